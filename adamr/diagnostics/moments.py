"""What the moments m and v look like, read from any optimizer state."""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adamr import _tree
from adamr._nodes import find_nodes
from adamr.diagnostics.measured import Measured, measure, ratio
from adamr.protection.eigenbasis import EigenbasisState, Rotated
from adamr.routing.estimators import ESTIMATORS, AmsgradMoments, FactoredMoments
from adamr.state import get_subspace
from adamr.subspaces.protected import require_subspace
from adamr.subspaces.subspace import Subspace, used, weighted

__all__ = ["MomentStatistics", "moment_statistics"]


class MomentStatistics(NamedTuple):
    """The statistics that `moment_statistics` states.

    Attributes:
      count: int32, the largest number of steps of any moments.
      mu_norm, nu_mean, nu_min, nu_max, largest_ratio: `Measured` over all leaves.
      old_energy, old_learning_rate, base_learning_rate: `Measured` over the protected
        leaves, or None without a subspace.
    """

    count: jax.Array
    mu_norm: Measured
    nu_mean: Measured
    nu_min: Measured
    nu_max: Measured
    largest_ratio: Measured
    old_energy: Measured | None
    old_learning_rate: Measured | None
    base_learning_rate: Measured | None


def _find_moments(opt_state: Any) -> list[tuple[Any, Subspace | None]]:
    """States with count, mu and nu, ours or optax's, and the eigenbasis of each."""

    def is_target(node):
        has_moments = {"count", "mu", "nu"} <= set(getattr(node, "_fields", ()))
        return has_moments or isinstance(node, EigenbasisState)

    found = []
    for node in jax.tree.leaves(opt_state, is_leaf=is_target):
        if isinstance(node, EigenbasisState):
            inner = _find_moments(node.inner)
            found += [(state, node.subspace) for state, _ in inner]
        elif is_target(node):
            found.append((node, None))
    return found


class _Entries(NamedTuple):
    """Moments of a leaf, or of one half of a rotated leaf, and weights of them."""

    m: jax.Array
    v: jax.Array
    ratio: jax.Array  # |m̂| / √v̂
    d: jax.Array  # 1 / (√(v̂ + eps_root) + eps)
    # Weights that broadcast to the moments:
    there: jax.Array | float = 1.0  # 0 for a zero column of the basis
    inside: jax.Array | float | None = None  # share along U; None: unprotected
    trace: jax.Array | float = 1.0  # share in the trace of the step's operator


class _Options(NamedTuple):
    """The options of the moments, as `moment_statistics` takes them."""

    b1: float
    b2: float | None
    eps: float
    eps_root: float


def _entries(state: Any, options: _Options) -> list[tuple[_Entries, ...]]:
    """Per parameter leaf: one entry, two for a rotated leaf, none for a hole.

    A v that is shared along axes, or factored, is broadcast to the shape of m.
    """
    b1, b2, eps, eps_root = options
    count, m = jax.tree.leaves(state.count)[0], jax.tree.leaves(state.mu)
    steps = jnp.maximum(count, 1).astype(jnp.float32)
    correction = 1.0 if b2 is None else 1.0 - b2**steps
    nu, nu_max = state.nu, getattr(state, "nu_max", None)
    if isinstance(nu, AmsgradMoments):
        nu, nu_max = nu
    if isinstance(nu, FactoredMoments):
        kind = ESTIMATORS["adafactor"]
        zeros = [jnp.zeros(x.shape, x.dtype) for x in kind.shapes(nu, m)]
        # With b2 = 1 and t = ∞ the zeros do not count: v̂ of the unchanged state.
        nu = kind.update(zeros, nu, 1.0, jnp.inf)[0]
        nu_max = nu = [jnp.where(count > 0, x, 0.0) for x in nu]
    # Amsgrad and adafactor keep a v̂ that needs no correction.
    hats, correction = (nu, correction) if nu_max is None else (nu_max, 1.0)

    def entry(m, v, hat):
        m, v, hat = (y.astype(jnp.float32) for y in jnp.broadcast_arrays(m, v, hat))
        root, m_hat = jnp.sqrt(hat / correction), jnp.abs(m) / (1.0 - b1**steps)
        d = 1.0 / (jnp.sqrt(hat / correction + eps_root) + eps)
        return _Entries(m, v, ratio((m_hat, root)), d)

    arrays = zip(m, jax.tree.leaves(nu), jax.tree.leaves(hats), strict=True)
    entries = [entry(*each) for each in arrays]

    def is_one_leaf(x):
        return _tree.is_hole(x) or isinstance(x, Rotated)

    leaves = jax.tree.leaves(state.mu, is_leaf=is_one_leaf)
    ends = [0, *itertools.accumulate(len(jax.tree.leaves(x)) for x in leaves)]
    return [tuple(entries[i:j]) for i, j in itertools.pairwise(ends)]


def _shares(
    basis: jax.Array | None, weights: jax.Array | None, entries: tuple[_Entries, ...]
) -> tuple[_Entries, ...]:
    """The entries of one leaf, with their shares along U where it is protected."""
    if basis is None or weights is None:
        return entries
    length = jnp.sum(jnp.square(basis.astype(jnp.float32)), axis=-1)  # Σ_k U_ik²
    if len(entries) == 1:
        (whole,) = entries
        return (whole._replace(inside=length),)
    along, rest = entries
    there = weighted(used(basis, weights), jnp.ones_like(along.m))
    # The rest is kept off U on the way out: none of a coordinate that lies in U.
    outside = jnp.where(length < 1.0 - 1e-6, 1.0 - length, 0.0)
    along = along._replace(
        ratio=jnp.where(there > 0, along.ratio, 0.0),
        there=there,
        inside=there,
        trace=there,
    )
    return along, rest._replace(inside=0.0, trace=outside)


