"""What the device can do at most: copy, and multiply matrices."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._speed.timing import stepper


def seconds_per_call(function: Callable, *arguments: Any, calls: int) -> float:
    """The median over eleven rounds of `calls` calls and one wait."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(11):
        start = time.perf_counter()
        for _ in range(calls):
            out = function(*arguments)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / calls)
    return float(np.median(times))


def measure_limits(copied: int, n: int, calls: int) -> dict[str, float]:
    """Bytes per second of a copy, operations per second of products of matrices.

    Args:
      copied: numbers that are copied.
      n: the matrices are (n, n).
      calls: between two waits for the device.
    """
    # In place, as an update works: a fresh result would also cost its first touch.
    x = jnp.ones(copied, jnp.float32)
    copy = jax.jit(lambda x, none, by: (x + by, none), donate_argnums=0)
    run = stepper(copy, x, (), calls)
    seconds = np.median([run(1.0) for _ in range(12)][1:])
    found = {"copy_bytes_per_s": float(2 * x.nbytes / seconds)}
    for name, dtype, precision in (
        ("float32_highest", jnp.float32, jax.lax.Precision.HIGHEST),
        ("bfloat16", jnp.bfloat16, None),
    ):
        a = jnp.ones((n, n), dtype)
        product = jax.jit(lambda a, b, p=precision: jnp.matmul(a, b, precision=p))
        seconds = seconds_per_call(product, a, a, calls=calls)
        found[f"matmul_{name}_flop_per_s"] = 2 * n**3 / seconds
    return found
