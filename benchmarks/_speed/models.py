"""Shapes of decoder-only language models; nothing is allocated."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import adamr


class Size(NamedTuple):
    """Attributes:
    layers: blocks, stacked: their kernels have a leading axis of this size.
    width: of the residual stream.
    hidden: of the gated perceptron.
    keys: features of the keys, and of the values; those of the queries are `width`.
    vocabulary: tokens.
    tied: whether the head is the embedding.
    """

    layers: int
    width: int
    hidden: int
    keys: int
    vocabulary: int = 128_256
    tied: bool = False


SIZES = {  # the sizes of Llama 3
    "1B": Size(16, 2048, 8192, 512, tied=True),
    "8B": Size(32, 4096, 14336, 1024),
    "70B": Size(80, 8192, 28672, 1024),
}


def shapes(size: Size, dtype: jax.typing.DTypeLike = jnp.float32) -> Any:
    """Parameters as `jax.ShapeDtypeStruct`s: kernels that share an input are one."""

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, dtype)

    n, width = size.layers, size.width
    head = {} if size.tied else {"head": array(width, size.vocabulary)}
    return {
        "embedding": array(size.vocabulary, width),
        "layers": {
            "attention": {
                "qkv": {"kernel": array(n, width, width + 2 * size.keys)},
                "out": {"kernel": array(n, width, width)},
            },
            "up": {"kernel": array(n, width, 2 * size.hidden)},
            "down": {"kernel": array(n, size.hidden, width)},
            "norm1": array(n, width),
            "norm2": array(n, width),
        },
        "norm": array(width),
        **head,
    }


def count(params: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(params))


def empty(params: Any, max_rank: int | None, head: bool = False) -> adamr.Subspace:
    """A basis for every kernel of every layer, and for the head if told."""

    def axes(path: str, shape: tuple[int, ...]) -> adamr.Axes | None:
        if head and path == "head":
            return adamr.Axes((0,))
        return adamr.Axes((1,), (0,)) if len(shape) == 3 else None

    return adamr.empty_subspace(params, axes=axes, max_rank=max_rank, max_fan_in=None)
