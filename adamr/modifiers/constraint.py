"""Gradient constraints: the smallest change of g after which no memory loss grows.

With M the matrix whose rows are the memory gradients g_k, one row per constraint,

    g̃ = argmin_x ‖x − g‖²  subject to  ⟨x, g_k⟩ ≥ 0     =  g + Mᵀ v
    v = argmin_v ½ vᵀ(M Mᵀ + ε diag) v + (M g)ᵀ v  over  v ≥ γ     (dual.py)

    gem_constraint                        one row per task
      ... leaves (T, S, *shape)           data-wise: one row per part of a task's memory
      ... partition="leaf"                parameter-wise: one program per leaf
    agem_constraint                       one row, the mean over all memories

They hold for the gradient. Adam's diagonal D breaks them: ⟨D g̃, g_k⟩ may be negative.
`constrained_second_moment` of `adamr.protection` makes them hold for Adam's step.
"""

import functools
from collections.abc import Callable, Hashable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adamr import _rows as evidence
from adamr import _tree
from adamr.modifiers.dual import solve_diagonal, solve_exact
from adamr.routing.carrier import plain_gradient

__all__ = ["ConstraintState", "agem_constraint", "gem_constraint"]

Partition = Callable[[str, tuple[int, ...]], Hashable]


class ConstraintState(NamedTuple):
    """int32: how many constraints the last incoming gradient violated."""

    violated: jax.Array


@functools.partial(jax.jit, static_argnames=("blocks", "solver"))
def _correct(leaves, rows, lower, regularization, *, blocks, solver):
    """g + Mᵀ v in every block with a violation; the number of violations."""
    vector = [g.astype(jnp.float32) for g in leaves]
    inner = evidence.inner(rows, vector, blocks)
    finite = jnp.isfinite(inner)
    wrong = rows.mask[None, :] & finite & (inner < 0)
    active = jnp.any(wrong, axis=1)

    def dual():
        if solver == "exact":
            products = evidence.gram(rows, blocks)
            squares = jnp.diagonal(products, axis1=-2, axis2=-1)
            solve = jax.vmap(solve_exact, (0, 0, None, 0, None))
        else:
            products = squares = evidence.squares(rows, blocks)
            solve = solve_diagonal
        usable = rows.mask[None, :] & finite & active[:, None]
        usable = usable & (squares > 0) & jnp.isfinite(squares)
        return solve(products, inner, lower, usable, regularization)

    def add(v, clean):
        correction = evidence.combine(rows, v, blocks, clean=clean)
        pairs = zip(leaves, vector, correction, strict=True)
        return [(g + c).astype(raw.dtype) for raw, g, c in pairs]

    v = jax.lax.cond(jnp.any(active), dual, lambda: jnp.zeros_like(inner))
    # 0 · NaN is NaN: rows that hold it are cleared, at the cost of a pass.
    branch = jnp.where(jnp.any(active), jnp.where(jnp.all(finite), 1, 2), 0)
    branches = [lambda v: leaves, lambda v: add(v, False), lambda v: add(v, True)]
    corrected = jax.lax.switch(branch, branches, v)
    return corrected, jnp.sum(wrong, dtype=jnp.int32)


def _constrain(updates, rows, partition, lower, regularization, solver):
    leaves, treedef = jax.tree.flatten(updates)
    if not leaves or not rows.mask.size:
        return updates, ConstraintState(jnp.zeros([], jnp.int32))
    blocks = evidence.blocks_of(updates, partition)
    corrected, violated = _correct(
        leaves, rows, lower, regularization, blocks=blocks, solver=solver
    )
    return jax.tree.unflatten(treedef, corrected), ConstraintState(violated)


def _check_options(solver, partition):
    if solver not in ("exact", "diagonal"):
        raise ValueError(f"solver is {solver!r}, expected 'exact' or 'diagonal'.")
    if not (partition is None or partition == "leaf" or callable(partition)):
        raise ValueError(
            f"partition is {partition!r}, expected None, 'leaf' or (path, shape) -> "
            "label."
        )


def _check_not_negative(**numbers):
    for name, value in numbers.items():
        if _tree.is_known(value) and not value >= 0:
            raise ValueError(f"{name} must not be negative, got {value}.")


def _init(params):
    del params
    return ConstraintState(jnp.zeros([], jnp.int32))


