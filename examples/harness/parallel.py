"""Several runs side by side: by `jax.vmap` in one program, or one per core."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["by_cores", "over_runs"]


def over_runs(function: Callable) -> Callable:
    """`jax.vmap`; a single run keeps the faster unbatched program."""

    def call(*args):
        if len(jax.tree.leaves(args[0])[0]) > 1:
            return jax.vmap(function)(*args)
        one = function(*jax.tree.map(lambda x: x[0], args))
        return jax.tree.map(lambda x: x[None], one)

    return call


def _cores() -> int | None:
    """Those this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def by_cores(function: Callable, *runs: Any) -> Any:
    """`function(*runs)`; on a CPU run by run, as many at a time as there are cores.

    A CPU gains nothing from batched products and loses much with batched convolutions,
    and one run's arrays fit its cache. Each run ends with the same bits, whichever
    runs are next to it.
    """
    count = len(jax.tree.leaves(runs)[0])
    if count == 1 or jax.default_backend() != "cpu":
        return function(*runs)
    parts = [jax.tree.map(lambda x, i=i: x[i : i + 1], runs) for i in range(count)]
    with ThreadPoolExecutor(_cores()) as pool:
        done = list(pool.map(lambda x: jax.block_until_ready(function(*x)), parts))
    return jax.tree.map(lambda *x: jnp.concatenate(x), *done)
