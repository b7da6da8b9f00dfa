"""What leaks, and what the moments look like: cheap enough to log every step.

All functions are pure and run under jit, vmap and scan, so they serve a logger and a
property test alike. Results hold one number for the whole tree (`total`) and one per
leaf in leaf order (`per_leaf`). A ratio 0 / 0 is 0, anything else by 0 is inf, and NaN
stays NaN: a broken step never looks like a good one.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adamr import _tree
from adamr._nodes import find_nodes
from adamr.protection.eigenbasis import EigenbasisState, Rotated
from adamr.routing.estimators import ESTIMATORS, AmsgradMoments, FactoredMoments
from adamr.state import get_subspace
from adamr.subspaces.protected import require_subspace
from adamr.subspaces.subspace import Subspace, coordinates, used, weighted

__all__ = [
    "Measured",
    "MomentStatistics",
    "effective_learning_rate",
    "moment_statistics",
    "update_leak",
]


class Measured(NamedTuple):
    """One number in all, and one per leaf in leaf order (None: not measured)."""

    total: jax.Array
    per_leaf: tuple[jax.Array | None, ...]


def _ratio(pair: Any) -> jax.Array:
    part, whole = pair
    nothing = (part == 0) & (whole == 0)
    return jnp.where(nothing, 0.0, part / jnp.where(nothing, 1.0, whole))


def _measure(leaves, function, combine=jnp.add, finish=lambda x: x) -> Measured:
    """`finish` of what `function` gives for the parts of each leaf, combined."""
    reduce = functools.partial(functools.reduce, combine)
    per_leaf = [reduce(map(function, parts)) if parts else None for parts in leaves]
    there = [x for x in per_leaf if x is not None]
    total = finish(reduce(there)) if there else jnp.zeros([])
    return Measured(total, tuple(None if x is None else finish(x) for x in per_leaf))


def _lengths(name: str, subspace: Subspace, *trees: Any) -> Measured:
    """‖UᵀΔ‖ / ‖Uᵀf‖ of two trees, ‖UᵀΔ‖ / ‖Δ‖ of one."""
    require_subspace(subspace, name)
    for tree in trees:
        subspace.check(tree, "subspace")

    def pair(basis, weights, *leaves):
        if basis is None or any(map(_tree.is_hole, leaves)):
            return []
        inside = [coordinates(basis, weights, x) for x in leaves]
        return [jnp.stack(list(map(_tree.squared_norm, (*inside, *leaves)[:2])))]

    leaves = list(map(pair, *subspace, *(_tree.flatten(tree)[0] for tree in trees)))
    return _measure(leaves, lambda x: x, finish=lambda x: jnp.sqrt(_ratio(x)))


def update_leak(updates: Any, subspace: Subspace) -> Measured:
    """‖UᵀΔ‖ / ‖Δ‖: the share of the step's length inside the protected space.

    Args:
      updates: the step Δ, a tree like the parameters.
      subspace: U; every direction counts in full, whatever its weight λ.

    Returns:
      `Measured` over the protected leaves, in [0, 1] to rounding; 0 for a zero step,
      NaN for one that is not finite.

    >>> from adamr import make_subspace
    >>> step = {"w": jnp.array([[3.0], [4.0]])}
    >>> u = make_subspace(step, {"w": jnp.array([[1.0], [0.0]])})
    >>> print(update_leak(step, u).total.round(3))
    0.6
    """
    return _lengths("update_leak", subspace, updates)


def effective_learning_rate(first: Any, updates: Any, subspace: Subspace) -> Measured:
    """‖UᵀΔ‖ / ‖Uᵀf‖, measured: how far a unit of f moves along old directions.

    Under shared routing it is 1/(1 − α) times what it is under decoupled routing
    (Proposition 1), where the coordinates are those in which Adam divides; proven in
    `test_proposition_1_along_one_coordinate`.

    Args:
      first, updates: f, the gradient that entered the first moment, and the step Δ.
      subspace: U; every direction counts in full, whatever its weight λ.

    Returns:
      `Measured` over the protected leaves; inf where the step leaks and f does not.

    >>> from adamr import make_subspace
    >>> f = {"w": jnp.array([[2.0], [1.0]])}
    >>> u = make_subspace(f, {"w": jnp.array([[1.0], [0.0]])})
    >>> print(effective_learning_rate(f, {"w": -0.05 * f["w"]}, u).total.round(3))
    0.05
    """
    return _lengths("effective_learning_rate", subspace, updates, first)


class MomentStatistics(NamedTuple):
    """See `moment_statistics`; every field but `count` is a `Measured`."""

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
    """States with count, mu and nu, ours or optax's, and the basis they are kept in."""

    def stops(node):
        fields = {"count", "mu", "nu"} <= set(getattr(node, "_fields", ()))
        return fields or isinstance(node, EigenbasisState)

    found = []
    for node in jax.tree.leaves(opt_state, is_leaf=stops):
        if isinstance(node, EigenbasisState):
            inner = _find_moments(node.inner)
            found += [(state, node.subspace) for state, _ in inner]
        elif stops(node):
            found.append((node, None))
    return found


