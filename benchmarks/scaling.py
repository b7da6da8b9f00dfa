"""How time and bytes of the update grow: with parameters, rank, leaves, tasks, devices.

    python -m benchmarks.scaling [--quick] [--sweeps parameters rank ...]

One thing grows at a time. A power law y = c xᵖ is fitted to what is measured, and p is
printed with its standard error. Sweeps that are not asked for keep their last results.
Devices that are simulated on a CPU share its cores: time over devices then shows what
splitting costs, not what it gains.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import adamr
from benchmarks._speed import models, timing
from benchmarks._speed.pictures import draw_scaling
from benchmarks.step_time import (
    LEARNING_RATE,
    block_params,
    gradients_like,
    optimizers_by_rank,
    random_bases,
)
from examples.harness import meshes
from examples.harness.report import write
from examples.pod import placement


@dataclasses.dataclass
class Config:
    """How time and bytes of the update grow."""

    parameters: tuple[int, ...] = (
        1_000_000, 3_000_000, 10_000_000, 30_000_000, 100_000_000
    )  # fmt: skip
    """Sizes of a transformer block, at rank 64."""
    rank: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512)
    """Protected directions per kernel, at `size` parameters."""
    leaves: tuple[int, ...] = (1, 4, 16, 64, 256)
    """Protected kernels of 128 x 128."""
    tasks: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Tasks that have protected 8 directions each in kernels of width 256."""
    devices: tuple[int, ...] = (1, 2, 4, 8)
    """Devices over which a stack of layers is split; counts beyond those there are left
    out."""
    sweeps: tuple[str, ...] = ("parameters", "rank", "leaves", "tasks", "devices")
    """What grows."""
    size: int = 10_000_000
    """Parameters of the sweep over ranks."""
    seconds: float = 2.0
    """Time per point, after which no further round starts (at least 5 are run)."""
    seed: int = 0
    quick: bool = False
    """Small sizes: does it run at all?"""
    out: Path = Path("benchmarks/results")


QUICK = {
    "parameters": (10_000, 100_000), "rank": (4, 8), "leaves": (1, 4), "tasks": (1, 2),
    "devices": (1, 2), "size": 100_000, "seconds": 0.1,
}  # fmt: skip


