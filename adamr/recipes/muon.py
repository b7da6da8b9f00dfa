"""Muon on the projected gradient: orthogonalised momentum that keeps out of U.

The momentum M of projected gradients lies in the range of P = I − U Uᵀ. Muon makes its
step of odd polynomials in M, such as M Mᵀ M, and each of them begins with M again, so

    M = P M    =>    Uᵀ msign(M) = 0

whatever M's other directions are; from the right likewise. No routing is needed, since
no second moment divides the step.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, MuonState, scale_by_muon

from adamr import _tree
from adamr.recipes.adamr import (
    Protection,
    decay_outside,
    project_off,
    protection_of,
)
from adamr.routing.carrier import (
    Routed,
    require_modifier,
    require_routed,
    route_first_moment,
)
from adamr.routing.merge import FaithfulSecondMomentState, faithful_second_moment
from adamr.sharding import placed_by_compiler
from adamr.subspaces.axes import Axes, default_axes
from adamr.subspaces.make import flatten_axes
from adamr.subspaces.subspace import Layout, Subspace, layout

__all__ = ["matrix_axes", "muon"]

QUINTIC = (3.4445, -4.775, 2.0315)


def matrix_axes(path: str, shape: tuple[int, ...]) -> Axes | None:
    """`default_axes`, with None for embeddings, which Muon's authors leave to Adam.

    >>> matrix_axes("layer/kernel", (4, 8))
    Axes(protected=(0,), batch=())
    >>> matrix_axes("embed/embedding", (100, 8)) is None
    True
    """
    return None if "embed" in path.lower() else default_axes(path, shape)


def _outputs(axes: Axes, ndim: int) -> tuple[int, ...]:
    return tuple(d for d in range(ndim) if d not in axes.protected + axes.batch)


def _mixed(side: Layout, axes: Axes) -> set[int]:
    """The axes of a slice, as a matrix, that the projection acts along."""
    return set(side.protected) | (set(side.batch) - set(axes.batch))


def _as_matrix(name: str, leaf: Any, axes: Axes | None, sides: list[Layout], said: bool):
    """How a leaf is a matrix that every projection acts on from one side, or None."""
    if axes is None:
        return None
    axes = Axes(*axes).normalized(leaf.ndim)
    if not said and sides and not _mixed(sides[0], axes) <= set(axes.protected):
        axes = Axes(sides[0].protected, sides[0].batch)
    outputs = _outputs(axes, leaf.ndim)
    for side in sides:
        mixed = _mixed(side, axes)
        if not (mixed <= set(axes.protected) or mixed <= set(outputs)):
            raise ValueError(
                f"muon: axes has {axes} at {name}, but its subspace is projected along "
                f"axes {side.protected}, expected all of them on one side of the "
                "matrix: in `protected` or among the outputs."
            )
    return axes if outputs and math.prod(leaf.shape) else None


def _matrices(
    tree: Any, axes: Any, subspaces: Sequence[Subspace]
) -> list[Axes | None]:
    """The axes of every position that Muon steps; None for holes and for Adam's."""
    names, leaves = _tree.flatten_with_names(tree)
    how = flatten_axes(matrix_axes if axes is None else axes, tree)
    here = [s.at(tree) for s in subspaces] if leaves else []
    found = []
    for i, (name, leaf, each) in enumerate(zip(names, leaves, how, strict=True)):
        pairs = [(s.bases[i], s.weights[i]) for s in here]
        sides = [layout(b, w) for b, w in pairs if b is not None and w is not None]
        sides = [side for side in sides if side.protected]
        hole = _tree.is_hole(leaf)
        found.append(
            None if hole else _as_matrix(name, leaf, each, sides, axes is not None)
        )
    return found


def _part(tree: Any, keep: Sequence[bool]) -> Any:
    """`tree` with holes at the other positions."""
    leaves, treedef = _tree.flatten(tree)
    pairs = zip(leaves, keep, strict=True)
    return treedef.unflatten([x if k else optax.MaskedNode() for x, k in pairs])


def _filled(tree: Any, other: Any) -> Any:
    """`tree` with what `other` has in its holes."""
    leaves, treedef = _tree.flatten(tree)
    pairs = zip(leaves, _tree.flatten(other)[0], strict=True)
    return treedef.unflatten([y if _tree.is_hole(x) else x for x, y in pairs])


