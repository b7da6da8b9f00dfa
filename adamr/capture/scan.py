"""Scans: the body is walked inside a scan, and what its leaves meet comes out of it.

A leaf that the scan runs over has a slice per iteration, so what its slices meet is
stacked; what a leaf meets that all iterations share is added up.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from adamr.capture.dims import Atom, Dims, unknown
from adamr.capture.origin import sliced_by_scan, stacked_by_scan
from adamr.capture.places import merged
from adamr.capture.records import Kept, Records
from adamr.capture.rows import Mask
from adamr.capture.walk import Notes, Value, Walk

__all__ = ["scan"]

Run = Callable[[Walk, Any, Sequence[Any], Sequence[Value]], list[Value]]


class _Scan:
    """A scan equation with its operands sorted."""

    def __init__(self, eqn: Any, values: Sequence[Value]) -> None:
        p = eqn.params
        self.body, self.length = p["jaxpr"], p["length"]
        self.options = {k: p[k] for k in ("length", "reverse", "unroll")}
        first, last = p["num_consts"], p["num_consts"] + p["num_carry"]
        self.consts, self.carry = values[:first], values[first:last]
        self.xs = values[last:]
        inside = self.body.jaxpr
        self.outvars = eqn.outvars
        self.kept = [
            out is inside.invars[first + i]
            for i, out in enumerate(inside.outvars[: len(self.carry)])
        ]  # entries of the carry that never change

    def inputs(self, depth: int, carry_places: Sequence[Dims | None], axis: int | None):
        """Values of the body's operands, over shapes."""

        def places(value, drop):
            if value.places is None:
                return None
            dims = value.places[1:] if drop else value.places
            return tuple(_without(dim, axis) for dim in dims)

        consts = [v._replace(places=places(v, False)) for v in self.consts]
        carry = [
            Value(v.array, v.origins, where, v.free)
            if kept
            else Value(v.array, (), where)
            for v, kept, where in zip(self.carry, self.kept, carry_places, strict=True)
        ]
        xs = [
            Value(
                v.array,
                tuple(sliced_by_scan(o, depth) for o in v.origins),
                places(v, True),
                v.free,
            )
            for v in self.xs
        ]
        avals = [v.aval for v in self.body.jaxpr.invars]
        pairs = zip((*consts, *carry, *xs), avals, strict=True)
        return [v._replace(array=aval) for v, aval in pairs]

    def results(self, outs: Sequence[Value], arrays, depth: int, axis: int | None):
        """Values of the equation's results, from those of the body's."""
        n, found = len(self.carry), []
        for i, (out, array) in enumerate(zip(outs, arrays, strict=True)):
            if i < n:
                origins = self.carry[i].origins if self.kept[i] else ()
                places = out.places
            else:
                origins = tuple(
                    stacked_by_scan(o, depth, self.length) for o in out.origins
                )
                first = (Atom(axis, 1, self.length),)
                places = None if out.places is None else (first, *out.places)
            free = i < n and self.kept[i] and self.carry[i].free
            found.append(Value(array, origins, places, free))
        return found


def _without(dim: tuple[Atom, ...], axis: int | None) -> tuple[Atom, ...]:
    return tuple(
        a._replace(axis=None) if axis is not None and a.axis == axis else a for a in dim
    )


def _mask_axis(mask: Mask | None, xs: Sequence[Value]) -> int | None:
    """The axis of the mask that the scan runs over."""
    if mask is None:
        return None
    whole: dict[tuple[Atom, ...], int] = {
        (Atom(axis, 1, size),): axis
        for axis, size in zip(mask.axes, mask.array.shape, strict=True)
    }
    axes = [whole[v.places[0]] for v in xs if v.places and v.places[0] in whole]
    return axes[0] if axes else None


def _carry_places(run: Run, walk: Walk, it: _Scan, axis: int | None) -> list:
    """Where the mask's axes lie in the carry, for every iteration alike."""
    if all(v.places is None for v in (*it.consts, *it.carry, *it.xs)):
        return [None] * len(it.carry)
    shapes = [v.shape for v in it.carry]
    places = [
        unknown(v.shape)
        if v.places is None
        else tuple(_without(dim, axis) for dim in v.places)
        for v in it.carry
    ]
    quiet = Walk(Notes(walk.notes.shapes), None, walk.depth + 1)
    for _ in range(4):
        inputs = it.inputs(walk.depth, places, axis)
        outs = run(quiet, it.body.jaxpr, it.body.consts, inputs)
        new = [
            merged(shape, [p, out.places or unknown(shape)])
            for shape, p, out in zip(shapes, places, outs, strict=False)
        ]
        if new == places:
            return places
        places = new
    return [unknown(shape) for shape in shapes]


