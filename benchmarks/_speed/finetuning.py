"""Memory of fine-tuning Llama 2, from shapes: by method, and at a task boundary."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import adamr
from benchmarks._pages.tables import table
from benchmarks._speed import timing
from benchmarks._speed.models import count
from benchmarks._speed.timing import nbytes

__all__ = ["LLAMA2", "VOCABULARY", "boundary", "finetuning"]

GB = 1e9
RATE, RANK, KEEP = 1e-3, 8, 0.5
CAPACITIES = (256, 1024, None)  # most directions per kernel; None: the fan-in


class Size(NamedTuple):
    """Attributes:
    layers: stacked: their kernels have a leading axis of this size.
    width: of the residual stream, and of queries and what attention gives.
    hidden: of the gated perceptron.
    keys: features of the keys, and of the values.
    """

    layers: int
    width: int
    hidden: int
    keys: int

    def kernels(self) -> dict[str, tuple[int, int]]:
        """Fan-in and outputs of the kernels of a layer."""
        width, hidden = self.width, self.hidden
        return {
            "q": (width, width),
            "k": (width, self.keys),
            "v": (width, self.keys),
            "o": (width, width),
            "gate": (width, hidden),
            "up": (width, hidden),
            "down": (hidden, width),
        }


LLAMA2 = {
    "Llama-2-7B": Size(32, 4096, 11_008, 4096),
    "Llama-2-70B": Size(80, 8192, 28_672, 1024),
}
VOCABULARY = 32_000
SHARED = {"k": "q", "v": "q", "up": "gate"}  # kernels that read what another one reads


def _model(size: Size, dtype: Any) -> dict[str, Any]:
    def array(*shape):
        return jax.ShapeDtypeStruct(shape, dtype)

    n, width = size.layers, size.width
    return {
        **{name: array(n, *shape) for name, shape in size.kernels().items()},
        "embedding": array(VOCABULARY, width),
        "head": array(width, VOCABULARY),
        "norms": array(2 * n + 1, width),
    }


def _pairs(size: Size) -> dict[str, Any]:
    """Of all kernels in the layers; float32."""
    found = {}
    for name, (fan_in, outputs) in size.kernels().items():
        for half, shape in (("a", (fan_in, RANK)), ("b", (RANK, outputs))):
            found[f"{name}_lora_{half}"] = jax.ShapeDtypeStruct(
                (size.layers, *shape), jnp.float32
            )
    return found


def _axes(name: str, shape: tuple[int, ...]) -> adamr.Axes | None:
    """The fan-in of an A, and of a kernel in the layers."""
    free = name in ("embedding", "head", "norms") or name.endswith("_lora_b")
    return None if free else adamr.Axes((len(shape) - 2,), (0,))


def _protected(params: Any, capacity: int | None) -> optax.GradientTransformation:
    subspace = adamr.empty_subspace(
        params, axes=_axes, max_rank=capacity, max_fan_in=None
    )
    return adamr.gpm(RATE, subspace)


def _osft(params: Any, share_v: bool) -> optax.GradientTransformation:
    sides = adamr.weight_subspaces(params, _axes, keep=KEEP)
    return adamr.osft(RATE, *sides, share_v=share_v)


def _methods(size: Size):
    """Name, frozen base, what is trained, its optimizer."""
    base, pairs = _model(size, jnp.bfloat16), _pairs(size)
    whole = _model(size, jnp.float32)
    yield f"LoRA, rank {RANK}, `optax.adam`", base, pairs, lambda p: optax.adam(RATE)
    for capacity in CAPACITIES:
        label = "the fan-in" if capacity is None else capacity
        yield (
            f"pairs in the complement, capacity {label}", base, pairs,
            lambda p, capacity=capacity: _protected(p, capacity),
        )  # fmt: skip
    yield "all parameters, `optax.adam`", {}, whole, lambda p: optax.adam(RATE)
    yield "`gpm`, capacity 1024", {}, whole, lambda p: _protected(p, 1024)
    for share_v, label in ((False, ""), (True, ", `share_v=True`")):
        yield (
            f"`osft`, keep {KEEP:g}{label}", {}, whole,
            functools.partial(_osft, share_v=share_v),
        )  # fmt: skip


def finetuning() -> str:
    """All devices together; what is trained is float32, a frozen base bfloat16."""
    rows = []
    for name, size in LLAMA2.items():
        for label, base, trained, build in _methods(size):
            state = jax.eval_shape(lambda p, build=build: build(p).init(p), trained)
            bases = timing.basis_bytes(state)
            numbers = [nbytes(base), nbytes(trained), nbytes(state) - bases, bases]
            numbers.append(sum(numbers))
            rows.append([f"{name}, {label}", *(f"{x / GB:.2f}" for x in numbers)])
    heads = ["", "frozen base", "trained", "moments", "bases", "all, GB"]
    return table(heads, rows)


def _grams(size: Size) -> list[int]:
    """Bytes of a layer's Gram matrices, as `layer_inputs` shares them."""
    pairs = {
        name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
        for name, x in _pairs(size).items()
        if name.endswith("_lora_a")
    }
    rows = {
        name: jax.ShapeDtypeStruct((1, shape[0]), jnp.float32)
        for name, shape in size.kernels().items()
        if name not in SHARED
    }

    def forward(pairs, rows):
        def read(name):
            kernel = name.removesuffix("_lora_a")
            return rows[SHARED.get(kernel, kernel)] @ pairs[name]

        return [read(name) for name in pairs]

    met = jax.eval_shape(
        lambda p, x: adamr.layer_inputs(forward, p, x, max_fan_in=None), pairs, rows
    )
    return [x.size * x.dtype.itemsize for x in jax.tree.leaves(met) if x.ndim > 1]


def boundary() -> str:
    """What a boundary of protected pairs takes besides, all devices together."""
    rows = []
    for name, size in LLAMA2.items():
        layer = _grams(size)
        pairs = _pairs(size)
        state = jax.eval_shape(lambda p: _protected(p, 1024).init(p), pairs)
        new = nbytes(_model(size, jnp.bfloat16)) + nbytes(pairs) + nbytes(state)
        numbers = [size.layers * sum(layer), sum(layer), max(layer), new]
        rows.append(
            [
                f"{name}, {count(_model(size, jnp.bfloat16)) / 1e9:.2f}e9 parameters",
                *(f"{x / GB:.2f}" for x in numbers),
            ]
        )
    heads = [
        "",
        "Gram matrices",
        "of one layer",
        "the largest",
        "new base, pairs and state, GB",
    ]
    return table(heads, rows)