class _Entries(NamedTuple):
    """Moments of a leaf, or of half a rotated one; shares that broadcast to them."""

    m: jax.Array
    v: jax.Array
    ratio: jax.Array  # |m̂| / √v̂
    d: jax.Array  # 1 / (√(v̂ + eps_root) + eps)
    there: jax.typing.ArrayLike = 1.0  # 0: a zero column of the basis
    inside: jax.typing.ArrayLike | None = None  # share along U; None: not protected
    trace: jax.typing.ArrayLike = 1.0  # share in the trace of the step's operator


def _entries(state: Any, b1, b2, eps, eps_root) -> Iterator[_Entries]:
    """Of the leaves of mu in order; what is shared or factored is spread out."""
    count, m = jax.tree.leaves(state.count)[0], jax.tree.leaves(state.mu)
    steps = jnp.maximum(count, 1).astype(jnp.float32)
    correction = 1.0 if b2 is None else 1.0 - b2**steps
    nu, nu_max = state.nu, getattr(state, "nu_max", None)
    if isinstance(nu, AmsgradMoments):
        nu, nu_max = nu
    if isinstance(nu, FactoredMoments):
        kind = ESTIMATORS["adafactor"]
        zeros = [jnp.zeros(x.shape, x.dtype) for x in kind.shapes(nu, m)]
        # With b2 = 1 and t = ∞ nothing is blended in: v̂ of the state as it is.
        nu = kind.update(zeros, nu, 1.0, jnp.inf)[0]
        nu_max = nu = [jnp.where(count > 0, x, 0.0) for x in nu]
    # Amsgrad and adafactor keep a v̂ that needs no correction.
    hats, correction = (nu, correction) if nu_max is None else (nu_max, 1.0)
    for each in zip(m, jax.tree.leaves(nu), jax.tree.leaves(hats), strict=True):
        x, v, hat = (y.astype(jnp.float32) for y in jnp.broadcast_arrays(*each))
        root, m_hat = jnp.sqrt(hat / correction), jnp.abs(x) / (1.0 - b1**steps)
        d = 1.0 / (jnp.sqrt(hat / correction + eps_root) + eps)
        yield _Entries(x, v, _ratio((m_hat, root)), d)


def _along(basis: Any, weights: Any, *halves: _Entries) -> tuple[_Entries, ...]:
    """The entries of one leaf with their shares along U."""
    length = jnp.sum(jnp.square(basis.astype(jnp.float32)), axis=-1)  # Σ_k U_ik²
    *along, rest = halves
    if not along:
        return (rest._replace(inside=length),)
    there = weighted(used(basis, weights), jnp.ones_like(along[0].m))
    # The rest is kept off U on the way out: none of a coordinate that lies in U.
    outside = jnp.where(length < 1.0 - 1e-6, 1.0 - length, 0.0)
    ratio = jnp.where(there > 0, along[0].ratio, 0.0)
    along = along[0]._replace(ratio=ratio, there=there, inside=there, trace=there)
    return along, rest._replace(inside=0.0, trace=outside)


def _sum(share: Any, x: jax.Array) -> jax.Array:
    """Σ share · x; 0 · inf is 0."""
    return jnp.sum(jnp.where(share > 0, share * x, 0.0))