def power_law(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """p of y = c xᵖ by least squares on logarithms, with its standard error."""
    a, b = np.log(np.asarray(x, float)), np.log(np.asarray(y, float))
    a, b = a - a.mean(), b - b.mean()
    exponent = float(a @ b / (a @ a))
    left = b - exponent * a
    freedom = len(a) - 2
    error = float(np.sqrt(left @ left / freedom / (a @ a))) if freedom else float("nan")
    return {"exponent": exponent, "standard_error": error}


def measure(optimizers: dict, params: Any, config: Config) -> dict[str, dict]:
    """Time, compilation and bytes of an update, per optimizer."""
    rng = np.random.default_rng(config.seed)
    gradients = [gradients_like(params, rng) for _ in range(2)]
    made = {name: timing.compile_step(tx, params) for name, tx in optimizers.items()}
    states = {name: tx.init(params) for name, tx in optimizers.items()}
    runs = {n: timing.stepper(c.step, params, states[n]) for n, c in made.items()}
    times = timing.time_rounds(
        runs,
        gradients,
        rounds=300,
        seconds=config.seconds,
        seed=config.seed,
        at_least=5,
    )
    return {
        name: {
            "milliseconds": 1e3 * float(np.median(times[name])),
            "compile_s": each.trace_s + each.compile_s,
            "state_bytes": timing.nbytes(states[name]),
            "basis_bytes": timing.basis_bytes(states[name]),
        }
        for name, each in made.items()
    }


def _rivals(params: Any, rank: int, config: Config) -> dict[str, Any]:
    bases = random_bases(params, rank, np.random.default_rng(config.seed))
    made = optimizers_by_rank(params, bases, rank)
    rivals = {name: made[name] for name in ("alias", "adaptive")}
    return {"adam": optax.adam(LEARNING_RATE), **rivals}


def by_parameters(size: int, config: Config) -> dict[str, dict]:
    params, width = block_params(size, np.random.default_rng(config.seed))
    return measure(_rivals(params, min(64, width // 2), config), params, config)


def by_rank(rank: int, config: Config) -> dict[str, dict]:
    params, _ = block_params(config.size, np.random.default_rng(config.seed))
    return measure(_rivals(params, rank, config), params, config)


def by_leaves(number: int, config: Config) -> dict[str, dict]:
    params = {f"kernel{i}": jnp.ones((128, 128)) for i in range(number)}
    return measure(_rivals(params, 16, config), params, config)


def by_tasks(number: int, config: Config) -> dict[str, dict]:
    """The step after `number` tasks, and the boundary that follows it."""
    rng, width = np.random.default_rng(config.seed), 256
    params = {"first": jnp.ones((width, width)), "second": jnp.ones((width, width))}
    subspace = adamr.empty_subspace(params)

    def samples():
        rows = rng.normal(size=(64, 8)) @ rng.normal(size=(8, width))
        return dict.fromkeys(params, jnp.asarray(rows, jnp.float32))

    for _ in range(number):
        subspace = adamr.grow_subspace(subspace, samples(), threshold=0.999)
    tx = adamr.adamr(LEARNING_RATE, adamr.project_out(subspace))
    found = measure({"alias": tx}, params, config)
    more, times = samples(), []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(adamr.grow_subspace(subspace, more, threshold=0.999))
        times.append(time.perf_counter() - start)
    boundary = {"milliseconds": 1e3 * float(np.median(times))}
    return {**found, "boundary": boundary}


def by_devices(number: int, config: Config) -> dict[str, dict]:
    """A stack of layers split by `fsdp`; bytes are those of one device."""
    mesh = meshes.parse_mesh(f"fsdp={number}", jax.devices()[:number])
    shapes = models.shapes(models.Size(2, 256, 512, 64, vocabulary=1024))
    specs = placement.param_specs(shapes)
    where = placement.shardings(mesh, specs)
    params = jax.tree.map(
        lambda x, s: jax.device_put(jnp.ones(x.shape, x.dtype), s), shapes, where
    )
    subspace = models.empty(shapes, 64)
    optimizers = {
        "adam": optax.adam(LEARNING_RATE),
        "alias": adamr.adamr(LEARNING_RATE, adamr.project_out(subspace)),
    }
    runs, about = {}, {}
    for name, tx in optimizers.items():
        beside = adamr.state_shardings(tx, params)
        state = jax.jit(tx.init, out_shardings=beside)(params)

        def step(params, state, gradient, tx=tx):
            updates, state = tx.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        step = jax.jit(step, donate_argnums=(0, 1), out_shardings=(where, beside))
        runs[name] = timing.stepper(step, params, state)
        about[name] = {"state_bytes": meshes.bytes_per_device(state)}
    times = timing.time_rounds(
        runs,
        [params],
        rounds=300,
        seconds=config.seconds,
        seed=config.seed,
        at_least=5,
    )
    for name, each in about.items():
        each["milliseconds"] = 1e3 * float(np.median(times[name]))
    return about


SWEEPS: dict[str, Callable[[int, Config], dict[str, dict]]] = {
    "parameters": by_parameters,
    "rank": by_rank,
    "leaves": by_leaves,
    "tasks": by_tasks,
    "devices": by_devices,
}


def sweep(name: str, config: Config) -> dict[str, Any]:
    """What was measured at every x, and the exponents of all of it."""
    xs = list(getattr(config, name))
    if name == "devices":
        xs = [x for x in xs if x <= jax.device_count()]
    print(name)
    points = [SWEEPS[name](x, config) for x in xs]
    fits = {}
    for rival in points[0]:
        for quantity in points[0][rival]:
            ys = [point[rival][quantity] for point in points]
            if len(xs) > 1 and min(ys) > 0:
                fit = fits[f"{rival} {quantity}"] = power_law(xs, ys)
                print(
                    f"  {rival:9} {quantity:13} {ys[0]:12.4g} … {ys[-1]:12.4g}   "
                    f"p = {fit['exponent']:6.3f} ± {fit['standard_error']:.3f}"
                )
    return {"machine": timing.machine(), "x": xs, "points": points, "fits": fits}


def main(config: Config) -> None:
    if config.quick:
        config = dataclasses.replace(config, **QUICK)
    config.out.mkdir(parents=True, exist_ok=True)
    path = config.out / "scaling.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name in config.sweeps:
        if name not in SWEEPS:
            raise SystemExit(f"--sweeps: got {name!r}, expected some of {[*SWEEPS]}.")
        results[name] = sweep(name, config)
        write(path, results)
    draw_scaling(results, config.out / "scaling.png")


if __name__ == "__main__":
    if jax.config.jax_platforms in (None, "", "cpu"):
        jax.config.update("jax_num_cpu_devices", 8)
    main(tyro.cli(Config))
