"""OSFT: full fine-tuning outside the top singular directions of the weights.

    W = U_k Σ_k V_kᵀ + the rest,   P = U_k U_kᵀ on the fan-in side,  Q = V_k V_kᵀ on the
                                   side of the outputs

Several projections of the gradient G go by the name:

    form            G̃                    who                         kept of W
    "oplora"        (I − P) G (I − Q)    OPLoRA, on its update       U_kᵀ W and W V_k
    "code"          the same             mini_trainer and PEFT's     the same
                                         OSF, through the factors
    "both_sides"    the same             the default
    "paper"         G − P G Q            the equation of the paper   U_kᵀ W V_k alone

The factors that mini_trainer and PEFT train, each with its gradient projected, reach
the same kernels as a dense one whose step is projected on both sides, so on a dense
kernel code and OPLoRA are one form.

OSFT's code hands projected gradients to AdamW, whose element-wise √v̂ puts a part of
the step back into the protected directions (mini_trainer now projects its factors again
after each step), and so does the decay of a dense kernel. With v shared along the
fan-in Adam commutes with P, with v shared along the outputs with Q, and with both only
if each matrix has one v. Else the step has to be projected as well. `osft` has both.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import optax

from adamr._nodes import find_nodes
from adamr.modifiers.projection import project_out
from adamr.recipes.adamr import (
    Protection,
    project_off,
    protected_adam,
    protection_of,
)
from adamr.routing.carrier import plain_gradient
from adamr.subspaces.columns import at_least_float32
from adamr.subspaces.protected import SubspaceSource, require_source
from adamr.subspaces.subspace import Subspace

__all__ = ["osft"]

Form = Literal["both_sides", "code", "oplora", "paper"]


def _outside_block(tree: Any, sides: Sequence[Callable[[Any], optax.Updates]]) -> Any:
    """X − P X Q, where each of `sides` removes what lies in P or in Q."""
    wide = block = jax.tree.map(at_least_float32, tree)
    for side in sides:
        block = optax.tree.sub(block, side(block))
    kept = optax.tree.sub(wide, block)
    return jax.tree.map(lambda x, old: x.astype(old.dtype), kept, tree)


def _project_block(
    inside: SubspaceSource, outside: SubspaceSource
) -> optax.GradientTransformationExtraArgs:
    """G − P G Q: the part that lies in both sides is removed."""
    links = project_out(inside), project_out(outside)

    def init_fn(params):
        return tuple(link.init(params) for link in links)

    def update_fn(updates, state, params=None, **extra_args):
        updates = plain_gradient(updates, "osft", params)
        del extra_args
        sides = [
            lambda x, link=link, held=held: link.update(x, held, params)[0]
            for link, held in zip(links, state, strict=True)
        ]
        return _outside_block(updates, sides), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _v_per_entry(modifier_state: Any) -> Protection:
    """v per entry; the step is projected, with the decay in it."""
    held = tuple(find_nodes(modifier_state, Subspace))
    return Protection(share=None, guard=True, decay=(), step=held)


def _off_the_step(held: Sequence[Subspace], form: str) -> optax.GradientTransformation:
    """Projects the step off the sides that are held."""

    def project(steps, params):
        del params
        if form == "paper":
            return _outside_block(steps, [each.project for each in held])
        kept = jax.tree.map(at_least_float32, steps)
        for each in held:
            kept = each.project(kept)
        return jax.tree.map(lambda x, step: x.astype(step.dtype), kept, steps)

    return optax.stateless(project)


def osft(
    learning_rate: optax.ScalarOrSchedule,
    inside: SubspaceSource,
    outside: SubspaceSource,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    nu_dtype: jax.typing.DTypeLike | None = None,
    weight_decay: float = 0.0,
    mask: Any = None,
    form: Form = "both_sides",
    share_v: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Orthogonal Subspace Fine-Tuning, exact for the step itself under Adam.

        G̃ = (I − P) G (I − Q),  m from G̃,  v from max(G², G̃²) per entry
        Δ = (I − P) [m̂ / (√v̂ + eps) + weight_decay · W] (I − Q)

    Guarantee: Uᵀ Δ = 0 and Δ V = 0 for every protected kernel, to float32 rounding,
    weight decay included, so the protected singular triples of W stay what they are.
    (form="paper": Uᵀ Δ V = 0.) Leaves without a basis get plain Adam.

    With `share_v`, v is the mean of G² over the matrix. Then the step needs no
    projection of its own, and the moments take half the memory. The price is that Adam
    no longer evens out rows or columns of different scale, and in a pretrained model
    that was much worse (docs/evidence/pretrained.md).

    Args:
      learning_rate: a number or a schedule.
      inside, outside: from `weight_subspaces`; or functions of the parameters that
        make them in `init`, such as `lambda p: weight_subspaces(p, axes)[0]`.
      b1, b2, eps, eps_root, mu_dtype, nu_dtype, weight_decay, mask: as for `adamr`.
      form: which projection, see the module's docstring: "both_sides", which is also
        called "code" and "oplora", or "paper".
      share_v: one v per matrix in place of one per entry and a projected step.

    Returns:
      An optimizer. At a boundary decompose the new weights, without recompiling:
      `set_subspace(state, weight_subspaces(params, axes))`; it projects the first
      moment, or resets it with `moments="reset"`.

    Raises:
      TypeError: for a side that is neither a subspace nor a function.
      ValueError: for an unknown form; at init, for other leaves than a side was made
        for; at update, without `params` where weights decay.

    >>> import jax.numpy as jnp
    >>> from adamr import Axes, weight_subspaces
    >>> params = {"w": jnp.diag(jnp.array([3.0, 1.0]))}
    >>> tx = osft(0.1, *weight_subspaces(params, {"w": Axes((0,))}), weight_decay=0.1)
    >>> state = tx.init(params)
    >>> step, state = tx.update({"w": jnp.ones((2, 2))}, state, params)
    >>> print(step["w"].round(2) + 0.0)
    [[ 0.    0.  ]
     [ 0.   -0.11]]

    References:
      Nayak et al., Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for
      Continual Learning, arXiv:2504.07097. Xiong, Xie, OPLoRA: Orthogonal Projection
      LoRA Prevents Catastrophic Forgetting, arXiv:2510.13003.
    """
    for side in (inside, outside):
        require_source(side, "osft", Subspace)
    if form not in get_args(Form):
        expected = ", ".join(map(repr, get_args(Form)))
        raise ValueError(f"form is {form!r}, expected one of {expected}.")
    if form == "paper":
        modifier = _project_block(inside, outside)
    else:
        modifier = optax.chain(project_out(inside), project_out(outside))
    return protected_adam(
        learning_rate,
        modifier,
        protection_of if share_v else _v_per_entry,
        weight_decay,
        mask,
        off=project_off if share_v else functools.partial(_off_the_step, form=form),
        name="osft",
        b1=b1,
        b2=b2,
        eps=eps,
        eps_root=eps_root,
        mu_dtype=mu_dtype,
        nu_dtype=nu_dtype,
    )
