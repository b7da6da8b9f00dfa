"""Second moments of layer inputs: n × n numbers per kernel for any number of samples.

They hold all that growing a basis needs of the samples (`grow_subspace`), and Adam-NSCL
protects by them (`null_space_complement`). Devices that see different parts of the
samples can keep sums of their own, which are added up once (`merge_covariance`).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adamr import _tree
from adamr.subspaces.columns import matmul, transpose
from adamr.subspaces.subspace import Subspace, layout

__all__ = [
    "Covariance",
    "SharedCovariance",
    "empty_covariance",
    "mean_moment",
    "merge_covariance",
    "update_covariance",
]

_MOST = jnp.iinfo(jnp.int32).max


class Covariance(NamedTuple):
    """Uncentred second moments in leaf order; None for an unprotected leaf.

    Attributes:
      moments: X̄, float32 (*batch, n, n), n the fan-in: the mean of x xᵀ.
      counts: n̄, int32 (*batch): the number of samples so far, at most 2³¹ − 1.
    """

    moments: tuple[jax.Array | None, ...]
    counts: tuple[jax.Array | None, ...]


@jax.tree_util.register_pytree_node_class
class SharedCovariance(Covariance):
    """A `Covariance` that keeps once what several leaves share.

    `moments` and `counts` have an entry per leaf; entries of leaves that met
    the same rows are one array, and one leaf of this pytree.

    Attributes:
      same_as: per leaf the position of the first leaf with the same moment, which may
        be its own; None where there is none. Static: part of the pytree's structure.
    """

    same_as: tuple[int | None, ...]

    def __new__(
        cls,
        moments: tuple[jax.Array | None, ...],
        counts: tuple[jax.Array | None, ...],
        same_as: tuple[int | None, ...],
    ) -> "SharedCovariance":
        self = super().__new__(cls, moments, counts)
        self.same_as = same_as
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:  # copy and pickle
        return *self, self.same_as

    def _distinct(self) -> list[int]:
        return [i for i, first in enumerate(self.same_as) if first == i]

    def tree_flatten(self) -> tuple[list[Any], Any]:
        distinct = self._distinct()
        children = [(self.moments[i], self.counts[i]) for i in distinct]
        return children, self.same_as

    @classmethod
    def tree_unflatten(cls, same_as: Any, children: Any) -> "SharedCovariance":
        children = iter(children)
        pairs: list[Any] = []
        for i, first in enumerate(same_as):
            pairs.append(
                (None, None)
                if first is None
                else next(children)
                if first == i
                else pairs[first]
            )
        moments, counts = zip(*pairs, strict=True) if pairs else ((), ())
        return cls(moments, counts, same_as)


def mean_moment(total: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Σ x xᵀ / N and N; zero where N is."""
    number = jnp.maximum(count, 1).astype(jnp.float32)
    return total / number[..., None, None], count


def check_leaves(argument: str, covariance: Covariance, expected: int) -> None:
    """Raises unless the covariance has so many leaves."""
    count = len(covariance.moments)
    if count != expected:
        raise ValueError(
            f"{argument} is a Covariance of {count} parameter leaves, expected "
            f"{expected}: the subspace was made for other parameters than those that "
            "layer_inputs got."
        )


def check_moment(
    moment: jax.Array, where: str, basis: jax.Array, weights: jax.Array
) -> None:
    """Raises unless the moment has the shape that fits the basis of the same leaf."""
    how = layout(basis, weights)
    batch = tuple(basis.shape[d] for d in how.batch)
    expected = (*batch, how.fan_in, how.fan_in)
    if moment.shape != expected:
        text = f"covariance has shape {moment.shape} at {where}, expected {expected}"
        in_parts = moment.shape[1:] == expected
        hint = "; add its parts up with merge_covariance" if in_parts else ""
        raise ValueError(f"{text}{hint}.")


