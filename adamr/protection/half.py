"""Half fine-tuning: each round trains a random half of the leaves of every category."""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adamr import _tree
from adamr._nodes import find_nodes, map_nodes
from adamr.protection.frozen import update_where
from adamr.routing.carrier import plain_gradient

__all__ = ["HalfFineTuningState", "default_groups", "half_fine_tuning", "redraw_half"]

Groups = Callable[[str, tuple[int, ...]], Hashable]

_PROJECTIONS = set("q k v o wq wk wv wo qkv query key value out".split())


def default_groups(path: str, shape: tuple[int, ...]) -> str | None:
    """Categories of a transformer's leaves, by the last two parts of their names.

    ==============================================  ==================================
    leaf                                            category
    ==============================================  ==================================
    `…embed…`, `…head`, `logits`                    None: always trained
    `scale`, `…norm…`, `ln…`                        norm
    in `query`, `q_proj`, `attention` and the like  attention of its block
    any other with two axes or more                 mlp
    any other                                       bias
    ==============================================  ==================================

    The biases of an attention layer have a category of their own.

    Args:
      path: the leaf's name, parts separated by `/`.
      shape: the leaf's shape.

    >>> default_groups("block_0/attention/query/kernel", (64, 4, 16))
    'block_0/attention kernel'
    >>> default_groups("block_0/mlp/up/kernel", (64, 256))
    'mlp'
    """
    *block, module, name = ["", "", *path.removesuffix("/value").split("/")]
    parts = (module.lower(), name.lower())
    if any("embed" in p or p.endswith("head") or p == "logits" for p in parts):
        return None
    if name.lower() == "scale" or any("norm" in p or p[:2] == "ln" for p in parts):
        return "norm"
    for p in parts:
        if "att" in p or p.removesuffix("_proj") in _PROJECTIONS:
            return f"{'/'.join(filter(None, block))} {name}"
    return "mlp" if len(shape) > 1 else "bias"


class HalfFineTuningState(NamedTuple):
    inner: Any
    key: jax.Array  # uint32, or typed where it is not of JAX's default implementation
    groups: jax.Array  # (leaves,) int32 in leaf order: the category, −1 for none
    trained: jax.Array  # (leaves,) bool


def _draw(key: jax.Array, groups: jax.Array) -> jax.Array:
    """Which leaves train: all but ⌊n/2⌋ random ones of every category of n."""
    if not groups.size:
        return jnp.zeros(groups.shape, bool)
    order = jnp.lexsort((jax.random.uniform(key, groups.shape), groups))
    ordered = groups[order]
    start = jnp.searchsorted(ordered, ordered, side="left")
    size = jnp.searchsorted(ordered, ordered, side="right") - start
    frozen = (jnp.arange(groups.size) - start < size // 2) & (ordered >= 0)
    return jnp.zeros(groups.shape, bool).at[order].set(~frozen)


def half_fine_tuning(
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    groups: Groups | None = None,
) -> optax.GradientTransformationExtraArgs:
    """HFT: in every round a random half of the leaves of each category stays frozen.

    Of a category of n leaves exactly ⌊n/2⌋ are frozen, until `redraw_half` begins the
    next round. At the end of a round frozen leaves are bit-identical: their step is
    exactly zero, weight decay included, their moments stay, and the optimizer sees a
    zero gradient there.

    Args:
      optimizer: any, such as `optax.adamw(...)`.
      key: a PRNG key, typed or uint32; all draws come from it.
      groups: (path, shape) -> category, or None for a leaf that always trains; path is
        the leaf's name such as `block_0/attention/query/kernel`. None:
        `default_groups`, the paper's choice with one difference: the paper halves
        feed-forward matrices within every pair of blocks, here they are halved over all
        blocks. Layers stacked into one leaf are frozen together.

    Returns:
      A wrapper with a state of fixed shapes: a new round does not recompile.

    >>> params = {f"block_{i}": {"up": {"kernel": jnp.ones((2, 2))}} for i in range(2)}
    >>> tx = half_fine_tuning(optax.sgd(1.0), jax.random.key(0))
    >>> steps, state = tx.update(params, tx.init(params))
    >>> [float(x[0, 0]) for x in jax.tree.leaves(steps)]
    [0.0, -1.0]

    References:
      Hui et al., HFT: Half Fine-Tuning for Large Language Models, arXiv:2404.18466.
    """
    inner, rule = optax.with_extra_args_support(optimizer), groups or default_groups

    def init_fn(params):
        _tree.require_arrays(params, "half_fine_tuning")
        names, leaves = _tree.flatten_with_names(params)
        categories = [
            rule(n, x.shape)
            for n, x in zip(names, leaves, strict=True)
            if not _tree.is_hole(x)
        ]
        known = dict.fromkeys(c for c in categories if c is not None)
        number = {None: -1, **{c: i for i, c in enumerate(known)}}
        where = jnp.array([number[c] for c in categories], jnp.int32)
        following, now = jax.random.split(_tree.stored_key(key))
        return HalfFineTuningState(
            inner.init(params), following, where, _draw(now, where)
        )

    def update_fn(updates, state, params=None, **extra_args):
        updates = plain_gradient(updates, "half_fine_tuning", params)
        treedef = jax.tree.structure(updates)
        keep = jax.tree.unflatten(treedef, list(state.trained))
        updates = jax.tree.map(
            lambda k, g: jnp.where(k, g, jnp.zeros_like(g)), keep, updates
        )
        steps, new = update_where(keep, inner, updates, state.inner, params, extra_args)
        return steps, state._replace(inner=new)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def redraw_half(opt_state: Any) -> Any:
    """Begins a round of `half_fine_tuning`: draws anew which leaves are frozen.

    Moments stay. The rounds of the paper start with a fresh optimizer:
    `adamr.reset_moments(redraw_half(opt_state))`. Without the reset a leaf that trains
    for the first time starts with steps up to (1 − b1) / √(1 − b2) times too large,
    because Adam has counted the steps in which the leaf was frozen.

    Args:
      opt_state: of any wrapper around `half_fine_tuning`.

    Raises:
      ValueError: if there is no such state.

    >>> tx = half_fine_tuning(optax.sgd(1.0), jax.random.key(0))
    >>> state = redraw_half(tx.init({"up": jnp.ones((2, 2)), "down": jnp.ones((2, 2))}))
    >>> int(state.trained.sum())
    1
    """
    if not find_nodes(opt_state, HalfFineTuningState):
        raise ValueError(
            "opt_state holds no state of half_fine_tuning: build the optimizer with it."
        )

    def redraw(node):
        following, now = jax.random.split(node.key)
        return node._replace(
            key=_tree.placed_like(node.key, following),
            trained=_tree.placed_like(node.trained, _draw(now, node.groups)),
        )

    return map_nodes(redraw, opt_state, HalfFineTuningState)
