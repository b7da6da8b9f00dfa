"""Flattening that keeps holes, so that each parameter leaf has one fixed position.

`optax.masked` and `optax.partition` put a `MaskedNode` where a leaf is left out; other
libraries put `None`. To JAX both are empty subtrees, so a plain flatten would shift
every later leaf. State in leaf order (bases, shared second moments) needs positions
that do not change.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

# A unit -> the squared length of something in this unit, per leaf in leaf order.
Distances = Callable[[float], Sequence[jax.Array]]


def is_traced(value: Any) -> bool:
    """Whether a value is known only under a trace, as inside jit."""
    return isinstance(value, Tracer)


def is_known(value: Any) -> bool:
    """Whether a hyperparameter is a plain number: no schedule, no tracer, no tree."""
    if isinstance(value, np.ndarray | jax.Array):
        return value.ndim == 0 and not is_traced(value)
    return isinstance(value, Real)


def is_hole(node: Any) -> bool:
    """Whether a leaf is left out here."""
    return node is None or isinstance(node, optax.MaskedNode)


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """Leaves with the holes in their places, and the matching treedef."""
    return jax.tree.flatten(tree, is_leaf=is_hole)


def flatten_with_names(tree: Any) -> tuple[list[str], list[Any]]:
    """Readable leaf names such as `layer/kernel`, for messages and for rules."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_hole)
    names = [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in paths]
    return names, [leaf for _, leaf in paths]


def listed(names: Iterable[str]) -> str:
    """Leaf names for a message; those that differ in their first number are one entry.

    >>> listed(["head", *(f"layers/{i}/bias" for i in (0, 1, 2, 5))])
    'head, layers/{0-2,5}/bias'
    """
    alike: dict[tuple[str, ...], list[int]] = {}
    for name in dict.fromkeys(names):
        start, number, end = re.split(r"(0|[1-9]\d*|$)", name, maxsplit=1)
        key = (start, end) if number else (name,)
        alike.setdefault(key, []).extend([int(number)] if number else [])

    def told(numbers: list[int]) -> str:
        runs = groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0])
        found = [[x for _, x in run] for _, run in runs]
        parts = [f"{x[0]}-{x[-1]}" if len(x) > 1 else f"{x[0]}" for x in found]
        return f"{{{','.join(parts)}}}" if len(numbers) > 1 else "".join(parts)

    return ", ".join(told(numbers).join(key) for key, numbers in alike.items())


def positions_like(
    tree: Any, like: Any, is_leaf: Callable[[Any], bool] = is_hole
) -> list[Any] | None:
    """The leaves of `tree` at the positions of `like`, or None if it does not fit.

    A hole in `like` may stand for a whole subtree, as under `optax.partition` with
    prefix labels: whatever `tree` has there is one position.
    """
    positions, treedef = flatten(like)
    leaves = jax.tree.leaves(tree, is_leaf=is_leaf)
    if len(leaves) == len(positions):
        return leaves
    try:
        found = treedef.flatten_up_to(tree)
    except ValueError:
        return None
    pairs = zip(positions, found, strict=True)
    return [None if is_hole(x) else leaf for x, leaf in pairs]


def flatten_like(tree: Any, argument: str, params: Any) -> list[Any]:
    """Leaves of `tree` in the order of `params`, holes included."""
    leaves = positions_like(tree, params)
    if leaves is None:
        wanted, names = flatten_with_names(params)[0], flatten_with_names(tree)[0]
        raise ValueError(
            f"{argument} must be a tree like params with one entry (an array or None) "
            f"per leaf: got {len(names)} entries ({listed(names)}), expected "
            f"{len(wanted)} ({listed(wanted)})."
        )
    return leaves


def matches(
    positions: Sequence[Any],
    count: int,
    fits: Callable[[Any, int], bool],
    may_hide: Callable[[int], bool] = lambda entry: True,
) -> list[int | None] | None:
    """Which of `count` entries in leaf order belongs to each position.

    With as many entries as positions each has its own. With more entries, some holes
    stand for several leaves; the answer is then the only one in which every leaf fits
    its entry and every other entry may be hidden.

    Returns:
      An index per position (None for a hole), or None if there is no answer or more
      than one.
    """
    if len(positions) == count:
        return list(range(count))
    # ways[i][j]: how many answers positions[i:] have in entries[j:]; 2: several.
    ways = [[0] * (count + 1) for _ in range(len(positions))] + [[0] * count + [1]]
    for i in reversed(range(len(positions))):
        hole = is_hole(positions[i])
        # Of several holes in a row only the last stands for more than one leaf.
        long = hole and not (i + 1 < len(positions) and is_hole(positions[i + 1]))
        for j in reversed(range(count)):
            if may_hide(j) if hole else fits(positions[i], j):
                more = ways[i][j + 1] if long else 0
                ways[i][j] = min(ways[i + 1][j + 1] + more, 2)
    if ways[0][0] != 1:
        return None
    found: list[int | None] = []
    j = 0
    for i, x in enumerate(positions):
        if is_hole(x):
            found.append(None)
            while not ways[i + 1][j + 1]:
                j += 1
        else:
            found.append(j)
        j += 1
    return found


def places_in(
    tree: Any,
    argument: str,
    count: int,
    fits: Callable[[Any, int], bool],
    may_hide: Callable[[int], bool] = lambda entry: True,
) -> list[int | None]:
    """What `matches` finds for `tree`; raises if that is not one answer."""
    names, positions = flatten_with_names(tree)
    places = matches(positions, count, fits, may_hide)
    if places is None:
        raise ValueError(
            f"{argument} was made for {count} parameter leaves, but the tree it meets "
            f"has {len(positions)}: {listed(names)}. If a mask or labels hide whole "
            "subtrees, give every leaf its own entry: jax.tree.map(lambda _: label, "
            "subtree)."
        )
    return places


