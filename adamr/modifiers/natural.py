"""Natural gradients that leave old tasks alone, in the Fisher norm (FOPNG).

With G the stored task gradients as columns and F, F' the diagonal Fisher matrices of
the old tasks and of the new one (`fisher_old`, `fisher_new`), the stated problem is

    min ⟨g, Δ⟩   subject to   Gᵀ F Δ = 0,   Δᵀ F' Δ ≤ 1

    −Δ = F'⁻¹ p / √(pᵀ F'⁻¹ p),   p = g − C (Cᵀ F'⁻¹ C)⁻¹ Cᵀ F'⁻¹ g,   C = F G

Only the span of F'^{−1/2} C matters. With Q an orthonormal basis of it and
h = F'^{−1/2} g this is −Δ = F'^{−1/2} h̃ / ‖h̃‖, h̃ = h − Q Qᵀ h. Q changes at task
boundaries only, so a step costs what OGD's does, and no ill-conditioned Gram matrix is
solved.

    fopng            the step
    set_fisher       replaces F and F' at a task boundary
    average_fisher   the moving average of F over tasks
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adamr import _rows as matrix
from adamr import _tree
from adamr._nodes import find_nodes, map_nodes, replace_arrays
from adamr.routing.carrier import plain_gradient
from adamr.subspaces.directions import Directions
from adamr.subspaces.protected import DirectionsSource, beside, require_source
from adamr.subspaces.vectors import norm, orthonormalize, residual

__all__ = ["FopngState", "average_fisher", "fopng", "set_fisher"]

# What is left of h below this share of its length is rounding.
_ROUNDING = 1e-6


class FopngState(NamedTuple):
    """`set_subspace` and `set_fisher` change it, and keep `basis` in step.

    Attributes:
      directions: the span of the stored task gradients G.
      fisher_old: F, a float32 tree like the parameters.
      fisher_new: F' with its damping, a float32 tree like the parameters.
      basis: Q, one entry per position of the parameters, shaped like the rows there.
    """

    directions: Directions
    fisher_old: Any
    fisher_new: Any
    basis: tuple[jax.Array | None, ...]


def _constraint_basis(
    directions: Directions, fisher_old: Any, fisher_new: Any
) -> tuple[jax.Array | None, ...]:
    """Q: an orthonormal basis of the span of F'^{−1/2} F G."""
    here = directions.at(fisher_old).rows
    fishers = (_tree.flatten(fisher)[0] for fisher in (fisher_old, fisher_new))
    samples = [
        rows * (old * jax.lax.rsqrt(new))[None]
        for rows, old, new in zip(here, *fishers, strict=True)
        if rows is not None
    ]
    if not samples:
        return here
    zeros = [jnp.zeros_like(x) for x in samples]
    none, room = jnp.zeros([], jnp.int32), samples[0].shape[0]
    basis = orthonormalize(zeros, none, samples, room, 1e-5)[0]
    return tuple(_tree.spread(basis, here))


