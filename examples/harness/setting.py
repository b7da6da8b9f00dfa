"""What the optimizers of a run are built from, apart from their numbers."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

import adamr

__all__ = [
    "DIRECTIONS",
    "SAMPLES",
    "THRESHOLD",
    "Setting",
    "default_of",
    "kernel_axes",
    "setting_for",
]


def default_of(function: Callable, parameter: str) -> Any:
    """The default of a parameter, as the signature shows it."""
    return inspect.signature(function).parameters[parameter].default


THRESHOLD = default_of(adamr.grow_subspace, "threshold")
SAMPLES = 128  # examples that a boundary looks at
DIRECTIONS = 20  # of OGD, per task


class Setting(NamedTuple):
    """What optimizers are built from, apart from learning rate and coefficient.

    Attributes:
      subspace: empty, with room, for every protected kernel.
      directions: empty, with room for `new_directions` per task; None without any.
      threshold: energy share of a task's layer inputs that becomes protected.
      samples: examples that a boundary looks at.
      new_directions: of OGD, per task.
    """

    subspace: adamr.Subspace
    directions: Any
    threshold: float
    samples: int
    new_directions: int


def kernel_axes(logits: Callable[..., Any], params: Any, inputs: Any) -> Any:
    """The `Axes` of all kernels; None for biases and scales, which no method protects.

    Args:
      logits: `(params, inputs) -> logits`.
      params: parameters, or their shapes.
      inputs: a batch, or its shape.
    """
    axes = adamr.contracted_axes(logits, params, inputs)
    return jax.tree.map(lambda a: a if isinstance(a, adamr.Axes) else None, axes,
                        is_leaf=lambda a: isinstance(a, adamr.Axes))  # fmt: skip


def setting_for(
    params: Any,
    axes: Any,
    *,
    tasks: int,
    unprotected: tuple[str, ...] = ("head",),
    threshold: float = THRESHOLD,
    samples: int = SAMPLES,
    new_directions: int = 0,
    max_rank: int | None = None,
) -> Setting:
    """A setting for a model; each direction costs a copy of the model in memory."""
    return Setting(
        adamr.empty_subspace(
            params, axes=axes, unprotected=unprotected, max_rank=max_rank
        ),
        adamr.empty_directions(params, tasks * new_directions)
        if new_directions
        else None,
        threshold,
        samples,
        new_directions,
    )
