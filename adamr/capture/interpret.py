"""Runs a function's jaxpr and notes every contraction of a parameter leaf with data.

The same walk serves twice: over shapes alone it finds how each leaf is used (`Notes`),
over values it also collects what the leaves meet (`Records`). Everything is jax, so the
latter runs under jit and on sharded arrays.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from jax.extend.core import Literal

from adamr.capture import contractions
from adamr.capture.dims import Dims, unknown
from adamr.capture.origin import follow
from adamr.capture.places import follow_places
from adamr.capture.scan import scan
from adamr.capture.walk import Value, Walk

__all__ = ["run"]

_CALLS = {
    "checkpoint", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call",
    "custom_vjp_call_jaxpr", "jit", "pjit", "remat", "remat2",
}  # fmt: skip

# Moves data about without computing: equal operands give equal results.
_MOVES = {"broadcast_in_dim", "convert_element_type", "reshape", "squeeze", "transpose"}

_REASONS = {
    "add": "added to data",
    "div": "divides or is divided elementwise",
    "mul": "multiplied elementwise with data",
    "sub": "added to data",
    "cond": "used inside cond (lax.cond, lax.switch)",
    "pallas_call": "used in a Pallas kernel",
    "shard_map": "used inside shard_map",
    "while": "used inside a while loop",
}


def _schedule(jaxpr: Any) -> Iterator[tuple[Any, list[Any]]]:
    """The equations whose results are used, and what can be forgotten after each."""
    needed = {v for v in jaxpr.outvars if not isinstance(v, Literal)}
    steps = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or any(v in needed for v in eqn.outvars):
            last = {v for v in eqn.invars if not isinstance(v, Literal)} - needed
            needed |= last
            steps.append((eqn, list(last)))
    return reversed(steps)


def _called(eqn: Any) -> Any:
    """The jaxpr that an equation merely calls, and its constants; else None."""
    if eqn.primitive.name not in _CALLS:
        return None
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = eqn.params.get(name)
        if inner is not None:
            return (
                (inner.jaxpr, inner.consts) if hasattr(inner, "consts") else (inner, ())
            )
    return None


def _bind(eqn: Any, arrays: Sequence[Any]) -> Sequence[Any]:
    params = eqn.primitive.get_bind_params(eqn.params)
    functions, params = params if isinstance(params, tuple) else ((), params)
    with eqn.ctx.manager:
        out = eqn.primitive.bind(*functions, *arrays, **params)
    return out if eqn.primitive.multiple_results else [out]


def _results(walk: Walk, eqn: Any, values: Sequence[Value]) -> Sequence[Any]:
    """The arrays that an equation gives: values, or shapes on a walk over shapes."""
    if walk.records is None:
        return [v.aval for v in eqn.outvars]
    arrays = [v.array for v in values]
    if eqn.primitive.name not in _MOVES:
        return _bind(eqn, arrays)
    return walk.records.once((eqn.primitive.name, str(eqn.params)), arrays,
                             lambda: _bind(eqn, arrays))  # fmt: skip


def _meet(walk: Walk, eqn: Any, values: Sequence[Value]) -> bool:
    """Notes the contractions of an equation; False if it contracts no leaf."""
    name = eqn.primitive.name
    if name == "dot_general":
        sides = [i for i in (0, 1) if values[i].origins]
        find = contractions.dot
    elif name == "conv_general_dilated":
        sides = [1] if values[1].origins and not values[0].origins else []
        find = lambda eqn, values, o, _: contractions.conv(eqn, values, o)  # noqa: E731
    elif name == "gather":
        sides = [0] if values[0].origins and not values[1].origins else []
        find = lambda eqn, values, o, _: contractions.gather(eqn, values, o)  # noqa: E731
    else:
        return False
    if len(sides) > 1:
        for side in sides:
            walk.notes.lost(values[side].origins, "contracted with another parameter")
    if len(sides) != 1:
        return len(sides) > 1
    (side,) = sides
    for origin in values[side].origins:
        operand = find(eqn, values, origin, side)
        if isinstance(operand, str):
            walk.notes.lost([origin], operand)
            continue
        found = contractions.meet(origin, walk.notes.shapes[origin.leaf], operand)
        if isinstance(found, str):
            walk.notes.lost([origin], found)
            continue
        walk.notes.met(origin.leaf, found.axes)
        if walk.records is not None:
            with eqn.ctx.manager:
                walk.records.add(origin.leaf, operand, found)
    return True


def _reason(eqn: Any) -> str:
    name = eqn.primitive.name
    return _REASONS.get(name, f"used by {name}")


def _apply(walk: Walk, eqn: Any, values: Sequence[Value]) -> list[Value]:
    if eqn.primitive.name == "scan":
        return scan(run, walk, eqn, values)
    called = _called(eqn)
    if called is not None:
        inner, consts = called
        return run(walk, inner, consts, values[len(values) - len(inner.invars) :])
    met = _meet(walk, eqn, values)
    origins, lost = ([()] * len(eqn.outvars), []) if met else follow(eqn, values)
    if lost:
        walk.notes.lost(lost, _reason(eqn))
    arrays = _results(walk, eqn, values)
    places: Sequence[Dims | None] = [None] * len(arrays)
    if any(v.places is not None for v in values):
        places = follow_places(eqn, [_placed(v) for v in values])
    free = all(v.free for v in values)
    return [Value(*each, free) for each in zip(arrays, origins, places, strict=True)]


def _placed(value: Value) -> Value:
    if value.places is not None:
        return value
    return value._replace(places=unknown(value.shape))


def run(
    walk: Walk, jaxpr: Any, consts: Sequence[Any], values: Sequence[Value]
) -> list[Value]:
    """Walks through a jaxpr; values of its results."""
    known: dict[Any, Value] = dict(zip(jaxpr.invars, values, strict=True))
    for variable, const in zip(jaxpr.constvars, consts, strict=True):
        known[variable] = Value(const)

    def read(variable):
        if isinstance(variable, Literal):
            array = variable.aval if walk.records is None else variable.val
            return Value(array, free=True)
        return known[variable]

    for eqn, last in _schedule(jaxpr):
        results = _apply(walk, eqn, [read(v) for v in eqn.invars])
        known.update(zip(eqn.outvars, results, strict=True))
        for variable in last:
            known.pop(variable, None)
    return [read(v) for v in jaxpr.outvars]
