"""The rows that a leaf meets, and what is kept of them: Gram matrices, rows, a sketch.

Rows arrive as an array of axes (*batch, *rows, *contracted), in the leaf's order. What
is kept has the axes (*batch, ...), so that slices of stacked layers stay apart:

    gram     Σ x xᵀ, (*batch, n, n), and how many rows it sums
    rows     (*batch, num_rows, n)
    sketch   (*batch, max_rows, n), Frequent Directions of the rows
"""

import functools
import math
import string
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec, reshard

from adamr.capture.dims import Atom, Dims, covers
from adamr.sharding import einsum_sharding
from adamr.subspaces.sketch import shrink_rows

_MOST = jnp.iinfo(jnp.int32).max

__all__ = ["Arrangement", "Kind", "Mask", "kind_of", "mask_rows", "spread"]


class Arrangement(NamedTuple):
    """How an operand becomes an array (*batch, *rows, *contracted).

    Attributes:
      shape: of the operand with its axes split into atoms.
      parts: into how many each axis is split.
      summed: axes of that shape that are summed away.
      order: the others: batch, rows, contracted.
      batch, contracted: how many of these there are.
      pads: (before, after) per contracted axis, where the leaf was a slice.
    """

    shape: tuple[int, ...]
    parts: tuple[int, ...]
    summed: tuple[int, ...]
    order: tuple[int, ...]
    batch: int
    contracted: int
    pads: tuple[tuple[int, int], ...]

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x if x.shape == self.shape else x.reshape(self.shape)
        if self.summed:
            x = jnp.sum(x, axis=self.summed, keepdims=True)
        x = x.transpose(*self.order, *self.summed)
        x = x.reshape(x.shape[: len(self.order)]) if self.summed else x
        if any(pad != (0, 0) for pad in self.pads):
            x = jnp.pad(x, [(0, 0)] * (x.ndim - self.contracted) + list(self.pads))
        return x


class Mask(NamedTuple):
    """Which data count: an array of 0 and 1, and which axis of the mask each is."""

    array: Any
    axes: tuple[int, ...]


def _told(atom: Atom) -> bool:
    return atom.axis is not None and atom.size > 1


def mask_rows(mask: Mask, places: Dims, how: Arrangement) -> jax.Array | None:
    """The mask with the axes of the arranged operand (size 1 where it is constant).

    None if the rows of the operand are not those of the mask: an axis of the mask is
    missing, or contracted with the leaf.
    """
    starts = [sum(how.parts[:d]) for d in range(len(places))]
    contracted = {*how.order[len(how.order) - how.contracted :], *how.summed}
    for dim, start, parts in zip(places, starts, how.parts, strict=True):
        if any(map(_told, dim)) and (parts > 1 or start in contracted):
            return None
    atoms = [atom for dim in places for atom in dim if _told(atom)]
    split: list[Atom] = []
    for axis, size in zip(mask.axes, mask.array.shape, strict=True):
        mine = sorted((a for a in atoms if a.axis == axis), key=lambda a: -a.stride)
        if not covers(mine, size):
            return None
        split += mine
    if len(split) != len(atoms):
        return None
    # By atoms in the order of the operand, then by its axes, then arranged.
    array = mask.array.reshape([a.size for a in split])
    array = array.transpose([split.index(a) for a in atoms])
    named = [any(map(_told, dim)) for dim in places]
    ones = [a.size if _told(a) else 1 for dim in places for a in dim]
    full = [
        a.size if whole else 1
        for dim, whole in zip(places, named, strict=True)
        for a in dim
    ]
    array = jnp.broadcast_to(array.reshape(ones), full)
    shape = [1] * len(how.shape)
    for dim, start, whole in zip(places, starts, named, strict=True):
        shape[start] = math.prod(a.size for a in dim) if whole else 1
    array = array.reshape(shape).transpose(*how.order, *how.summed)
    return array.reshape(array.shape[: len(how.order)])


class Kind(NamedTuple):
    """What is kept of rows, and how it adds up.

    Attributes:
      take: (rows (*batch, *rows, *contracted), mask or None, batch, contracted) ->
        what is kept, a tuple of arrays with the batch axes in front.
      fold: (kept, axis, batch) -> kept, with one batch axis of `batch` turned into
        rows.
      merge: list of kept -> kept.
      sums: whether kept things add up entry by entry.
    """

    take: Callable[..., tuple[jax.Array, ...]]
    fold: Callable[..., tuple[jax.Array, ...]]
    merge: Callable[..., tuple[jax.Array, ...]]
    sums: bool


def _weighted(x, mask, normalize, contracted):
    """Rows in a floating dtype, those that do not count 0, of unit length on demand."""
    inner = tuple(range(x.ndim - contracted, x.ndim))
    half = x.dtype in (jnp.bfloat16, jnp.float16)
    x = x if half and not normalize and mask is None else x.astype(jnp.float32)
    if mask is not None:
        x = jnp.where(mask != 0, x, 0.0)
    if normalize:
        peak = jnp.max(jnp.abs(x), axis=inner, keepdims=True)
        x = x / jnp.where(peak > 0, peak, 1.0)
        length = jnp.sqrt(jnp.sum(jnp.square(x), axis=inner, keepdims=True))
        x = x / jnp.where(length > 0, length, 1.0)
    return x


