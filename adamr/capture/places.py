"""Where the axes of a mask lie in a value: which rows belong to which datum.

A mask (batch, time) says which positions count. An input of that leading shape has
these axes in front; from there they are followed through the computation by the same
atoms as the axes of a leaf (`dims`). Equations that move rows about in a way that is
not understood here lose the axes, and a mask is then refused rather than ignored.
"""

from collections.abc import Callable, Sequence
from typing import Any

from adamr.capture import dims as _dims
from adamr.capture.dims import Dims, unknown

__all__ = ["follow_places", "merged"]

_ELEMENTWISE = set(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp
    convert_element_type copy copy_p cos cosh cumlogsumexp cummax cummin cumprod cumsum
    digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt integer_pow is_finite le
    lgamma log log1p logistic lt max mesh_cast min mul ne neg nextafter not or pow
    reduce_precision rem reshard round rsqrt select_n sharding_constraint shift_left
    shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient
    sub tan tanh xor""".split()
)


def _named(dim: tuple) -> bool:
    return any(atom.axis is not None for atom in dim)


def merged(shape: Sequence[int], found: Sequence[Dims]) -> Dims:
    """What operands of one shape know together; contradictions are unknown."""
    out = list(unknown(shape))
    for d in range(len(shape)):
        names = {dims[d] for dims in found if _named(dims[d])}
        if len(names) == 1:
            out[d] = names.pop()
    return tuple(out)


def _elementwise(eqn, values):
    """Axes of size 1 are repeated, and say nothing."""
    shape = eqn.outvars[0].aval.shape
    found = [
        tuple(
            dim if m == n else unknown((n,))[0]
            for dim, m, n in zip(v.places, v.shape, shape, strict=True)
        )
        for v in values
        if len(v.shape) == len(shape)
    ]
    return merged(shape, found)


def _transpose(eqn, values):
    return tuple(values[0].places[d] for d in eqn.params["permutation"])


def _squeeze(eqn, values):
    gone = {d % len(values[0].shape) for d in eqn.params["dimensions"]}
    return tuple(dim for d, dim in enumerate(values[0].places) if d not in gone)


def _reshape(eqn, values):
    shape = eqn.outvars[0].aval.shape
    order = eqn.params["dimensions"]
    return _dims.reshape(values[0].places, shape, order) or unknown(shape)


def _broadcast(eqn, values):
    x, p = values[0], eqn.params
    return _dims.broadcast(x.places, x.shape, p["shape"], p["broadcast_dimensions"])


def _reduced(eqn, values):
    gone = set(eqn.params["axes"])
    return tuple(dim for d, dim in enumerate(values[0].places) if d not in gone)


def _dot(eqn, values):
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    left, right = (v.places for v in values[:2])
    sizes = [values[0].shape[d] for d in lb]
    both = merged(sizes, [tuple(left[d] for d in lb), tuple(right[d] for d in rb)])
    free = [left[d] for d in range(len(left)) if d not in (*lc, *lb)]
    free += [right[d] for d in range(len(right)) if d not in (*rc, *rb)]
    return (*both, *free)


def _conv(eqn, values):
    """The batch, and positions where there is one output for each input."""
    numbers, out = eqn.params["dimension_numbers"], eqn.outvars[0].aval.shape
    dims = list(unknown(out))
    if eqn.params["batch_group_count"] == 1:
        dims[numbers.out_spec[0]] = values[0].places[numbers.lhs_spec[0]]
    spatial = zip(numbers.lhs_spec[2:], numbers.out_spec[2:], strict=True)
    steps = zip(eqn.params["window_strides"], eqn.params["lhs_dilation"], strict=True)
    for (here, there), step in zip(spatial, steps, strict=True):
        if step == (1, 1) and values[0].shape[here] == out[there]:
            dims[there] = values[0].places[here]
    return tuple(dims)


def _gather(eqn, values):
    numbers, out = eqn.params["dimension_numbers"], eqn.outvars[0].aval.shape
    operand, indices = values[:2]
    dims = list(unknown(out))
    rows = [d for d in range(len(out)) if d not in numbers.offset_dims]
    for place, dim in zip(rows, indices.places[:-1], strict=True):
        dims[place] = dim
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    kept = [d for d in range(len(operand.shape)) if d not in gone]
    for place, d in zip(numbers.offset_dims, kept, strict=True):
        if eqn.params["slice_sizes"][d] == operand.shape[d]:
            dims[int(place)] = operand.places[d]
    for d, i in zip(
        numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True
    ):
        place = rows[i]
        both = (operand.places[d],), (indices.places[i],)
        (dims[place],) = merged((operand.shape[d],), both)
    return tuple(dims)


def _uncut(eqn, values):
    """Slices and pads: axes that keep their size keep their places."""
    out = eqn.outvars[0].aval.shape
    pairs = zip(values[0].places, values[0].shape, out, strict=True)
    return tuple(dim if size == new else unknown((new,))[0] for dim, size, new in pairs)


def _pad(eqn, values):
    out = list(_uncut(eqn, values))
    for d, config in enumerate(eqn.params["padding_config"]):
        if tuple(config) != (0, 0, 0):
            out[d] = unknown((eqn.outvars[0].aval.shape[d],))[0]
    return tuple(out)


def _concatenate(eqn, values):
    along = eqn.params["dimension"]
    cut = []
    for v in values:
        dims = list(v.places)
        dims[along] = unknown((1,))[0]
        cut.append(tuple(dims))
    out = eqn.outvars[0].aval.shape
    return merged(out, cut)


def _updated(eqn, values):
    whole, part = values[:2]
    if whole.shape == part.shape:
        return part.places
    pairs = zip(whole.places, part.places, whole.shape, part.shape, strict=True)
    found = [
        merged((m,), ((a,), (b,)))[0] if m == n else unknown((m,))[0]
        for a, b, m, n in pairs
    ]
    return tuple(found)


def _pooled(eqn, values):
    windows = eqn.params["window_dimensions"]
    pairs = zip(_uncut(eqn, values), windows, strict=True)
    out = eqn.outvars[0].aval.shape
    return tuple(
        dim if window == 1 else unknown((n,))[0]
        for (dim, window), n in zip(pairs, out, strict=True)
    )


_RULES: dict[str, Callable[[Any, Sequence[Any]], Dims]] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    "transpose": _transpose,
    "squeeze": _squeeze,
    "reshape": _reshape,
    "broadcast_in_dim": _broadcast,
    "dot_general": _dot,
    "conv_general_dilated": _conv,
    "gather": _gather,
    "slice": _uncut,
    "dynamic_slice": _uncut,
    "pad": _pad,
    "concatenate": _concatenate,
    "dynamic_update_slice": _updated,
    **dict.fromkeys(
        """argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod
        reduce_sum""".split(),
        _reduced,
    ),
    **dict.fromkeys(
        "reduce_window_max reduce_window_min reduce_window_sum".split(), _pooled
    ),
}


def follow_places(eqn: Any, values: Sequence[Any]) -> list[Dims]:
    """Where the mask's axes lie in each result of an equation."""
    name = eqn.primitive.name
    if name == "optimization_barrier":
        return [v.places for v in values]
    if name in ("split", "top_k"):
        cut = eqn.params.get("axis", len(values[0].shape) - 1)
        return [
            tuple(
                unknown((n,))[0] if d == cut else dim
                for d, (dim, n) in enumerate(
                    zip(values[0].places, v.aval.shape, strict=True)
                )
            )
            for v in eqn.outvars
        ]
    if name in _RULES:
        return [_RULES[name](eqn, values)]
    return [unknown(v.aval.shape) for v in eqn.outvars]
