"""Gradient constraints under Adam's preconditioner: they hold for the step itself."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adamr import _rows as evidence
from adamr.modifiers.constraint import ConstraintState
from adamr.routing.carrier import require_routed
from adamr.routing.estimators import Estimators
from adamr.routing.merge import (
    FaithfulSecondMomentState,
    MomentOptions,
    advance_moments,
    check_moments,
    init_moments,
)
from adamr.routing.sharing import Guard, Share

__all__ = ["ConstrainedState", "constrained_second_moment"]

_EVIDENCE = ("memory_gradients", "memory_gradient")
_FLOOR = 1e-2


class ConstrainedState(NamedTuple):
    constraint: Any
    moments: FaithfulSecondMomentState


def _inverse_roots(mu_hat, denominator, guard):
    """1 / √D per leaf, for the norm in which the step is corrected."""
    if not guard:
        return [jnp.sqrt(d.astype(jnp.float32)) for d in denominator]
    denominator = [d.astype(jnp.float32) for d in denominator]
    pairs = list(zip(mu_hat, denominator, strict=True))
    total = sum(jnp.sum(d * d) * (m.size / max(d.size, 1)) for m, d in pairs)
    floor = _FLOOR * jnp.sqrt(total / max(sum(m.size for m in mu_hat), 1))
    return [jnp.sqrt(jnp.maximum(d, floor)) for d in denominator]


def constrained_second_moment(
    constraint: optax.GradientTransformation,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    *,
    estimator: Estimators = "adam",
    share: Share | None = None,
    guard: Guard = True,
    mu_dtype: jax.typing.DTypeLike | None = None,
    nu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """A merging link whose step itself satisfies the constraint: ⟨Δ, g_k⟩ ≥ 0.

    With D = 1 / (√(v̂ + ε_root) + ε) and M the memory gradients of `constraint`:

        Δ = D (m̂ + Mᵀ v),   v the dual solution for M D Mᵀ and M D m̂

    Δ is the point closest to Adam's D m̂, in the norm √(xᵀ D⁻¹ x), among those that
    satisfy the constraint (for memory strength 0). Parameters change by −η Δ, so to
    first order no memory loss grows. Without violation Δ is Adam's step, bit for bit.
    Put it after `route_first_moment(optax.identity())`; its `update` takes the extra
    arguments of `constraint`.

    Args:
      constraint: `gem_constraint(...)` or `agem_constraint(...)`, any partition and
        solver.
      b1, b2, eps, eps_root, estimator, share, mu_dtype, nu_dtype: as for
        `faithful_second_moment`.
      guard: as for `faithful_second_moment`. It also acts on the D of the correction
        (not on that of Adam's step): no √v̂ counts as less than a hundredth of their
        root mean square. Otherwise coordinates that the new task never touches (v̂ = 0,
        D = 1/ε) would carry the whole correction, in steps of a thousand times Adam's.
        ⟨Δ, g_k⟩ ≥ 0 holds either way; ⟨m̂, Δ⟩ ≥ 0 is certain for guard=False with
        `agem_constraint` or memory strength 0.

    Returns:
      A link from `Routed` to a plain tree in the dtype of `raw` (bfloat16 rounds the
      constraint to about 1 %).

    Raises:
      TypeError: if `constraint` is not a gradient constraint; at update, without a
        route before it.
      ValueError: as `faithful_second_moment` and `constraint`.

    >>> from adamr.modifiers.constraint import agem_constraint
    >>> from adamr.routing import route_first_moment
    >>> tx = optax.chain(
    ...     route_first_moment(optax.identity()),
    ...     constrained_second_moment(agem_constraint()),
    ... )
    >>> g, r = jnp.array([1.0, -2.0]), jnp.array([1.0, 1.5])
    >>> step, _ = tx.update(g, tx.init(g), memory_gradient=r)
    >>> print(bool(jnp.abs(step @ r) < 1e-6))
    True
    """
    constraint = optax.with_extra_args_support(constraint)
    options = MomentOptions(
        b1, b2, eps, eps_root, estimator, share, guard, mu_dtype, nu_dtype
    )
    check_moments(options)

    def is_state(node):
        return isinstance(node, ConstraintState)

    def init_fn(params):
        state = constraint.init(params)
        if not any(map(is_state, jax.tree.leaves(state, is_leaf=is_state))):
            raise TypeError(
                "constrained_second_moment takes gem_constraint(...) or "
                f"agem_constraint(...), got a transformation with state {state!r}."
            )
        return ConstrainedState(state, init_moments(options, params))

    def update_fn(updates, state, params=None, **extra_args):
        require_routed(updates, "constrained_second_moment")
        (mu_hat, denominator), inner = advance_moments(options, updates, state.moments)
        raw, treedef = jax.tree.flatten(updates.raw)
        steps = [
            (m / d).astype(jnp.float32)
            for m, d in zip(mu_hat, denominator, strict=True)
        ]
        # In the coordinates √D⁻¹ Δ the norm is the plain one and g_k becomes √D g_k.
        roots = _inverse_roots(mu_hat, denominator, guard)
        whitened = [s * r for s, r in zip(steps, roots, strict=True)]
        for name in _EVIDENCE:
            if extra_args.get(name) is not None:
                aligned = evidence.align(updates.raw, extra_args[name], name)
                scaled = [
                    x / r.reshape((1,) * (jnp.ndim(x) - r.ndim) + r.shape)
                    for x, r in zip(aligned, roots, strict=True)
                ]
                extra_args[name] = jax.tree.unflatten(treedef, scaled)
        corrected, constraint_state = constraint.update(
            jax.tree.unflatten(treedef, whitened),
            state.constraint,
            params,
            **extra_args,
        )
        changed = jax.tree.leaves(corrected)
        steps = [
            (s + (c - w) / r).astype(g.dtype)
            for g, s, c, w, r in zip(raw, steps, changed, whitened, roots, strict=True)
        ]
        steps = jax.tree.unflatten(treedef, steps)
        return steps, ConstrainedState(constraint_state, inner)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
