"""Gradient constraints by name: GEM, A-GEM and mGEM, exact for the step Adam takes.

    recipe   evidence at each step                constraint on the step Δ
    gem      memory_gradients (T, …)              ⟨Δ, g_k⟩ ≥ 0 for every task
    agem     memory_gradient                      ⟨Δ, r⟩ ≥ 0 for the average
    p_mgem   memory_gradients (T, …)              ⟨Δ_b, g_kb⟩ ≥ 0 in every block b
    d_mgem   memory_gradients (T, S, …)           ⟨Δ, g_ks⟩ ≥ 0 for every part s

A projected gradient that Adam rescales satisfies no constraint. So each recipe solves
its program for the momentum, in the norm of Adam's preconditioner.

All four take the options of the moments as `constrained_second_moment` does: b1, b2,
eps, eps_root, estimator, share, guard, mu_dtype and nu_dtype.
"""

from typing import Literal

import jax
import optax

from adamr.modifiers.constraint import Partition, agem_constraint, gem_constraint
from adamr.protection.constrained import constrained_second_moment
from adamr.routing.carrier import route_first_moment
from adamr.routing.estimators import Estimators
from adamr.routing.merge import MomentOptions
from adamr.routing.sharing import Guard, Share

__all__ = ["agem", "d_mgem", "gem", "p_mgem"]


Solver = Literal["exact", "diagonal"]


def _constrained(
    learning_rate: optax.ScalarOrSchedule,
    constraint: optax.GradientTransformation,
    options: MomentOptions,
) -> optax.GradientTransformationExtraArgs:
    """Adam whose step satisfies the constraint: every recipe of this file."""
    return optax.chain(
        route_first_moment(optax.identity()),
        constrained_second_moment(constraint, **options._asdict()),
        optax.scale_by_learning_rate(learning_rate),
    )


