"""Fan-in axes of any function of its parameters, read off its equations.

Wherever a parameter meets data in a contraction, the other operand is the layer's
input, the contracted axes are the fan-in, and an axis along which both are sliced (by a
scan, a vmap, experts) is a batch axis. So the equations of the function say all of
it, whatever library its layers come from:

    nnx        lambda params, x: nnx.merge(graph, params, rest)(x)
    linen      lambda params, x: module.apply({"params": params}, x)
    Equinox    lambda model, x: jax.vmap(model)(x)
    Haiku      lambda params, x: transformed.apply(params, None, x)
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adamr import _tree
from adamr.capture.interpret import run
from adamr.capture.origin import of_leaf
from adamr.capture.walk import Notes, Value, Walk
from adamr.subspaces.axes import Axes, listed_by_reason, read_axes

__all__ = [
    "Function",
    "contracted_axes",
    "draws_random_numbers",
    "plan_of",
    "traced",
    "values_of",
]


class Function(NamedTuple):
    """A function of parameters and inputs as equations.

    Attributes:
      jaxpr: its equations, closed.
      names, leaves: of the parameters, with holes and leaves that are not arrays.
      treedef: of the parameters.
      at: positions of the leaves that are arrays, the first operands of the jaxpr.
      inputs: the arrays among the inputs, its other operands.
    """

    jaxpr: Any
    names: list[str]
    leaves: list[Any]
    treedef: Any
    at: list[int]
    inputs: list[Any]


def _is_array(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")


def traced(forward: Callable[..., Any], params: Any, inputs: Sequence[Any]) -> Function:
    """The equations of `forward(params, *inputs)`."""
    if not callable(forward):
        raise TypeError(
            "forward must be a function of (params, *inputs), got "
            f"{type(forward).__name__}."
        )
    names, leaves = _tree.flatten_with_names(params)
    treedef = _tree.flatten(params)[1]
    at = [i for i, x in enumerate(leaves) if _is_array(x)]
    given, in_def = jax.tree.flatten(inputs)
    in_at = [i for i, x in enumerate(given) if _is_array(x)]

    def function(arrays, in_arrays):
        whole, fed = list(leaves), list(given)
        for i, x in zip(at, arrays, strict=True):
            whole[i] = x
        for i, x in zip(in_at, in_arrays, strict=True):
            fed[i] = x
        fed = jax.tree.unflatten(in_def, fed)
        out = forward(jax.tree.unflatten(treedef, whole), *fed)
        return [x for x in jax.tree.leaves(out) if _is_array(x)]

    arrays, in_arrays = [leaves[i] for i in at], [given[i] for i in in_at]
    jaxpr = jax.make_jaxpr(function)(arrays, in_arrays)
    return Function(jaxpr, names, leaves, treedef, at, in_arrays)


def draws_random_numbers(jaxpr: Any) -> bool:
    """Whether an equation, or one inside it, draws random numbers, as dropout does."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "random_bits":
            return True
        for inner in jax.tree.leaves(tuple(eqn.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns") and draws_random_numbers(inner):
                return True
    return False


def cannot_follow(leaf: Any) -> str | None:
    """Why a leaf has no fan-in whatever the function does with it."""
    if not _is_array(leaf):
        return f"not an array ({type(leaf).__name__})"
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return f"not floating ({leaf.dtype})"
    return None


def values_of(function: Function, arrays: Sequence[Any]) -> list[Value]:
    """The first operands of the jaxpr, which come from the leaves."""
    values = []
    for i, x in zip(function.at, arrays, strict=False):
        leaf = function.leaves[i]
        followed = cannot_follow(leaf) is None
        origins = (of_leaf(i, leaf.shape),) if followed else ()
        values.append(Value(x, origins, free=True))
    return values


class Unread(NamedTuple):
    """In place of `Axes`: why a leaf cannot be read."""

    reason: str


def plan_of(function: Function) -> list[Axes | Unread | None]:
    """How each leaf is protected, from the equations alone."""
    shapes = [tuple(getattr(x, "shape", ())) for x in function.leaves]
    notes, avals = Notes(shapes), function.jaxpr.in_avals
    values = values_of(function, avals)
    values += [Value(aval) for aval in avals[len(values) :]]
    run(Walk(notes), function.jaxpr.jaxpr, function.jaxpr.consts, values)
    if any(v.origins for v in values) and not notes.axes and not notes.reasons:
        raise ValueError(
            "forward makes no use of params: a function that closes over its "
            "parameters (a model, not the params it is given) has nothing to read; "
            f"the leaves of params are {_tree.listed(function.names)}."
        )

    def leaf(i):
        given = function.leaves[i]
        if _tree.is_hole(given):
            return None
        reasons = notes.reasons.get(i, [])
        why = cannot_follow(given) or "; ".join(reasons)
        if why:
            return Unread(why)
        axes = notes.axes.get(i)
        if axes is None:
            return Unread("not used by forward")
        fan_ins = sorted({a.protected for a in axes})
        if len(fan_ins) > 1:
            places = " and ".join(f"along axes {p}" for p in fan_ins)
            return Unread(f"met {places}, as a tied embedding is")
        common = set.intersection(*(set(a.batch) for a in axes))
        return Axes(fan_ins[0], tuple(sorted(common)))

    return [leaf(i) for i in range(len(function.leaves))]


def contracted_axes(forward: Callable[..., Any], params: Any, *inputs: Any) -> Any:
    """Which axes of each parameter meet data, read off the equations of `forward`.

    A leaf W that meets an operand X along its axes P, alone or in a scan or batch along
    B, in every place where `forward` uses it, has `Axes(protected=P, batch=B)`: a step
    ΔW with X ΔW = 0 leaves the outputs of `forward` on X unchanged.

    Seen through: transposes, reshapes, casts, slices, scaling by a number, sums with
    other parameters; jit, remat, vmap, scan, custom derivatives. Met in: `dot_general`
    (matmul, einsum), `conv_general_dilated`, look-ups of rows.

    Args:
      forward: `(params, *inputs) -> anything`: outputs, or a loss.
      params: parameters, arrays or `ShapeDtypeStruct`s; other leaves (functions, Python
        numbers) are left to `forward` as given.
      *inputs: of `forward`; `ShapeDtypeStruct`s are enough, nothing is computed.

    Returns:
      A tree like `params` of `Axes`, or None for a leaf that cannot be protected (added
      to data, in a while loop, looked up and contracted, …), for
      `empty_subspace(params, axes=...)`, which warns of them by name and reason, as
      `coverage` prints them. `capture.unread_leaves(axes)` returns the reasons.

    Warns:
      UserWarning: if no leaf can be read.

    Raises:
      TypeError: if `forward` cannot be called.
      ValueError: if `forward` uses no leaf of `params`.

    >>> from adamr import capture
    >>> def forward(p, x):
    ...     return jnp.einsum("ti,hio->tho", x, p["w"]) + p["b"][None]
    >>> params = {"w": jnp.ones((2, 3, 4)), "b": jnp.ones((2, 4))}
    >>> axes = contracted_axes(forward, params, jnp.ones((5, 3)))
    >>> axes["w"]
    Axes(protected=(1,), batch=())
    >>> axes["b"] is None, capture.unread_leaves(axes)
    (True, {'b': 'added to data'})
    """
    function = traced(forward, params, inputs)
    plan = plan_of(function)
    named = zip(function.names, plan, strict=True)
    unread = {name: a.reason for name, a in named if isinstance(a, Unread)}
    if unread and not any(isinstance(a, Axes) for a in plan):
        told = listed_by_reason(unread)
        warnings.warn(f"no leaf can be read off forward: {told}.", stacklevel=2)
    leaves = [read_axes(a, unread) if isinstance(a, Axes) else None for a in plan]
    return jax.tree.unflatten(function.treedef, leaves)