def gem_constraint(
    memory_strength: float = 0.05,
    *,
    average: bool = False,
    regularization: float | None = None,
    partition: Literal["leaf"] | Partition | None = None,
    solver: Literal["exact", "diagonal"] = "exact",
) -> optax.GradientTransformationExtraArgs:
    """Gradient Episodic Memory: g̃ = g + Mᵀv with ⟨g̃, g_k⟩ ≥ 0 for every task k.

    With γ = `memory_strength`, ε = `regularization` and n_k = ‖g_k‖:

        v = argmin ½ vᵀ(M Mᵀ + ε diag n²) v + (M g)ᵀv  over v ≥ γ   if some ⟨g, g_k⟩ < 0
        v = 0                                                       otherwise

    γ bounds the dual and is not a margin: once one task is violated, every memory
    gradient is added with weight γ at least. With γ = 0, g̃ is the projection of g on
    the cone of gradients that violate nothing.

    Extra arguments of `update`:
      memory_gradients: tree like the gradient, leaves (T, *shape): one gradient per
        task. Leaves (T, S, *shape) are T · S constraints, the data-wise form (d-mGEM):
        one gradient per part of a task's memory. A fixed T keeps one compiled step.
      memory_mask: (T,) or (T, S) bool, optional: False for tasks not seen yet.

    Args:
      memory_strength: γ ≥ 0; see `adamr.gem`.
      average: divide γ by the number of rows in the mask, so that the memory as a whole
        pulls as hard after many tasks as after the first.
      regularization: None: the paper's program, ε = 0, solved so that collinear rows do
        no harm: ⟨g̃, g_k⟩ ≥ 0 to float32 rounding. A number ε ≥ 0: the bias of GEM's
        code, ⟨g̃, g_k⟩ ≥ −ε v_k n_k², relative to each row (and at least 2e-7 T). The
        absolute 1e-3 of that code hardly constrains small gradients.
      partition: blocks of parameters with a program each (p-mGEM), so ⟨g̃_b, g_kb⟩ ≥ 0
        in every block b, which implies ⟨g̃, g_k⟩ ≥ 0. None: one block; "leaf"; or a
        function (path, shape) -> label of the leaf's block.
      solver: "exact", or "diagonal": v_k = max(γ, −⟨g, g_k⟩ / ((1 + ε) n_k²)), exact
        for orthogonal rows, without a Gram matrix. It is the approximate mGEM solver as
        reconstructed here, and does not guarantee any constraint.

    Returns:
      A modifier for a route, or a plain link. Its state counts `violated` constraints.
      Without violation g̃ is g, bit for bit. Rows that are masked, zero or not finite
      do not count. NaN in g passes through. Gradients may be of any scale between
      norms of 1e-18 and 1e18; products are float32. Under `optax.MultiSteps` the memory
      gradients of the last micro-step count.

    Raises:
      ValueError: for a negative number, an unknown solver or partition; at update,
        without `memory_gradients` or with one of the wrong shape.
      TypeError: for a `Routed`.

    >>> g, memory = jnp.array([1.0, -2.0]), jnp.array([[0.0, 1.0]])
    >>> tx = gem_constraint(memory_strength=0.0)
    >>> print(tx.update(g, tx.init(g), memory_gradients=memory)[0].round(3))
    [1. 0.]

    References:
      Lopez-Paz, Ranzato, Gradient Episodic Memory, arXiv:1706.08840. Liu, Ye, Stone,
      Liu, Fine-Grained Gradient Restriction, arXiv:2410.00868 (its equations are
      reconstructed here from the abstract).
    """
    _check_options(solver, partition)
    _check_not_negative(memory_strength=memory_strength, regularization=regularization)

    def update_fn(
        updates,
        state,
        params=None,
        *,
        memory_gradients=None,
        memory_mask=None,
        **extra_args,
    ):
        updates = plain_gradient(updates, "gem_constraint", params)
        del state, params, extra_args
        rows = evidence.read_rows(
            updates,
            memory_gradients,
            memory_mask,
            link="gem_constraint",
            argument="memory_gradients",
            mask_argument="memory_mask",
        )
        lower = memory_strength
        if average:
            lower = lower / jnp.maximum(jnp.sum(rows.mask), 1)
        return _constrain(updates, rows, partition, lower, regularization, solver)

    return optax.GradientTransformationExtraArgs(_init, update_fn)


def agem_constraint(
    *, partition: Literal["leaf"] | Partition | None = None
) -> optax.GradientTransformationExtraArgs:
    """Averaged GEM: one constraint, the gradient r on a batch from all memories.

        g̃ = g − min(0, ⟨g, r⟩) / ‖r‖² · r

    Extra argument of `update`:
      memory_gradient: r, a tree like the gradient. Zero before there is a memory.

    Args:
      partition: as for `gem_constraint`.

    Returns:
      A modifier for a route, or a plain link. Where r is zero or not finite, or
      ⟨g, r⟩ ≥ 0, g̃ is g, bit for bit. Single tasks may still be violated.

    Raises:
      ValueError: at update, without `memory_gradient` or with one of the wrong shape.
      TypeError: for a `Routed`.

    >>> g, r = jnp.array([1.0, -2.0]), jnp.array([0.0, 1.0])
    >>> tx = agem_constraint()
    >>> print(tx.update(g, tx.init(g), memory_gradient=r)[0])
    [1. 0.]

    References: Chaudhry et al., Efficient Lifelong Learning with A-GEM,
      arXiv:1812.00420.
    """
    _check_options("diagonal", partition)

    def update_fn(updates, state, params=None, *, memory_gradient=None, **extra_args):
        updates = plain_gradient(updates, "agem_constraint", params)
        del state, params, extra_args
        if memory_gradient is None:
            raise ValueError(
                "agem_constraint needs memory_gradient: pass update(gradient, state, "
                "params, memory_gradient=tree) with the gradient of the loss on a "
                "batch drawn from the memories of all past tasks."
            )
        tree = jax.tree.map(lambda x: jnp.expand_dims(x, 0), memory_gradient)
        rows = evidence.read_rows(
            updates,
            tree,
            None,
            link="agem_constraint",
            argument="memory_gradient",
            mask_argument="memory_mask",
        )
        return _constrain(updates, rows, partition, 0.0, 0.0, "diagonal")

    return optax.GradientTransformationExtraArgs(_init, update_fn)
