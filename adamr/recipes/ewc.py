"""Penalty methods by the names users know: whole optimizers, one call each.

    recipe       penalty                                 at a task boundary
    l2_sp        (strength/2) Σ (θ − θ_0)²               nothing
    ewc          (strength/2) Σ_k Σ F_k (θ − θ_k)²       consolidate(…, fisher)
    online_ewc   (strength/2) Σ γ F̃ (θ − θ*)²            consolidate(…, rule="online",
                                                                     decay=γ)
    mas          (strength/2) Σ Ω (θ − θ*)²              consolidate(…, rule="online")
    si           c Σ Ω (θ − θ*)²                         consolidate_si
    rwalk        (strength/2) Σ ([F] + [s]) (θ − θ*)²    consolidate_rwalk

Every recipe takes the options of the moments (b1, b2, eps, eps_root, share, mu_dtype,
nu_dtype) and `form`:

    "proximal"   Adam on the task's gradient, then the proximal point of the penalty in
                 the norm of Adam's preconditioner: θ stays between Adam's point and θ*,
                 for any weight (`proximal_second_moment`). The default.
    "additive"   Adam on the penalised loss, as in the papers' code: bounded steps, but
                 a large penalty fills both moments and drowns the new task.

All work under `optax.inject_hyperparams`, so the weight of the penalty, `strength` or
`c`, can change during a run.
"""

from typing import Any, Literal

import jax
import optax

from adamr.modifiers.penalty import check_numbers, quadratic_penalty
from adamr.penalties.rwalk import track_rwalk
from adamr.penalties.si import track_si
from adamr.protection.proximal import proximal_second_moment
from adamr.routing.carrier import route_both_moments, route_first_moment
from adamr.routing.merge import MomentOptions, faithful_second_moment
from adamr.routing.sharing import Share

__all__ = ["ewc", "l2_sp", "mas", "online_ewc", "rwalk", "si"]

Form = Literal["proximal", "additive"]


