"""Which axes of a leaf are contracted with the layer's input, and which only stack."""

import math
import warnings
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

from adamr import _tree

__all__ = [
    "MAX_FAN_IN",
    "Axes",
    "ReadAxes",
    "default_axes",
    "fan_in",
    "flatten_axes",
    "leaf_axes",
    "listed_by_reason",
    "read_axes",
    "reason_of",
    "unread_leaves",
]

# A basis of full rank for a larger fan-in takes more than 1 GB: an embedding's
# vocabulary, as a rule, rather than the width of a layer.
MAX_FAN_IN = 16384


class Axes(NamedTuple):
    """How one leaf is protected.

    Attributes:
      protected: axes contracted with the layer's input; together they are the fan-in.
      batch: axes along which every slice has a basis of its own (scanned layers,
        experts).

    The remaining axes are outputs: all of them share the basis.
    """

    protected: tuple[int, ...]
    batch: tuple[int, ...] = ()

    def normalized(self, ndim: int) -> "Axes":
        """The same axes counted from the front, checked against `ndim`."""
        for axis in self.protected + self.batch:
            if not -ndim <= axis < ndim:
                raise ValueError(f"axes names axis {axis} of a leaf with {ndim} axes.")
        protected = tuple(sorted(axis % ndim for axis in self.protected))
        batch = tuple(sorted(axis % ndim for axis in self.batch))
        if len(set(protected + batch)) != len(protected + batch) or not protected:
            raise ValueError(
                "axes needs at least one protected axis and none named twice, "
                f"got {self}."
            )
        return Axes(protected, batch)


class ReadAxes(Axes):
    """`Axes` that were read off a computation, which could not read some leaves.

    Attributes:
      unread: name and reason of every leaf of the same tree that has None.
    """

    unread: Mapping[str, str] = MappingProxyType({})

    def __repr__(self) -> str:
        return repr(Axes(*self))


def read_axes(axes: Axes, unread: Mapping[str, str]) -> ReadAxes:
    """The same axes, with the reasons for the leaves beside them."""
    read = ReadAxes(*axes)
    read.unread = unread
    return read


def unread_leaves(axes: Any) -> dict[str, str]:
    """Why leaves have None in a tree that `contracted_axes` returned, by name.

    >>> unread_leaves({"w": Axes((0,)), "bias": None})
    {}
    """

    def is_axes(x: Any) -> bool:
        return isinstance(x, Axes)

    found: dict[str, str] = {}
    for leaf in jax.tree.leaves(axes, is_leaf=is_axes):
        if isinstance(leaf, ReadAxes):
            found |= leaf.unread
    return found


def listed_by_reason(unread: Mapping[str, str]) -> str:
    """For a message: the leaves that share a reason together."""
    names: dict[str, list[str]] = {}
    for name, reason in unread.items():
        names.setdefault(reason, []).append(name)
    return "; ".join(f"{_tree.listed(each)} ({why})" for why, each in names.items())


def reason_of(name: str, unread: Mapping[str, str]) -> str | None:
    """Why the leaf `name` was not read, also where the tree was put into another."""
    for own, reason in unread.items():
        if name == own or name.endswith(f"/{own}"):
            return reason
    return None


def fan_in(axes: Axes, shape: Sequence[int]) -> int:
    return math.prod(shape[axis] for axis in axes.protected)


_VECTORS = ("beta", "bias", "gamma", "offset", "scale")


def _names_a_vector(path: str) -> bool:
    """Whether a leaf is a bias or a scale, which may be stacked or have heads."""
    *modules, name = [p for p in path.lower().split("/") if p != "value"] or [""]
    if name == "b":  # alone it is as likely the second of two kernels, a and b
        return bool(modules)
    if name in _VECTORS or name.endswith(("_bias", "_scale")):
        return True
    return "norm" in name or (name == "weight" and any("norm" in m for m in modules))


