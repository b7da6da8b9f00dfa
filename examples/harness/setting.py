"""What the optimizers of a run are built from, beside their learning rate."""

from typing import Any, NamedTuple

import adamr

__all__ = ["Setting", "setting_for"]


class Setting(NamedTuple):
    """What optimizers are built from beside their learning rate.

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


def setting_for(
    params: Any,
    axes: Any,
    *,
    tasks: int,
    unprotected: tuple[str, ...] = ("head",),
    threshold: float = 0.97,
    samples: int = 128,
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