def empty_covariance(subspace: Subspace, *, parts: int | None = None) -> Covariance:
    """Zero moments and counts for every protected leaf.

    Args:
      subspace: says which leaves and axes are protected; its bases are not read.
      parts: for samples that are sharded over devices, how many separate sums to keep,
        so that `update_covariance` sends nothing. The sums get a leading axis of this
        size: place them like the samples
        (`jax.device_put(covariance, NamedSharding(mesh, P("data")))`) and add them up
        once with `merge_covariance`. None: a single sum without this axis.

    Returns:
      A `Covariance` of zeros.

    Raises:
      ValueError: for parts below 1.

    >>> from adamr import empty_subspace
    >>> c = empty_covariance(empty_subspace({"w": jnp.zeros((4, 2))}))
    >>> c.moments[0].shape
    (4, 4)
    """
    if parts is not None and parts < 1:
        raise ValueError(f"parts must be at least 1, got {parts}.")

    def leaf(basis, weights):
        if basis is None:
            return None, None
        how = layout(basis, weights)
        batch = tuple(basis.shape[d] for d in how.batch)
        batch = batch if parts is None else (parts, *batch)
        moment = jnp.zeros((*batch, how.fan_in, how.fan_in), jnp.float32)
        return moment, jnp.zeros(batch, jnp.int32)

    return Covariance(*zip(*map(leaf, *subspace), strict=True))


def require_finite(samples: jax.Array, where: str) -> None:
    """Raises, where the numbers are known."""
    finite = jnp.all(jnp.isfinite(samples))
    if not _tree.is_traced(finite) and not finite:
        raise ValueError(f"samples has NaN or infinite entries {where}.")


def checked_rows(
    name: str, samples: jax.Array, expected: tuple[Any, ...], fits: bool
) -> jax.Array:
    """Samples of leaf `name` as (*batch, num_samples, n); raises unless sound."""
    if jnp.issubdtype(samples.dtype, jnp.complexfloating):
        raise TypeError(f"samples is {samples.dtype} at {name}, expected real numbers.")
    if not fits:
        raise ValueError(
            f"samples has shape {samples.shape} at {name}, expected {expected}."
        )
    *batch, _, fan_in = expected
    if samples.shape[len(batch)] == 0:
        raise ValueError(f"samples is empty at {name}: shape {samples.shape}.")
    require_finite(samples, f"at {name}")
    return samples.reshape(*batch, -1, fan_in)


def _fits(samples: jax.Array, batch: list[int], fan_in: int) -> bool:
    """Whether samples are (*batch, num_samples, n), n in one axis or several."""
    at = len(batch)
    inner = samples.shape[at + 1 :]
    same = list(samples.shape[:at]) == batch
    return same and bool(inner) and math.prod(inner) == fan_in