def _mean(share: Any, x: jax.Array) -> jax.Array:
    share = jnp.asarray(share, jnp.float32)
    return jnp.stack([_sum(share, x), jnp.sum(share) * (x.size / share.size)])


def _used_v(entries: _Entries, otherwise: float) -> jax.Array:
    """v without the zero columns of the basis, which count as `otherwise`."""
    return jnp.where(jnp.asarray(entries.there) > 0, entries.v, otherwise)


def _extreme(reduce: Any, x: jax.Array) -> jax.Array:
    """XLA's maximum of a long array on a CPU passes over NaN."""
    return jnp.where(jnp.any(jnp.isnan(x)), jnp.nan, reduce(x))


def _is_whole(node: Any) -> bool:
    """A leaf of mu, in both halves if it is kept in an eigenbasis."""
    return _tree.is_hole(node) or isinstance(node, Rotated)


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
    adafactor: v), D = 1 / (√(v̂ + eps_root) + eps), per leaf and in all:

        mu_norm             ‖m‖
        nu_mean, nu_min, nu_max
        largest_ratio       max |m̂| / √v̂: 0 where m̂ = 0, inf where only v̂ = 0
        old_energy          Σ_k Σ_i U_ik² v_i / Σ_i v_i, the share of v along old
                            directions; rank / fan-in if v is isotropic
        old_learning_rate   mean over directions and outputs of u_kᵀ D u_k: what the
                            merging link multiplies m̂ by along old directions
        base_learning_rate  mean of D over the protected leaves, tr D / size

    In an eigenbasis v is kept along U and off it: there v_k stands for Σ_i U_ik² v_i,
    D_k for u_kᵀ D u_k, and D for the operator rotated back. Where v = 0, as before the
    first step, D = 1 / (√eps_root + eps).

    Args:
      opt_state: of a routed chain, of `adamr`, or of an optax Adam or AMSGrad, in any
        wrapper; of a partition, the leaves of all its optimizers.
      subspace: U; every direction counts in full, whatever its weight λ. None: the one
        that `opt_state` holds; without one the last three are None. Moments in an
        eigenbasis are measured along their own.
      b1, b2: decays, for bias correction; b2 None: v̂ = v, as in rmsprop and adagrad.
      eps, eps_root: outside and inside the root.

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
    leaves: dict[int, tuple[_Entries, ...]] = {}
    for state, own in found:
        u = own or subspace
        if own is None and u is not None:
            u.check(state.mu, "subspace")
        entries = _entries(state, b1, b2, eps, eps_root)
        for i, x in enumerate(jax.tree.leaves(state.mu, is_leaf=_is_whole)):
            parts = tuple(next(entries) for _ in jax.tree.leaves(x))
            if len(parts) == 2 and own is None:
                raise ValueError(
                    "opt_state lacks the basis: pass the whole EigenbasisState."
                )
            if parts and leaves.get(i):
                raise ValueError(
                    "opt_state holds several moments of one leaf: pass a part of it."
                )
            if parts and u is not None and u.bases[i] is not None:
                parts = _along(u.bases[i], u.weights[i], *parts)
            leaves[i] = leaves.get(i, ()) + tuple(e for e in parts if e.m.size)
    every = list(leaves.values())
    protected = [e if e and e[0].inside is not None else () for e in every]
    pairs = (
        lambda e: jnp.stack([_sum(e.inside, e.v), _sum(e.there, e.v)]),
        lambda e: _mean(e.inside, e.d),
        lambda e: _mean(e.trace, e.d),
    )
    old = [_measure(protected, p, finish=_ratio) if subspace else None for p in pairs]
    return MomentStatistics(
        functools.reduce(jnp.maximum, [jax.tree.leaves(s.count)[0] for s, _ in found]),
        _measure(every, lambda e: _sum(e.there, jnp.square(e.m)), finish=jnp.sqrt),
        _measure(every, lambda e: _mean(e.there, e.v), finish=_ratio),
        _measure(every, lambda e: _extreme(jnp.min, _used_v(e, jnp.inf)), jnp.minimum),
        _measure(every, lambda e: _extreme(jnp.max, _used_v(e, 0.0)), jnp.maximum),
        _measure(every, lambda e: _extreme(jnp.max, e.ratio), jnp.maximum),
        *old,
    )
