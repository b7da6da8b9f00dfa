"""A task boundary at the shapes of a language model: time, and memory.

    python -m benchmarks.boundary [--layers 30] [--rows 512] [--no-large]

From the captured inputs of a decoder-only model to grown bases. Query, key and value
share their inputs, and so do gate and up, so each layer has four distinct sets of rows.

    outside jit   `grow_subspace` in float64 on the host                target <= 30 s
    under jit     the same in float32, compiling included               target <= 30 s

at SmolLM2-135M's shapes (30 layers, width 576, 1536 inside), and compiled only, nothing
being allocated, for each leaf of one layer of an 8B model in turn (width 4096, 14336
inside, at most `rows` directions): reading its rows and growing its basis. The peak
beyond parameters and inputs is what the compiled program allocates for itself and its
results, target <= 2 GB.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import adamr
from benchmarks._speed import timing
from examples.harness.report import write

WIDTH, KEYS, INSIDE = 576, 192, 1536
LARGE_WIDTH, LARGE_KEYS, LARGE_INSIDE = 4096, 1024, 14336


@dataclasses.dataclass
class Config:
    """A task boundary at the shapes of a language model."""

    layers: int = 30
    """Of the small model."""
    rows: int = 512
    """Of layer inputs; of the large model, also the room for directions per leaf."""
    large: bool = True
    """Also compile the boundary of one layer of an 8B model."""
    seed: int = 0
    out: Path = Path("benchmarks/results/boundary.json")


def layer_shapes(width: int, keys: int, inside: int) -> dict[str, tuple[int, int]]:
    attention = {"query": (width, width), "key": (width, keys), "value": (width, keys)}
    dense = {"gate": (width, inside), "up": (width, inside), "down": (inside, width)}
    return {**attention, "out": (width, width), **dense}


def shapes_of(layers: int, *sizes: int) -> Any:
    return {
        f"layer_{i:02}": {
            name: jax.ShapeDtypeStruct(shape, jnp.float32)
            for name, shape in layer_shapes(*sizes).items()
        }
        for i in range(layers)
    }


def captured(config: Config) -> Any:
    """Rows with a spectrum that falls as a network's does."""
    rng = np.random.default_rng(config.seed)

    def rows(n: int) -> jax.Array:
        falling = np.exp(-np.arange(n) / 40)
        mixed = rng.standard_normal((config.rows, n)) * falling
        return jnp.asarray(mixed @ rng.standard_normal((n, n)) / n**0.5, jnp.float32)

    def layer() -> dict[str, jax.Array]:
        before, after, mlp = rows(WIDTH), rows(WIDTH), rows(WIDTH)
        attention = dict.fromkeys(("query", "key", "value"), before)
        return {
            **attention,
            "out": after,
            "gate": mlp,
            "up": mlp,
            "down": rows(INSIDE),
        }

    return {f"layer_{i:02}": layer() for i in range(config.layers)}


def seconds(function: Any, *arguments: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


def small(config: Config) -> dict[str, Any]:
    subspace = adamr.empty_subspace(shapes_of(config.layers, WIDTH, KEYS, INSIDE))
    inputs = jax.block_until_ready(captured(config))
    first = seconds(adamr.grow_subspace, subspace, inputs)
    again = seconds(adamr.grow_subspace, subspace, inputs)
    # Inside jit arrays that are one must be one argument: the tree is rebuilt there.
    leaves, treedef = jax.tree.flatten(inputs)
    distinct = list({id(x): x for x in leaves}.values())
    index = [next(i for i, y in enumerate(distinct) if y is x) for x in leaves]

    @jax.jit
    def grow(subspace, distinct):
        tree = jax.tree.unflatten(treedef, [distinct[i] for i in index])
        return adamr.grow_subspace(subspace, tree)

    start = time.perf_counter()
    compiled = grow.lower(subspace, distinct).compile()
    compiling = time.perf_counter() - start
    return {
        "leaves": len(leaves),
        "distinct": len(distinct),
        "outside_jit_first_s": first,
        "outside_jit_s": again,
        "jit_compile_s": compiling,
        "jit_s": seconds(compiled, subspace, distinct),
    }


def forward(params: Any, x: jax.Array) -> jax.Array:
    """One decoder layer without norms: what its kernels meet is what matters."""
    query, key, value = (x @ params[name] for name in ("query", "key", "value"))
    heads = query.shape[-1] // key.shape[-1]
    key, value = (jnp.tile(y, heads) for y in (key, value))
    weights = jax.nn.softmax(jnp.einsum("btd,bsd->bts", query, key), axis=-1)
    x = x + jnp.einsum("bts,bsd->btd", weights, value) @ params["out"]
    inside = jax.nn.silu(x @ params["gate"]) * (x @ params["up"])
    return x + inside @ params["down"]


def large(config: Config) -> dict[str, Any]:
    """Bytes that the boundary of each leaf needs beyond parameters and inputs."""
    sizes = LARGE_WIDTH, LARGE_KEYS, LARGE_INSIDE
    params = shapes_of(1, *sizes)["layer_00"]
    x = jax.ShapeDtypeStruct((1, config.rows, LARGE_WIDTH), jnp.float32)
    peaks = {}
    for name in params:
        subspace = jax.eval_shape(
            lambda p, name=name: adamr.empty_subspace(
                p,
                axes={n: adamr.Axes((0,)) if n == name else None for n in p},
                max_rank=config.rows,
            ),
            params,
        )

        @jax.jit
        def boundary(params, x, subspace, name=name):
            inputs = adamr.layer_inputs(
                forward, params, x, kind="rows", leaves=lambda leaf: leaf == name
            )
            return adamr.grow_subspace(subspace, inputs)

        memory = boundary.lower(params, x, subspace).compile().memory_analysis()
        peaks[name] = memory.temp_size_in_bytes + memory.output_size_in_bytes
    return {"peak_bytes": peaks}


def main(config: Config) -> dict[str, Any]:
    found: dict[str, Any] = {"machine": timing.machine(), "small": small(config)}
    for name, value in found["small"].items():
        print(f"{name:22} {value:.4g}")
    if config.large:
        found["large"] = large(config)
        for name, peak in found["large"]["peak_bytes"].items():
            print(f"8B {name:19} {peak / 1e9:.2f} GB")
    config.out.parent.mkdir(parents=True, exist_ok=True)
    write(config.out, found)
    return found


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