def _size(shape: Sequence[int], axes: Sequence[int]) -> int:
    return math.prod(shape[d] for d in axes)


def orthogonal_momentum(
    matrices: Sequence[Axes],
    *,
    beta: jax.typing.ArrayLike,
    ns_coeffs: Any,
    ns_steps: int,
    eps: jax.typing.ArrayLike,
    nesterov: bool,
):
    """optax's Muon for a list of leaves: (gradients, momenta, count) -> (steps, momenta).

    optax 0.2.6 scales its steps by √max(1, outputs / fan-in), later versions do not. It
    is told that the longer side is the fan-in, which changes nothing in msign and makes
    that factor 1; the factor itself is put on here.
    """

    def longer_first(x, axes):
        sides = axes.protected, _outputs(axes, x.ndim)
        return MuonDimensionNumbers(*sorted(sides, key=lambda s: -_size(x.shape, s)))

    def scaled(step, axes):
        outputs, fan_in = _outputs(axes, step.ndim), axes.protected
        ratio = _size(step.shape, outputs) / _size(step.shape, fan_in)
        return step * max(1.0, ratio) ** 0.5

    def update(gradients, momenta, count):
        dims = [longer_first(g, a) for g, a in zip(gradients, matrices, strict=True)]
        tx = scale_by_muon(
            ns_coeffs, ns_steps, beta, eps, nesterov=nesterov,
            weight_dimension_numbers=dims,
        )  # fmt: skip
        state = MuonState(count, momenta, jnp.asarray(ns_coeffs))
        steps, state = tx.update(gradients, state)
        return list(map(scaled, steps, matrices)), state.mu

    return update


