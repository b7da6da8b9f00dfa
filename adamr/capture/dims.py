"""What the axes of a value are made of, and how rearrangements carry it.

An axis of a value is a product of *atoms*, outermost first. An atom is a whole axis of
the thing that is followed (a parameter leaf, or a mask), or the part of it that a
reshape split off; `axis=None` stands for anything else. So

    leaf (in, heads · head)  reshaped to  (in, heads, head)

has the dims ((Atom(0, 1, in),), (Atom(1, head, heads),), (Atom(1, 1, head),)).
"""

from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

__all__ = ["Atom", "Dims", "broadcast", "covers", "reshape", "unknown", "whole"]


class Atom(NamedTuple):
    """Part of an axis: entry i of the atom moves by i · stride along the axis."""

    axis: int | None
    stride: int
    size: int


Dims = tuple[tuple[Atom, ...], ...]


def whole(shape: Sequence[int]) -> Dims:
    return tuple((Atom(axis, 1, size),) for axis, size in enumerate(shape))


def unknown(shape: Sequence[int]) -> Dims:
    return tuple((Atom(None, 1, size),) for size in shape)


def _joined(atoms: Iterable[Atom]) -> tuple[Atom, ...]:
    """Neighbours that follow each other along one axis become one atom."""
    done: list[Atom] = []
    for atom in atoms:
        last = done[-1] if done else None
        if last and last.axis == atom.axis:
            if atom.axis is None or last.stride == atom.stride * atom.size:
                done[-1] = Atom(atom.axis, atom.stride, last.size * atom.size)
                continue
        done.append(atom)
    return tuple(done)


def _split(atom: Atom, outer: int) -> tuple[Atom, Atom]:
    inner = atom.size // outer
    return (
        Atom(atom.axis, atom.stride * inner, outer),
        Atom(atom.axis, atom.stride, inner),
    )


def reshape(
    dims: Dims, shape: Sequence[int], order: Sequence[int] | None = None
) -> Dims | None:
    """The dims of a value reshaped to `shape`; None where its axes are cut unevenly.

    `order`: a permutation of the axes before that.
    """
    if 0 in shape:
        return None
    dims = dims if order is None else tuple(dims[d] for d in order)
    rest = deque(atom for dim in dims for atom in dim)
    out: list[list[Atom]] = []
    for size in shape:
        taken: list[Atom] = []
        missing = size
        while missing > 1 or (size == 1 and not taken and rest and rest[0].size == 1):
            atom = rest.popleft()
            if missing % atom.size:
                if atom.size % missing:
                    return None
                atom, left_over = _split(atom, missing)
                rest.appendleft(left_over)
            taken.append(atom)
            missing //= atom.size
        out.append(taken)
    if out:
        out[-1].extend(rest)
    return tuple(map(_joined, out))


def broadcast(
    dims: Dims, sizes: Sequence[int], shape: Sequence[int], places: Sequence[int]
) -> Dims:
    """The dims after `broadcast_in_dim`; what is repeated is unknown."""
    out = list(unknown(shape))
    for dim, size, place in zip(dims, sizes, places, strict=True):
        if size == shape[place]:
            out[place] = dim
    return tuple(out)


def covers(atoms: Sequence[Atom], size: int) -> bool:
    """Whether the atoms, outermost first, make up an axis of this size."""
    inner = 1
    for atom in reversed(atoms):
        if atom.stride != inner:
            return False
        inner *= atom.size
    return inner == size