def leaf_of_each(
    tree: Any,
    count: int,
    fits: Callable[[Any, int], bool],
    may_hide: Callable[[int], bool] = lambda entry: True,
) -> list[Any] | None:
    """The leaf of `tree` that each entry belongs to, or None without one answer."""
    positions = flatten(tree)[0]
    places = matches(positions, count, fits, may_hide)
    if places is None:
        return None
    leaves: list[Any] = [None] * count
    for x, place in zip(positions, places, strict=True):
        if place is not None:
            leaves[place] = x
    return leaves


def map_positions(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Maps `function(leaf, *others)` over the leaves of `tree`; holes stay.

    Each of `rest` is a sequence with one entry per position of `tree`.
    """
    leaves, treedef = flatten(tree)
    mapped = [
        leaf if is_hole(leaf) else function(leaf, *others)
        for leaf, *others in zip(leaves, *rest, strict=True)
    ]
    return jax.tree.unflatten(treedef, mapped)


def spread(values: Sequence[Any], positions: Sequence[Any]) -> list[Any]:
    """One entry per position: the values in order, None where there is a hole."""
    spread: list[Any] = [None] * len(positions)
    there = [i for i, x in enumerate(positions) if not is_hole(x)]
    for i, value in zip(there, values, strict=True):
        spread[i] = value
    return spread


def is_placeholder(params: Any) -> bool:
    """Whether `params` is what `optax.tree.map_params` passes to `init`.

    It has no positions. An empty part of a partition has holes, an empty tree is an
    ordinary container.
    """
    return not flatten(params)[0] and not isinstance(params, Mapping | list | tuple)


def in_leaf_order(params: Any, function: Callable[..., Any], *rest: Any) -> Any:
    """State that is not parameter-shaped: a tuple in leaf order, never a tree.

    `optax.tree.map_params` calls `init` with a placeholder that has no leaves. It gets
    one opaque leaf instead of the tuple, so that it does not treat it as parameters.
    """
    if is_placeholder(params):
        return jnp.zeros([])
    leaves = [leaf for leaf in flatten(params)[0] if not is_hole(leaf)]
    return tuple(function(*each) for each in zip(leaves, *rest, strict=True))


def placed_like(old: jax.Array | np.ndarray, new: jax.Array | np.ndarray) -> jax.Array:
    """A new buffer with the values of `new` and the dtype and placement of `old`."""
    if not isinstance(old, jax.Array):
        return jnp.array(new, old.dtype, copy=True)
    if not is_traced(old) and isinstance(new, np.ndarray):
        if not old.is_fully_addressable:
            whole = new.astype(old.dtype)
            shard = whole.__getitem__
            return jax.make_array_from_callback(whole.shape, old.sharding, shard)
    new = jnp.asarray(new, old.dtype)
    if is_traced(old) or is_traced(new):
        return new
    # An uncommitted array must stay uncommitted, or the step recompiles.
    if not old.committed:
        return jnp.array(new, copy=True)
    return jax.device_put(new, old.sharding, may_alias=False)


def cleared(tree: Any) -> Any:
    """Zeros in fresh buffers, placed like the arrays of `tree`."""
    return jax.tree.map(lambda x: placed_like(x, jnp.zeros_like(x)), tree)


def require_arrays(tree: Any, where: str) -> None:
    """Raises for a leaf that is neither an array nor a number."""
    for name, x in zip(*flatten_with_names(tree), strict=True):
        if not (is_hole(x) or hasattr(x, "dtype") or isinstance(x, Real)):
            raise TypeError(
                f"{where}: the leaf {name!r} is a {type(x).__name__}, expected an "
                "array. Pass the arrays of a model alone, such as nnx.state(model, "
                "nnx.Param) or eqx.filter(model, eqx.is_array)."
            )


def stored_key(key: jax.Array) -> jax.Array:
    """A new buffer with a PRNG key as states hold it.

    A typed key becomes uint32 numbers, which every library can save; JAX reads them as
    a key of the default implementation, so a key of another one stays typed.
    """
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if key.dtype == jax.eval_shape(jax.random.key, 0).dtype:
            key = jax.random.key_data(key)
    return jnp.array(key, copy=True)


def require_real(tree: Any, where: str) -> None:
    """Raises for a complex leaf: squares and projections here are those of reals."""
    for name, x in zip(*flatten_with_names(tree), strict=True):
        if not is_hole(x) and jnp.issubdtype(x.dtype, jnp.complexfloating):
            raise TypeError(
                f"{where}: the leaf {name!r} is {x.dtype}, expected real numbers. Keep "
                "its real and imaginary parts as two leaves, or leave it out with "
                "optax.masked or optax.partition."
            )


def widened(tree: Any, like: Any) -> Any:
    """`tree` in dtypes at least as wide as those of `like`."""

    def cast(x: Any, wide: Any) -> Any:
        dtype = jnp.promote_types(x.dtype, wide.dtype)
        return x if x.dtype == dtype else x.astype(dtype)

    return jax.tree.map(cast, tree, like)


def largest(x: jax.Array, axis: Any = None, keepdims: bool = False) -> jax.Array:
    """max |x|, and NaN if an entry is: on a CPU, XLA's maximum may skip NaN."""
    top = jnp.max(jnp.abs(x), axis=axis, keepdims=keepdims, initial=0.0)
    broken = jnp.any(jnp.isnan(x), axis=axis, keepdims=keepdims)
    return jnp.where(broken, jnp.nan, top)


def squared_norm(x: jax.Array) -> jax.Array:
    """Sum of squares in float32."""
    return jnp.sum(jnp.square(x.astype(jnp.float32)))
