"""Float32 masters of low-rank pairs, for models in bfloat16."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from adamr import _tree

__all__ = ["cast_like", "masters", "require_wide"]


def masters(lora: Any) -> Any:
    """The pairs in float32, in fresh buffers; wider ones keep their dtype.

    Qwix gives the A's and B's the dtype of their kernels. In bfloat16 each step is
    rounded, which moves A back into the protected space: after 50 steps the part of its
    change inside that space was 17 % of the whole, and 3e-6 in float32. So train the
    masters, and cast inside the loss; its gradient comes back in float32.

    A model that multiplies in bfloat16 rounds A each time: for an old input x, xA is
    then not 0 but up to 2⁻⁸ ‖x‖ ‖A‖ (it does not add up from step to step).

    Args:
      lora: the A's and B's, or the kernels that they are merged into. Leaves that are
        not floating, and holes, stay as they are.

    Returns:
      A tree like `lora`, what is floating at least float32, placed alike.

    >>> lora = {"w_lora_a": jnp.ones((4, 2), jnp.bfloat16)}
    >>> trained = masters(lora)
    >>> loss = lambda m, x: jnp.sum(x @ cast_like(m, lora)["w_lora_a"])
    >>> jax.grad(loss)(trained, jnp.ones((1, 4), jnp.bfloat16))["w_lora_a"].dtype
    dtype('float32')
    """

    def leaf(x: jax.Array) -> jax.Array:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return jnp.array(x, jnp.promote_types(x.dtype, jnp.float32), copy=True)

    return jax.tree.map(leaf, lora)


def cast_like(masters: Any, lora: Any) -> Any:
    """`masters` in the dtypes of `lora`, for use inside the loss.

    Args:
      masters: from `masters(lora)`, trained since.
      lora: a tree of the same structure, arrays or `ShapeDtypeStruct`s.

    Returns:
      A tree like `lora`.
    """

    def leaf(x: jax.Array, like: Any) -> jax.Array:  # keys have no other dtype
        return x if x.dtype == like.dtype else x.astype(like.dtype)

    return jax.tree.map(leaf, masters, lora)


def require_wide(leaves: Sequence[Any], names: Sequence[str]) -> None:
    """Raises for a leaf of the pairs that is narrower than float32."""
    for name, x in zip(names, leaves, strict=True):
        if _tree.is_hole(x):
            continue
        if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize < 4:
            raise ValueError(
                f"lora has {x.dtype} at {name!r}, expected float32: rounding moves A "
                "back into the protected space at every step. Train "
                "lora.masters(lora), and cast to the model's dtype inside the loss."
            )