def _whole_but_lead(subscripts: str, lead: str, x: jax.Array) -> Any:
    """Under explicit sharding: batch axes as in the rows, moments whole everywhere."""
    inputs, result = subscripts.split("->")
    found = einsum_sharding(f"{inputs}->{lead}", x, x)
    if found is None:
        return None
    rest = [None] * (len(result) - len(lead))
    return NamedSharding(found.mesh, PartitionSpec(*found.spec, *rest))


def _gram(normalize):
    def take(x, mask, batch, contracted):
        letters = string.ascii_letters
        lead, rows = letters[:batch], letters[batch : x.ndim - contracted]
        left = letters[x.ndim - contracted : x.ndim]
        right = letters[x.ndim : x.ndim + contracted]
        sizes = x.shape[batch : x.ndim - contracted]
        shape, fan_in = x.shape[:batch], math.prod(x.shape[x.ndim - contracted :])
        x = _weighted(x, mask, normalize, contracted)
        subscripts = f"{lead}{rows}{left},{lead}{rows}{right}->{lead}{left}{right}"
        gram = jnp.einsum(
            subscripts,
            x,
            x,
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
            out_sharding=_whole_but_lead(subscripts, lead, x),
        ).reshape(*shape, fan_in, fan_in)
        count = jnp.full(shape, min(math.prod(sizes), _MOST), jnp.int32)
        if mask is not None:
            each = mask.reshape(mask.shape[: len(shape) + len(sizes)]) != 0
            rows_each = math.prod(sizes) // math.prod(each.shape[batch:])
            inner = tuple(range(batch, each.ndim))
            count = jnp.sum(each, axis=inner, dtype=jnp.int32) * rows_each
            count = jnp.broadcast_to(count, shape)
        return gram, count

    def fold(kept, axis, batch):
        return tuple(jnp.sum(x, axis=axis, dtype=x.dtype) for x in kept)

    def merge(parts):
        return tuple(functools.reduce(jnp.add, x) for x in zip(*parts, strict=True))

    return Kind(take, fold, merge, True)


def _rows(normalize, finish=lambda rows: rows):
    def take(x, mask, batch, contracted):
        fan_in = math.prod(x.shape[x.ndim - contracted :])
        shape = x.shape[:batch]
        x = _weighted(x, mask, normalize, contracted).astype(jnp.float32)
        return (finish(x.reshape(*shape, -1, fan_in)),)

    def fold(kept, axis, batch):
        x = jnp.moveaxis(kept[0], axis, batch - 1)
        return (finish(x.reshape(*x.shape[: batch - 1], -1, x.shape[-1])),)

    def merge(parts):
        rows = [x for (x,) in parts]
        return (rows[0] if len(rows) == 1 else finish(jnp.concatenate(rows, -2)),)

    return Kind(take, fold, merge, False)


def spread(rows: jax.Array, most: int) -> jax.Array:
    """At most `most` rows per slice, evenly spread over those that are not zero.

    Zero rows are those that the mask hides, or other slices of a stacked kernel met.
    """
    if rows.shape[-2] <= most:
        return rows
    where = jax.typeof(rows).sharding
    if AxisType.Explicit in where.mesh.axis_types:  # what is sharded is not sorted
        rows = reshard(rows, NamedSharding(where.mesh, PartitionSpec()))
    counts = jnp.any(rows != 0, axis=-1)
    first = jnp.argsort(~counts, axis=-1, stable=True)
    last = jnp.sum(counts, axis=-1, dtype=jnp.int32, keepdims=True) - 1
    number = jax.lax.broadcasted_iota(
        jnp.int32, (*counts.shape[:-1], most), counts.ndim - 1
    )
    # number · last / parts; whole numbers apart, which float32 would round.
    parts = max(most - 1, 1)
    rest = jnp.floor((last % parts) * (number / parts).astype(jnp.float32) + 0.5)
    places = (last // parts) * number + rest.astype(jnp.int32)
    places = jnp.where(last < most, number, places)
    chosen = jnp.take_along_axis(first, places, axis=-1)
    return jnp.take_along_axis(rows, chosen[..., None], axis=-2)


def _sketched(rows: jax.Array, size: int) -> jax.Array:
    if rows.shape[-2] <= size:
        return rows
    shrink = functools.partial(shrink_rows, jnp.zeros((size, rows.shape[-1])))
    for _ in range(rows.ndim - 2):
        shrink = jax.vmap(shrink)
    return shrink(rows)


def kind_of(kind: str, normalize: bool, max_rows: int | None) -> Kind:
    """The `Kind` by its name; checks the options."""
    if kind not in ("gram", "rows", "sketch"):
        raise ValueError(f"kind must be 'gram', 'rows' or 'sketch', got {kind!r}.")
    if max_rows is not None and (kind == "gram" or max_rows < 1):
        raise ValueError(
            "max_rows must be at least 1, and is for rows and sketches: got "
            f"{max_rows} for kind={kind!r}."
        )
    if kind == "gram":
        return _gram(normalize)
    if kind == "rows":
        return _rows(normalize)
    if max_rows is None:
        raise ValueError("kind='sketch' needs max_rows.")
    return _rows(normalize, functools.partial(_sketched, size=max_rows))