def _momentum_or_moments(
    protection: Protection, axes: Any, momentum: dict, moments: dict
) -> optax.GradientTransformationExtraArgs:
    """The merging link: Muon for matrices, the alias's Adam for all other leaves.

    Its state is Adam's: `mu` of all leaves, `nu` in leaf order of those that have one.
    """
    subspaces = protection.share or ()
    merge = faithful_second_moment(share=subspaces, guard=protection.guard, **moments)

    def init_fn(params):
        if _tree.is_placeholder(params):
            return merge.init(params)
        rest = [a is None for a in _matrices(params, axes, subspaces)]
        state = merge.init(_part(params, rest))
        mu = optax.tree.zeros_like(params, dtype=moments["mu_dtype"])
        return state._replace(mu=mu)

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        require_routed(updates, "muon")
        found = _matrices(updates.first, axes, subspaces)
        ours, rest = [a is not None for a in found], [a is None for a in found]
        gradients, treedef = jax.tree.flatten(_part(updates.first, ours))
        momenta = jax.tree.leaves(_part(state.mu, ours))
        update = orthogonal_momentum([a for a in found if a is not None], **momentum)
        steps, mu = placed_by_compiler(
            update, gradients, momenta, state.count, like=(gradients, momenta)
        )
        steps = [x.astype(g.dtype) for x, g in zip(steps, gradients, strict=True)]
        mu = [x.astype(m.dtype) for x, m in zip(mu, momenta, strict=True)]
        others, adam = merge.update(
            Routed(*(_part(tree, rest) for tree in updates)),
            state._replace(mu=_part(state.mu, rest)),
        )
        mu = _filled(treedef.unflatten(mu), adam.mu)
        return _filled(treedef.unflatten(steps), others), adam._replace(mu=mu)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _rates(
    learning_rate: optax.ScalarOrSchedule,
    adam_learning_rate: optax.ScalarOrSchedule | None,
    axes: Any,
    subspaces: Sequence[Subspace],
) -> optax.GradientTransformation:
    """Scales the steps of matrices and of all other leaves, each by its rate."""
    if adam_learning_rate is None:
        return optax.scale_by_learning_rate(learning_rate)

    def labels(tree):
        found = _matrices(tree, axes, subspaces)
        return _tree.map_positions(
            lambda _, a: "adam" if a is None else "muon", tree, found
        )

    return optax.partition(
        {
            "muon": optax.scale_by_learning_rate(learning_rate),
            "adam": optax.scale_by_learning_rate(adam_learning_rate),
        },
        labels,
    )


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
        M_t = beta m̂_{t+1} + (1 − beta) g̃_t / (1 − beta^t)     (`nesterov`; else m̂_t)
        Δ_t = √max(1, outputs / fan-in) · P msign(M_t)
        θ_t = θ_{t−1} − η (Δ_t + P(weight_decay · θ_{t−1}))

    Guarantee: UᵀΔ = 0 to float32 rounding, for a subspace of inputs or of outputs. Each
    term of the iteration is an odd polynomial in M, which stays in the range of P, so
    the P before msign costs no strength: it removes only rounding. The iteration
    magnifies small singular values up to 500 times, and rounding errors with them, and
    on accelerators it multiplies in less than float32.

    A partial projection is another matter. msign makes all singular values alike, so it
    undoes an attenuation 1 − α of the gradient: by 1 / (1 − α) in full where the
    iteration converges and U is made of singular directions, by 8.9 at α = .9 in a
    transformer (docs/evidence.md). This is why there is no `strength`. Weights λ < 1 in
    the subspace act through the last P alone: u_iᵀΔ is 1 − λ_i times that of msign.
    Element-wise modifiers (masks) do not survive msign. `Directions` of the whole
    vector do not commute with it, so there the step is projected, and may ascend.

    The step has its full size however little the projection leaves of the gradient; only
    momenta shorter than `eps`, such as those of a full basis, give shorter ones.

    Leaves that are no matrix get the alias `adamr` with the same modifier: biases,
    scales, leaves of size 0 and whatever has "embed" in its name, unless `axes` says
    otherwise. A kernel with several input or output axes is reshaped to fan-in ×
    outputs, and every slice along batch axes is a matrix of its own.

    Args:
      learning_rate: η, a number or a schedule; Muon's is often .02.
      modifier: g -> g̃, any optax transformation; `project_out(subspace)` for one.
      axes: which leaves are matrices, and along which axes: a tree like the parameters
        of `Axes` or None (Adam), as `contracted_axes` gives, or a rule (path, shape) ->
        `Axes` or None. None: the axes of the leaf's subspace, else
        `recipes.muon.matrix_axes`. For a subspace of outputs say `axes`: they give the
        fan-in, on which the scale of the step depends.
      beta: decay of the momentum.
      ns_coeffs: three coefficients of the iteration, or (n, 3) for n different steps.
      ns_steps: steps of the iteration, for three coefficients.
      nesterov: whether M looks one step ahead.
      adam_learning_rate: of the other leaves; None: `learning_rate`.
      b1, b2, eps_root, nu_dtype: of the other leaves, as for `adamr`.
      eps: added to the norm that a momentum is divided by; for the other leaves as for
        `adamr`.
      mu_dtype: dtype of m in all leaves; None: the parameter's.
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

    >>> from adamr import make_subspace, project_out
    >>> params = {"w": jnp.ones((2, 2)), "b": jnp.zeros(2)}
    >>> bases = {"w": jnp.array([[1.0], [0.0]]), "b": None}
    >>> tx = muon(0.1, project_out(make_subspace(params, bases)), b1=0.8)
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
    if callable(weight_decay):
        raise TypeError(
            "muon: weight_decay must be a number, got a function; the learning rate, "
            "which scales it, may be a schedule."
        )
    decays = not (isinstance(weight_decay, int | float) and weight_decay == 0)
    momentum = {
        "beta": beta, "ns_coeffs": ns_coeffs, "ns_steps": ns_steps, "eps": eps,
        "nesterov": nesterov,
    }  # fmt: skip
    moments = {
        "b1": b1, "b2": b2, "eps": eps, "eps_root": eps_root, "mu_dtype": mu_dtype,
        "nu_dtype": nu_dtype,
    }  # fmt: skip

    def links(protection: Protection) -> optax.GradientTransformationExtraArgs:
        held = (*protection.decay, *protection.step)
        decay = decay_outside(held, weight_decay, mask)
        return optax.chain(
            route_first_moment(modifier),
            _momentum_or_moments(protection, axes, momentum, moments),
            project_off(held),
            decay if decays else optax.identity(),
            _rates(learning_rate, adam_learning_rate, axes, protection.share or ()),
        )

    def init_fn(params):
        _tree.require_arrays(params, "muon")
        state = jax.eval_shape(optax.with_extra_args_support(modifier).init, params)
        return links(protection_of(state)).init(params)

    def update_fn(updates, state, params=None, **extra_args):
        route, *_ = state
        tx = links(protection_of(route.modifier))
        return tx.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
