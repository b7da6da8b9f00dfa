"""Projection methods by name: GPM, alone and with SI, and SGP.

    recipe    step of W                                 what the task boundary does
    gpm       Adam, first moment projected, v shared    grow_subspace
              along the projected axis
    sgp       the same, with weights λ                  grow_subspace(scaling=α)
    gpm_si    gpm, and SI's proximal pull               grow_subspace, consolidate_si

`recipes.adam_nscl` holds Adam-NSCL, `recipes.trgp` TRGP and ROGO. All start with
`empty_subspace(params)`, with which they train the first task freely. A boundary
changes values in the state, never shapes, so the step does not recompile. Heads,
embeddings and biases that stay unprotected get plain Adam; `gpm_si` also holds those.
"""

from typing import Any, NamedTuple

import jax
import optax

from adamr import _tree
from adamr.modifiers.penalty import check_numbers
from adamr.modifiers.projection import project_out
from adamr.penalties.si import track_si
from adamr.protection.proximal import proximal_second_moment
from adamr.protection.update import protect_update
from adamr.recipes.adamr import adamr
from adamr.routing.carrier import route_first_moment
from adamr.routing.merge import MomentOptions
from adamr.subspaces.protected import SubspaceSource, made, require_source
from adamr.subspaces.subspace import Subspace

__all__ = ["gpm", "gpm_si", "sgp"]

Strength = optax.ScalarOrSchedule | optax.GradientTransformation


class AdamrOptions(NamedTuple):
    """What the recipes around a projection pass on to `adamr`."""

    b1: float
    b2: float
    eps: float
    eps_root: float
    mu_dtype: jax.typing.DTypeLike | None
    nu_dtype: jax.typing.DTypeLike | None
    weight_decay: float
    mask: Any
    strength: Strength | None


def projected(
    recipe: str,
    learning_rate: optax.ScalarOrSchedule,
    subspace: SubspaceSource,
    options: AdamrOptions,
) -> optax.GradientTransformationExtraArgs:
    """`adamr` with a projection: GPM and SGP, and the weights of TRGP and ROGO."""
    require_source(subspace, recipe, Subspace)
    return adamr(learning_rate, project_out(subspace), **options._asdict())


