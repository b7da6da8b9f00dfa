"""What a walk through a function's equations carries along."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from adamr.capture.dims import Dims
from adamr.capture.origin import Origin
from adamr.capture.records import Records
from adamr.subspaces.axes import Axes

__all__ = ["Notes", "Value", "Walk"]


class Value(NamedTuple):
    """A value of the function.

    Attributes:
      array: the array, or something with its shape.
      origins: the leaves it comes from, if it is one seen through rearrangements.
      places: where the axes of the mask lie in it; None without a mask.
      free: whether it does not depend on data.
    """

    array: Any
    origins: tuple[Origin, ...] = ()
    places: Dims | None = None
    free: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(getattr(self.array, "shape", ()))


class Notes:
    """How each leaf is used: `axes` where it meets data, `reasons` where it is lost."""

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        self.shapes = shapes
        self.axes: dict[int, list[Axes]] = {}
        self.reasons: dict[int, list[str]] = {}

    def met(self, leaf: int, axes: Axes) -> None:
        self.axes.setdefault(leaf, []).append(axes)

    def lost(self, origins: Sequence[Origin], reason: str) -> None:
        for origin in origins:
            reasons = self.reasons.setdefault(origin.leaf, [])
            if reason not in reasons:
                reasons.append(reason)


class Walk(NamedTuple):
    """What a walk carries along.

    Attributes:
      notes: filled by every walk.
      records: filled by a walk over values; None over shapes.
      depth: how many scans this part of the function is in.
    """

    notes: Notes
    records: Records | None = None
    depth: int = 0