def _penalised(
    learning_rate: optax.ScalarOrSchedule,
    strength: jax.typing.ArrayLike,
    form: Form,
    options: MomentOptions,
    importance: Any = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Adam with the penalty (strength/2) Σ Ω (θ − θ*)²: every recipe of this file."""
    if form == "proximal":
        route = route_first_moment(optax.identity())
        merge = proximal_second_moment(
            learning_rate, strength, importance=importance, **options._asdict()
        )
    elif form == "additive":
        route = route_both_moments(quadratic_penalty(strength, importance=importance))
        merge = faithful_second_moment(**options._asdict())
    else:
        raise ValueError(f"form is {form!r}, expected 'proximal' or 'additive'.")
    return optax.chain(route, merge, optax.scale_by_learning_rate(learning_rate))


def l2_sp(
    learning_rate: optax.ScalarOrSchedule,
    strength: jax.typing.ArrayLike = 0.1,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    *,
    importance: Any = 1.0,
    form: Form = "proximal",
    share: Share | None = None,
    mu_dtype: jax.typing.DTypeLike | None = None,
    nu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam that is pulled back to where it started: (strength/2) Σ Ω (θ − θ_0)².

        θ̂ = θ − η m̂ D,   D = 1 / (√v̂ + eps)         Adam's step on the task's loss
        θ <- (θ̂ + η D k θ_0) / (1 + η D k),   k = strength · Ω,   η = learning_rate

    θ_0 are the parameters given to `init`: the pretrained weights. For plain L2 to the
    last task's solution, call `set_anchor` at each boundary.

    Args:
      learning_rate: a number or a schedule.
      strength: λ ≥ 0, the weight of the penalty in the convention with 1/2.
      b1, b2, eps, eps_root, share, mu_dtype, nu_dtype: as for `faithful_second_moment`.
      importance: Ω, a number or a tree like params of arrays, numbers and None (0),
        such as {"backbone": 1.0, "head": 0.0} when these are leaves.
      form: "proximal" or "additive", see `adamr.recipes.ewc`.

    Returns:
      An optimizer that needs `params` in `update`.

    Raises:
      ValueError: for an unknown form or a negative number; at update, without `params`.

    >>> import jax.numpy as jnp
    >>> tx = l2_sp(0.1, 1e9)
    >>> state = tx.init(jnp.zeros(1))
    >>> step, state = tx.update(jnp.ones(1), state, jnp.array([0.5]))
    >>> print(step.round(4))
    [-0.5]

    References: Li et al., Explicit Inductive Bias for Transfer Learning with
      Convolutional Networks, arXiv:1802.01483.
    """
    options = MomentOptions(
        b1, b2, eps, eps_root, share=share, mu_dtype=mu_dtype, nu_dtype=nu_dtype
    )
    return _penalised(learning_rate, strength, form, options, importance)


def ewc(
    learning_rate: optax.ScalarOrSchedule,
    strength: jax.typing.ArrayLike,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    *,
    form: Form = "proximal",
    share: Share | None = None,
    mu_dtype: jax.typing.DTypeLike | None = None,
    nu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Elastic Weight Consolidation: (strength/2) Σ_k Σ F_k (θ − θ_k)² over past tasks.

        F = E_x E_y (∂ log p(y|x) / ∂θ)²                        of a finished task
        Ω' = Ω + F,   θ*' = θ* + F/Ω' (θ − θ*)                  at its boundary
        θ <- (θ̂ + η D k θ*) / (1 + η D k),   k = strength · Ω   as in `l2_sp`

    At a boundary call `consolidate(opt_state, params, fisher)` with the
    `fisher_information` of the finished task. The tasks are merged exactly, in the
    memory of one.

    Args:
      learning_rate: a number or a schedule.
      strength: λ ≥ 0, the weight of the penalty in the convention with 1/2. No value
        is universal: the product λ F sets the scale, and F depends on the size of the
        gradients.
      b1, b2, eps, eps_root, share, mu_dtype, nu_dtype: as for `faithful_second_moment`.
      form: "proximal" or "additive", see `adamr.recipes.ewc`.

    Returns and raises what `l2_sp` does.

    >>> import jax.numpy as jnp
    >>> from adamr import consolidate, fisher_information
    >>> logits = lambda w, x: jnp.array([0.0, 1.0]) * w * x
    >>> w, tx = jnp.zeros([]), ewc(0.1, strength=1e9)
    >>> state = tx.init(w)
    >>> state = consolidate(state, w, fisher_information(logits, w, jnp.ones([4])))
    >>> step, state = tx.update(jnp.ones([]), state, w)
    >>> print(abs(step) < 1e-6)
    True

    References: Kirkpatrick et al., Overcoming catastrophic forgetting in neural
      networks, arXiv:1612.00796.
    """
    options = MomentOptions(
        b1, b2, eps, eps_root, share=share, mu_dtype=mu_dtype, nu_dtype=nu_dtype
    )
    return _penalised(learning_rate, strength, form, options)


def online_ewc(
    learning_rate: optax.ScalarOrSchedule,
    strength: jax.typing.ArrayLike,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    *,
    form: Form = "proximal",
    share: Share | None = None,
    mu_dtype: jax.typing.DTypeLike | None = None,
    nu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Online EWC: (strength/2) Σ γ F̃ (θ − θ*)², θ* the latest solution.

        F̃ <- γ F̃ + F,   θ* <- θ                                 at a boundary
        θ <- (θ̂ + η D k θ*) / (1 + η D k),   k = strength γ F̃   as in `l2_sp`

    The optimizer is that of `ewc`; γ enters at the boundary:
    `consolidate(opt_state, params, fisher, rule="online", decay=γ)`. γ = 1 is not EWC,
    since the anchor moves. Arguments, returns and errors are those of `ewc`.

    References: Schwarz et al., Progress & Compress, arXiv:1805.06370.
    """
    options = MomentOptions(
        b1, b2, eps, eps_root, share=share, mu_dtype=mu_dtype, nu_dtype=nu_dtype
    )
    return _penalised(learning_rate, strength, form, options)


def mas(
    learning_rate: optax.ScalarOrSchedule,
    strength: jax.typing.ArrayLike = 2.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    *,
    form: Form = "proximal",
    share: Share | None = None,
    mu_dtype: jax.typing.DTypeLike | None = None,
    nu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Memory Aware Synapses: (strength/2) Σ Ω (θ − θ*)², Ω summed over tasks.

        Ω <- Ω + E_x |∂ ‖f(x)‖² / ∂θ|,   θ* <- θ                at a boundary
        θ <- (θ̂ + η D k θ*) / (1 + η D k),   k = strength · Ω   as in `l2_sp`

    At a boundary call `consolidate(opt_state, params, omega, rule="online")` with the
    `memory_aware_importance` of the finished task. The authors' λ has no 1/2, so the
    default is their λ = 1. Arguments, returns and errors are those of `ewc`.

    References: Aljundi et al., Memory Aware Synapses, arXiv:1711.09601.
    """
    options = MomentOptions(
        b1, b2, eps, eps_root, share=share, mu_dtype=mu_dtype, nu_dtype=nu_dtype
    )
    return _penalised(learning_rate, strength, form, options)


def si(
    learning_rate: optax.ScalarOrSchedule,
    c: jax.typing.ArrayLike = 0.3,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    *,
    form: Form = "proximal",
    share: Share | None = None,
    mu_dtype: jax.typing.DTypeLike | None = None,
    nu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Synaptic Intelligence: c Σ Ω (θ − θ*)², Ω from the trajectory of training.

        ω <- ω − g δ,   δ the change of θ                       at every step
        Ω <- relu(Ω + ω / ((θ − θ*)² + damping)),   θ* <- θ     at a boundary
        θ <- (θ̂ + η D k θ*) / (1 + η D k),   k = 2 c Ω          as in `l2_sp`

    There is no 1/2 here: the gradient of the penalty is 2 c Ω (θ − θ*). At a boundary
    call `consolidate_si(opt_state, params)`. The incoming gradient must be that of the
    task's loss alone; where the loss has more terms, pass `task_gradient`.

    Args:
      learning_rate: a number or a schedule.
      c: ≥ 0. The default ended best on text that differs (docs/evidence/how.md), with
        the default damping of `consolidate_si`; the authors use 0.1 on permuted MNIST
        and split CIFAR.
      b1, b2, eps, eps_root, share, mu_dtype, nu_dtype: as for `faithful_second_moment`.
      form: "proximal" or "additive", see `adamr.recipes.ewc`.

    Returns and raises what `l2_sp` does.

    >>> import jax.numpy as jnp
    >>> from adamr import consolidate_si, get_anchor
    >>> theta, tx = jnp.array([1.0]), si(0.1)
    >>> state = tx.init(theta)
    >>> step, state = tx.update(theta, state, theta)
    >>> state = consolidate_si(state, theta + step)
    >>> print(get_anchor(state).importance > 0.9)
    [ True]

    References: Zenke, Poole, Ganguli, Continual Learning Through Synaptic
      Intelligence, arXiv:1703.04200.
    """
    check_numbers("si", 0.0, c=c)
    options = MomentOptions(
        b1, b2, eps, eps_root, share=share, mu_dtype=mu_dtype, nu_dtype=nu_dtype
    )
    return track_si(_penalised(learning_rate, 2 * c, form, options))


def rwalk(
    learning_rate: optax.ScalarOrSchedule,
    strength: jax.typing.ArrayLike = 2.0,
    interval: int = 10,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    *,
    alpha: float = 0.9,
    damping: float = 1e-3,
    form: Form = "proximal",
    share: Share | None = None,
    mu_dtype: jax.typing.DTypeLike | None = None,
    nu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """RWalk: (strength/2) Σ ([F] + [s]) (θ − θ*)², F and s gathered while training.

        ω <- ω − g δ,   δ the change of θ                       at every step
        s <- s + relu(ω / (½ F δ² + damping))                   every `interval` steps,
        F <- (1 − alpha) F + alpha · mean of g²                 δ and ω since the last
        Ω <- [F] + [s],   θ* <- θ                               at a boundary
        θ <- (θ̂ + η D k θ*) / (1 + η D k),   k = strength · Ω   as in `l2_sp`

    At a boundary call `consolidate_rwalk(opt_state, params)`. The authors' λ has no
    1/2, so the default is their λ = 1; F and s are scaled to [0, 1].

    Args:
      learning_rate: a number or a schedule.
      strength: λ ≥ 0, the weight of the penalty in the convention with 1/2.
      interval, alpha, damping: as for `track_rwalk`.
      b1, b2, eps, eps_root, share, mu_dtype, nu_dtype: as for `faithful_second_moment`.
      form: "proximal" or "additive", see `adamr.recipes.ewc`.

    Returns and raises what `l2_sp` does.

    References: Chaudhry et al., Riemannian Walk for Incremental Learning,
      arXiv:1801.10112.
    """
    options = MomentOptions(
        b1, b2, eps, eps_root, share=share, mu_dtype=mu_dtype, nu_dtype=nu_dtype
    )
    inner = _penalised(learning_rate, strength, form, options)
    return track_rwalk(inner, interval, alpha, damping)
