"""The alias `adamr`: decoupled routing with safe defaults."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from adamr import _tree
from adamr._nodes import find_nodes
from adamr.modifiers.projection import ProjectOutState
from adamr.routing.carrier import require_modifier, route_with_strength
from adamr.routing.merge import faithful_second_moment
from adamr.routing.sharing import Guard
from adamr.routing.strength import constant_scale
from adamr.subspaces.directions import Directions
from adamr.subspaces.protected import Protected, is_unmade
from adamr.subspaces.subspace import Subspace

__all__ = ["adamr"]


class Protection(NamedTuple):
    """What the modifier's state says about the moments and the step.

    Attributes:
      share: subspaces whose contracted axes v is shared along, or None.
      guard: of the second moment.
      decay: what weight decay is projected off.
      step: what the step is projected off.
    """

    share: tuple[Subspace, ...] | None
    guard: Guard
    decay: tuple[Protected, ...]
    step: tuple[Protected, ...]


def protection_of(modifier_state: Any) -> Protection:
    """Along which axes v is shared, which guard holds, what the step is kept off.

    v is shared where a projection per leaf mixes coordinates. Projections only
    shorten the gradient; whatever else is chained to them may not, so then a shared v
    is guarded as well. Directions of the whole vector mix all leaves, and no v per leaf
    commutes with them.
    """
    subspaces = tuple(find_nodes(modifier_state, Subspace))
    links = find_nodes(modifier_state, ProjectOutState)
    unmade = any(is_unmade(link.subspace) for link in links)
    chained = type(modifier_state) is tuple
    parts = modifier_state if chained else (modifier_state,)
    projects = all(isinstance(part, ProjectOutState) for part in parts)
    return Protection(
        share=subspaces if subspaces or unmade else None,
        guard=True if projects else "shared",
        decay=subspaces,
        step=tuple(find_nodes(modifier_state, Directions)),
    )


def project_off(held: tuple[Protected, ...]) -> optax.GradientTransformation:
    """Projects the step off everything that is held."""

    def project(steps, params):
        del params
        for each in held:
            steps = each.project(steps)
        return steps

    return optax.stateless(project)


def decay_outside(
    held: tuple[Protected, ...], weight_decay: Any, mask: Any
) -> optax.GradientTransformation:
    """Adds decoupled weight decay, projected off the protected space."""
    decay = optax.chain(
        optax.add_decayed_weights(weight_decay, mask), project_off(held)
    )

    def add(steps, params):
        if params is None:
            raise ValueError("weight_decay needs params: update(g, state, params).")
        zeros = optax.tree.zeros_like(steps)
        decayed, _ = decay.update(zeros, decay.init(params), params)
        return optax.tree.add(steps, decayed)

    return optax.stateless(add)


def decays(recipe: str, weight_decay: Any) -> bool:
    """Whether there is weight decay; a traced or injected one may be.

    Raises:
      TypeError: for a function, with the recipe's name.
    """
    if callable(weight_decay):
        raise TypeError(
            f"{recipe}: weight_decay must be a number, got a function; the learning "
            "rate, which scales it, may be a schedule."
        )
    return not (isinstance(weight_decay, int | float) and weight_decay == 0)


def by_modifier(
    recipe: str,
    modifier: optax.GradientTransformation,
    links: Callable[[Any], optax.GradientTransformationExtraArgs],
    held: Callable[[Any], Any],
) -> optax.GradientTransformationExtraArgs:
    """A chain that the modifier's state decides, made anew in every update.

    Args:
      recipe: its name, for errors.
      modifier: part of the chain's first link.
      links: the modifier's state -> the chain.
      held: the first link's state -> the modifier's.
    """

    def init_fn(params):
        _tree.require_arrays(params, recipe)
        state = jax.eval_shape(optax.with_extra_args_support(modifier).init, params)
        return links(state).init(params)

    def update_fn(updates, state, params=None, **extra_args):
        first, *_ = state
        return links(held(first)).update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def protected_adam(
    learning_rate: optax.ScalarOrSchedule,
    modifier: optax.GradientTransformation,
    protection: Callable[[Any], Protection],
    weight_decay: Any,
    mask: Any,
    strength: Any = None,
    off: Callable[[tuple[Any, ...]], optax.GradientTransformation] = project_off,
    name: str = "adamr",
    **moments: Any,
) -> optax.GradientTransformationExtraArgs:
    """`adamr` by another name, with another `protection_of` and `project_off`."""
    require_modifier(modifier, name)
    decaying = decays(name, weight_decay)
    if strength is None:
        scale = optax.identity()
    elif isinstance(strength, optax.GradientTransformation):
        scale = strength
    else:
        scale = constant_scale(strength)

    def links(modifier_state: Any) -> optax.GradientTransformationExtraArgs:
        found = protection(modifier_state)
        merge = faithful_second_moment(share=found.share, guard=found.guard, **moments)
        decay = decay_outside(found.decay, weight_decay, mask)
        return optax.chain(
            route_with_strength(modifier, scale),
            merge,
            decay if decaying else optax.identity(),
            off(found.step),
            optax.scale_by_learning_rate(learning_rate),
        )

    return by_modifier(name, modifier, links, lambda first: first.route.modifier)


def adamr(
    learning_rate: optax.ScalarOrSchedule,
    modifier: optax.GradientTransformation,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    nu_dtype: jax.typing.DTypeLike | None = None,
    weight_decay: float = 0.0,
    mask: Any = None,
    strength: optax.ScalarOrSchedule | optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam whose first moment sees the modified gradient and whose second the raw one.

    With g the gradient, g̃ = `modifier`(g) and α the `strength` (1 if None):

        f_t = g − α (g − g̃)
        m_t = b1 m_{t−1} + (1 − b1) f_t
        v_t = b2 v_{t−1} + (1 − b2) ⟨g²⟩
        θ_t = θ_{t−1} − η (m̂_t / (√(v̂_t + eps_root) + eps) + P(weight_decay · θ_{t−1}))

    ⟨·⟩ is the mean along the axes that a projection in the modifier mixes (the fan-in
    of each protected kernel), and nothing elsewhere, so biases and unprotected leaves
    get plain Adam. Preconditioner and projector then commute: what the projection
    removes from the gradient is absent from the step, to rounding, with less memory
    than Adam. Element-wise modifiers keep an element-wise v, guarded against
    coordinates where g = 0 and g̃ is not. A shared v is guarded where the modifier does
    more than project, such as a penalty or replay chained before the projection. P
    projects the decay off the protected space, which plain decay would shrink. No v per
    leaf commutes with `Directions` of the whole vector: there the step is projected as
    well.

    Args:
      learning_rate: η, a number or a schedule.
      modifier: g -> g̃, any optax transformation; `project_out(subspace)` for one.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: outside the root.
      eps_root: inside the root.
      mu_dtype: dtype of m; None: the parameter's. With bf16 parameters use float32.
      nu_dtype: dtype of v; None: the parameter's.
      weight_decay: a number; decoupled, scaled by η as in `optax.adamw`.
      mask: tree of bools or a function of the parameters: which leaves decay.
      strength: None: the modifier in full; α in [0, 1] or a schedule of it; or a link
        on `Routed` such as `overlap_adaptive_scale()`.

    Returns:
      An optimizer. Extra arguments of `update` reach the modifier. `set_subspace`
      changes what is protected, between two steps.

    Raises:
      ValueError: for a strength outside [0, 1]; at update, for weight decay without
        `params`.
      TypeError: if `modifier` is not an optax transformation or weight_decay is a
        schedule; at init, for a leaf that is neither an array nor a number.

    >>> import jax.numpy as jnp
    >>> from adamr import make_subspace, project_out
    >>> params = {"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}
    >>> bases = {"w": jnp.array([[1.0], [0.0]]), "b": None}
    >>> tx = adamr(0.1, project_out(make_subspace(params, bases)))
    >>> state = tx.init(params)
    >>> g = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
    >>> steps, state = tx.update(g, state, params)
    >>> print(steps["w"][:, 0].round(3))
    [-0.  -0.1]

    References:
      Hu et al., Hidden Failure Modes of Gradient Modification under Adam in Continual
      Learning, arXiv:2604.22407 (withdrawn for its experiments; the mechanism is
      verified here). Saha, Garg, Roy, Gradient Projection Memory, arXiv:2103.09762.
    """
    return protected_adam(
        learning_rate,
        modifier,
        protection_of,
        weight_decay,
        mask,
        strength,
        b1=b1,
        b2=b2,
        eps=eps,
        eps_root=eps_root,
        mu_dtype=mu_dtype,
        nu_dtype=nu_dtype,
    )