def default_axes(path: str, shape: tuple[int, ...]) -> Axes | None:
    """The rule for dense trees that nothing else is said about (Flax's layouts).

    ====================================  =======================  ==============
    leaf                                  shape                    protected
    ====================================  =======================  ==============
    `bias`, `scale` and the like          any                      none
    whatever else has one axis            (n,)                     none
    dense or embedding                    (in, out)                in
    attention `query`, `key`, `value`     (in, heads, head)        in
    attention `out`                       (heads, head, out)       heads and head
    `conv…` with three axes               (window, in, out)        window and in
    any other three axes: stacked dense   (layers, in, out)        in, per layer
    four axes and more: convolution       (*window, in, out)       window and in
    ====================================  =======================  ==============

    `bias and the like`: the last part of the name is beta, bias, gamma, offset, scale
    or (in a module) b, ends in _bias or _scale, or speaks of a norm. Other layouts need
    `axes=`, for which `capture.contracted_axes` reads them off the model.

    Args:
      path: the leaf's name, parts separated by `/`.
      shape: the leaf's shape.

    Returns:
      The axes, or None for a leaf that has no fan-in.

    >>> default_axes("block/mlp/kernel", (64, 256))
    Axes(protected=(0,), batch=())
    >>> default_axes("block/attention/out/kernel", (4, 16, 64))
    Axes(protected=(0, 1), batch=())
    >>> default_axes("block/attention/query/bias", (4, 16)) is None
    True
    """
    ndim = len(shape)
    if ndim < 2 or _names_a_vector(path):
        return None
    if ndim == 2:
        return Axes((0,))
    if ndim == 3:
        parts = path.split("/")
        if any(part in ("query", "key", "value") for part in parts):
            return Axes((0,))
        if "out" in parts or any(p.lower().startswith("conv") for p in parts):
            return Axes((0, 1))
        return Axes((1,), (0,))
    return Axes(tuple(range(ndim - 1)))


def flatten_axes(axes: Any, params: Any) -> list[Any]:
    """Axes per leaf of `params`: a tree like it, or a rule `(path, shape) -> Axes`."""
    names, leaves = _tree.flatten_with_names(params)
    # A module that can be called is a tree nevertheless.
    if callable(axes) and jax.tree_util.all_leaves([axes]):
        pairs = zip(names, leaves, strict=True)
        return [axes(n, x.shape) if hasattr(x, "shape") else None for n, x in pairs]

    def is_entry(x):
        return x is None or isinstance(x, Axes)

    found = _tree.positions_like(axes, params, is_entry)
    if found is None:
        count = len(jax.tree.leaves(axes, is_leaf=is_entry))
        raise ValueError(
            f"axes must be a tree like params with an Axes or None per leaf: got "
            f"{count} entries, expected {len(leaves)} ({_tree.listed(names)})."
        )
    return found


def leaf_axes(
    params: Any,
    axes: Any,
    unprotected: Sequence[str],
    max_fan_in: int | None = MAX_FAN_IN,
) -> list[Axes | None]:
    """The checked axes of each leaf that is to be protected; see `empty_subspace`."""
    names, leaves = _tree.flatten_with_names(params)
    if isinstance(unprotected, str):
        raise ValueError(f"unprotected must be a sequence of str, got {unprotected!r}.")
    for part in unprotected:
        if not any(part in name for name in names):
            raise ValueError(
                f"unprotected names {part!r}, which no leaf has: {_tree.listed(names)}."
            )
    how = flatten_axes(default_axes if axes is None else axes, params)
    reasons, unread = unread_leaves(axes), {}
    found: list[Axes | None] = []
    for name, leaf, spec in zip(names, leaves, how, strict=True):
        wanted = not any(part in name for part in unprotected)
        why = reason_of(name, reasons)
        if wanted and spec is None and why and hasattr(leaf, "shape"):
            unread[name] = why
        if not wanted or spec is None or not hasattr(leaf, "shape"):
            found.append(None)
            continue
        if not math.prod(leaf.shape):  # without entries there is nothing to protect
            found.append(None)
            continue
        spec = Axes(*spec).normalized(leaf.ndim)
        size = fan_in(spec, leaf.shape)
        if max_fan_in is not None and size > max_fan_in:
            raise ValueError(
                f"{name} has a fan-in of {size}, more than max_fan_in = {max_fan_in} "
                "(the vocabulary of an embedding?): name it in unprotected=, or raise "
                "max_fan_in."
            )
        found.append(spec)
    if unread:
        warnings.warn(
            f"{len(unread)} leaves stay unprotected: {listed_by_reason(unread)}. Name "
            "them in unprotected= to accept that.",
            stacklevel=3,
        )
    return found
