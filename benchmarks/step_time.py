"""Time of one optimizer step against Optax, by size and by rank.

    python -m benchmarks.step_time [--quick] [--sizes 100000 ...] [--ranks 8 ...]

A step is `update` and `apply_updates`, jitted, parameters and state donated, on the
parameters of a transformer block. Per size, against `optax.adam`:

    elementwise   an element-wise modifier in the first moment only      target <= 1.10
    shared        v shared along fan-in, no modifier                     target <= 0.85

and per size and rank, against `optax.chain(project_out(s), optax.adam(lr))`:

    by_hand       g − U (Uᵀg) as a user would write it, then optax.adam
    alias         `adamr(lr, project_out(s))`                            target <= 1.05
    adaptive      the alias with `overlap_adaptive_scale`                target <= 1.10
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import adamr
from benchmarks._speed import timing
from benchmarks._speed.pictures import draw_step_time

LEARNING_RATE = 1e-3

# comparison -> (numerator, denominator, target)
BY_SIZE = {
    "elementwise / adam": ("elementwise", "adam", 1.10),
    "shared / adam": ("shared", "adam", 0.85),
}
BY_RANK = {
    "alias / chain": ("alias", "chain", 1.05),
    "adaptive / chain": ("adaptive", "chain", 1.10),
    "adaptive / alias": ("adaptive", "alias", 1.10),
    "alias / by_hand": ("alias", "by_hand", None),
}
STATE_TARGET = 0.51  # shared / adam


@dataclasses.dataclass
class Config:
    """Time of one optimizer step against Optax."""

    sizes: tuple[int, ...] = (100_000, 1_000_000, 10_000_000, 30_000_000)
    """Numbers of parameters, met to the nearest multiple of 16 in the width."""
    ranks: tuple[int, ...] = (8, 32, 64, 256)
    """Protected directions per kernel; ranks not below the width are left out."""
    pairs: int = 300
    """Rounds per group, at most."""
    seconds: float = 20.0
    """Time per group, after which no further round starts (at least 11 are run)."""
    seed: int = 0
    quick: bool = False
    """Two small sizes, two ranks, few pairs: does it run at all?"""
    out: Path = Path("benchmarks/results")


def block_params(size: int, rng: np.random.Generator) -> tuple[Any, int]:
    """A transformer block of about `size` parameters, and its width."""
    width = max(16, 16 * round(math.sqrt(size / 12) / 16))

    def dense(fan_in, out):
        scale = np.float32(1 / math.sqrt(fan_in))
        kernel = scale * rng.standard_normal((fan_in, out), np.float32)
        return {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(out)}

    block = {
        **{name: dense(width, width) for name in ("query", "key", "value", "out")},
        "up": dense(width, 4 * width),
        "down": dense(4 * width, width),
        "norm": {"scale": jnp.ones(width), "bias": jnp.zeros(width)},
    }
    return block, width


def gradients_like(params: Any, rng: np.random.Generator) -> Any:
    def leaf(x):
        return jnp.asarray(1e-2 * rng.standard_normal(x.shape, np.float32), x.dtype)

    return jax.tree.map(leaf, params)


def random_bases(params: Any, rank: int, rng: np.random.Generator) -> Any:
    """Orthonormal (fan-in, rank) per kernel, None elsewhere."""

    def leaf(x):
        if x.ndim < 2:
            return None
        return np.linalg.qr(rng.standard_normal((x.shape[0], rank)))[0]

    return jax.tree.map(leaf, params)


def project_by_hand(bases: Any) -> optax.GradientTransformation:
    """g − U (Uᵀ g), without weights, padding or a precision asked for."""

    def init_fn(params):
        del params
        return jax.tree.map(jnp.asarray, bases)

    def update_fn(updates, state, params=None):
        del params

        def leaf(u, g):
            return g if u is None else g - u @ (u.T @ g)

        return jax.tree.map(leaf, state, updates, is_leaf=lambda u: u is None), state

    return optax.GradientTransformation(init_fn, update_fn)


def optimizers_by_size() -> dict[str, optax.GradientTransformation]:
    def routed(modifier, **kwargs):
        return optax.chain(
            adamr.route_first_moment(modifier),
            adamr.faithful_second_moment(**kwargs),
            optax.scale_by_learning_rate(LEARNING_RATE),
        )

    return {
        "adam": optax.adam(LEARNING_RATE),
        "elementwise": routed(optax.scale(0.5)),
        "shared": routed(optax.identity(), share="fan_in"),
    }


def optimizers_by_rank(params: Any, bases: Any, rank: int) -> dict[str, Any]:
    project = adamr.project_out(adamr.make_subspace(params, bases, max_rank=rank))
    by_hand = project_by_hand(jax.tree.map(np.float32, bases))
    adaptive = adamr.overlap_adaptive_scale()
    return {
        "chain": optax.chain(project, optax.adam(LEARNING_RATE)),
        "by_hand": optax.chain(by_hand, optax.adam(LEARNING_RATE)),
        "alias": adamr.adamr(LEARNING_RATE, project),
        "adaptive": adamr.adamr(LEARNING_RATE, project, strength=adaptive),
    }


def measure(
    optimizers: dict[str, Any],
    comparisons: dict[str, tuple[str, str, float | None]],
    params: Any,
    gradients: list[Any],
    config: Config,
) -> dict[str, Any]:
    """Times, ratios, compile times and state bytes of one group of rivals."""
    compiled = {n: timing.compile_step(tx, params) for n, tx in optimizers.items()}
    states = {n: tx.init(params) for n, tx in optimizers.items()}
    runs = {n: timing.stepper(c.step, params, states[n]) for n, c in compiled.items()}
    times = timing.time_rounds(
        runs, gradients, rounds=config.pairs, seconds=config.seconds, seed=config.seed
    )
    rivals = {
        name: {
            "milliseconds": 1e3 * float(np.median(times[name])),
            "trace_s": each.trace_s,
            "compile_s": each.compile_s,
            "state_bytes": timing.nbytes(states[name]),
        }
        for name, each in compiled.items()
    }
    ratios = {
        label: {**timing.ratio(times[a], times[b], config.seed), "target": target}
        for label, (a, b, target) in comparisons.items()
    }
    for label, found in ratios.items():
        target = f"target {found['target']:.2f}" if found["target"] else ""
        low, high = found["low"], found["high"]
        print(f"    {label:20} {found['median']:.3f} [{low:.3f}, {high:.3f}] {target}")
    return {"rivals": rivals, "ratios": ratios}


def run(config: Config) -> dict[str, Any]:
    groups = []
    for size in config.sizes:
        rng = np.random.default_rng(config.seed)
        params, width = block_params(size, rng)
        gradients = [gradients_like(params, rng) for _ in range(2)]
        count = sum(x.size for x in jax.tree.leaves(params))
        print(f"{count} parameters, width {width}")
        same = {"parameters": count, "width": width}
        found = measure(optimizers_by_size(), BY_SIZE, params, gradients, config)
        groups.append({**same, "rank": None, **found})
        state = {n: r["state_bytes"] for n, r in found["rivals"].items()}
        print(f"    shared / adam, state {state['shared'] / state['adam']:.3f}")
        for rank in (r for r in config.ranks if r < width):
            print(f"  rank {rank}")
            bases = random_bases(params, rank, rng)
            optimizers = optimizers_by_rank(params, bases, rank)
            found = measure(optimizers, BY_RANK, params, gradients, config)
            groups.append({**same, "rank": rank, **found})
    return {
        "machine": timing.machine(),
        "config": {**dataclasses.asdict(config), "out": config.out.as_posix()},
        "groups": groups,
    }


def main(config: Config) -> None:
    if config.quick:
        config = dataclasses.replace(
            config, sizes=(100_000, 1_000_000), ranks=(8, 32), pairs=40, seconds=3.0
        )
    results = run(config)
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "step_time.json").write_text(json.dumps(results, indent=1) + "\n")
    draw_step_time(results, config.out / "step_time.png")


if __name__ == "__main__":
    main(tyro.cli(Config))
