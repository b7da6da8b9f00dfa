"""What a value is relative to a parameter leaf, and which equations keep it so.

A value *comes from* a leaf when it is the leaf seen through linear rearrangements:
transposed, reshaped, cast, scaled by a number, a slice of it. Then a contraction of the
value is one of the leaf, and its other operand is a layer input.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend.core import Literal

from adamr.capture import dims as _dims
from adamr.capture.dims import Atom, Dims

__all__ = ["Origin", "follow", "of_leaf", "sliced_by_scan", "stacked_by_scan"]


IN_PIECES = (None, -1)


class Origin(NamedTuple):
    """A leaf and what became of its axes.

    Attributes:
      leaf: position among the leaves.
      dims: what each axis of the value is made of.
      scanned: (depth of the scan, atom) for axes along which a scan slices the leaf.
      picked: axes of which one entry was picked, as in `w[3]`; each of size 1.
      windows: axis -> (start or None where it is not known, size) of slices;
        `IN_PIECES` where what is left of the axis is not a slice.
    """

    leaf: int
    dims: Dims
    scanned: tuple[tuple[int, Atom], ...] = ()
    picked: tuple[Atom, ...] = ()
    windows: tuple[tuple[int, tuple[int | None, int]], ...] = ()


def of_leaf(leaf: int, shape: Sequence[int]) -> Origin:
    return Origin(leaf, _dims.whole(shape))


def sliced_by_scan(origin: Origin, depth: int) -> Origin:
    """One iteration's slice of a leaf that a scan runs over."""
    first, *rest = origin.dims
    atoms = tuple((depth, atom) for atom in first if atom.axis is not None)
    return origin._replace(dims=tuple(rest), scanned=origin.scanned + atoms)


def stacked_by_scan(origin: Origin, depth: int, length: int) -> Origin:
    """The leaf again, from the slices that a scan gives back unchanged."""
    first = tuple(atom for at, atom in origin.scanned if at == depth)
    outer = tuple(each for each in origin.scanned if each[0] != depth)
    dims = (first or (Atom(None, 1, length),), *origin.dims)
    return origin._replace(dims=dims, scanned=outer)


def _transpose(origin, value, params, _):
    return origin._replace(dims=tuple(origin.dims[d] for d in params["permutation"]))


def _squeeze(origin, value, params, _):
    gone = {d % len(origin.dims) for d in params["dimensions"]}
    kept = tuple(dim for d, dim in enumerate(origin.dims) if d not in gone)
    return origin._replace(dims=kept)


def _reshape(origin, value, params, _):
    found = _dims.reshape(origin.dims, params["new_sizes"], params["dimensions"])
    return None if found is None else origin._replace(dims=found)


def _broadcast(origin, value, params, _):
    found = _dims.broadcast(
        origin.dims, value.shape, params["shape"], params["broadcast_dimensions"]
    )
    return origin._replace(dims=found)


def _window(origin: Origin, d: int, start: int | None, size: int) -> Origin:
    """The slice of axis d of the value."""
    windows, atoms = dict(origin.windows), origin.dims[d]
    new, picked = Atom(None, 1, size), origin.picked
    for atom in atoms:
        if atom.axis is None:
            continue
        before, whole = windows.get(atom.axis, (0, atom.size))
        if len(atoms) > 1 or atom.stride != 1 or atom.size != whole:
            windows[atom.axis] = IN_PIECES
            new = atom._replace(size=size)
            continue
        at = None if start is None or before is None else before + start
        windows[atom.axis] = at, size
        slice_of_axis = Atom(atom.axis, 1, size)
        if size == 1:
            picked = (*picked, slice_of_axis)
        else:
            new = slice_of_axis
    dims = (*origin.dims[:d], (new,), *origin.dims[d + 1 :])
    return origin._replace(dims=dims, picked=picked, windows=tuple(windows.items()))


def _slice(origin, value, params, _):
    if params["strides"] is not None and set(params["strides"]) != {1}:
        return None
    ends = zip(params["start_indices"], params["limit_indices"], strict=True)
    return _sliced(origin, value.shape, [(a, b - a) for a, b in ends])


def _dynamic_slice(origin, value, params, variables):
    def start(variable, size, whole):
        if not isinstance(variable, Literal):
            return None
        return min(max(int(variable.val), 0), whole - size)

    ends = zip(variables[1:], params["slice_sizes"], value.shape, strict=True)
    starts = [(start(v, size, whole), size) for v, size, whole in ends]
    return _sliced(origin, value.shape, starts)


def _sliced(origin, shape, windows):
    for d, (start, size) in enumerate(windows):
        if size != shape[d]:
            origin = _window(origin, d, start, size)
    return origin


_REARRANGED: dict[str, Callable[..., Origin | None]] = {
    "transpose": _transpose,
    "squeeze": _squeeze,
    "reshape": _reshape,
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
}

_UNCHANGED = {
    "copy", "copy_p", "mesh_cast", "neg", "optimization_barrier", "reduce_precision",
    "reshard", "sharding_constraint", "stop_gradient",
}  # fmt: skip


def _split(origin, params):
    parts, start = [], 0
    for size in map(int, params["sizes"]):
        parts.append(_window(origin, params["axis"], start, size))
        start += size
    return parts


def follow(
    eqn: Any, values: Sequence[Any]
) -> tuple[list[tuple[Origin, ...]], list[Origin]]:
    """Origins of an equation's results, and those of operands that are lost in it.

    Args:
      eqn: an equation of a jaxpr other than a call, a loop or a contraction.
      values: its operands, with `shape`, `origins` and `free` (of data).
    """
    held = [o for v in values for o in v.origins]
    found = _carried(eqn, values) if held else [()] * len(eqn.outvars)
    if found is None:
        return [()] * len(eqn.outvars), held
    leaves = {o.leaf for origins in found for o in origins}
    return found, [o for o in held if o.leaf not in leaves]


def _carried(eqn: Any, values: Sequence[Any]) -> list[tuple[Origin, ...]] | None:
    name = eqn.primitive.name
    holders = [v for v in values if v.origins]
    if name == "optimization_barrier":
        return [v.origins for v in values]
    if name in _UNCHANGED:
        return [holders[0].origins]
    if name == "convert_element_type":
        floating = jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating)
        return [holders[0].origins] if floating else None
    if name in ("mul", "div"):
        scaled, number = values
        if name == "mul" and math.prod(scaled.shape) == 1:
            scaled, number = number, scaled
        alone = (
            math.prod(number.shape) == 1 and scaled.shape == eqn.outvars[0].aval.shape
        )
        return [scaled.origins] if alone else None
    if name in ("add", "sub", "add_any"):
        same = len({v.shape for v in values}) == 1
        if same and all(v.free for v in values):
            return [tuple(o for v in values for o in v.origins)]
        return None
    if name == "split":
        columns = [_split(o, eqn.params) for o in values[0].origins]
        return list(zip(*columns, strict=True))
    if name in _REARRANGED and values[0].origins and len(holders) == 1:
        change = _REARRANGED[name]
        new = [change(o, values[0], eqn.params, eqn.invars) for o in values[0].origins]
        kept = tuple(o for o in new if o is not None)
        return [kept] if len(kept) == len(new) else None
    return None