def gem(
    learning_rate: optax.ScalarOrSchedule,
    memory_strength: float = 0.05,
    *,
    average: bool = False,
    solver: Solver = "exact",
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    estimator: Estimators = "adam",
    share: Share | None = None,
    guard: Guard = True,
    mu_dtype: jax.typing.DTypeLike | None = None,
    nu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Gradient Episodic Memory under Adam: no memory loss grows, to first order.

        Δ = D (m̂ + Mᵀ u),   D = 1 / (√v̂ + eps)      m and v those of plain Adam
        u = argmin ½ uᵀ (M D Mᵀ) u + (M D m̂)ᵀ u  over u ≥ γ,   γ = memory_strength

    The rows of M are the memory gradients g_k, and u = 0 without violation. For γ = 0
    Δ is the point with ⟨Δ, g_k⟩ ≥ 0 that is closest to Adam's step, in Adam's norm.

    Guarantee: ⟨Δ, g_k⟩ ≥ 0 for the step −ηΔ and every memory gradient g_k, to float32
    rounding; without violation Δ is Adam's. The authors use SGD, which is
    `optax.chain(gem_constraint(), optax.sgd(rate))`.

    Args:
      learning_rate: a number or a schedule.
      memory_strength: γ ≥ 0, the least weight of each memory gradient once one is
        violated. Every old task gets this weight, so the pull of the memory grows
        with their number. GEM's code uses 0.5, which is far worse on text and level
        with the default on images (docs/evidence/memory.md).
      average: divide γ by the number of old tasks, for streams longer than those that
        γ was tuned on.
      solver: "exact", or "diagonal" as in `gem_constraint`.
      b1, b2, eps, eps_root, estimator, share, guard, mu_dtype, nu_dtype: as for
        `constrained_second_moment`.

    Returns:
      An optimizer; `update` needs `memory_gradients`, a tree with leaves (T, *shape),
      one gradient per task seen or to come. Its `memory_mask`, (T,) bool, says which
      tasks have been seen; without it, all.

    >>> import jax.numpy as jnp
    >>> params = jnp.zeros(2)
    >>> tx = gem(0.1, memory_strength=0.0)
    >>> memory = jnp.array([[0.0, 1.0]])
    >>> g = jnp.array([1.0, -2.0])
    >>> step, _ = tx.update(g, tx.init(params), params, memory_gradients=memory)
    >>> print(step.round(3) + 0.0)
    [-0.1  0. ]

    References: Lopez-Paz, Ranzato, Gradient Episodic Memory, arXiv:1706.08840.
    """
    options = MomentOptions(
        b1, b2, eps, eps_root, estimator, share, guard, mu_dtype, nu_dtype
    )
    constraint = gem_constraint(memory_strength, average=average, solver=solver)
    return _constrained(learning_rate, constraint, options)


def p_mgem(
    learning_rate: optax.ScalarOrSchedule,
    memory_strength: float = 0.05,
    *,
    average: bool = False,
    partition: Literal["leaf"] | Partition = "leaf",
    solver: Solver = "exact",
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    estimator: Estimators = "adam",
    share: Share | None = None,
    guard: Guard = True,
    mu_dtype: jax.typing.DTypeLike | None = None,
    nu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Parameter-wise mGEM: GEM's program in each block of parameters by itself.

        Δ_b = D_b (m̂_b + M_bᵀ u_b)                 u_b as in `gem`, for block b alone

    Guarantee: ⟨Δ_b, g_kb⟩ ≥ 0 in every block b, which implies the guarantee of `gem`.
    The equations are reconstructed from the paper's abstract.

    Args:
      partition: "leaf", or a function (path, shape) -> label of the leaf's block.
      learning_rate and all others: as for `gem`.

    Returns:
      An optimizer that takes what `gem` takes.

    >>> import jax.numpy as jnp
    >>> params = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    >>> tx = p_mgem(0.1, memory_strength=0.0)
    >>> g = {"a": jnp.ones(2), "b": jnp.array([-1.0, -2.0])}
    >>> memory = {"a": jnp.ones((1, 2)), "b": jnp.ones((1, 2))}
    >>> step, _ = tx.update(g, tx.init(params), params, memory_gradients=memory)
    >>> print(f"{step['a'][0]:.2f}", abs(step["b"].sum()) < 1e-6)
    -0.10 True

    References: Liu, Ye, Stone, Liu, Fine-Grained Gradient Restriction,
      arXiv:2410.00868.
    """
    options = MomentOptions(
        b1, b2, eps, eps_root, estimator, share, guard, mu_dtype, nu_dtype
    )
    constraint = gem_constraint(
        memory_strength, average=average, partition=partition, solver=solver
    )
    return _constrained(learning_rate, constraint, options)


def d_mgem(
    learning_rate: optax.ScalarOrSchedule,
    memory_strength: float = 0.05,
    *,
    average: bool = False,
    solver: Solver = "exact",
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    estimator: Estimators = "adam",
    share: Share | None = None,
    guard: Guard = True,
    mu_dtype: jax.typing.DTypeLike | None = None,
    nu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Data-wise mGEM: `gem` with `memory_gradients` of leaves (T, S, *shape).

        Δ = D (m̂ + Mᵀ u)                           M with a row g_ks per part of a task

    Guarantee: ⟨Δ, g_ks⟩ ≥ 0 for each of the S parts of every task's memory. Arguments
    are those of `gem`.

    >>> import jax.numpy as jnp
    >>> tx = d_mgem(0.1, memory_strength=0.0)
    >>> memory = jnp.array([[[0.0, 1.0], [1.0, 0.0]]])  # two parts of one task
    >>> g = jnp.array([1.0, -2.0])
    >>> step, _ = tx.update(g, tx.init(g), memory_gradients=memory)
    >>> print(step.round(3) + 0.0)
    [-0.1  0. ]

    References: Liu, Ye, Stone, Liu, Fine-Grained Gradient Restriction,
      arXiv:2410.00868.
    """
    options = MomentOptions(
        b1, b2, eps, eps_root, estimator, share, guard, mu_dtype, nu_dtype
    )
    constraint = gem_constraint(memory_strength, average=average, solver=solver)
    return _constrained(learning_rate, constraint, options)


def agem(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    estimator: Estimators = "adam",
    share: Share | None = None,
    guard: Guard = True,
    mu_dtype: jax.typing.DTypeLike | None = None,
    nu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Averaged GEM under Adam: the loss on the average memory does not grow.

        d = D m̂,   D = 1 / (√v̂ + eps)               Adam's step
        Δ = d − min(0, ⟨d, r⟩) / ⟨r, D r⟩ · D r     r = memory_gradient

    Guarantee: ⟨Δ, r⟩ ≥ 0 for the step −ηΔ and the memory gradient r, to float32
    rounding; single tasks may still be violated.

    Args:
      learning_rate: a number or a schedule.
      b1, b2, eps, eps_root, estimator, share, guard, mu_dtype, nu_dtype: as for
        `constrained_second_moment`.

    Returns:
      An optimizer; `update` needs `memory_gradient`, a tree like the gradient, zero
      before there is a memory.

    >>> import jax.numpy as jnp
    >>> params = jnp.zeros(2)
    >>> tx = agem(0.1)
    >>> r, g = jnp.array([0.0, 1.0]), jnp.array([1.0, -2.0])
    >>> step, _ = tx.update(g, tx.init(params), params, memory_gradient=r)
    >>> print(step.round(3) + 0.0)
    [-0.1  0. ]

    References: Chaudhry et al., Efficient Lifelong Learning with A-GEM,
      arXiv:1812.00420.
    """
    options = MomentOptions(
        b1, b2, eps, eps_root, estimator, share, guard, mu_dtype, nu_dtype
    )
    return _constrained(learning_rate, agem_constraint(), options)
