"""The alias `adamr`: decoupled routing with safe defaults."""

from typing import Any, NamedTuple

import jax
import optax

from adamr._nodes import find_nodes
from adamr.modifiers.projection import ProjectOutState
from adamr.routing.carrier import route_first_moment
from adamr.routing.merge import faithful_second_moment
from adamr.routing.sharing import Guard, contracted
from adamr.routing.strength import constant_scale
from adamr.subspaces.directions import Directions
from adamr.subspaces.subspace import Subspace, project

__all__ = ["AdamrState", "adamr"]


class AdamrState(NamedTuple):
    links: Any
    learning_rate: Any


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

    ⟨·⟩ is the mean over the axes along which a projection in the modifier mixes
    coordinates (the fan-in of each protected kernel) and nothing elsewhere, so biases
    and unprotected leaves get plain Adam. There preconditioner and projector commute:
    what the projection removes from the gradient is absent from the step, to rounding
    (`test_leak_of_exact_protections`), at less memory than Adam. Element-wise modifiers
    keep an element-wise v, guarded against coordinates where g = 0 and g̃ is not; so is
    a shared v where the modifier does more than project, such as a penalty or replay
    chained before the projection (`test_the_alias_bounds_what_is_chained_to_...`). P
    projects the decay off the protected space: plain decay would shrink it. No v per
    leaf commutes with whole-vector `Directions`: there the step is projected too.

    Args:
      learning_rate: η, a number or a schedule.
      modifier: g -> g̃, any optax transformation; `project_out(subspace)` for one.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: outside the root.
      eps_root: inside the root.
      mu_dtype: dtype of m; None: the parameter's. With bf16 parameters use float32.
      nu_dtype: dtype of v, likewise.
      weight_decay: decoupled, scaled by η as in `optax.adamw`.
      mask: tree of bools or a function of the parameters: which leaves decay.
      strength: None: the modifier in full; α in [0, 1] or a schedule of it; or a link
        on `Routed` such as `overlap_adaptive_scale()`.

    Returns:
      An optimizer. Extra arguments of `update` reach the modifier. `set_subspace`
      changes what is protected, between two steps.

    Raises:
      ValueError: for a strength outside [0, 1]; at update, for weight decay without
        `params`.

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
    links: list[optax.GradientTransformation] = [route_first_moment(modifier)]
    if isinstance(strength, optax.GradientTransformation):
        links.append(strength)
    elif strength is not None:
        links.append(constant_scale(strength))
    decays = not (isinstance(weight_decay, int | float) and weight_decay == 0)
    decay = optax.add_decayed_weights(weight_decay, mask)
    rate = optax.scale_by_learning_rate(learning_rate)

    def chained(share=None, guard: Guard = True):
        merge = faithful_second_moment(
            b1, b2, eps, eps_root, share=share, guard=guard, mu_dtype=mu_dtype,
            nu_dtype=nu_dtype,
        )  # fmt: skip
        return optax.chain(*links, merge)

    def init_fn(params):
        state = jax.eval_shape(optax.with_extra_args_support(modifier).init, params)
        subspaces = find_nodes(state, Subspace)
        share = contracted(subspaces, params) if subspaces else None
        return AdamrState(chained(share).init(params), rate.init(params))

    def update_fn(updates, state, params=None, **extra_args):
        # A projection shortens the gradient; what is chained to it may not.
        projects = isinstance(state.links[0].modifier, ProjectOutState)
        # The shapes in the state say along which axes v is shared: no rule needed here.
        steps, links_state = chained(guard=True if projects else "shared").update(
            updates, state.links, params, **extra_args
        )
        if decays:
            if params is None:
                raise ValueError("weight_decay needs params: update(g, state, params).")
            zeros = optax.tree.zeros_like(steps)
            decayed, _ = decay.update(zeros, decay.init(params), params)
            for subspace in find_nodes(state.links, Subspace):
                decayed = project(subspace, decayed)
            steps = optax.tree.add(steps, decayed)
        for directions in find_nodes(state.links, Directions):
            steps = project(directions, steps)
        steps, rate_state = rate.update(steps, state.learning_rate, params)
        return steps, AdamrState(links_state, rate_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
