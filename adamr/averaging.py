"""Averages of weights, made after or beside training; no gradient sees them.

lines_scaling   LiNeS: moves shallow blocks back towards the pretrained weights
ema_weights     temporal ensemble: an average over the steps, for evaluation
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adamr import _tree

__all__ = ["EmaWeights", "EmaWeightsState", "ema_weights", "lines_scaling"]


def lines_scaling(
    pretrained: Any,
    finetuned: Any,
    alpha: float,
    beta: float | None = None,
    *,
    block: Callable[[str], int | None],
) -> Any:
    """LiNeS: the task vector scaled by depth, θ_0 + (α + β l/(L − 1)) (θ_ft − θ_0).

    Undoes most of the change of the shallow blocks, which carry general features, and
    keeps that of the deep ones: less forgetting for almost no loss on the new task.
    Call it once, after fine-tuning.

    Args:
      pretrained: θ_0, a tree of float arrays.
      finetuned: θ_ft, a tree like pretrained.
      alpha: α, the scale of the first block and of leaves outside the blocks.
      beta: β, added to α for the last block. None: 1 − alpha, the authors' choice for a
        single task, with which the last block keeps its fine-tuned weights.
      block: a function that maps a leaf's name such as `blocks/3/kernel` to its block
        l, counted from 0, or to None outside the blocks (usually embeddings and heads).
        L is the largest l it returns, plus one.

    Returns:
      A tree like pretrained, in its dtypes, rounded once. What fine-tuning left as it
      was stays so to the bit.

    Raises:
      ValueError: if the trees or shapes do not match, or block finds fewer than two
        blocks.

    >>> before = {"0": jnp.zeros(1), "1": jnp.zeros(1), "2": jnp.zeros(1)}
    >>> after = {"0": jnp.ones(1), "1": jnp.ones(1), "2": jnp.ones(1)}
    >>> lines_scaling(before, after, 0.5, block=int)["1"]
    Array([0.75], dtype=float32)

    References:
      Wang et al., LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances
      Model Merging, arXiv:2410.17146.
    """
    beta = 1.0 - alpha if beta is None else beta
    names, _ = _tree.flatten_with_names(pretrained)
    blocks = [block(name) for name in names]
    last = max((b for b in blocks if b is not None), default=0)
    if last < 1 or min(b for b in blocks if b is not None) < 0:
        raise ValueError(
            "block must number the blocks from 0 and find at least two of them, got "
            f"{dict(zip(names, blocks, strict=True))}."
        )
    have, want = jax.tree.structure(finetuned), jax.tree.structure(pretrained)
    if have != want:
        raise ValueError(
            f"finetuned has the structure {have}, expected that of pretrained, {want}."
        )

    ends = _tree.flatten(finetuned)[0]
    for name, start, end in zip(names, _tree.flatten(pretrained)[0], ends, strict=True):
        if not _tree.is_hole(start) and jnp.shape(start) != jnp.shape(end):
            raise ValueError(
                f"finetuned has shape {jnp.shape(end)} at {name}, expected that of "
                f"pretrained, {jnp.shape(start)}."
            )

    def scaled(start, number, end):
        scale = alpha if number is None else alpha + beta * number / last
        wide = jnp.promote_types(start.dtype, jnp.float32)
        # A weighted mean, not start + scale · change: exact at scale 1.
        mean = start.astype(wide) * (1.0 - scale) + end.astype(wide) * scale
        unchanged = (start == end) | (scale == 0.0)
        return jnp.where(unchanged, start, mean.astype(start.dtype))

    return _tree.map_positions(scaled, pretrained, blocks, ends)


class EmaWeightsState(NamedTuple):
    """The average so far.

    Attributes:
      count: int32: updates so far.
      weights: the average, a tree like the parameters in float32 or wider.
    """

    count: jax.Array
    weights: Any


class EmaWeights(NamedTuple):
    """`init(params) -> state` and `update(state, params) -> state`."""

    init: Callable[[Any], EmaWeightsState]
    update: Callable[[EmaWeightsState, Any], EmaWeightsState]


def ema_weights(decay: float = 0.99, warmup_steps: int = 0) -> EmaWeights:
    """Temporal ensemble: the average of the weights over training, for evaluation.

        weights  <-  params                               while count < warmup_steps
        weights  <-  decay · weights + (1 − decay) · params    afterwards

    Training never sees the average. It starts as a copy of the parameters, so it needs
    no debiasing. Its dtype is float32 or wider: in bfloat16 a step of (1 − decay) would
    round away.

    Trap: `params` must hold everything that evaluation reads, including batch-norm
    statistics. When a task adds a head, copy the head into `weights` as the task
    begins, so that it is not averaged with an earlier random start.

    Args:
      decay: in [0, 1); the authors use 0.99 per iteration.
      warmup_steps: how many updates only copy the parameters, so that the first steps
        of training do not enter the average; at least 0.

    Returns:
      An `EmaWeights`; evaluate with `state.weights`.

    Raises:
      ValueError: if decay or warmup_steps is out of range.

    >>> ema = ema_weights(decay=0.75)
    >>> state = ema.init(jnp.zeros(1))
    >>> ema.update(state, jnp.ones(1)).weights
    Array([0.25], dtype=float32)

    References:
      Soutif-Cormerais, Carta and Van de Weijer, Improving Online Continual Learning
      Performance and Stability with Temporal Ensembles, arXiv:2306.16817.
    """
    if not 0.0 <= decay < 1.0:
        raise ValueError(f"decay must lie in [0, 1), got {decay}.")
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps must be at least 0, got {warmup_steps}.")

    def accumulator(x):
        x = jnp.asarray(x)
        floating = jnp.issubdtype(x.dtype, jnp.floating)
        dtype = jnp.promote_types(x.dtype, jnp.float32) if floating else x.dtype
        return jnp.array(x, dtype, copy=True)

    def init(params):
        return EmaWeightsState(
            jnp.zeros([], jnp.int32), jax.tree.map(accumulator, params)
        )

    def update(state, params):
        step = jnp.where(state.count < warmup_steps, 1.0, 1.0 - decay)

        def average(old, new):
            # Counters and flags have no average: the newest value is kept.
            if not jnp.issubdtype(old.dtype, jnp.floating):
                return jnp.asarray(new, old.dtype)
            new = jnp.asarray(new, old.dtype)
            return optax.incremental_update(new, old, step.astype(old.dtype))

        weights = jax.tree.map(average, state.weights, params)
        count = jnp.asarray(optax.safe_increment(state.count))
        return EmaWeightsState(count, weights)

    return EmaWeights(init, update)
