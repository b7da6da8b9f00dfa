"""Timing by rounds: all rivals once per round, in random order, ratios within a round.

A machine's speed drifts and its neighbours come and go; within one round they are
nearly the same for everyone. So a ratio is taken per round, and the median of many
rounds is reported with a bootstrap interval.
"""

import os
import platform
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import adamr
from examples.harness.report import commit

__all__ = [
    "Compiled",
    "basis_bytes",
    "compile_step",
    "machine",
    "nbytes",
    "ratio",
    "stepper",
    "time_rounds",
]


class Compiled(NamedTuple):
    """One optimizer step, `(params, state, input) -> (params, state)`, donated."""

    step: Callable
    trace_s: float
    compile_s: float


def nbytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def basis_bytes(state: Any) -> int:
    """Of the subspaces in a state."""

    def is_subspace(node):
        return isinstance(node, adamr.Subspace)

    nodes = jax.tree.leaves(state, is_leaf=is_subspace)
    return nbytes([node for node in nodes if is_subspace(node)])


def compile_step(
    tx: optax.GradientTransformation,
    params: Any,
    batch: Any = None,
    gradient: Callable[[Any, Any], Any] = lambda params, batch: batch,
) -> Compiled:
    """`update` and `apply_updates` in one program; params and state are donated.

    Args:
      tx: the optimizer.
      params: parameters, or their shapes.
      batch: input of the step, or its shapes; None: a gradient.
      gradient: (params, batch) -> gradient.
    """

    def step(params, state, batch):
        updates, state = tx.update(gradient(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    start = time.perf_counter()
    state = jax.eval_shape(tx.init, params)
    batch = params if batch is None else batch
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, batch)
    traced = time.perf_counter()
    compiled = lowered.compile()
    return Compiled(compiled, traced - start, time.perf_counter() - traced)


def stepper(
    step: Callable, params: Any, state: Any, steps: int = 1
) -> Callable[[Any], float]:
    """`gradient -> seconds` of a step, the mean over `steps` of them and one wait.

    Parameters and state live inside.
    """
    carry = jax.tree.map(lambda x: x.copy(), (params, state))

    def run(gradient):
        nonlocal carry
        start = time.perf_counter()
        for _ in range(steps):
            carry = step(*carry, gradient)
        jax.block_until_ready(carry)
        return (time.perf_counter() - start) / steps

    return run


def time_rounds(
    rivals: dict[str, Callable[[Any], float]],
    gradients: list[Any],
    *,
    rounds: int,
    seconds: float,
    seed: int,
    at_least: int = 11,
) -> dict[str, np.ndarray]:
    """Seconds per step of every rival, one entry per round.

    Args:
      rivals: name -> what `stepper` returned.
      gradients: trees of gradients; each round takes the next one.
      rounds: how many at most.
      seconds: budget, after which no further round starts.
      seed: of the order within each round.
      at_least: rounds that run however long they take.
    """
    for run in rivals.values():  # warm caches, first touch of donated buffers
        run(gradients[0])
        run(gradients[-1])
    order, times = np.random.default_rng(seed), {name: [] for name in rivals}
    end = time.perf_counter() + seconds
    for i in range(rounds):
        if i >= at_least and time.perf_counter() > end:
            break
        for name in order.permutation(list(rivals)):
            times[name].append(rivals[name](gradients[i % len(gradients)]))
    return {name: np.array(each) for name, each in times.items()}


def ratio(numerator: np.ndarray, denominator: np.ndarray, seed: int) -> dict[str, Any]:
    """Median of the ratios within rounds, with a bootstrap 95 % interval."""
    ratios = numerator / denominator
    draws = np.random.default_rng(seed).choice(ratios, size=(2000, ratios.size))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return {
        "median": float(np.median(ratios)),
        "low": float(low),
        "high": float(high),
        "pairs": ratios.size,
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _command() -> str:
    """As typed, except for the places of folders, which mean nothing elsewhere."""
    given = [Path(x).name if os.path.isabs(x) else x for x in sys.argv[1:]]
    return shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *given])


def machine() -> dict[str, Any]:
    """What a reader needs to judge the numbers."""
    load = os.getloadavg() if hasattr(os, "getloadavg") else None
    device = jax.devices()[0]
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "load_average": load,
        "device": f"{device.platform}: {device.device_kind}",
        "devices": jax.device_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "optax": optax.__version__,
        "commit": commit(),
        "command": _command(),
    }
