"""What leaves meet, collected once per value however many leaves meet it."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adamr.capture.contractions import Meeting, Operand
from adamr.capture.dims import Atom, unknown
from adamr.capture.rows import Kind, Mask, mask_rows
from adamr.subspaces.axes import Axes

__all__ = ["Kept", "Records", "settled"]

Windows = tuple[tuple[int, tuple[int | None, int]], ...]


class Kept(NamedTuple):
    """What is kept of one operand.

    Attributes:
      data: arrays with the axes of `lead` in front.
      lead: which part of the leaf's batch axes each of them is.
      scanned: atoms of batch axes that scans around this one still have to stack.
      windows: which part of an axis was met, where it was a slice.
    """

    data: tuple[jax.Array, ...]
    lead: tuple[Atom, ...]
    scanned: tuple[tuple[int, Atom], ...]
    windows: Windows


class Records:
    """Fills up during a walk over values.

    Attributes:
      kind: what is kept of rows.
      plan: the leaves of which something is kept, and their axes.
      mask: which rows count, or None.
      kept: by operand, in the order met.
      met: per leaf the operands that it meets.
      refused: leaves whose rows are not those of the mask.
    """

    def __init__(self, kind: Kind, plan: dict[int, Axes], mask: Mask | None) -> None:
        self.kind, self.plan, self.mask = kind, plan, mask
        self.kept: dict[Hashable, Kept] = {}
        self.met: dict[int, list[Hashable]] = {}
        self.refused: set[int] = set()
        self._moved: dict[Hashable, Sequence[jax.Array]] = {}
        self._alive: list[Any] = []  # identity is told by id: nothing may be reused

    def within(self, mask: Mask | None) -> "Records":
        """Records for the body of a scan."""
        inner = Records(self.kind, self.plan, mask)
        inner.refused = self.refused
        return inner

    def once(
        self,
        what: Hashable,
        arrays: Sequence[Any],
        make: Callable[[], Sequence[jax.Array]],
    ) -> Sequence[jax.Array]:
        """The same arrays for the same rearrangement of the same arrays."""
        key = (what, *map(id, arrays))
        if key not in self._moved:
            self._alive.append(arrays)
            self._moved[key] = make()
        return self._moved[key]

    def add(self, leaf: int, operand: Operand, meeting: Meeting) -> None:
        if leaf not in self.plan:
            return
        axes, scanned, batch, picked, how, windows = meeting
        told = tuple(item for item in windows.items() if item[0] in axes.batch)
        key = operand.key, how, scanned, batch, picked, told
        if key not in self.kept:
            mask = None
            if self.mask is not None and not operand.free:
                places = operand.places or unknown(operand.shape)
                mask = mask_rows(self.mask, places, how)
                if mask is None:
                    self.refused.add(leaf)
                    return
            rows = how(operand.make())
            data = self.kind.take(rows, mask, how.batch, how.contracted)
            ones = [1] * len(picked)
            data = tuple(
                x.reshape(*x.shape[: how.batch], *ones, *x.shape[how.batch :])
                for x in data
            )
            self._alive.append(operand)
            self.kept[key] = Kept(data, (*batch, *picked), scanned, told)
        self.note(leaf, key)

    def note(self, leaf: int, key: Hashable) -> None:
        met = self.met.setdefault(leaf, [])
        if key not in met:
            met.append(key)


def _by_axes(kept: Kept, shape: tuple[int, ...]) -> tuple[list[int], tuple]:
    """The batch axes in order, and the data with one leading axis for each."""
    order = sorted(
        range(len(kept.lead)),
        key=lambda i: (kept.lead[i].axis, -kept.lead[i].stride),
    )
    axes = sorted({atom.axis for atom in kept.lead if atom.axis is not None})
    windows = dict(kept.windows)
    sizes = [windows[a][1] if a in windows else shape[a] for a in axes]
    pads = [(0, 0)] * len(axes)
    for i, axis in enumerate(axes):
        start, size = windows.get(axis, (0, shape[axis]))
        pads[i] = (start or 0, shape[axis] - (start or 0) - size)

    def leaf(x):
        inner = range(len(order), x.ndim)
        x = x.transpose(*order, *inner).reshape(*sizes, *x.shape[len(order) :])
        return jnp.pad(x, pads + [(0, 0)] * len(inner)) if any(map(any, pads)) else x

    return axes, tuple(map(leaf, kept.data))


def settled(
    records: Records, leaf: int, shape: tuple[int, ...]
) -> tuple[jax.Array, ...]:
    """All that a leaf met, with the batch axes of its plan (larger than 1) in front."""
    wanted, parts = records.plan[leaf].batch, []
    for key in records.met[leaf]:
        axes, data = _by_axes(records.kept[key], shape)
        for axis in [a for a in axes if a not in wanted]:
            data = records.kind.fold(data, axes.index(axis), len(axes))
            axes.remove(axis)
        sizes = [shape[a] for a in axes if shape[a] > 1]
        parts.append(tuple(x.reshape(*sizes, *x.shape[len(axes) :]) for x in data))
    return records.kind.merge(parts)
