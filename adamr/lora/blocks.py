"""Finished pairs kept beside the kernel, frozen, for kernels that cannot be merged.

An A of `tasks` · r columns is `tasks` blocks of r, and so is the B of as many rows. One
block trains at a time, the others stand still:

    h = xW + s · Σ_t (x A_t) B_t

Capacity: tasks × r columns, fixed when the model is made.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adamr import _tree
from adamr._nodes import find_nodes, map_nodes
from adamr._tree import placed_like
from adamr.lora.draw import Init, he_uniform, redrawn
from adamr.lora.pairs import Halves, halves
from adamr.lora.precision import require_wide
from adamr.lora.remaining import warn_of_gaps
from adamr.lora.task import bases_of, require_restartable, restarted
from adamr.routing.carrier import plain_gradient
from adamr.sharding import einsum_sharding
from adamr.state import protect_inputs
from adamr.subspaces.subspace import Subspace

__all__ = ["BlockState", "in_blocks", "orthogonality", "start_block", "train_block"]

# A tree -> for each position the axis that is cut into blocks, or None.
BlockAxes = Callable[[Any], Sequence[int | None]]


class BlockState(NamedTuple):
    """Which block trains.

    Attributes:
      block: int32, counted from 0.
      rank: int32, r, the length of a block.
      inner: state of the wrapped optimizer.
    """

    block: jax.Array
    rank: jax.Array
    inner: Any


def _numbers(shape: tuple[int, ...], axis: int, rank: Any) -> jax.Array:
    """The block of each entry along an axis, shaped to broadcast against a leaf."""
    sizes = [n if d == axis else 1 for d, n in enumerate(shape)]
    return jax.lax.broadcasted_iota(jnp.int32, sizes, axis) // rank


def in_blocks(
    optimizer: optax.GradientTransformation, rank: int, axes: BlockAxes
) -> optax.GradientTransformationExtraArgs:
    """An optimizer that trains one block of each leaf; see `train_block`.

    Args:
      optimizer: any.
      rank: the length of a block.
      axes: `tree -> axis or None per position` of parameters or of a gradient; leaves
        with None train as usual.

    Returns:
      An optimizer whose state is a `BlockState`.

    Raises:
      ValueError: for a rank below 1.

    >>> tx = in_blocks(optax.sgd(1.0), 2, lambda tree: [0])
    >>> print(tx.update(jnp.ones(4), tx.init(jnp.ones(4)))[0])
    [-1. -1.  0.  0.]
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}.")
    inner = optax.with_extra_args_support(optimizer)

    def kept(tree, state):
        def leaf(x, axis):
            if axis is None:
                return x
            here = _numbers(x.shape, axis, state.rank) == state.block
            return jnp.where(here, x, jnp.zeros_like(x))

        return _tree.map_positions(leaf, tree, axes(tree))

    def init_fn(params):
        block, size = jnp.zeros([], jnp.int32), jnp.full([], rank, jnp.int32)
        return BlockState(block, size, inner.init(params))

    def update_fn(updates, state, params=None, **extra_args):
        updates = kept(plain_gradient(updates, "train_block", params), state)
        steps, new = inner.update(updates, state.inner, params, **extra_args)
        return kept(steps, state), state._replace(inner=new)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def train_block(
    optimizer: optax.GradientTransformation,
    rank: int,
    *,
    pairs: Sequence[Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer that trains one block of r columns of every A, and of rows of its B.

    Guarantee: the other blocks do not move by a bit, whatever the optimizer does
    (momentum, weight decay), and their gradient reaches no moment and no norm.

    Args:
      optimizer: a whole one over the tree of the pairs, such as
        `adamr(rate, project_out(subspace), weight_decay=0.1)`. Axes in front that A and
        B of a pair share are taken for stacked layers.
      rank: r of one block. The pairs have `tasks` · r columns, so that the model is
        made with that rank: the scale α / rank that Qwix and PEFT apply is then that
        of the whole.
      pairs: as for `find_pairs`.

    Returns:
      An optimizer; it starts with the first block. `start_block` begins the next.

    Raises:
      ValueError: for a rank below 1; at update, for leaves in no pair.

    >>> lora = {"w_lora_a": jnp.ones((3, 4)), "w_lora_b": jnp.ones((4, 1))}
    >>> tx = train_block(optax.adamw(0.1), rank=2)
    >>> step, _ = tx.update(lora, tx.init(lora), lora)
    >>> [f"{x:.2f}" for x in step["w_lora_b"][:, 0]]
    ['-0.10', '-0.10', '0.00', '0.00']
    """

    def axes(tree):
        found: list[int | None] = [None] * len(_tree.flatten(tree)[0])
        for each in halves(tree, pairs):
            found[each.a], found[each.b] = each.factors.rank_axis
        return found

    return in_blocks(optimizer, rank, axes)


def _held(opt_state: Any) -> BlockState:
    found = find_nodes(opt_state, BlockState)
    if len(found) != 1:
        raise ValueError(
            f"opt_state holds {len(found)} BlockStates, expected one: build the "
            "optimizer as lora.train_block(optimizer, rank)."
        )
    return found[0]


def _of_b(leaves: Sequence[Any], each: Halves, held: BlockState) -> jax.Array:
    """The block number of each row of a B."""
    return _numbers(leaves[each.b].shape, each.factors.rank_axis[1], held.rank)


def _next_block(
    leaves: Sequence[Any], found: Sequence[Halves], held: BlockState
) -> jax.Array:
    """The first block whose B's are zero: this one, or the one after it."""

    def learned(each):
        here = _of_b(leaves, each, held) == held.block
        return jnp.any(here & (leaves[each.b] != 0))

    some = jnp.any(jnp.stack([learned(each) for each in found]))
    block = held.block + some.astype(jnp.int32)
    columns = [each.factors.rank for each in found]
    if _tree.is_traced(block):
        used_up = (block + 1) * held.rank > min(columns)
        return jnp.where(used_up, max(columns), block)  # where no column is
    least, rank = min(columns), int(held.rank)
    if (int(block) + 1) * rank > least:
        raise ValueError(
            f"all {least // rank} blocks of r = {rank} hold finished tasks: the pairs "
            f"have {least} columns, expected room for one more block. Make the model "
            "with a larger rank."
        )
    for each in found:
        if jnp.any((_of_b(leaves, each, held) >= block) & (leaves[each.b] != 0)):
            raise ValueError(
                f"lora has numbers in the unused rows of {each.pair.b!r}, expected "
                "zeros: the model would change at the boundary."
            )
    return block


def start_block(
    lora: Any,
    opt_state: Any,
    inputs: Any,
    key: jax.Array,
    *,
    threshold: float = 0.97,
    init: Init = he_uniform,
    pairs: Sequence[Any] | None = None,
) -> tuple[Any, Any]:
    """Ends a task and starts the next beside a kernel that cannot be merged.

        U <- grow_subspace(U, inputs, threshold)
        A_{t+1} <- (I − UUᵀ) A₀,  B_{t+1} = 0,  moments <- 0

    The base is not touched (int8, nf4, or any), the model computes what it did, and the
    guarantee is that of `start_task`: old responses do not move. A block whose B's are
    all zero has nothing to keep and is drawn again, so the same call before the first
    task protects text that the pretrained model should keep. Merged pairs
    (`start_task`) need no capacity and compute less.

    Args:
      lora: the A's and B's of `tasks` · r columns, float32; B's are zero at first.
      opt_state: of `train_block(optimizer, r)`, in any wrapper, with a `Subspace` as
        for `start_task`.
      inputs: of the finished task, as for `start_task`; None: nothing more is
        protected, and no subspace is needed (O-LoRA, with `orthogonality` in the loss).
      key, threshold, init, pairs: as for `start_task`.

    Returns:
      (lora, opt_state) of the same structures, shapes, dtypes and placement. Works
      under jit, where after the last block nothing trains any more.

    Raises:
      ValueError: as `start_task` raises it; outside jit, when all blocks are used, or
        for a B that is not zero in the blocks to come.

    >>> from adamr import adamr, empty_subspace, project_out
    >>> lora = {"w_lora_a": jnp.ones((3, 4)), "w_lora_b": jnp.zeros((4, 1))}
    >>> s = empty_subspace(lora, unprotected=["lora_b"])
    >>> tx = train_block(adamr(0.1, project_out(s)), rank=2)
    >>> inputs = {"w_lora_a": jnp.eye(3)[:1], "w_lora_b": None}
    >>> lora, state = start_block(lora, tx.init(lora), inputs, jax.random.key(0))
    >>> print(jnp.any(lora["w_lora_a"][0, :2] != 0), lora["w_lora_a"][:, 2:].sum())
    False 6.0

    References:
      Saha, Garg, Roy, Gradient Projection Memory, arXiv:2103.09762. Hu et al., LoRA,
      arXiv:2106.09685.
    """
    found = halves(lora, pairs)
    names, leaves = _tree.flatten_with_names(lora)
    require_wide(leaves, names)
    require_restartable(opt_state)
    held = _held(opt_state)
    block = _next_block(leaves, found, held)
    if inputs is not None:
        bases_of(opt_state, lora, found)
        opt_state = protect_inputs(
            opt_state, inputs, threshold=threshold, moments="keep"
        )
        warn_of_gaps(opt_state, inputs, lora)
    if find_nodes(opt_state, Subspace):
        here = bases_of(opt_state, lora, found)
    else:
        here = Subspace((None,) * len(leaves), (None,) * len(leaves))
    fresh = redrawn(key, leaves, found, here, init)
    new = list(leaves)
    for each in found:
        a = leaves[each.a]
        mine = _numbers(a.shape, each.factors.rank_axis[0], held.rank) == block
        new[each.a] = placed_like(a, jnp.where(mine, fresh[each.a], a))
    lora = jax.tree.unflatten(_tree.flatten(lora)[1], new)
    opt_state = restarted(opt_state, lora)

    def moved(node):
        return node._replace(block=placed_like(node.block, block))

    return lora, map_nodes(moved, opt_state, BlockState)


def orthogonality(
    lora: Any, opt_state: Any, *, pairs: Sequence[Any] | None = None
) -> jax.Array:
    """O-LoRA's penalty: Σ over pairs, Σ_{t' < t} Σ_ij |A_{t'}ᵀ A_t|_ij.

    t is the block that trains. Old blocks get no gradient. For the loss:

        loss = task_loss + 0.5 * orthogonality(lora, opt_state)

    with λ₁ = 0.5, as the authors' scripts have it (their λ₂, of the norms, is 0). It
    asks new A's to be orthogonal to old A's, which protects no input: xA_t is small for
    old x only as far as old A's span the old inputs.

    Args:
      lora: the A's and B's.
      opt_state: of `train_block`; `start_block(..., inputs=None)` ends a task.
      pairs: as for `find_pairs`.

    Returns:
      A float32 number; 0 in the first task.

    >>> lora = {"w_lora_a": jnp.array([[1.0, 3.0]]), "w_lora_b": jnp.ones((2, 1))}
    >>> state = train_block(optax.sgd(0.1), rank=1).init(lora)
    >>> print(orthogonality(lora, state))
    0.0
    >>> print(orthogonality(lora, state._replace(block=jnp.array(1))))
    3.0

    References:
      Wang et al., Orthogonal Subspace Learning for Language Model Continual Learning,
      arXiv:2310.14152.
    """
    held, leaves = _held(opt_state), _tree.flatten(lora)[0]
    total = jnp.zeros([], jnp.float32)
    for each in halves(lora, pairs):
        a = each.factors.as_columns(leaves[each.a]).astype(jnp.float32)
        number = jnp.arange(each.factors.rank) // held.rank
        between = (number < held.block)[:, None] & (number == held.block)[None]
        met = jnp.einsum(
            "lnr,lns->lrs",
            jax.lax.stop_gradient(a),
            a,
            precision=jax.lax.Precision.HIGHEST,
            out_sharding=einsum_sharding("lnr,lns->lrs", a, a),
        )
        total += jnp.sum(jnp.where(between[None], jnp.abs(met), 0.0))
    return total
