"""Rotary positions as a model's config.json asks for them."""

import functools
import math
import types
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from examples.llm.errors import ModelError

__all__ = ["SCALINGS", "frequencies", "replace_rotary"]

SCALINGS = ("default", "linear", "llama3")


def frequencies(
    head_dim: int, theta: float, scaling: Mapping[str, Any]
) -> tuple[float, ...]:
    """The angle per position of each of a head's pairs.

        default   w_i = theta^(−2i / head_dim)
        linear    w_i / factor
        llama3    w_i / factor where fewer than `low_freq_factor` turns fit into the
                  original context, w_i where more than `high_freq_factor` fit, and a
                  blend of both in between

    Args:
      head_dim: n, even.
      theta: the base.
      scaling: `rope_scaling` of config.json; empty for none.

    Returns:
      n / 2 numbers.

    Raises:
      ModelError: for a kind of scaling that is not known here, or one without its
        numbers.

    References:
      Su et al., RoFormer, arXiv:2104.09864. Chen et al., Extending Context Window of
      Large Language Models via Positional Interpolation, arXiv:2306.15595. Grattafiori
      et al., The Llama 3 Herd of Models, arXiv:2407.21783.
    """
    plain = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in SCALINGS:
        raise ModelError(
            f"config.json: rope_scaling is of the type {kind!r}, expected one of "
            f"{', '.join(SCALINGS)}."
        )
    if kind == "default":
        return tuple(plain.tolist())
    factor = _number(scaling, "factor")
    if kind == "linear":
        return tuple((plain / factor).tolist())
    low, high = (_number(scaling, f"{x}_freq_factor") for x in ("low", "high"))
    length = _number(scaling, "original_max_position_embeddings")
    share = np.clip((length * plain / (2 * math.pi) - low) / (high - low), 0, 1)
    return tuple(((share + (1 - share) / factor) * plain).tolist())


def _number(scaling: Mapping[str, Any], name: str) -> float:
    if not isinstance(scaling.get(name), int | float):
        raise ModelError(
            f"config.json: rope_scaling has {name} {scaling.get(name)!r}, expected a "
            "number."
        )
    return scaling[name]


def _rotate(
    inputs: jax.Array,
    positions: jax.Array,
    head_dim: int,
    rope_theta: float | None = None,
    *,
    frequencies: tuple[float, ...],
) -> jax.Array:
    """Turns the pairs (x_i, x_{i + n/2}) of (batch, time, heads, n) by position · w_i.

    The first four arguments are those of Tunix's `apply_rope`.
    """
    del head_dim, rope_theta
    turn = jnp.asarray(frequencies, jnp.float32).reshape(1, 1, 1, -1)
    angle = positions[:, :, None, None].astype(jnp.float32) * turn
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    x, y = jnp.split(inputs, 2, axis=-1)
    return jnp.concatenate([x * cos - y * sin, y * cos + x * sin], -1).astype(
        inputs.dtype
    )


@functools.cache
def _attention_with(attention: type, frequencies: tuple[float, ...]) -> type:
    """The attention class with its own `apply_rope` instead of its module's."""
    block = attention.block
    if "apply_rope" not in block.__code__.co_names:
        raise ModelError(
            f"{attention.__module__}.Attention does not call `apply_rope`, expected "
            "it to, as in google-tunix 0.1.7: the rotary base of config.json would be "
            "ignored. Install google-tunix==0.1.7."
        )
    rope = functools.partial(_rotate, frequencies=frequencies)
    own = types.FunctionType(
        block.__code__,
        {**block.__globals__, "apply_rope": rope},
        block.__name__,
        block.__defaults__,
        block.__closure__,
    )
    return type(attention.__name__, (attention,), {"block": own})


def replace_rotary(module: nnx.Module, frequencies: tuple[float, ...]) -> None:
    """Gives this model's attention the frequencies, and no other model's.

    Tunix 0.1.7 calls `apply_rope` without `config.rope_theta` in its Llama, Qwen3 and
    Gemma 2, which then turn by a base of 1e6 (1e4 in Gemma), and knows no scaling.
    """
    for layer in module.layers:
        layer.attn.__class__ = _attention_with(type(layer.attn), frequencies)
