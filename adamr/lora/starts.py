"""A's chosen at a task's start, from its inputs (InfLoRA) or its gradient (KeepLoRA).

Both take the leading directions of something of the new task outside the protected
space U, and both papers then train B alone (`train_b`). Call them after `start_task`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from adamr import _tree
from adamr._nodes import find_nodes
from adamr._tree import placed_like
from adamr.lora.blocks import BlockState
from adamr.lora.leading import leading
from adamr.lora.leading_on_host import leading_on_host
from adamr.lora.pairs import Halves, halves, located
from adamr.lora.precision import require_wide
from adamr.lora.task import bases_of, require_restartable
from adamr.modifiers.penalty import Anchor
from adamr.subspaces.columns import on_host, to_columns, to_storage
from adamr.subspaces.covariance import (
    Covariance,
    check_leaves,
    check_moment,
    require_finite,
)
from adamr.subspaces.grow import gradient_rows, sample_rows

__all__ = ["inflora", "keeplora"]

# (number of the pair, basis, weights) -> rows (*batch, count, n) or (*batch, n, n)
Evidence = Callable[[int, jax.Array, jax.Array], jax.Array]


def _same(x: jax.Array, y: jax.Array) -> bool:
    """Whether both are known to be the same basis."""
    return x.shape == y.shape and not _tree.is_traced(x) and bool(jnp.all(x == y))


def _led(
    met: jax.Array, basis: jax.Array, weights: jax.Array, rank: int, **options: bool
) -> jax.Array:
    """The leading directions (*batch, n, rank) of the evidence outside a basis."""
    columns, _ = to_columns(basis, weights)
    like = jnp.zeros((*columns.shape[:-1], rank), columns.dtype)
    traced = _tree.is_traced(columns) or _tree.is_traced(met)
    function = leading if traced else leading_on_host
    return on_host(function, like, columns, met, **options)[0]


def _started(
    lora: Any,
    opt_state: Any,
    pairs: Sequence[Halves],
    evidence: Evidence,
    *,
    scale: float,
    rows: bool,
    squared: bool = False,
    shared: bool = False,
) -> Any:
    """`lora` with A <- scale · leading directions of the evidence, B <- 0."""
    names, leaves = _tree.flatten_with_names(lora)
    require_wide(leaves, names)
    require_restartable(opt_state)
    if find_nodes(opt_state, BlockState):
        raise ValueError(
            "opt_state is of lora.train_block, whose finished blocks would be lost: "
            "every A and B is written anew here. Keep the A that lora.start_block "
            "draws, or merge finished pairs (lora.start_task)."
        )
    if find_nodes(opt_state, Anchor):
        raise ValueError(
            "opt_state has the anchor of a penalty (gpm_si, ewc, ...), which would "
            "pull every A back to the one that is replaced here. Keep the A that "
            "lora.start_task draws, or train with a recipe without a penalty (gpm)."
        )
    here = bases_of(opt_state, lora, pairs)
    new = list(leaves)
    done: dict[tuple[int, int], tuple[jax.Array, jax.Array, jax.Array]] = {}
    for i, each in enumerate(pairs):
        a, basis, weights = leaves[each.a], here.bases[each.a], here.weights[each.a]
        if basis is None or weights is None:
            raise ValueError(
                f"the subspace in opt_state has no basis for the A {names[each.a]!r}, "
                "expected one, which says along which axes its directions lie."
            )
        met = evidence(i, basis, weights)
        rank, axis = each.factors.rank, each.factors.rank_axis[0]
        # Query, key and value meet the same, and mostly have the same basis.
        known = done.get((id(met), rank))
        if known is None or not _same(known[1], basis):
            found = _led(met, basis, weights, rank, rows=rows, squared=squared)
            known = found, basis, met
            if shared:  # kept, so that its id stays its own
                done[id(met), rank] = known
        found = known[0]
        shapes = (jnp.zeros((*x.shape[:-1], rank)) for x in (basis, weights))
        stored, _ = to_storage(found, found[..., 0, :], *shapes)
        stored = jnp.moveaxis(jnp.squeeze(stored, axis), -1, axis)
        new[each.a] = placed_like(a, scale * stored)
        new[each.b] = placed_like(leaves[each.b], jnp.zeros_like(leaves[each.b]))
    return jax.tree.unflatten(_tree.flatten(lora)[1], new)


def inflora(
    lora: Any,
    opt_state: Any,
    inputs: Any,
    *,
    form: Literal["paper", "code"] = "paper",
    pairs: Sequence[Any] | None = None,
) -> Any:
    """InfLoRA's start of a task: A from the new task's inputs outside the old ones'.

        A <- V_r / √3,  B <- 0

    V_r: the r leading eigenvectors of (I − UUᵀ) X̄ (I − UUᵀ), X̄ the mean of x xᵀ over
    the inputs x of the new task ("paper"; "code": the leading left singular vectors of
    (I − UUᵀ) X̄, as the authors' code computes them). Then B alone trains, in the span
    that the new task uses most and the old tasks do not use.

    Call it after `start_task`, which grows U (the authors do so by DualGPM, with a
    threshold that rises from task to task) and merges; train with
    `train_b(adamr(rate, project_out(subspace)))`.

    Without `train_b`, A trains as well and its gradient is projected. Old responses
    stay in place. Little of the random A of `start_task` meets the new inputs: where
    the learning rate is small, a task is learned faster from this one. At the best rate
    they are level (docs/pretrained.md).

    Of a fan-in above 256 the vectors come from a block iteration and hold nearly all of
    the energy that the leading eigenvectors do.

    Args:
      lora: the A's and B's, float32; what they hold is lost: merge before.
      opt_state: with the `Subspace` of the A's.
      inputs: `layer_inputs(forward, lora, x)` of the *new* task, before it is trained.
      form: "paper" or "code".
      pairs: as for `find_pairs`.

    Returns:
      A tree like `lora`. UᵀA = 0, the columns are orthogonal. Those for which the new
      task has no inputs outside U (or fewer than r directions) are 0, and as B is 0 as
      well, they stay so. A direction with less than 1e-6 of the energy of the inputs
      counts as none; with rows, outside jit, with less than 1e-12.

    Raises:
      ValueError: as `start_task` raises it; for an A without a basis or without inputs,
        and for the state of `train_block` or of a penalty.

    >>> from adamr import empty_subspace, project_out, protect_inputs
    >>> lora = {"w_lora_a": jnp.ones((3, 1)), "w_lora_b": jnp.zeros((1, 2))}
    >>> s = empty_subspace(lora, unprotected=["lora_b"])
    >>> old = {"w_lora_a": jnp.eye(3)[:1], "w_lora_b": None}
    >>> state = protect_inputs(project_out(s).init(lora), old)
    >>> new = {"w_lora_a": jnp.array([[9.0, 3.0, 0.0]]), "w_lora_b": None}
    >>> print(jnp.abs(inflora(lora, state, new)["w_lora_a"][:, 0]).round(3))
    [0.    0.577 0.   ]

    References:
      Liang, Li, InfLoRA: Interference-Free Low-Rank Adaptation for Continual Learning,
      arXiv:2404.00228.
    """
    if form not in ("paper", "code"):
        raise ValueError(f"form is {form!r}, expected 'paper' or 'code'.")
    found = halves(lora, pairs)
    by_gram = isinstance(inputs, Covariance)
    if by_gram:
        check_leaves("inputs", inputs, len(_tree.flatten(lora)[0]))
        entries = list(inputs.moments)
    else:
        entries = _tree.flatten_like(inputs, "inputs", lora)

    def evidence(i, basis, weights):
        name, x = found[i].pair.a, entries[found[i].a]
        if _tree.is_hole(x):
            raise ValueError(f"inputs has None at the A {name!r}, expected its inputs.")
        x = jnp.asarray(x)
        if not by_gram:
            return sample_rows(name, x, basis, weights)
        check_moment(x, name, basis, weights)
        require_finite(x, f"at {name!r}")
        return x

    return _started(
        lora,
        opt_state,
        found,
        evidence,
        scale=1 / math.sqrt(3),
        rows=not by_gram,
        squared=form == "code",
        shared=True,
    )


def keeplora(
    base: Any,
    lora: Any,
    opt_state: Any,
    gradient: Any,
    *,
    pairs: Sequence[Any] | None = None,
) -> Any:
    """KeepLoRA's start of a task: A from the gradient of the kernel outside U.

        Ĝ = G − UUᵀG,  A <- the r leading left singular vectors of Ĝ,  B <- 0

    G = ∂loss/∂W over some batches of the new task, W (in, out). The authors keep A
    fixed from then on (`train_b`); with A trained, its gradient projected, old inputs
    are protected as well. Their U starts with the leading directions of the pretrained
    weights and grows by GPM's rule.

    Args:
      base: the kernels, for their shapes; after `start_task`.
      lora: the A's and B's, float32; what they hold is lost: merge before.
      opt_state: with the `Subspace` of the A's.
      gradient: a tree like `base`, the loss' gradient with respect to the kernels
        (`jax.grad(loss, argnums=...)`); None where a leaf is the kernel of no pair.
      pairs: as for `find_pairs`.

    Returns:
      A tree like `lora`. UᵀA = 0, the columns are orthonormal, or 0 where Ĝ has rank
      below r: a direction with less than 1e-12 of the energy of G counts as none,
      inside jit with less than 1e-6.

    Raises:
      ValueError: as `start_task` raises it; for an A without a basis, for the state of
        `train_block` or of a penalty, and for a gradient of another shape or (outside
        jit) one that is not finite.

    >>> from adamr import empty_subspace, project_out, protect_inputs
    >>> base = {"w": jnp.ones((3, 2))}
    >>> lora = {"w_lora_a": jnp.ones((3, 1)), "w_lora_b": jnp.zeros((1, 2))}
    >>> s = empty_subspace(lora, unprotected=["lora_b"])
    >>> old = {"w_lora_a": jnp.eye(3)[:1], "w_lora_b": None}
    >>> state = protect_inputs(project_out(s).init(lora), old)
    >>> gradient = {"w": jnp.array([[9.0, 9.0], [1.0, 1.0], [0.0, 0.0]])}
    >>> print(jnp.abs(keeplora(base, lora, state, gradient)["w_lora_a"][:, 0]))
    [0. 1. 0.]

    References:
      Luo et al., KeepLoRA, arXiv:2601.19659, https://github.com/MaolinLuo/KeepLoRA.
    """
    found = located(base, lora, pairs)
    kernels = _tree.flatten(base)[0]
    entries = _tree.flatten_like(gradient, "gradient", base)
    leaves = _tree.flatten(lora)[0]

    def evidence(i, basis, weights):
        each, g = found[i], entries[found[i].kernel]
        name, shape = each.pair.kernel, kernels[each.kernel].shape
        if _tree.is_hole(g) or jnp.shape(g) != shape:
            got = "None" if _tree.is_hole(g) else f"shape {jnp.shape(g)}"
            raise ValueError(
                f"gradient has {got} at the kernel {name!r}, expected shape {shape}."
            )
        finite = jnp.all(jnp.isfinite(g))
        if not _tree.is_traced(finite) and not finite:
            raise ValueError(f"gradient has NaN or infinite entries at {name!r}.")
        as_a = each.meeting.outputs_as_rank(jnp.asarray(g), leaves[each.a].shape)
        return gradient_rows(as_a, basis, weights)

    parts = [each.halves for each in found]
    return _started(lora, opt_state, parts, evidence, scale=1.0, rows=True)
