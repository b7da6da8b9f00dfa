"""Low-rank pairs beside the kernels of Llama-2-7B on one device, and their boundary.

The layers have Llama's kernels without its attention, which meets no parameter. All
numbers are random: what is measured is time.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import adamr
from adamr import lora
from benchmarks.boundary import layer_shapes

__all__ = ["SIZES", "boundary", "pairs", "protected"]

SIZES = 4096, 4096, 11008  # width, keys and values together, inside
COLUMNS = 8  # of a pair


def pairs(layers: int, sizes: tuple[int, int, int], seed: int) -> Any:
    """{"layer_00": {"query": {"lora_a", "lora_b"}, …}, …}, float32; every B is zero."""
    rng = np.random.default_rng(seed)

    def pair(fan_in, fan_out):
        a = rng.standard_normal((fan_in, COLUMNS), np.float32) / fan_in**0.5
        return {"lora_a": jnp.asarray(a), "lora_b": jnp.zeros((COLUMNS, fan_out))}

    return {
        f"layer_{i:02}": {
            name: pair(*shape) for name, shape in layer_shapes(*sizes).items()
        }
        for i in range(layers)
    }


def protected(tree: Any, rank: int, seed: int) -> adamr.Subspace:
    """Random directions for every A, the same for all of one fan-in."""
    bases = {}

    def basis(pair):
        n = len(pair["lora_a"])
        if n not in bases:
            drawn = jax.random.normal(jax.random.key(seed), (n, min(rank, n)))
            bases[n] = jnp.linalg.qr(drawn).Q
        return {"lora_a": bases[n], "lora_b": None}

    tree_of = jax.tree.map(basis, tree, is_leaf=lambda node: "lora_a" in node)
    return adamr.make_subspace(tree, tree_of, max_rank=rank)


def _forward(tree: Any, base: Any, x: jax.Array) -> jax.Array:
    def layer(x, tree, base):
        def dense(name, x):
            a, b = tree[name]["lora_a"], tree[name]["lora_b"]
            return x @ base[name]["kernel"] + x.astype(a.dtype) @ a @ b

        def short(x):  # no layer's inputs grow
            return x / jnp.sqrt(jnp.mean(jnp.square(x), -1, keepdims=True))

        x = short(x)
        query, key, value = (dense(name, x) for name in ("query", "key", "value"))
        repeats = query.shape[-1] // key.shape[-1]
        met = query + jnp.tile(key * value, repeats)
        x = short(x + dense("out", short(met)))
        inside = jax.nn.silu(dense("gate", x)) * dense("up", x)
        return x + dense("down", inside)

    for name in tree:
        x = layer(x, tree[name], base[name])
    return x


def _seconds(program: Callable, *arguments: Any) -> tuple[Any, dict[str, float]]:
    start = time.perf_counter()
    compiled = jax.jit(program).lower(*arguments).compile()
    compiling = time.perf_counter() - start
    jax.block_until_ready(compiled(*arguments))
    start = time.perf_counter()
    found = jax.block_until_ready(compiled(*arguments))
    return found, {
        "compile_s": compiling,
        "seconds": time.perf_counter() - start,
    }


def boundary(
    layers: int, sizes: tuple[int, int, int], rank: int, rows: int, seed: int
) -> dict[str, Any]:
    """Seconds under jit of what ends a task and starts the next, for so many layers.

    Args:
      layers: of the model.
      sizes: as `layer_shapes` takes them.
      rank: room per A.
      rows: of the finished task, and of the next one.
      seed: of all numbers.

    Returns:
      The compiling and running time of `layer_inputs`, `start_task` and `inflora`.
    """
    tree = pairs(layers, sizes, seed)
    keys = iter(jax.random.split(jax.random.key(seed), 2 + 7 * layers))

    def kernel(pair):
        shape = len(pair["lora_a"]), pair["lora_b"].shape[1]
        drawn = jax.random.normal(next(keys), shape, jnp.bfloat16)
        return {"kernel": drawn / shape[0] ** 0.5}

    base = jax.tree.map(kernel, tree, is_leaf=lambda node: "lora_a" in node)
    old, new = (
        jax.random.normal(next(keys), (rows, sizes[0]), jnp.bfloat16) for _ in range(2)
    )
    subspace = adamr.empty_subspace(
        tree, axes=lora.axes(_forward, tree, base, old), max_rank=rank
    )
    opt_state = adamr.gpm(1e-3, subspace).init(tree)

    def capture(tree, base, x):
        return adamr.layer_inputs(
            _forward, tree, base, x, normalize=True, leaves=subspace, max_fan_in=None
        )

    def end(tree, base, opt_state, inputs):
        key = jax.random.key(seed)
        return lora.start_task(base, tree, opt_state, inputs, key, threshold=0.9)

    inputs, captured = _seconds(capture, tree, base, old)
    (base, tree, opt_state), ended = _seconds(end, tree, base, opt_state, inputs)
    inputs = jax.jit(capture)(tree, base, new)
    _, chosen = _seconds(lora.inflora, tree, opt_state, inputs)
    return {
        "layers": layers,
        "rows": rows,
        "layer_inputs": captured,
        "start_task": ended,
        "inflora": chosen,
    }