def gpm(
    learning_rate: optax.ScalarOrSchedule,
    subspace: SubspaceSource,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    nu_dtype: jax.typing.DTypeLike | None = None,
    weight_decay: float = 0.0,
    mask: Any = None,
    strength: Strength | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Gradient Projection Memory under Adam: `adamr(learning_rate, project_out(...))`.

        g̃ = g − U Uᵀ g
        m = b1 m + (1 − b1) g̃
        v = b2 v + (1 − b2) ⟨g²⟩                    ⟨·⟩ the mean along the fan-in
        Δ = m̂ / (√v̂ + eps),   θ <- θ − learning_rate · Δ

    Guarantee: UᵀΔ = 0 for the step Δ of every protected kernel, to float32 rounding, so
    its response to inputs in span U does not change: v is shared along the axis that
    the projection mixes. Deeper layers keep their response only as far as their inputs
    stay in the stored space. The authors train with plain SGD, which has the same
    guarantee: `optax.chain(project_out(subspace), optax.sgd(learning_rate))`. Where
    they use Adam, theirs is the chain of `adam_nscl`. Their code adds one direction
    fewer than their equation 5, which `grow_subspace` follows.

    Args:
      learning_rate: a number or a schedule.
      subspace: what is protected, for the first task `empty_subspace(params)`; or a
        function of the parameters that makes it in `init`, such as `empty_subspace`.
      b1, b2, eps, eps_root, mu_dtype, nu_dtype, weight_decay, mask, strength: as for
        `adamr`.

    Returns:
      An optimizer.

    Raises:
      TypeError, ValueError: as `project_out` and `adamr` raise them.

    >>> import jax.numpy as jnp
    >>> from adamr import empty_subspace, protect_inputs
    >>> params = {"w": jnp.zeros((3, 1))}
    >>> tx = gpm(0.1, empty_subspace(params))
    >>> state = tx.init(params)
    >>> # ... train task 1; then capture layer inputs of some of its samples:
    >>> inputs = {"w": jnp.array([[1.0, 0.0, 0.0], [2.0, 0.0, 0.0]])}
    >>> state = protect_inputs(state, inputs)  # ... and train task 2
    >>> step, state = tx.update({"w": jnp.ones((3, 1))}, state, params)
    >>> print(step["w"][:, 0].round(3) + 0.0)
    [ 0.  -0.1 -0.1]

    `adamr.layer_inputs(forward, params, x)` gives the inputs of any model.

    References:
      Saha, Garg, Roy, Gradient Projection Memory for Continual Learning,
      arXiv:2103.09762.
    """
    options = AdamrOptions(
        b1, b2, eps, eps_root, mu_dtype, nu_dtype, weight_decay, mask, strength
    )
    return projected("gpm", learning_rate, subspace, options)


def sgp(
    learning_rate: optax.ScalarOrSchedule,
    subspace: SubspaceSource,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    nu_dtype: jax.typing.DTypeLike | None = None,
    weight_decay: float = 0.0,
    mask: Any = None,
    strength: Strength | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Scaled Gradient Projection: GPM in which direction i keeps the share 1 − λ_i.

        g̃ = g − U diag(λ) Uᵀ g                     then m, v and Δ as in `gpm`
        λ_i <- min(1, λ_i + (α + 1) σ_i / (α σ_i + σ_max))         at a boundary

    σ_i² is the energy of the finished task's inputs along direction i, α = `scaling`.

    Guarantee: u_iᵀΔ is (1 − λ_i) times that of the same optimizer without protection,
    as long as λ does not change, since v, shared along the projected axis and fed by
    the raw gradient, cannot undo the scaling. Under shared routing Adam would cancel
    most of it. λ = 1 is `gpm`.

    Args:
      learning_rate: a number or a schedule.
      subspace: grown with `scaling`; for the first task `empty_subspace(params)`, or a
        function of the parameters that makes it in `init`, such as `empty_subspace`.
      b1, b2, eps, eps_root, mu_dtype, nu_dtype, weight_decay, mask, strength: as for
        `adamr`.

    Returns:
      An optimizer; the boundary is that of `gpm` with `scaling` = α (the authors
      use 10, 3 and 25).

    Raises:
      TypeError, ValueError: as `project_out` and `adamr` raise them.

    >>> from adamr import empty_subspace, grow_subspace
    >>> import jax.numpy as jnp
    >>> params = {"w": jnp.zeros((3, 1))}
    >>> inputs = {"w": jnp.diag(jnp.array([10.0, 5.0, 1.0]))}
    >>> s = empty_subspace(params)
    >>> s = grow_subspace(s, inputs, threshold=1.0, scaling=10.0)
    >>> print((1 - s.weights[0][0, 0]).round(2))
    [0.   0.08 0.45]
    >>> tx = sgp(0.1, s)
    >>> step, _ = tx.update({"w": jnp.eye(3)[:, 2:]}, tx.init(params), params)
    >>> plain = gpm(0.1, empty_subspace(params))
    >>> free, _ = plain.update({"w": jnp.eye(3)[:, 2:]}, plain.init(params), params)
    >>> print((step["w"] / free["w"])[2, 0].round(2))
    0.45

    References:
      Saha, Roy, Continual Learning with Scaled Gradient Projection, arXiv:2302.01386.
    """
    options = AdamrOptions(
        b1, b2, eps, eps_root, mu_dtype, nu_dtype, weight_decay, mask, strength
    )
    return projected("sgp", learning_rate, subspace, options)


def gpm_si(
    learning_rate: optax.ScalarOrSchedule,
    subspace: SubspaceSource,
    c: jax.typing.ArrayLike = 0.3,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    *,
    mu_dtype: jax.typing.DTypeLike | None = None,
    nu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """GPM, and Synaptic Intelligence for what its projection leaves open.

        d = m̂ / (√v̂ + eps)                         m from P g, v from g, as in `gpm`
        u = (d + D k (θ − θ*)) / (1 + η D k)       SI's proximal pull, k = 2 c Ω
        θ <- θ − η P u                             P = I − U Uᵀ

    Guarantees, to rounding: Uᵀ P u = 0; the pull is stable at any c, since along P it
    is the contraction I − P S P with S = η D k / (1 + η D k) in [0, 1); at θ = θ* the
    first step never ascends. The pull holds what the projection does not: embeddings,
    norms, heads, biases, directions below the threshold. c = 0 gives the steps of `gpm`
    (except that a weight λ < 1 counts twice, on gradient and step). docs/evidence/ says
    what it gains where. It keeps three float32 numbers per parameter and one copy
    of the bases more than `gpm`.

    Args:
      learning_rate: η, a number or a schedule.
      subspace: what is protected, for the first task `empty_subspace(params)`; or a
        function of the parameters that makes it in `init`, such as `empty_subspace`.
      c: ≥ 0, of SI; the default ended best on text that differs
        (docs/evidence/how.md).
      b1, b2, eps, eps_root, mu_dtype, nu_dtype: as for `faithful_second_moment`.

    Returns:
      An optimizer. At a boundary grow the subspace as for `gpm`, then call
      `consolidate_si`. Its ω comes from the incoming gradient; where that was clipped
      before, pass `task_gradient`.

    Raises:
      ValueError: for a negative c; at update, without `params`.

    >>> import jax.numpy as jnp
    >>> from adamr import consolidate_si, empty_subspace, protect_inputs
    >>> params = {"b": jnp.zeros(1), "w": jnp.zeros((3, 1))}
    >>> tx = gpm_si(0.1, empty_subspace(params), c=100.0)
    >>> state = tx.init(params)
    >>> g = {"b": jnp.ones(1), "w": jnp.array([[1.0], [1.0], [0.0]])}
    >>> step, state = tx.update(g, state, params)  # task 1
    >>> params = optax.apply_updates(params, step)
    >>> inputs = {"b": None, "w": jnp.array([[1.0, 0.0, 0.0]])}
    >>> state = protect_inputs(state, inputs)
    >>> state = consolidate_si(state, params)
    >>> g = {"b": jnp.ones(1), "w": jnp.ones((3, 1))}
    >>> step, state = tx.update(g, state, params)  # task 2
    >>> print(step["w"][:, 0].round(3) + 0.0, step["b"].round(3) + 0.0)
    [ 0.    -0.001 -0.058] [-0.001]

    References:
      Saha, Garg, Roy, Gradient Projection Memory, arXiv:2103.09762. Zenke, Poole,
      Ganguli, Continual Learning Through Synaptic Intelligence, arXiv:1703.04200.
    """
    check_numbers("gpm_si", 0.0, c=c)
    require_source(subspace, "gpm_si", Subspace)

    def links(held: SubspaceSource) -> optax.GradientTransformationExtraArgs:
        share = held if isinstance(held, Subspace) else ()
        options = MomentOptions(
            b1, b2, eps, eps_root, share=share, mu_dtype=mu_dtype, nu_dtype=nu_dtype
        )
        return track_si(
            optax.chain(
                route_first_moment(project_out(held)),
                proximal_second_moment(learning_rate, 2 * c, **options._asdict()),
                protect_update(held),
                optax.scale_by_learning_rate(learning_rate),
            )
        )

    if isinstance(subspace, Subspace):
        return links(subspace)

    def init_fn(params):
        if _tree.is_placeholder(params):
            return links(subspace).init(params)
        return links(made(subspace, params, "gpm_si", Subspace)).init(params)

    # The shapes of the state say along which axes v is shared.
    return optax.GradientTransformationExtraArgs(init_fn, links(subspace).update)