def fopng(
    directions: DirectionsSource, *, as_published: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Fisher-Orthogonal Projected Natural Gradient: a preconditioner of its own.

        Δ = F'⁻¹ p / √(pᵀ F'⁻¹ p),   p = g − C (Cᵀ F'⁻¹ C)⁻¹ Cᵀ F'⁻¹ g,   C = F G

    The steepest descent in the norm of F', the Fisher matrix of the new task, among the
    steps with Gᵀ F Δ = 0, at length 1 in that norm. Guarantee: Gᵀ F Δ = 0 to rounding,
    and ⟨g, Δ⟩ ≥ 0 for the unsigned step. With both Fisher matrices 1 it is OGD with a
    step of length 1.

    Args:
      directions: from `empty_directions`; the span of the task gradients G. It grows
        by `set_subspace(state, grow_directions(get_subspace(state), gradients))`.
      as_published: the step of the paper and of its code at λ = 0, whose p ends in
        Cᵀ g where the stated problem has Cᵀ F'⁻¹ g. It keeps neither guarantee: it may
        move along protected directions, and may ascend.

    Returns:
      g -> unsigned step: follow it with `optax.scale_by_learning_rate`. The step has
      length 1 however small g is, so the rate has to decay. F and F' start as 1:
      `set_fisher` sets them, at the end of a task and whenever F' is estimated anew.
      Zero gradients, and gradients that lie in the protected space to rounding, give
      zero steps; NaN in g reaches all leaves. State: 2 capacity + 2 float32 copies of
      the parameters.

    Raises:
      TypeError: for anything but `Directions`; at update, for a `Routed`.
      ValueError: at init or update, for a tree they were not made for.

    >>> from adamr import empty_directions, grow_directions
    >>> d = empty_directions(jnp.zeros(2), 1)
    >>> tx = fopng(grow_directions(d, jnp.array([[1.0, 1.0]])))
    >>> print(tx.update(jnp.array([3.0, 1.0]), tx.init(jnp.zeros(2)))[0].round(4))
    [ 0.7071 -0.7071]

    References: Garg, Kolhe, Peng, Gopalam, Fisher-Orthogonal Projected Natural Gradient
      Descent for Continual Learning, arXiv:2601.12816.
    """
    require_source(directions, "fopng", Directions)

    def init_fn(params) -> Any:
        old, new = (optax.tree.ones_like(params, dtype=jnp.float32) for _ in range(2))
        if _tree.is_placeholder(params):
            return FopngState(jnp.zeros([]), old, new, jnp.zeros([]))  # pyright: ignore
        here = beside(directions, params, "fopng", Directions)
        return FopngState(here, old, new, _constraint_basis(here, old, new))

    def update_fn(updates, state, params=None, **extra_args):
        updates = plain_gradient(updates, "fopng", params)
        del params, extra_args
        state.directions.check(updates, "fopng(directions)")
        leaves, treedef = jax.tree.flatten(updates)
        g = [x.astype(jnp.float32) for x in leaves]
        roots = [jnp.sqrt(f) for f in jax.tree.leaves(state.fisher_new)]
        visible = [not _tree.is_hole(x) for x in _tree.flatten(updates)[0]]
        basis = [q for q, here in zip(state.basis, visible, strict=True) if here]

        peaks = [jnp.max(jnp.abs(x), initial=0.0) for x in g]
        peak = jnp.max(jnp.stack(peaks)) if peaks else 0.0
        g = [x / jnp.where(peak == 0, 1.0, peak) for x in g]
        h = [x / root for x, root in zip(g, roots, strict=True)]
        covered = [i for i, q in enumerate(basis) if q is not None]
        kept = list(h)
        if covered:
            rows = [basis[i] for i in covered]
            seen = [g[i] * roots[i] if as_published else h[i] for i in covered]
            for i, s, r in zip(covered, seen, residual(rows, seen), strict=True):
                kept[i] = r + (h[i] - s)
        whole, length = norm(h), norm(kept)
        nothing = length <= _ROUNDING * whole
        scale = jnp.where(nothing, 0.0, 1.0 / jnp.where(nothing, 1.0, length))
        steps = [
            (scale * x / root).astype(u.dtype)
            for u, x, root in zip(leaves, kept, roots, strict=True)
        ]
        return jax.tree.unflatten(treedef, steps), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def renew_basis(node: FopngState) -> FopngState:
    """The state with the basis that its directions and Fisher matrices ask for."""
    basis = _constraint_basis(node.directions, node.fisher_old, node.fisher_new)
    return node._replace(basis=replace_arrays(node.basis, jax.tree.leaves(basis)))


def _positive(fisher: list[jax.Array]) -> list[jax.Array]:
    """In float32; entries that are negative or not finite count as 0."""
    fisher = [f.astype(jnp.float32) for f in fisher]
    return [jnp.where(jnp.isfinite(f) & (f > 0), f, 0.0) for f in fisher]


def _damped(fisher: list[jax.Array], damping: jax.typing.ArrayLike) -> list[jax.Array]:
    """F + damping · mean(F), always > 0: where F is 0 everywhere, it is 1."""
    fisher = _positive(fisher)
    mean = sum(jnp.sum(f) for f in fisher) / max(sum(f.size for f in fisher), 1)
    return [jnp.where(mean > 0, f + damping * mean, 1.0) for f in fisher]


Clean = Callable[[list[jax.Array]], list[jax.Array]]


def _replaced(held: Any, fisher: Any, clean: Clean, argument: str) -> Any:
    """`held` with the values of `fisher`, checked and cleaned."""
    if fisher is None:
        return held
    found = [jnp.asarray(f) for f in matrix.align(held, fisher, argument)]
    pairs = zip(*_tree.flatten_with_names(held), strict=True)
    here = [(name, x) for name, x in pairs if not _tree.is_hole(x)]
    for (name, x), f in zip(here, found, strict=True):
        if f.shape != x.shape:
            raise ValueError(
                f"{argument} has shape {f.shape} at {name!r}, expected {x.shape}, the "
                "parameter's."
            )
        if not _tree.is_traced(f) and not jnp.all(jnp.isfinite(f) & (f >= 0)):
            raise ValueError(
                f"{argument} has negative, NaN or infinite entries at {name!r}: a "
                "Fisher diagonal is a mean of squares."
            )
    return replace_arrays(held, clean(found))


def set_fisher(
    opt_state: Any, *, old: Any = None, new: Any = None, damping: float = 1e-3
) -> Any:
    """The state of `fopng` with other Fisher diagonals; the step does not recompile.

    Args:
      opt_state: of any wrapper around `fopng`.
      old: F of the old tasks, a tree like the parameters of values ≥ 0; None leaves it
        unchanged. After the first task it is that task's Fisher matrix, later
        `average_fisher(old, task)`.
      new: F' of the current task, a tree like that of `old`; None leaves it unchanged.
        What is stored is F' + damping · mean(F'), or 1 where F' is 0 everywhere.
      damping: > 0, as a share of the mean; entries of 0 would give infinite steps.

    Returns:
      A state of the same structure, shapes, dtypes and placement.

    Raises:
      ValueError: if the state holds no `fopng`, damping is not positive, a tree does
        not fit, or (outside jit) values are negative or not finite. Under jit such
        values count as 0.

    >>> from adamr import empty_directions, fopng
    >>> g = jnp.array([2.0, 1.0])
    >>> tx = fopng(empty_directions(g, 1))
    >>> state = set_fisher(tx.init(g), new=jnp.array([4.0, 1.0]), damping=1e-6)
    >>> print(tx.update(g, state)[0].round(4))
    [0.3536 0.7071]
    """
    if _tree.is_known(damping) and not damping > 0:
        raise ValueError(f"damping must be positive, got {damping}.")
    if not find_nodes(opt_state, FopngState):
        raise ValueError("opt_state holds no fopng: build the optimizer with it.")

    def damp(fisher):
        return _damped(fisher, damping)

    def replace(node):
        node = node._replace(
            fisher_old=_replaced(node.fisher_old, old, _positive, "old"),
            fisher_new=_replaced(node.fisher_new, new, damp, "new"),
        )
        return renew_basis(node)

    return map_nodes(replace, opt_state, FopngState)


def average_fisher(fisher: Any, task: Any, weight: float = 0.5) -> Any:
    """FOPNG's moving average over tasks: F <- (1 − weight) F + weight F_task.

    Args:
      fisher: F, a tree like the parameters.
      task: F_task, a tree like `fisher`.
      weight: of the newest task, in [0, 1].

    Returns:
      A tree like `fisher`.

    >>> average_fisher({"w": jnp.ones(1)}, {"w": jnp.zeros(1)})["w"]
    Array([0.5], dtype=float32)
    """
    return jax.tree.map(lambda f, t: (1.0 - weight) * f + weight * t, fisher, task)