def _dealt(name: str, samples: jax.Array, batch: list[int]) -> jax.Array:
    """Gives every part an equal block of the rows, in order, as devices hold them."""
    parts, at = batch[0], len(batch) - 1
    number = samples.shape[at]
    if number % parts:
        raise ValueError(
            f"samples has {number} rows at {name}, expected a multiple of {parts}, the "
            "number of parts of the covariance."
        )
    shape = (*samples.shape[:at], parts, number // parts, *samples.shape[at + 1 :])
    return jnp.moveaxis(samples.reshape(shape), at, 0)


def _rows(name: str, samples: jax.Array, moment: jax.Array) -> jax.Array:
    """Checks samples and brings them to (*batch, num_samples, n)."""
    *batch, fan_in, _ = moment.shape
    undealt = batch and _fits(samples, batch[1:], fan_in)
    if undealt and not _fits(samples, batch, fan_in):
        samples = _dealt(name, samples, batch)
    fits = _fits(samples, batch, fan_in)
    return checked_rows(name, samples, (*batch, "num_samples", fan_in), fits)


@jax.jit
def _added(moment, count, new, number):
    """Moment and count of one leaf after the moment of `number` more samples."""
    usable = jnp.all(jnp.isfinite(new), axis=(-1, -2))
    number = jnp.where(usable, number, 0)
    total = jnp.where(count > _MOST - number, _MOST, count + number)
    share = (number / jnp.maximum(total, 1).astype(jnp.float32))[..., None, None]
    averaged = moment + share * (new - moment)
    return jnp.where(usable[..., None, None], averaged, moment), total


@jax.jit
def _averaged(moment, count, rows):
    """The same after more rows (*batch, num_samples, n)."""
    number = rows.shape[-2]
    rows = rows.astype(jnp.float32)
    return _added(moment, count, matmul(transpose(rows), rows) / number, number)


def _add(covariance: Covariance, other: Covariance) -> Covariance:
    """That of the samples of both."""
    if len(covariance.moments) != len(other.moments):
        raise ValueError(
            f"samples is a covariance of {len(other.moments)} leaves, expected "
            f"{len(covariance.moments)}."
        )
    mine, theirs = getattr(covariance, "same_as", None), getattr(other, "same_as", None)
    shared = mine if mine == theirs else None
    done: dict[int, Any] = {}

    def leaf(i, moment, count, new, number):
        if moment is None or new is None:
            return moment, count
        if moment.shape != new.shape:
            raise ValueError(
                f"samples has a moment of shape {new.shape} at leaf {i}, expected "
                f"{moment.shape}."
            )
        require_finite(new, f"at leaf {i}")
        first = i if shared is None else shared[i]
        if first not in done:
            done[first] = _added(moment, count, new, number)
        return done[first]

    pairs = list(map(leaf, range(len(other.moments)), *covariance, *other))
    moments, counts = zip(*pairs, strict=True)
    if shared is None:
        return Covariance(moments, counts)
    return SharedCovariance(moments, counts, shared)


def update_covariance(covariance: Covariance, samples: Any) -> Covariance:
    """Adds a batch of layer inputs, in or outside jit and scan.

        X̄ <- (n̄ X̄ + XᵀX) / (n̄ + n),   n̄ <- n̄ + n

    or, given the covariance Ȳ of n more samples instead of the samples,

        X̄ <- (n̄ X̄ + n Ȳ) / (n̄ + n),   n̄ <- n̄ + n

    X holds n samples as rows. Guarantee: X̄ is the mean of x xᵀ over all samples, to
    rounding, however they are split into batches. The authors' code (Adam-NSCL) first
    averages each batch to one vector and adds the products up; to follow it, pass these
    means as samples.

    Args:
      covariance: the sums so far. With parts, each part gets an equal block of rows.
      samples: tree like the parameters, or a tuple in leaf order; per leaf a float
        array (num_samples, n), (layers, num_samples, n) for stacked kernels, or None;
        or a `Covariance`, such as `capture.layer_inputs` gives.

    Returns:
      A `Covariance` of the same shapes; a `SharedCovariance` where both are and share
      the same. A slice is unchanged where the squares of its samples are not finite
      (inside jit, also where the samples are not).

    Raises:
      ValueError: for samples of the wrong shape, empty or (outside jit) not finite.

    >>> from adamr import empty_subspace
    >>> c = empty_covariance(empty_subspace({"w": jnp.zeros((2, 1))}))
    >>> c = update_covariance(c, {"w": jnp.array([[2.0, 0.0], [0.0, 0.0]])})
    >>> c.moments[0]
    Array([[2., 0.],
           [0., 0.]], dtype=float32)
    """
    if isinstance(samples, Covariance):
        return _add(covariance, samples)
    names, leaves = _tree.flatten_with_names(samples)
    if len(leaves) != len(covariance.moments):
        raise ValueError(
            f"samples must have one entry (an array or None) per parameter leaf: got "
            f"{len(leaves)} ({_tree.listed(names)}), expected "
            f"{len(covariance.moments)}."
        )

    def leaf(name, x, moment, count):
        if moment is None or _tree.is_hole(x):
            return moment, count
        return _averaged(moment, count, _rows(name, jnp.asarray(x), moment))

    return Covariance(*zip(*map(leaf, names, leaves, *covariance), strict=True))


@jax.jit
def _merged(moments, counts):
    """Moment and count of one leaf over the parts along the leading axis."""
    counts = counts.astype(jnp.float32)
    total = jnp.sum(counts, axis=0, keepdims=True)
    share = (counts / jnp.where(total > 0, total, 1.0))[..., None, None]
    count = jnp.where(total < _MOST, total.astype(jnp.int32), _MOST)[0]
    return jnp.sum(share * moments, axis=0), count


def merge_covariance(covariance: Covariance) -> Covariance:
    """Adds up the parts along the leading axis: the covariance of all samples.

        X̄ = Σ n̄_i X̄_i / Σ n̄_i,   n̄ = Σ n̄_i

    Where the parts lie on different devices, this sends one sum of n × n numbers per
    kernel, and nothing else is sent before or after it.

    Args:
      covariance: from `empty_covariance(..., parts=...)`.

    Returns:
      A `Covariance` without the leading axis.

    >>> from adamr import empty_subspace
    >>> c = empty_covariance(empty_subspace({"w": jnp.zeros((2, 1))}), parts=2)
    >>> c = update_covariance(c, {"w": jnp.array([[2.0, 0.0], [0.0, 0.0]])})
    >>> c.moments[0][:, 0, 0], merge_covariance(c).moments[0][0, 0]
    (Array([4., 0.], dtype=float32), Array(2., dtype=float32))
    """

    def leaf(moment, count):
        return (None, None) if moment is None else _merged(moment, count)

    return Covariance(*zip(*map(leaf, *covariance), strict=True))
