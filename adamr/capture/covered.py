"""What a subspace protects of each leaf, at what cost, and what it does not and why."""

import math
from typing import Any, NamedTuple

from adamr import _tree
from adamr.subspaces.axes import Axes, flatten_axes, reason_of, unread_leaves
from adamr.subspaces.subspace import Subspace, layout

__all__ = ["Coverage", "LeafCoverage", "coverage"]


class LeafCoverage(NamedTuple):
    """One leaf.

    Attributes:
      name, shape: of the leaf (None for a leaf that is not an array).
      protected, batch: as in `Axes`; None where unprotected. Axes of size 1 in a basis
        are not told from outputs.
      fan_in: size of the protected space.
      capacity: directions that can be protected (per slice of a stacked leaf).
      bytes: of the basis and its weights.
      reason: why the leaf is unprotected; None where it is protected.
    """

    name: str
    shape: tuple[int, ...] | None
    protected: tuple[int, ...] | None
    batch: tuple[int, ...] | None
    fan_in: int
    capacity: int
    bytes: int
    reason: str | None


def _size(shape: tuple[int, ...] | None) -> int:
    return 0 if shape is None else math.prod(shape)


class Coverage(tuple[LeafCoverage, ...]):
    """A `LeafCoverage` per parameter leaf, in leaf order; prints as a table."""

    __slots__ = ()

    def __repr__(self) -> str:
        head = ("leaf", "shape", "along", "each", "fan-in", "capacity", "bytes")
        lines: list[tuple[str, ...]] = [head]
        for leaf in self:
            shape = (
                "-" if leaf.shape is None else "×".join(map(str, leaf.shape)) or "()"
            )
            if leaf.reason is not None:
                lines.append((leaf.name, shape, f"unprotected: {leaf.reason}"))
                continue
            axes = [",".join(map(str, a or ())) for a in (leaf.protected, leaf.batch)]
            sizes = (leaf.fan_in, leaf.capacity, leaf.bytes)
            lines.append((leaf.name, shape, *axes, *(f"{n:,}" for n in sizes)))
        full = [line for line in lines if len(line) == len(head)]
        first = [max(len(line[i]) for line in lines) for i in (0, 1)]
        rest = [max(len(line[i]) for line in full) for i in range(2, len(head))]

        def row(line):
            left = [x.ljust(n) for x, n in zip(line[:2], first, strict=True)]
            if len(line) != len(head):
                return "  ".join((*left, line[2]))
            right = [x.rjust(n) for x, n in zip(line[2:], rest, strict=True)]
            return "  ".join((*left, *right))

        covered = [leaf for leaf in self if leaf.reason is None]
        share = sum(_size(leaf.shape) for leaf in covered)
        whole = max(sum(_size(leaf.shape) for leaf in self), 1)
        total = (
            f"{len(covered)} of {len(self)} leaves protected, {share / whole:.1%} of "
            f"the parameters, {sum(leaf.bytes for leaf in covered):,} bytes"
        )
        return "\n".join([*(row(line).rstrip() for line in lines), total])

    __str__ = __repr__


def coverage(subspace: Subspace, params: Any, axes: Any = None) -> Coverage:
    """Per leaf: protected along what, at what cost; or unprotected, and why.

    Args:
      subspace: from `empty_subspace`, `make_subspace` or grown; shapes are enough.
      params: the parameters it was made for (arrays or `ShapeDtypeStruct`s).
      axes: what `contracted_axes` gave, for the reasons; None: they are not known.

    Returns:
      A tuple of `LeafCoverage` in leaf order that prints as a table.

    Raises:
      ValueError: if `params` or `axes` do not have the leaves of the subspace.

    >>> import jax.numpy as jnp
    >>> from adamr import contracted_axes, empty_subspace
    >>> params = {"bias": jnp.ones(4), "w": jnp.ones((3, 4))}
    >>> forward = lambda p, x: x @ p["w"] + p["bias"][None]
    >>> axes = contracted_axes(forward, params, jnp.ones((2, 3)))
    >>> subspace = empty_subspace(params, axes=axes, unprotected=["bias"])
    >>> coverage(subspace, params, axes)
    leaf  shape  along  each  fan-in  capacity  bytes
    bias  4      unprotected: added to data
    w     3×4        0             3         3     48
    1 of 2 leaves protected, 75.0% of the parameters, 48 bytes
    """
    subspace = subspace.at(params)
    names, leaves = _tree.flatten_with_names(params)
    given = [None] * len(leaves) if axes is None else flatten_axes(axes, params)
    reasons, found = unread_leaves(axes), []
    for name, leaf, basis, weights, told in zip(
        names, leaves, *subspace, given, strict=True
    ):
        shape = tuple(leaf.shape) if hasattr(leaf, "shape") else None
        if basis is not None and weights is not None:
            how = layout(basis, weights)
            size = sum(x.size * x.dtype.itemsize for x in (basis, weights))
            found.append(
                LeafCoverage(
                    name, shape, *how[:2], how.fan_in, how.capacity, size, None
                )
            )
            continue
        why = reason_of(name, reasons)
        if told is None and why:
            reason = why
        elif _tree.is_hole(leaf):
            reason = "no parameter"
        elif isinstance(told, Axes):
            reason = "left out when the subspace was made"
        elif axes is None:
            reason = "no basis (pass axes=contracted_axes(...) to see why)"
        else:
            reason = "None in axes"
        found.append(LeafCoverage(name, shape, None, None, 0, 0, 0, reason))
    return Coverage(found)