def _entries_by_leaf(
    found: list[tuple[Any, Subspace | None]],
    subspace: Subspace | None,
    options: _Options,
) -> list[tuple[_Entries, ...]]:
    """The entries of all states, by parameter leaf, with their shares along U."""
    leaves: dict[int, tuple[_Entries, ...]] = {}
    for state, own in found:
        u = own or subspace
        if own is None and u is not None:
            u.check(state.mu, "subspace")
        for i, entries in enumerate(_entries(state, options)):
            if len(entries) == 2 and own is None:
                raise ValueError(
                    "opt_state lacks the basis: pass the whole EigenbasisState."
                )
            if entries and leaves.get(i):
                raise ValueError(
                    "opt_state holds several moments of one leaf: pass a part of it."
                )
            if entries and u is not None:
                entries = _shares(u.bases[i], u.weights[i], entries)
            leaves[i] = leaves.get(i, ()) + tuple(e for e in entries if e.m.size)
    return list(leaves.values())


def _sum(share: Any, x: jax.Array) -> jax.Array:
    """Σ share · x; 0 · inf is 0."""
    return jnp.sum(jnp.where(share > 0, share * x, 0.0))


def _mean(share: Any, x: jax.Array) -> jax.Array:
    """Σ share · x and the sum of the shares, for `ratio`."""
    share = jnp.asarray(share, jnp.float32)
    return jnp.stack([_sum(share, x), jnp.sum(share) * (x.size / share.size)])


def _used_v(entry: _Entries, otherwise: float) -> jax.Array:
    """v, and `otherwise` at zero columns of the basis."""
    return jnp.where(jnp.asarray(entry.there) > 0, entry.v, otherwise)


def _extreme(reduce: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """max or min, and NaN if an entry is: on a CPU, XLA's maximum may skip NaN."""
    return jnp.where(jnp.any(jnp.isnan(x)), jnp.nan, reduce(x))


def moment_statistics(
    opt_state: Any,
    subspace: Subspace | None = None,
    *,
    b1: float = 0.9,
    b2: float | None = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
) -> MomentStatistics:
    """Statistics of m and v, found inside any wrapper; a pytree of scalars.

    With m̂ = m / (1 − b1^count), v̂ = v / (1 − b2^count) (amsgrad: the largest so far;
    adafactor: v), D = 1 / (√(v̂ + eps_root) + eps), per leaf and over all leaves:

        mu_norm             ‖m‖
        nu_mean, nu_min, nu_max
        largest_ratio       max |m̂| / √v̂: 0 where m̂ = 0, inf where only v̂ = 0
        old_energy          Σ_k Σ_i U_ik² v_i / Σ_i v_i, the share of v along old
                            directions; rank / fan-in if v is isotropic
        old_learning_rate   mean over directions and outputs of u_kᵀ D u_k, the factor
                            of m̂ in the merging link along old directions
        base_learning_rate  mean of D over the protected leaves, tr D / size

    In an eigenbasis v is kept along U and off it: there v_k replaces Σ_i U_ik² v_i, D_k
    replaces u_kᵀ D u_k, and D is the operator rotated back. Where v = 0, as before the
    first step, D = 1 / (√eps_root + eps).

    Args:
      opt_state: the state of a routed chain, of `adamr`, or of an optax Adam or
        AMSGrad, in any wrapper. A partition is measured over all its optimizers.
      subspace: U; every direction counts in full, whatever its weight λ. None: the one
        that `opt_state` holds; if it holds none, the last three fields are None.
        Moments in an eigenbasis are measured along that basis.
      b1: decay of m, in [0, 1).
      b2: decay of v, in [0, 1); None: v̂ = v, as in rmsprop and adagrad.
      eps: added outside the root.
      eps_root: added inside the root.

    Returns:
      `MomentStatistics` of float32 scalars.

    Raises:
      ValueError: if `opt_state` has no moments, or several of one leaf; if it holds
        subspaces of different shapes and none is given.

    >>> import optax
    >>> tx = optax.adam(0.1)
    >>> _, state = tx.update(jnp.array([1.0, -2.0]), tx.init(jnp.zeros(2)))
    >>> print(moment_statistics(state).largest_ratio.total.round(3))
    1.0
    """
    if subspace is None and find_nodes(opt_state, Subspace):
        subspace = get_subspace(opt_state)
    elif subspace is not None:
        require_subspace(subspace, "moment_statistics")
    found = _find_moments(opt_state)
    if not found:
        raise ValueError("opt_state holds no state with count, mu and nu.")
    every = _entries_by_leaf(found, subspace, _Options(b1, b2, eps, eps_root))
    protected = [e if e and e[0].inside is not None else () for e in every]
    along_old = (
        lambda e: jnp.stack([_sum(e.inside, e.v), _sum(e.there, e.v)]),
        lambda e: _mean(e.inside, e.d),
        lambda e: _mean(e.trace, e.d),
    )
    old = [
        measure(protected, pair, finish=ratio) if subspace else None
        for pair in along_old
    ]
    counts = [jax.tree.leaves(state.count)[0] for state, _ in found]
    return MomentStatistics(
        functools.reduce(jnp.maximum, counts),
        measure(every, lambda e: _sum(e.there, jnp.square(e.m)), finish=jnp.sqrt),
        measure(every, lambda e: _mean(e.there, e.v), finish=ratio),
        measure(every, lambda e: _extreme(jnp.min, _used_v(e, jnp.inf)), jnp.minimum),
        measure(every, lambda e: _extreme(jnp.max, _used_v(e, 0.0)), jnp.maximum),
        measure(every, lambda e: _extreme(jnp.max, e.ratio), jnp.maximum),
        *old,
    )
