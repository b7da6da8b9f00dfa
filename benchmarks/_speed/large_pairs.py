"""Low-rank pairs beside the kernels of Llama-2-7B on one device, and their boundary.

Names are Flax's. The inputs of query, key and value are one array, as are those of gate
and up. All numbers are random: what is measured is time.
"""

import time
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
MET = {
    "query": "before", "key": "before", "value": "before", "out": "after",
    "gate": "within", "up": "within", "down": "inside",
}  # fmt: skip


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


def _is_pair(node: Any) -> bool:
    return "lora_a" in node


def _per_pair(function: Any, tree: Any) -> Any:
    return jax.tree.map(function, tree, is_leaf=_is_pair)


def protected(tree: Any, rank: int, seed: int) -> adamr.Subspace:
    """Random directions for every A, the same for all of one fan-in."""
    bases = {}

    def basis(pair):
        n = len(pair["lora_a"])
        if n not in bases:
            drawn = jax.random.normal(jax.random.key(seed), (n, min(rank, n)))
            bases[n] = jnp.linalg.qr(drawn).Q
        return {"lora_a": bases[n], "lora_b": None}

    return adamr.make_subspace(tree, _per_pair(basis, tree), max_rank=rank)


def boundary(layers: int, sizes: tuple[int, int, int], rank: int, rows: int, seed: int):
    """Seconds of `lora.start_task` under jit, for so many layers with nothing known.

    Args:
      layers: of the model.
      sizes: as `layer_shapes` takes them.
      rank: room per A.
      rows: inputs of a task that each kernel meets.
      seed: of the inputs.
    """
    tree, shapes = pairs(layers, sizes, seed), layer_shapes(*sizes)
    base = {
        layer: {
            name: {"kernel": jnp.zeros(shape, jnp.bfloat16)}
            for name, shape in shapes.items()
        }
        for layer in tree
    }
    axes = _per_pair(lambda pair: {"lora_a": adamr.Axes((0,)), "lora_b": None}, tree)
    empty = adamr.empty_subspace(tree, axes=axes, max_rank=rank)
    opt_state = adamr.adamr(1e-3, adamr.project_out(empty)).init(tree)
    rng = np.random.default_rng(seed)

    def drawn(n):
        falling = np.exp(-np.arange(n) / 40, dtype=np.float32)
        return jnp.asarray(rng.standard_normal((rows, n), np.float32) * falling)

    fan_in = {MET[name]: shape[0] for name, shape in shapes.items()}
    met = {layer: {site: drawn(n) for site, n in fan_in.items()} for layer in tree}

    @jax.jit
    def program(base, tree, opt_state, met, key):
        inputs = {
            layer: {
                name: {"lora_a": met[layer][MET[name]], "lora_b": None}
                for name in shapes
            }
            for layer in tree
        }
        return lora.start_task(base, tree, opt_state, inputs, key, threshold=0.9)

    start = time.perf_counter()
    arguments = base, tree, opt_state, met, jax.random.key(seed)
    compiled = program.lower(*arguments).compile()
    compiling = time.perf_counter() - start
    jax.block_until_ready(compiled(*arguments))
    start = time.perf_counter()
    jax.block_until_ready(compiled(*arguments))
    memory = compiled.memory_analysis()
    return {
        "layers": layers,
        "compile_s": compiling,
        "seconds_per_layer": (time.perf_counter() - start) / layers,
        "temporary_bytes": memory.temp_size_in_bytes if memory else None,
    }
