"""v as the alias `adamr.adamr` keeps it: shared along what a subspace protects."""

from typing import Any

import optax

import adamr
from adamr.optimizers import _mixed_axes
from adamr.subspace import Subspace

__all__ = ["shared_second_moment"]


def shared_second_moment(
    subspace: Subspace, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """`faithful_second_moment`, element-wise where nothing is protected.

    `share="fan_in"` would also share v over an embedding's tokens.
    """

    def init_fn(params):
        share = _mixed_axes([subspace], params)
        return adamr.faithful_second_moment(share=share, **options).init(params)

    # The shapes in the state say along which axes v is shared.
    update_fn = adamr.faithful_second_moment(**options).update
    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
