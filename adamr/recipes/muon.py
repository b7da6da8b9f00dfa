"""Muon on the projected gradient: orthogonalised momentum that keeps out of U.

The momentum M of projected gradients lies in the range of P = I − U Uᵀ. Muon makes its
step of odd polynomials in M, such as M Mᵀ M, and each of them begins with M again, so

    M = P M    =>    Uᵀ msign(M) = 0

whatever M's other directions are; from the right likewise. No routing is needed, since
no second moment divides the step.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax

from adamr import _tree
from adamr.recipes.adamr import (
    by_modifier,
    decay_outside,
    decays,
    project_off,
    protection_of,
)
from adamr.recipes.orthogonal import QUINTIC, Momentum, momentum_or_moments
from adamr.routing.carrier import require_modifier, route_first_moment
from adamr.routing.merge import MomentOptions
from adamr.subspaces.matrices import matrices
from adamr.subspaces.subspace import Subspace

__all__ = ["muon"]


def _rates(
    learning_rate: optax.ScalarOrSchedule,
    adam_learning_rate: optax.ScalarOrSchedule | None,
    axes: Any,
    subspaces: Sequence[Subspace],
) -> optax.GradientTransformation:
    """Scales the steps of matrices and of all other leaves, each by its rate."""
    if adam_learning_rate is None:
        return optax.scale_by_learning_rate(learning_rate)
    rates = {"muon": learning_rate, "adam": adam_learning_rate}

    def labels(tree):
        if _tree.is_placeholder(tree):
            return tree

        def label(_, axes):
            return "adam" if axes is None else "muon"

        return _tree.map_positions(label, tree, matrices(tree, axes, subspaces))

    return optax.partition(
        {name: optax.scale_by_learning_rate(rate) for name, rate in rates.items()},
        labels,
    )


def _project_steps(
    matrix: Sequence[Any],
    other: Sequence[Any],
    axes: Any,
    subspaces: Sequence[Subspace],
) -> optax.GradientTransformation:
    """Projects steps: of matrices off all that is held, of other leaves as `adamr`."""

    def project(steps, params):
        del params
        off_all, off_some = (
            project_off(tuple(held)).update(steps, optax.EmptyState())[0]
            for held in (matrix, other)
        )

        def leaf(step, off, axes):
            return step if axes is None else off

        how = matrices(steps, axes, subspaces)
        return _tree.map_positions(leaf, off_some, _tree.flatten(off_all)[0], how)

    return optax.stateless(project)


def _check_coefficients(ns_coeffs: Any) -> None:
    shape = np.shape(ns_coeffs)
    if len(shape) not in (1, 2) or shape[-1] != 3 or not shape[0]:
        raise ValueError(f"ns_coeffs has shape {shape}, expected (3,) or (n, 3).")


def muon(
    learning_rate: optax.ScalarOrSchedule,
    modifier: optax.GradientTransformation,
    *,
    axes: Any = None,
    beta: float = 0.95,
    ns_coeffs: Any = QUINTIC,
    ns_steps: int = 5,
    nesterov: bool = True,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    nu_dtype: jax.typing.DTypeLike | None = None,
    weight_decay: float = 0.0,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Muon whose momentum sees the modified gradient.

    For a matrix, with g̃ = `modifier`(g), P the projection in the modifier and msign the
    Newton–Schulz iteration of `optax.contrib.muon`:

        m_t = beta m_{t−1} + (1 − beta) g̃_t
        M_t = beta m_t / (1 − beta^(t+1)) + (1 − beta) g̃_t / (1 − beta^t)
        Δ_t = √max(1, fan-out / fan-in) · P msign(M_t)
        θ_t = θ_{t−1} − η (Δ_t + P(weight_decay · θ_{t−1}))

    Guarantee: UᵀΔ = 0 to float32 rounding, for a subspace of inputs or of outputs. All
    that the iteration computes are odd polynomials in M, which stay in the range of P,
    so the P after it takes away rounding alone. The iteration magnifies small singular
    values up to 500 times, rounding errors among them, and on accelerators it
    multiplies in less than float32: of a step that the authors' code computes in bf16
    from a projected gradient, 12 % lies in span U.

    A partial projection is another matter. msign makes all singular values alike, so it
    undoes an attenuation of the gradient along U by 1 − α. At α = .9 the effective
    learning rate there grew by 10 = 1 / (1 − α) with an iteration that converges, and
    by 7.9 to 15 with the default one (docs/evidence/mechanism.md). This is why there is
    no `strength`. Weights λ < 1 in the subspace act through the last P alone: u_iᵀΔ is
    1 − λ_i times that of msign. Element-wise modifiers (masks) do not survive msign.
    `Directions` of the whole vector do not commute with it, so there the step is
    projected and may ascend.

    The step has its full size however little the projection leaves of the gradient.
    Only momenta shorter than `eps`, such as those of a full basis, give shorter ones,
    and momenta of 1e19 and more, whose squares leave float32, none, as in optax.

    Leaves that are no matrix get the alias `adamr` with the same modifier: biases,
    scales, leaves of size 0 and whatever has "embed" in its name, unless `axes` says
    otherwise. A kernel with several input or output axes is reshaped to fan-in ×
    fan-out, and every slice along batch axes is a matrix of its own. A sharded matrix
    is gathered for the iteration, as under optax's Muon; its momentum stays sharded.

    Args:
      learning_rate: η, a number or a schedule; Muon's is often .02.
      modifier: g -> g̃, any optax transformation; `project_out(subspace)` for one.
      axes: which leaves are matrices, and along which axes: a tree like the parameters
        of `Axes` or None (Adam), as `contracted_axes` gives, or a rule (path, shape) ->
        `Axes` or None. None: `subspaces.matrix_axes`, and the axes of the leaf's
        subspace where these are others; so give `axes` for a subspace of outputs, since
        the scale of the step depends on what is the fan-in.
      beta: decay of the momentum.
      ns_coeffs: three coefficients of the iteration, or (n, 3) for n different steps.
      ns_steps: steps of the iteration, for three coefficients.
      nesterov: whether M looks one step ahead; if not, it is m_t / (1 − beta^t).
      adam_learning_rate: of the other leaves; None: `learning_rate`.
      b1, b2, eps_root, nu_dtype: of the other leaves, as for `adamr`.
      eps: added to the norm that a momentum is divided by; for the other leaves as for
        `adamr`.
      mu_dtype: dtype of m in all leaves; None: the parameter's. With bf16 parameters
        use float32.
      weight_decay: a number; decoupled, scaled by η.
      mask: tree of bools or a function of the parameters: which leaves decay.

    Returns:
      An optimizer. Extra arguments of `update` reach the modifier. `set_subspace` and
      `protect_inputs` also project the momentum off the new space.

    Raises:
      ValueError: for `axes` that put a projection on both sides of the matrix; at
        update, for weight decay without `params`.
      TypeError: if `modifier` is not an optax transformation or weight_decay is a
        schedule; at init, for a leaf that is neither an array nor a number.

    >>> import jax.numpy as jnp
    >>> from adamr import make_subspace, project_out
    >>> params = {"w": jnp.ones((2, 2)), "b": jnp.zeros(2)}
    >>> bases = {"w": jnp.array([[1.0], [0.0]]), "b": None}
    >>> tx = muon(0.1, project_out(make_subspace(params, bases)))
    >>> g = {"w": jnp.array([[5.0, 7.0], [3.0, 4.0]]), "b": jnp.ones(2)}
    >>> steps, state = tx.update(g, tx.init(params), params)
    >>> print(jnp.abs(steps["w"]).round(2))
    [[0.   0.  ]
     [0.04 0.06]]

    References:
      Jordan et al., Muon: an optimizer for hidden layers in neural networks, 2024,
      https://kellerjordan.github.io/posts/muon. Muon-OGD
      (https://github.com/jeremylu916/Muon-OGD) keeps gradients of old tasks instead and
      takes dual steps towards ⟨C_i, msign(M + Σ λ_i C_i)⟩ = 0, one a step, so its steps
      are orthogonal to them approximately.
    """
    require_modifier(modifier, "muon")
    _check_coefficients(ns_coeffs)
    decaying = decays("muon", weight_decay)
    momentum = Momentum(beta, ns_coeffs, ns_steps, nesterov, eps)

    def links(modifier_state: Any) -> optax.GradientTransformationExtraArgs:
        protection = protection_of(modifier_state)
        subspaces = protection.share or ()
        moments = MomentOptions(
            b1,
            b2,
            eps,
            eps_root,
            share=subspaces,
            guard=protection.guard,
            mu_dtype=mu_dtype,
            nu_dtype=nu_dtype,
        )
        held = (*protection.decay, *protection.step)
        return optax.chain(
            route_first_moment(modifier),
            momentum_or_moments(momentum, moments, axes, subspaces),
            _project_steps(held, protection.step, axes, subspaces),
            decay_outside(held, weight_decay, mask) if decaying else optax.identity(),
            _rates(learning_rate, adam_learning_rate, axes, subspaces),
        )

    return by_modifier("muon", modifier, links, lambda first: first.modifier)