def _lose_changed(walk: Walk, it: _Scan, outs: Sequence[Value]) -> None:
    for value, kept, out in zip(it.carry, it.kept, outs, strict=False):
        if not kept:
            walk.notes.lost(value.origins, "in the carry of a scan")
            walk.notes.lost(out.origins, "in the carry of a scan")


def scan(run: Run, walk: Walk, eqn: Any, values: Sequence[Value]) -> list[Value]:
    """Walks through a scan.

    Args:
      run: walks through the body.
      walk, eqn, values: as for any other equation.
    """
    it, depth = _Scan(eqn, values), walk.depth
    inside = walk._replace(depth=depth + 1)
    if walk.records is None:
        places = _carry_places(run, walk, it, None)
        inputs = it.inputs(depth, places, None)
        outs = run(inside, it.body.jaxpr, it.body.consts, inputs)
        _lose_changed(walk, it, outs)
        return it.results(outs, [v.aval for v in it.outvars], depth, None)

    records = walk.records
    axis = _mask_axis(records.mask, it.xs)
    inputs = it.inputs(depth, _carry_places(run, walk, it, axis), axis)
    seen: list[Any] = []

    def body(carry, xs, mask):
        """One iteration: the new carry, ys, and what was met."""
        inner = records.within(_sliced(records.mask, axis, mask))
        arrays = [*(v.array for v in it.consts), *carry, *xs]
        pairs = zip(inputs, arrays, strict=True)
        outs = run(
            inside._replace(records=inner),
            it.body.jaxpr,
            it.body.consts,
            [v._replace(array=array) for v, array in pairs],
        )
        seen[:] = [inner, outs]
        given = [v.array for v in outs]
        met = [kept.data for kept in inner.kept.values()]
        return given[: len(carry)], given[len(carry) :], met

    carry = [v.array for v in it.carry]
    xs = [v.array for v in it.xs]
    masks = _first(records.mask, axis)
    slices = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), (xs, masks)
    )
    shapes = jax.eval_shape(body, carry, *slices)[2]
    stacks = [
        not records.kind.sums or any(at == depth for at, _ in kept.scanned)
        for kept in seen[0].kept.values()
    ]
    zeros = [
        None if stack else jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), met)
        for met, stack in zip(shapes, stacks, strict=True)
    ]

    def step(state, each):
        carry, sums = state
        carry, ys, met = body(carry, *each)
        sums = [
            None if stack else jax.tree.map(jnp.add, total, new)
            for total, new, stack in zip(sums, met, stacks, strict=True)
        ]
        rest = [new if stack else None for new, stack in zip(met, stacks, strict=True)]
        return (carry, sums), (ys, rest)

    (carry, sums), (ys, rest) = jax.lax.scan(
        step, (carry, zeros), (xs, masks), **it.options
    )
    inner, outs = seen
    data = [b if stack else a for a, b, stack in zip(sums, rest, stacks, strict=True)]
    _take_out(records, inner, data, depth)
    return it.results(outs, [*carry, *ys], depth, axis)


def _first(mask: Mask | None, axis: int | None) -> jax.Array | None:
    """The mask with the axis that is scanned over in front."""
    if mask is None or axis is None:
        return None
    return jnp.moveaxis(mask.array, mask.axes.index(axis), 0)


def _sliced(mask: Mask | None, axis: int | None, part: Any) -> Mask | None:
    if mask is None or axis is None:
        return mask
    return Mask(part, tuple(a for a in mask.axes if a != axis))


def _take_out(records: Records, inner: Records, data: Sequence[Any], depth: int):
    """What a scan's body met becomes what the scan met."""
    this = object()
    pairs = zip(inner.kept.items(), data, strict=True)
    for i, ((_, kept), arrays) in enumerate(pairs):
        here = tuple(atom for at, atom in kept.scanned if at == depth)
        outer = tuple(each for each in kept.scanned if each[0] != depth)
        if here:
            sizes = [atom.size for atom in here]
            arrays = tuple(x.reshape(*sizes, *x.shape[1:]) for x in arrays)
        elif not records.kind.sums:
            arrays = records.kind.fold(arrays, 0, 1 + len(kept.lead))
        records.kept[this, i] = Kept(arrays, here + kept.lead, outer, kept.windows)
    numbers = {key: i for i, key in enumerate(inner.kept)}
    for leaf, keys in inner.met.items():
        for key in keys:
            records.note(leaf, (this, numbers[key]))
