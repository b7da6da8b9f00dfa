"""Recipes that train scales beside the weights: TRGP and ROGO.

Both train {"params": W, "scales": Q} of a loss on `scaled_params(W, subspaces, Q)`: W
by `gpm`, Q freely. They differ in which subspaces are scaled and in what becomes of Q
when the task ends. Where W and Q do not live in one tree (`nnx.Optimizer`), use `gpm`
for the one and any optimizer for the other.
"""

from typing import Any, NamedTuple

import jax
import optax

from adamr import _tree
from adamr.recipes.gpm import AdamrOptions, Strength, projected
from adamr.subspaces.protected import SubspaceSource

__all__ = ["ScaledState", "rogo", "trgp"]


class ScaledState(NamedTuple):
    params: Any
    scales: Any


def _with_scales(
    weights: optax.GradientTransformation,
    scales: optax.GradientTransformation,
    name: str,
) -> optax.GradientTransformationExtraArgs:
    """One optimizer for each entry of {"params": ..., "scales": ...}."""
    # Not optax.partition: its branches see the whole tree with holes, and a subspace
    # made for the parameters would no longer fit.
    weights = optax.with_extra_args_support(weights)
    scales = optax.with_extra_args_support(scales)

    def parts(tree) -> Any:
        if not isinstance(tree, dict) or set(tree) != {"params", "scales"}:
            found = sorted(tree) if isinstance(tree, dict) else type(tree).__name__
            raise ValueError(
                f"{name} trains a dict {{'params': ..., 'scales': ...}}, got {found}."
            )
        return tree["params"], tree["scales"]

    def init_fn(params) -> Any:
        if _tree.is_placeholder(params):
            return ScaledState(weights.init(params), scales.init(params))
        w, q = parts(params)
        return ScaledState(weights.init(w), scales.init(q))

    def update_fn(updates, state, params=None, **extra_args):
        w, q = parts(updates)
        w_params, q_params = (None, None) if params is None else parts(params)
        w, w_state = weights.update(w, state.params, w_params, **extra_args)
        q, q_state = scales.update(q, state.scales, q_params, **extra_args)
        return {"params": w, "scales": q}, ScaledState(w_state, q_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def trgp(
    learning_rate: optax.ScalarOrSchedule,
    subspace: SubspaceSource,
    *,
    scale_optimizer: optax.GradientTransformation | None = None,
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
    """Trust Region Gradient Projection: W under `gpm`, the scales Q trained freely.

        loss(W + Σ_j B_j (Q_j − I) B_jᵀ W)         B_j: the basis of trusted task j
        Δ_W as in `gpm`, off the frozen space M,   Δ_Q as in `scale_optimizer`

    Trains {"params": W, "scales": Q} of a loss on `scaled_params(W, trusted, Q)`.
    Guarantee: with its own scales a past task keeps its function on inputs in its own
    subspace, whatever W and the other scales do. Task identity is needed at test time,
    and (trusted subspaces, Q) must be kept per task.

    Args:
      learning_rate: of W, and of Q unless `scale_optimizer` is given.
      subspace: the frozen space M of all tasks.
      scale_optimizer: for Q; None: `optax.adam(learning_rate)`.
      b1, b2, eps, eps_root, mu_dtype, nu_dtype, weight_decay, mask, strength: as for
        `adamr`, for W.

    Returns:
      An optimizer for a tree with the entries "params" and "scales".

    Raises:
      ValueError: for a tree without these two entries.

    >>> import adamr
    >>> import jax.numpy as jnp
    >>> params = {"w": jnp.ones((3, 1))}
    >>> memory = adamr.empty_subspace(params)
    >>> tasks = [memory, memory]  # one per task to come
    >>> region = adamr.trust.trust_region(tasks, params)
    >>> scales = adamr.trust.init_scales(region.subspaces)
    >>> variables = {"params": params, "scales": scales}
    >>> tx = trgp(0.1, memory)
    >>> state = tx.init(variables)
    >>> # ... train task 1 and capture its inputs; then, at the boundary:
    >>> x = jnp.array([[1.0, 0.0, 0.0]])
    >>> tasks[0], memory = adamr.trust.grow_task_subspace(memory, {"w": x})
    >>> state = adamr.set_subspace(state, memory, moments="reset")
    >>> loss = lambda p: jnp.sum((x + 0.1) @ p["w"])  # of task 2, on a batch
    >>> region = adamr.trust.trust_region(tasks, jax.grad(loss)(params))
    >>> variables["scales"] = adamr.trust.init_scales(region.subspaces)
    >>> # ... and each step of task 2:
    >>> def scaled_loss(v):
    ...     inside = region.subspaces
    ...     return loss(adamr.trust.scaled_params(v["params"], inside, v["scales"]))
    >>> step, state = tx.update(jax.grad(scaled_loss)(variables), state, variables)
    >>> print(step["params"]["w"][:, 0].round(3) + 0.0)
    [ 0.    -0.016 -0.016]
    >>> print(step["scales"][0][0][0, 0, 0].round(3) + 0.0)
    [-0.1  0.   0. ]

    References:
      Lin, Yang, Fan, Zhang, TRGP: Trust Region Gradient Projection for Continual
      Learning, arXiv:2202.02931.
    """
    options = AdamrOptions(
        b1, b2, eps, eps_root, mu_dtype, nu_dtype, weight_decay, mask, strength
    )
    weights = projected("trgp", learning_rate, subspace, options)
    return _with_scales(weights, scale_optimizer or optax.adam(learning_rate), "trgp")


def rogo(
    learning_rate: optax.ScalarOrSchedule,
    subspace: SubspaceSource,
    *,
    scale_optimizer: optax.GradientTransformation | None = None,
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
    """Restricted Orthogonal Gradient Projection: GPM that opens part of what it froze.

        loss(W + B (Q − I) Bᵀ W) + β ‖Q − I‖²      B: the relaxing space, inside M
        Δ_W as in `gpm`, off the frozen space M,   Δ_Q as in `scale_optimizer`
        W <- W + B (Q − I) Bᵀ W,   Q <- I          at the end of the task

    Trains {"params": W, "scales": Q} of a loss on `scaled_params(W, relaxed, Q)` plus
    `scale_penalty(Q)`, as `trgp` does, but with one subspace inside M, searched anew
    when the learning rate has decayed, and folded into W at the end of each task, so
    that nothing is stored. Guarantee: with Q = I it is `gpm`. What folding changes for
    old tasks is bounded by ‖Q − I‖; it is not zero.

    Args:
      learning_rate: of W, and of Q unless `scale_optimizer` is given.
      subspace: the frozen space M.
      scale_optimizer: for Q; None: `optax.adam(learning_rate)`.
      b1, b2, eps, eps_root, mu_dtype, nu_dtype, weight_decay, mask, strength: as for
        `adamr`, for W.

    Returns:
      An optimizer for a tree with the entries "params" and "scales".

    Raises:
      ValueError: for a tree without these two entries.

    >>> import adamr
    >>> import jax.numpy as jnp
    >>> params = {"w": jnp.ones((3, 1))}
    >>> memory = adamr.make_subspace(params, {"w": jnp.eye(3)[:, :2]})
    >>> loss = lambda p: jnp.sum(p["w"][0] ** 2)  # task 2
    >>> relaxed = adamr.trust.relaxing_subspace(memory, jax.grad(loss)(params))
    >>> variables = {"params": params, "scales": adamr.trust.init_scales(relaxed)}
    >>> tx = rogo(0.1, memory)
    >>> state = tx.init(variables)
    >>> def scaled_loss(v):
    ...     weights = adamr.trust.scaled_params(v["params"], relaxed, v["scales"])
    ...     return loss(weights) + adamr.trust.scale_penalty(v["scales"])
    >>> step, state = tx.update(jax.grad(scaled_loss)(variables), state, variables)
    >>> variables = optax.apply_updates(variables, step)
    >>> folded, scales = adamr.trust.fold_scales(
    ...     variables["params"], relaxed, variables["scales"]
    ... )
    >>> print(f"{folded['w'][0, 0]:.3f} {folded['w'][1, 0]:.3f}")
    0.900 1.000

    References:
      Yang et al., Restricted Orthogonal Gradient Projection for Continual Learning,
      arXiv:2301.12131.
    """
    options = AdamrOptions(
        b1, b2, eps, eps_root, mu_dtype, nu_dtype, weight_decay, mask, strength
    )
    weights = projected("rogo", learning_rate, subspace, options)
    return _with_scales(weights, scale_optimizer or optax.adam(learning_rate), "rogo")
