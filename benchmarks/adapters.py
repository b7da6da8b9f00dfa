"""Time of one optimizer step on a language model's adapters against Optax.

    python -m benchmarks.adapters [--layers 30] [--ranks 16 64 256 1536]

A step is `update` and `apply_updates`, jitted, parameters and state donated, on the 420
leaves of LoRA of rank 8 at SmolLM2-135M's shapes: 30 layers of seven pairs, A of shape
(fan-in, 8) and B of shape (8, fan-out). The subspace protects the fan-in of every A,
`rank` directions each (at most the fan-in), all of them in use. Against `optax.adam`:

    chain    `chain(project_out(s), adam)`
    alias    `adamr(lr, project_out(s))`                              target <= 2.50

The bases of rank 256 are 153 MB, which each of the two products of a projection reads;
those of 1536, the whole fan-in, 522 MB.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import adamr
from benchmarks import boundary, step_time
from benchmarks._speed import timing

RATIOS = {
    "chain / adam": ("chain", "adam", None),
    "alias / adam": ("alias", "adam", 2.5),
}


@dataclasses.dataclass
class Config:
    """Time of one optimizer step on adapters."""

    layers: int = 30
    adapter_rank: int = 8
    """Of every pair."""
    ranks: tuple[int, ...] = (16, 64, 256, 1536)
    """Protected directions per A, at most its fan-in."""
    pairs: int = 300
    """Rounds per rank, at most."""
    seconds: float = 30.0
    """Time per rank, after which no further round starts (at least 11 are run)."""
    seed: int = 0
    out: Path = Path("benchmarks/results/adapters.json")


def adapters(config: Config, rng: np.random.Generator) -> Any:
    """A pair {"a", "b"} beside each kernel of SmolLM2-135M."""
    sizes = boundary.WIDTH, boundary.KEYS, boundary.INSIDE

    def pair(kernel):
        fan_in, fan_out = kernel.shape
        a = rng.standard_normal((fan_in, config.adapter_rank), np.float32)
        b = jnp.zeros((config.adapter_rank, fan_out))
        return {"a": jnp.asarray(a / fan_in**0.5), "b": b}

    return jax.tree.map(pair, boundary.shapes_of(config.layers, *sizes))


def protected(params: Any, rank: int, rng: np.random.Generator) -> adamr.Subspace:
    """Random directions for every A; those of equal fan-in have the same."""
    fan_ins = {leaf.shape[0] for leaf in jax.tree.leaves(params)}
    bases = {
        n: np.linalg.qr(rng.standard_normal((n, min(rank, n))))[0]
        for n in sorted(fan_ins)
    }
    tree = jax.tree.map_with_path(
        lambda path, x: bases[x.shape[0]] if path[-1].key == "a" else None, params
    )
    return adamr.make_subspace(params, tree, max_rank=rank)


def run(config: Config) -> dict[str, Any]:
    rng = np.random.default_rng(config.seed)
    params = adapters(config, rng)
    gradients = [step_time.gradients_like(params, rng) for _ in range(2)]
    timed = step_time.Config(
        pairs=config.pairs, seconds=config.seconds, seed=config.seed
    )
    groups, rate = [], step_time.LEARNING_RATE
    for rank in config.ranks:
        print(f"rank {rank}")
        project = adamr.project_out(protected(params, rank, rng))
        optimizers = {
            "adam": optax.adam(rate),
            "chain": optax.chain(project, optax.adam(rate)),
            "alias": adamr.adamr(rate, project),
        }
        found = step_time.measure(optimizers, RATIOS, params, gradients, timed)
        groups.append({"rank": rank, **found})
    return {
        "machine": timing.machine(),
        "config": {**dataclasses.asdict(config), "out": config.out.as_posix()},
        "leaves": len(jax.tree.leaves(params)),
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "groups": groups,
    }


def main(config: Config) -> dict[str, Any]:
    results = run(config)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(json.dumps(results, indent=1) + "\n")
    return results


if __name__ == "__main__":
    main(tyro.cli(Config))
