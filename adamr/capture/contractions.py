"""Where a leaf meets data: products, convolutions and look-ups, all as one thing.

Each becomes an operand whose axes have one of three parts in the product with the leaf:
rows (not in the leaf), batch (in both, kept), contracted (in both, summed). `meet`
reads from that how the leaf is to be protected, and how the operand is brought into
rows of the leaf's fan-in.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adamr.capture.dims import Atom, Dims, covers, unknown
from adamr.capture.origin import Origin
from adamr.capture.places import follow_places
from adamr.capture.rows import Arrangement
from adamr.subspaces.axes import Axes

__all__ = ["Meeting", "Operand", "conv", "dot", "gather", "meet"]


Part = tuple[str, tuple[Atom, ...]] | None


class Operand(NamedTuple):
    """What a leaf meets.

    Attributes:
      key: equal for the same value.
      shape: of the array.
      make: () -> the array.
      places: where the axes of the mask lie.
      free: whether it does not depend on the data.
      parts: per axis None for rows, or ("batch" | "contracted", what the axis of the
        leaf's value is made of).
    """

    key: Any
    shape: tuple[int, ...]
    make: Callable[[], jax.Array]
    places: Dims | None
    free: bool
    parts: tuple[Part, ...]


class Meeting(NamedTuple):
    """A leaf that meets an operand.

    Attributes:
      axes: how the leaf is protected against it.
      scanned: of the leaf's `Origin`, for axes in `axes.batch`.
      batch: atoms of the batch axes of the arranged operand.
      picked: of the leaf's `Origin`, for axes in `axes.batch`.
      how: brings the operand into rows.
      windows: of the leaf's `Origin`.
    """

    axes: Axes
    scanned: tuple[tuple[int, Atom], ...]
    batch: tuple[Atom, ...]
    picked: tuple[Atom, ...]
    how: Arrangement
    windows: dict[int, tuple[int | None, int]]


def _grouped(atoms: Sequence[Atom]) -> dict[int, list[Atom]]:
    """Atoms of each axis of the leaf, outermost first."""
    groups: dict[int, list[Atom]] = {}
    for atom in atoms:
        if atom.axis is not None:
            groups.setdefault(atom.axis, []).append(atom)
    return {axis: sorted(g, key=lambda a: -a.stride) for axis, g in groups.items()}


def _around(atom: Atom, windows: Any, shape: Sequence[int]) -> tuple[int, int]:
    """What a slice leaves out of its axis, before and after."""
    if atom.axis is None or atom.axis not in windows:
        return 0, 0
    start, size = windows[atom.axis]
    return start, shape[atom.axis] - start - size


def meet(origin: Origin, shape: tuple[int, ...], operand: Operand) -> Meeting | str:
    """How the leaf meets the operand, or why that cannot be protected.

    Args:
      origin: of the leaf's value.
      shape: of the leaf.
      operand: what it meets.
    """
    windows = dict(origin.windows)

    def size(axis):
        return windows.get(axis, (0, shape[axis]))[1]

    pieces: list[tuple[str, Atom]] = []
    parts = []
    for part, n in zip(operand.parts, operand.shape, strict=True):
        atoms = (part and part[1]) or (Atom(None, 1, n),)
        parts.append(len(atoms))
        pieces += [(part[0] if part else "rows", atom) for atom in atoms]
    contracted = _grouped([a for kind, a in pieces if kind == "contracted"])
    for axis, atoms in contracted.items():
        if not covers(atoms, size(axis)):
            return f"contracted along a part of axis {axis} alone"
        if axis in windows and (windows[axis][0] is None or len(atoms) > 1):
            return f"a slice along axis {axis} that is not known is contracted"
    protected = tuple(sorted(contracted))
    sliced = [atom for _, atom in origin.scanned]
    both = _grouped(
        [a for kind, a in pieces if kind == "batch"] + sliced + list(origin.picked)
    )
    batch = {
        axis
        for axis, atoms in both.items()
        if covers(atoms, size(axis)) and windows.get(axis, (0, 0))[0] is not None
    }
    if set(both) & set(protected):
        axis = min(set(both) & set(protected))
        return f"axis {axis} is contracted in part and kept in part"
    if not protected:
        ones = [d for d, n in enumerate(shape) if n == 1 and d not in batch]
        if not ones or not any(kind == "contracted" for kind, _ in pieces):
            return "multiplied elementwise with data"
        protected = (ones[0],)

    def at(kind, wanted=lambda a: True):
        return [i for i, (k, a) in enumerate(pieces) if k == kind and wanted(a)]

    kept = at("batch", lambda a: a.axis in batch)
    rows = [
        i
        for i, (k, a) in enumerate(pieces)
        if k == "rows" or (k == "batch" and i not in kept)
    ]
    inner = sorted(
        at("contracted", lambda a: a.axis is not None),
        key=lambda i: (pieces[i][1].axis, -pieces[i][1].stride),
    )
    how = Arrangement(
        tuple(atom.size for _, atom in pieces),
        tuple(parts),
        tuple(at("contracted", lambda a: a.axis is None)),
        (*kept, *rows, *inner),
        len(kept),
        len(inner),
        tuple(_around(pieces[i][1], windows, shape) for i in inner),
    )
    return Meeting(
        Axes(protected, tuple(sorted(batch))),
        tuple(s for s in origin.scanned if s[1].axis in batch),
        tuple(pieces[i][1] for i in kept),
        tuple(a for a in origin.picked if a.axis in batch),
        how,
        windows,
    )


def dot(eqn: Any, values: Sequence[Any], origin: Origin, side: int) -> Operand:
    """The other operand of `dot_general`; the leaf is operand `side`."""
    contracted, batch = eqn.params["dimension_numbers"]
    other = values[1 - side]
    parts: list[Part] = [None] * len(other.shape)
    for kind, pairs in (("contracted", contracted), ("batch", batch)):
        for here, there in zip(pairs[1 - side], pairs[side], strict=True):
            parts[here] = kind, origin.dims[there]
    return Operand(
        id(other.array), other.shape, lambda: other.array, other.places, other.free,
        tuple(parts),
    )  # fmt: skip


def conv(eqn: Any, values: Sequence[Any], origin: Origin) -> Operand | str:
    """The patches of the images, (batch, groups, *positions, *window, channels)."""
    p, (images, kernel) = eqn.params, values
    numbers = p["dimension_numbers"]
    if p["batch_group_count"] != 1:
        return "convolved in batch groups"
    out_axis, in_axis, *window_axes = numbers.rhs_spec
    window = tuple(kernel.shape[d] for d in window_axes)
    groups, channels = p["feature_group_count"], kernel.shape[in_axis]
    batch = images.shape[numbers.lhs_spec[0]]
    positions = tuple(eqn.outvars[0].aval.shape[d] for d in numbers.out_spec[2:])
    spatial = len(window)

    def make():
        x = images.array.transpose(numbers.lhs_spec).astype(jnp.float32)
        patches = jax.lax.conv_general_dilated_patches(
            x,
            window,
            p["window_strides"],
            p["padding"],
            lhs_dilation=p["lhs_dilation"],
            rhs_dilation=p["rhs_dilation"],
            precision=jax.lax.Precision.HIGHEST,
        )  # (batch, in · window, *positions): channels outermost
        x = patches.reshape(batch, groups, channels, *window, *positions)
        inner = range(3, 3 + spatial)
        return x.transpose(0, 1, *range(3 + spatial, x.ndim), *inner, 2)

    places = images.places
    if places is not None:
        (out,) = follow_places(eqn, values)
        n = numbers.out_spec
        places = (
            out[n[0]],
            *unknown((groups,)),
            *(out[d] for d in n[2:]),
            *unknown((*window, channels)),
        )
    parts = (
        None,
        _group_axes(origin.dims[out_axis], groups),
        *[None] * spatial,
        *(("contracted", origin.dims[d]) for d in window_axes),
        ("contracted", origin.dims[in_axis]),
    )
    settings = (numbers, window, p["window_strides"], p["padding"], p["lhs_dilation"],
                p["rhs_dilation"], groups)  # fmt: skip
    key = (id(images.array), str(settings))
    shape = (batch, groups, *positions, *window, channels)
    return Operand(key, shape, make, places, images.free, parts)


def _group_axes(atoms: tuple[Atom, ...], groups: int) -> Part:
    """The axes of the leaf that number the groups of output channels, if any do."""
    for i in range(1, len(atoms)):
        if math.prod(atom.size for atom in atoms[:i]) == groups:
            return "batch", atoms[:i]
    return None


def gather(eqn: Any, values: Sequence[Any], origin: Origin) -> Operand | str:
    """One-hot rows of the indices: a look-up is their product with the leaf."""
    table, indices = values[:2]
    numbers, slices = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    looked_up = tuple(numbers.start_index_map)
    batch = tuple(map(int, numbers.operand_batching_dims))
    whole = all(
        n == (1 if d in looked_up or d in batch else table.shape[d])
        for d, n in enumerate(slices)
    )
    if not whole or set(looked_up) - set(map(int, numbers.collapsed_slice_dims)):
        return "looked up in pieces smaller than rows"
    sizes = tuple(table.shape[d] for d in looked_up)
    lead = indices.shape[:-1]
    clip = eqn.params["mode"] == jax.lax.GatherScatterMode.CLIP

    def make():
        each = indices.array
        product = jnp.ones(lead + (1,) * len(sizes), jnp.float32)
        for i, n in enumerate(sizes):
            index = each[..., i]
            index = jnp.clip(index, 0, n - 1) if clip else index
            hot = jax.nn.one_hot(index, n, dtype=jnp.float32)
            spread = [1] * len(sizes)
            spread[i] = n
            product = product * hot.reshape(*lead, *spread)
        return product

    parts: list[Part] = [None] * len(lead)
    for d, i in zip(batch, numbers.start_indices_batching_dims, strict=True):
        parts[i] = "batch", origin.dims[d]
    parts += [("contracted", origin.dims[int(d)]) for d in looked_up]
    places = indices.places
    if places is not None:
        places = (*places[:-1], *unknown(sizes))
    key = (id(indices.array), sizes, clip)
    return Operand(key, (*lead, *sizes), make, places, indices.free, tuple(parts))
