"""Layer inputs of any function of its parameters, read off its equations."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamr import _tree
from adamr.capture.axes import (
    Function,
    Unread,
    draws_random_numbers,
    plan_of,
    traced,
    values_of,
)
from adamr.capture.dims import Atom, unknown
from adamr.capture.interpret import run
from adamr.capture.records import Records, settled
from adamr.capture.rows import Mask, kind_of, spread
from adamr.capture.walk import Notes, Value, Walk
from adamr.subspaces.axes import MAX_FAN_IN, Axes, fan_in, listed_by_reason
from adamr.subspaces.covariance import SharedCovariance, mean_moment
from adamr.subspaces.subspace import Subspace

__all__ = ["layer_inputs"]


def _selected(function: Function, leaves: Any) -> list[bool]:
    names = function.names
    if leaves is None:
        return [True] * len(names)
    if isinstance(leaves, Subspace):
        if len(leaves.bases) != len(names):
            raise ValueError(
                f"leaves is a subspace of {len(leaves.bases)} leaves, expected "
                f"{len(names)}: {_tree.listed(names)}."
            )
        return [basis is not None for basis in leaves.bases]
    if callable(leaves):
        return [bool(leaves(name)) for name in names]
    if isinstance(leaves, str):
        raise ValueError(f"leaves must be a sequence of str, got {leaves!r}.")
    for part in leaves:
        if not any(part in name for name in names):
            raise ValueError(
                f"leaves names {part!r}, which no leaf has: {_tree.listed(names)}."
            )
    return [any(part in name for part in leaves) for name in names]


def _checked_mask(mask: Any, inputs: Sequence[Any]) -> Mask | None:
    if mask is None:
        return None
    mask = jnp.asarray(mask)
    if mask.ndim == 0:
        raise ValueError("mask is a number, expected the leading axes of the inputs.")
    if not any(x.shape[: mask.ndim] == mask.shape for x in inputs):
        shapes = [tuple(x.shape) for x in inputs]
        raise ValueError(
            f"mask has shape {mask.shape}, expected the leading axes of an input "
            f"(batch, or batch and time): the inputs have shapes {shapes}."
        )
    if not _tree.is_traced(mask) and not np.any(np.asarray(mask)):
        raise ValueError("mask hides every row: nothing would be protected.")
    return Mask(mask, tuple(range(mask.ndim)))


def _fed(x: Any, mask: Mask | None) -> Value:
    if mask is None:
        return Value(x)
    places, n = list(unknown(x.shape)), mask.array.ndim
    if x.shape[:n] == mask.array.shape:
        places[:n] = [(Atom(d, 1, size),) for d, size in enumerate(x.shape[:n])]
    return Value(x, places=tuple(places))


def _check_sizes(function: Function, plan: dict[int, Axes], most: int | None) -> None:
    for i, axes in plan.items():
        n = fan_in(axes, function.leaves[i].shape)
        if most is not None and n > most:
            raise ValueError(
                f"{function.names[i]} has a fan-in of {n}, more than max_fan_in = "
                f"{most} (the vocabulary of an embedding?): leave it out with leaves=, "
                "or raise max_fan_in."
            )


def layer_inputs(
    forward: Callable[..., Any],
    params: Any,
    *inputs: Any,
    mask: Any = None,
    normalize: bool = False,
    kind: str = "gram",
    max_rows: int | None = None,
    leaves: Any = None,
    max_fan_in: int | None = MAX_FAN_IN,
) -> Any:
    """The inputs that every parameter meets in `forward`, for `grow_subspace`.

    With x_1, …, x_N the rows that a leaf meets, flattened over its fan-in axes in the
    leaf's order (N: batch times positions; all places that use the leaf together),

        kind="gram"     X̄ = Σ_i x_i x_iᵀ / N and N         a `SharedCovariance`
        kind="rows"     x_1, …, x_N, at most `max_rows` of them, evenly spread over
                        those that are not zero
        kind="sketch"   `max_rows` rows S with SᵀS ≈ Σ_i x_i x_iᵀ (Frequent Directions)

    A Gram matrix of float32 tells directions with at least 1e-6 of a leaf's energy from
    noise: what is grown from it holds old outputs to 1e-3 of their size where rows are
    nearly alike (a layer after attention), and better elsewhere. Rows lose nothing
    outside jit, and are smaller as long as they are fewer than the fan-in.

    One set per slice for stacked layers and experts. Leaves that meet the same value
    (query, key, value; gate, up) share one Gram matrix, computed and kept once:
    `result.same_as` says which. A large set goes through in portions,

        total = layer_inputs(forward, params, first)
        total = update_covariance(total, layer_inputs(forward, params, second))

    and a large model in portions of its leaves (`leaves=`). Runs under jit (the way to
    call it on a large model), where sharded inputs cost one sum over devices per
    Gram matrix; eagerly, it computes `forward` equation by equation.

    Args:
      forward: `(params, *inputs) -> anything`, in evaluation mode: warns if it draws
        random numbers, as dropout does.
      params: parameters; leaves that are not arrays are left to `forward` as given.
      *inputs: arrays with a leading batch axis; whatever else `forward` takes.
      mask: which data count (bool, or numbers of which 0 hides): (batch,) or (batch,
        time), the leading axes of the inputs. Rows hidden by it are dropped (0 among
        `rows`). A leaf whose rows are not those of the mask (experts after dispatch,
        means over time) is refused; rows that do not depend on the data all count.
      normalize: scales every row to unit length first.
      kind: "gram", "rows" or "sketch".
      max_rows: per leaf (and slice), for "rows" (None: all) and "sketch".
      leaves: which leaves: a `Subspace` (those that it protects), parts of names, or a
        function `name -> bool`; None: all that can be read.
      max_fan_in: the largest fan-in for which rows are collected; None: no limit.

    Returns:
      A `SharedCovariance` in leaf order, or a tree like `params` of float32 arrays
      (num_rows, n), (slices, num_rows, n) for stacked kernels; None for leaves that
      are not read (`contracted_axes` says why).

    Raises:
      TypeError: if `forward` cannot be called.
      ValueError: for an unknown kind, or max_rows with "gram" or missing with "sketch";
        if `forward` uses no leaf of `params`, if nothing can be read or is selected, or
        `leaves` names what no leaf has; for a mask of another shape than the data, one
        that hides everything, or one that does not fit the rows of a leaf; for a fan-in
        above `max_fan_in`; for inputs without rows, or (outside jit) with NaN or
        infinite ones.

    >>> from adamr import contracted_axes, empty_subspace, grow_subspace
    >>> params = {"in": jnp.ones((3, 4)), "out": jnp.ones((4, 1))}
    >>> forward = lambda p, x: jnp.tanh(x @ p["in"]) @ p["out"]
    >>> x = jnp.eye(3)[:2]
    >>> inputs = layer_inputs(forward, params, x)
    >>> inputs.moments[0]
    Array([[0.5, 0. , 0. ],
           [0. , 0.5, 0. ],
           [0. , 0. , 0. ]], dtype=float32)
    >>> subspace = empty_subspace(params, axes=contracted_axes(forward, params, x))
    >>> subspace = grow_subspace(subspace, inputs)

    References:
      Saha, Garg, Roy, Gradient Projection Memory for Continual Learning,
      arXiv:2103.09762. Ghashami, Liberty, Phillips, Woodruff, Frequent Directions:
      Simple and Deterministic Matrix Sketching, arXiv:1501.01711.
    """
    keep = kind_of(kind, normalize, max_rows)
    function = traced(forward, params, inputs)
    for x in (*function.leaves, *function.inputs):
        if isinstance(x, jax.ShapeDtypeStruct):
            raise ValueError("layer_inputs needs values, got a ShapeDtypeStruct.")
    for x in function.inputs:
        if 0 in x.shape:
            raise ValueError(
                f"inputs has an array of shape {x.shape}: no rows to read."
            )
    if draws_random_numbers(function.jaxpr.jaxpr):
        warnings.warn(
            "forward draws random numbers (dropout?): what the layers meet with one "
            "draw is not what they meet in use. Pass the model in evaluation mode.",
            stacklevel=2,
        )
    axes = plan_of(function)
    chosen = _selected(function, leaves)
    plan = {i: a for i, a in enumerate(axes) if isinstance(a, Axes) and chosen[i]}
    if not plan:
        why = {
            name: a.reason
            for name, a, here in zip(function.names, axes, chosen, strict=True)
            if isinstance(a, Unread) and here
        }
        reasons = listed_by_reason(why) or "no leaf"
        raise ValueError(f"no layer input can be read: {reasons}.")
    _check_sizes(function, plan, max_fan_in)
    told = _checked_mask(mask, function.inputs)
    records = Records(keep, plan, told)
    arrays = [jnp.asarray(function.leaves[i]) for i in function.at]
    values = values_of(function, arrays)
    values += [_fed(jnp.asarray(x), told) for x in function.inputs]
    shapes = [tuple(getattr(x, "shape", ())) for x in function.leaves]
    walk = Walk(Notes(shapes), records)
    run(walk, function.jaxpr.jaxpr, function.jaxpr.consts, values)
    if records.refused:
        names = [function.names[i] for i in sorted(records.refused)]
        raise ValueError(
            f"mask of shape {told.array.shape if told else None} does not fit the rows "
            f"that these leaves meet: {_tree.listed(names)}. It must have the leading "
            "axes of the data, (batch,) or (batch, time), and not the axis of "
            "features. Leaves whose rows are not those of the data (experts after "
            "dispatch, means over time) can be left out with leaves=."
        )
    return _collected(function, records, shapes, kind, max_rows)


def _collected(function, records: Records, shapes, kind: str, max_rows: int | None):
    """One entry per leaf; leaves that met the same share theirs."""
    first: dict[Any, int] = {}
    same_as: list[int | None] = [None] * len(shapes)
    found: list[Any] = [None] * len(shapes)
    for i in sorted(records.met):
        axes = records.plan[i]
        sizes = [shapes[i][d] for d in axes.batch]
        key = tuple(records.met[i]), axes.batch, tuple(sizes)
        same_as[i] = place = first.setdefault(key, i)
        if place != i:
            found[i] = found[place]
        elif kind == "gram":
            found[i] = mean_moment(*settled(records, i, shapes[i]))
        else:
            (rows,) = settled(records, i, shapes[i])
            found[i] = rows if max_rows is None else spread(rows, max_rows)
        for x in jax.tree.leaves(found[i]):
            if not _tree.is_traced(x) and not jnp.all(jnp.isfinite(x)):
                raise ValueError(
                    f"inputs give NaN or infinite entries in what {function.names[i]} "
                    "meets."
                )
    if kind != "gram":
        return jax.tree.unflatten(function.treedef, found)
    pairs = [(None, None) if pair is None else pair for pair in found]
    moments, counts = zip(*pairs, strict=True)
    return SharedCovariance(moments, counts, tuple(same_as))
