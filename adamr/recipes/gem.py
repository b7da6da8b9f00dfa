"""Gradient constraints by name: GEM, A-GEM and mGEM, exact for the step Adam takes.

    recipe   evidence at each step                constraint on the step Δ
    gem      memory_gradients (T, …)              ⟨Δ, g_k⟩ ≥ 0 for every task
    agem     memory_gradient                      ⟨Δ, r⟩ ≥ 0 for the average
    p_mgem   memory_gradients (T, …)              ⟨Δ_b, g_kb⟩ ≥ 0 in every block b
    d_mgem   memory_gradients (T, S, …)           ⟨Δ, g_ks⟩ ≥ 0 for every part s

A projected gradient that Adam rescales satisfies nothing. So each recipe solves its
program in the metric of Adam's preconditioner, on the momentum.
"""

from typing import Any, Literal

import optax

from adamr.modifiers.constraint import Partition, agem_constraint, gem_constraint
from adamr.protection.constrained import constrained_second_moment
from adamr.recipes._signature import passes_on_to
from adamr.routing.carrier import route_first_moment

__all__ = ["agem", "d_mgem", "gem", "p_mgem"]


def _constrained(learning_rate, constraint, kwargs):
    return optax.chain(
        route_first_moment(optax.identity()),
        constrained_second_moment(constraint, **kwargs),
        optax.scale_by_learning_rate(learning_rate),
    )


@passes_on_to(constrained_second_moment)
def gem(
    learning_rate: optax.ScalarOrSchedule,
    memory_strength: float = 0.5,
    *,
    average: bool = False,
    solver: Literal["exact", "diagonal"] = "exact",
    **kwargs: Any,
) -> optax.GradientTransformationExtraArgs:
    """Gradient Episodic Memory under Adam: no memory loss grows, to first order.

    Guarantee: ⟨Δ, g_k⟩ ≥ 0 for the step −ηΔ and every memory gradient g_k, to float32
    rounding (`test_the_step_that_adam_takes_is_feasible`); without violation Δ is
    Adam's. For the authors' SGD: `optax.chain(gem_constraint(), optax.sgd(rate))`.

    Args:
      learning_rate: a number or a schedule.
      memory_strength: γ ≥ 0, the least weight of each memory gradient once one is
        violated; GEM's code uses 0.5. A weight for each old task, so the memory's pull
        grows with their number: on text 0.05 was far better (docs/evidence.md).
      average: divide γ by the number of old tasks, for streams longer than those it was
        tuned on.
      solver: "exact", or "diagonal" as in `gem_constraint`.
      **kwargs: of `constrained_second_moment`, such as b1, b2, eps.

    Returns:
      An optimizer; `update` needs `memory_gradients`, a tree with leaves (T, *shape),
      one gradient per task seen or to come, and takes `memory_mask` (T,) for which are.

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
    constraint = gem_constraint(memory_strength, average=average, solver=solver)
    return _constrained(learning_rate, constraint, kwargs)


@passes_on_to(constrained_second_moment)
def p_mgem(
    learning_rate: optax.ScalarOrSchedule,
    memory_strength: float = 0.5,
    *,
    average: bool = False,
    partition: Literal["leaf"] | Partition = "leaf",
    solver: Literal["exact", "diagonal"] = "exact",
    **kwargs: Any,
) -> optax.GradientTransformationExtraArgs:
    """Parameter-wise mGEM: GEM's program in each block of parameters by itself.

    Guarantee: ⟨Δ_b, g_kb⟩ ≥ 0 in every block b, which implies GEM's; the equations
    are reconstructed from the paper's abstract.

    Args:
      learning_rate, memory_strength, average, solver, **kwargs: as for `gem`.
      partition: "leaf", or a function (path, shape) -> label of the leaf's block.

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
    constraint = gem_constraint(
        memory_strength, average=average, partition=partition, solver=solver
    )
    return _constrained(learning_rate, constraint, kwargs)


def d_mgem(
    learning_rate: optax.ScalarOrSchedule, memory_strength: float = 0.5, **kwargs: Any
) -> optax.GradientTransformationExtraArgs:
    """Data-wise mGEM: `gem` with `memory_gradients` of leaves (T, S, *shape).

    One constraint for each of S parts of a task's memory; arguments as for `gem`.
    """
    return gem(learning_rate, memory_strength, **kwargs)


@passes_on_to(constrained_second_moment)
def agem(
    learning_rate: optax.ScalarOrSchedule, **kwargs: Any
) -> optax.GradientTransformationExtraArgs:
    """Averaged GEM under Adam: the loss on the average memory does not grow.

    Guarantee: ⟨Δ, r⟩ ≥ 0 for the step −ηΔ and the memory gradient r, to float32
    rounding (`test_t11_in_the_metric`); single tasks may still be violated.

    Args:
      learning_rate: a number or a schedule.
      **kwargs: of `constrained_second_moment`.

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
    return _constrained(learning_rate, agem_constraint(), kwargs)
