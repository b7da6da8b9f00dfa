"""Task boundaries of the penalties: pure functions on an optimizer state.

    get_anchor, set_anchor   read and write (Ω, θ*)
    consolidate              EWC, online EWC, MAS, L2: an importance from data comes in

They find their targets inside chain, masked, partition, MultiSteps, inject_hyperparams,
apply_if_finite and nnx.Optimizer by type. Shapes, dtypes and placement stay, so the
step does not recompile. Call them between the last step of a task and the first of the
next. They work under jit as well.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from adamr import _tree
from adamr._nodes import find_nodes, map_nodes
from adamr._tree import placed_like
from adamr.modifiers.penalty import Anchor, widen

__all__ = [
    "consolidate",
    "get_anchor",
    "set_anchor",
]


def _anchors(opt_state: Any) -> list[Anchor]:
    """Every `Anchor`; `optax.partition` may hold several, each for its own leaves."""
    found = find_nodes(opt_state, Anchor)
    if not found:
        raise ValueError(
            "opt_state holds no Anchor: build the optimizer with quadratic_penalty, "
            "proximal_second_moment, proximal_penalty or a recipe such as ewc."
        )
    leaves = [_tree.flatten(node.anchor)[0] for node in found]
    if any(len(row) != len(leaves[0]) for row in leaves) or any(
        sum(not _tree.is_hole(x) for x in position) > 1
        for position in zip(*leaves, strict=True)
    ):
        raise ValueError(
            f"opt_state holds {len(found)} anchors for the same parameters: pass the "
            "part of the state that has one of them."
        )
    return found


def rewrite_anchors(
    opt_state: Any, function: Callable[..., tuple], **trees: Any
) -> Any:
    """(Ω, θ*) <- `function(Ω, θ*, *leaves)` on every leaf of every anchor.

    `trees` are like params; None in one of them reaches the function as 0.
    """
    _anchors(opt_state)

    def leaf(omega, anchor, name, *values):
        wide = []
        for argument, x in zip(trees, values, strict=True):
            x = jnp.zeros_like(anchor) if _tree.is_hole(x) else jnp.asarray(x)
            if x.shape != anchor.shape:
                raise ValueError(
                    f"{argument} at {name} has shape {x.shape}, expected "
                    f"{anchor.shape}."
                )
            wide.append(widen(x))
        new = function(omega, anchor, *wide)
        return Anchor(*map(placed_like, (omega, anchor), new))

    def rewrite(node):
        names = _tree.flatten_with_names(node.anchor)[0]
        anchors = _tree.flatten(node.anchor)[0]
        rows = [_tree.flatten_like(trees[k], k, node.anchor) for k in trees]
        pairs = _tree.map_positions(leaf, node.importance, anchors, names, *rows)

        def part(field):
            return jax.tree.map(
                lambda pair: getattr(pair, field),
                pairs,
                is_leaf=lambda x: isinstance(x, Anchor),
            )

        return Anchor(part("importance"), part("anchor"))

    return map_nodes(rewrite, opt_state, Anchor)


def _usable(importance: Any) -> Any:
    """Refuses what is negative or not finite; under jit, counts it as 0."""
    leaves, treedef = _tree.flatten(importance)
    good = [
        x if _tree.is_hole(x) else jnp.isfinite(x) & (jnp.asarray(x) >= 0)
        for x in leaves
    ]
    known = [x for x in good if not _tree.is_hole(x) and not _tree.is_traced(x)]
    if not all(bool(x) for x in [jnp.all(x) for x in known]):
        raise ValueError(
            "importance must be finite and not negative in every entry: check the loss "
            "that it was computed from."
        )
    leaves = [
        x if _tree.is_hole(x) else jnp.where(ok, x, 0)
        for x, ok in zip(leaves, good, strict=True)
    ]
    return jax.tree.unflatten(treedef, leaves)


def get_anchor(opt_state: Any) -> Anchor:
    """A copy of the penalty's `Anchor` inside an optimizer state.

    Under `optax.partition` the anchors of all parts come as one.

    Raises:
      ValueError: if there is none, or several for the same parameters.

    >>> from adamr.modifiers.penalty import quadratic_penalty
    >>> state = quadratic_penalty(importance=2.0).init(jnp.ones(1))
    >>> print(get_anchor(state).importance)
    [2.]
    """

    def together(trees):
        rows = [_tree.flatten(tree)[0] for tree in trees]
        treedef = _tree.flatten(trees[0])[1]
        leaves = []
        for position in zip(*rows, strict=True):
            held = [x for x in position if not _tree.is_hole(x)]
            leaves.append(jnp.copy(held[0]) if held else position[0])
        return jax.tree.unflatten(treedef, leaves)

    found = _anchors(opt_state)
    return Anchor(
        importance=together([node.importance for node in found]),
        anchor=together([node.anchor for node in found]),
    )


def set_anchor(opt_state: Any, anchor: Anchor) -> Any:
    """The state with Ω and θ* replaced; the step does not recompile.

    Args:
      anchor: trees like params; None for a leaf: Ω = 0 there, θ* = 0.

    Raises:
      ValueError: if the state holds no `Anchor`, several for the same parameters, or
        one of other shapes; for an importance that is negative or not finite.
      TypeError: for anything but an `Anchor`.

    >>> from adamr.modifiers.penalty import quadratic_penalty
    >>> state = quadratic_penalty().init(jnp.ones(1))
    >>> state = set_anchor(state, Anchor(jnp.array([3.0]), jnp.zeros(1)))
    >>> print(get_anchor(state).importance)
    [3.]
    """
    if not isinstance(anchor, Anchor):
        raise TypeError(f"anchor must be an Anchor, got {type(anchor).__name__}.")
    return rewrite_anchors(
        opt_state,
        lambda omega, old, new_omega, new: (new_omega, new),
        importance=_usable(anchor.importance),
        anchor=anchor.anchor,
    )


def consolidate(
    opt_state: Any,
    params: Any,
    importance: Any,
    *,
    rule: Literal["sum", "online", "replace"] = "sum",
    decay: float = 1.0,
) -> Any:
    """Ends a task: the importance F of its solution θ joins the penalty.

        "sum"      Ω' = Ω + F,  θ*' = θ* + F/Ω' (θ − θ*)    EWC: Σ_k ½ F_k (θ − θ_k)²
                                                            up to a constant
        "online"   Ω' = decay (Ω + F),  θ*' = θ             online EWC; MAS: decay = 1
        "replace"  Ω' = F,  θ*' = θ                         the last task only; L2

    "sum" merges the tasks' penalties exactly, in constant memory; where Ω' = 0, θ*
    stays. "online" keeps what Schwarz et al. apply, γ F̃ with F̃ <- γ F̃ + F and
    γ = `decay`. In all of them the penalty is (strength / 2) Σ Ω (θ − θ*)², with the
    strength λ of the link or recipe that holds it.

    Args:
      opt_state: of any wrapper around a link or recipe with a penalty.
      params: θ at the end of the task.
      importance: F, a tree like params of arrays ≥ 0; None for a leaf means 0. Leaves
        that the optimizer leaves out are ignored.
      rule: see above.
      decay: γ in [0, 1], for "online".

    Returns:
      A new state, in which the step does not recompile. Under jit, entries of F that
      are negative or not finite count as 0.

    Raises:
      ValueError: if the state holds no `Anchor`, or several for the same parameters;
        for trees that do not fit, an unknown rule, a decay outside [0, 1] or with
        another rule, and, outside jit, an F that is negative or not finite.

    >>> from adamr.modifiers.penalty import quadratic_penalty
    >>> tx = quadratic_penalty()
    >>> state = tx.init(jnp.zeros(1))
    >>> for theta, f in [(1.0, 1.0), (4.0, 3.0)]:
    ...     state = consolidate(state, jnp.array([theta]), jnp.array([f]))
    >>> print(get_anchor(state))
    Anchor(importance=Array([4.], dtype=float32), anchor=Array([3.25], dtype=float32))

    References:
      Kirkpatrick et al., arXiv:1612.00796. Huszár, On Quadratic Penalties in Elastic
      Weight Consolidation, arXiv:1712.03847. Schwarz et al., Progress & Compress,
      arXiv:1805.06370. Aljundi et al., Memory Aware Synapses, arXiv:1711.09601.
    """
    if rule not in ("sum", "online", "replace"):
        raise ValueError(f"rule is {rule!r}, expected 'sum', 'online' or 'replace'.")
    if _tree.is_known(decay):
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must lie in [0, 1], got {decay}.")
        if decay != 1 and rule != "online":
            raise ValueError(f"decay is for rule='online', got rule={rule!r}.")

    def merge(omega, anchor, theta, f):
        if rule == "replace":
            return f, theta
        total = omega + f
        if rule == "online":
            return decay * total, theta
        # Below the smallest normal number a quotient may be 0/0.
        safe = total >= jnp.finfo(total.dtype).tiny
        share = jnp.where(safe, f / jnp.where(safe, total, 1), 0)
        return total, anchor + share * (theta - anchor)

    return rewrite_anchors(
        opt_state, merge, params=params, importance=_usable(importance)
    )
