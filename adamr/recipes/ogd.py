"""Orthogonal Gradient Descent: one optimizer, three ways to choose its directions.

method    what a finished task adds                          function
OGD       logit gradients of some of its samples             ogd_directions
OGD+      those of all tasks, again at the newest θ          ogd_plus_directions
PCA-OGD   principal directions of those of many samples      pca_ogd_directions
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from adamr.protection.update import two_sided
from adamr.routing.estimators import Estimators
from adamr.routing.merge import MomentOptions
from adamr.routing.sharing import Guard, Share
from adamr.subspaces.directions import Directions
from adamr.subspaces.gram_schmidt import grow_directions, principal_directions
from adamr.subspaces.logits import logit_gradients
from adamr.subspaces.protected import DirectionsSource

__all__ = ["ogd", "ogd_directions", "ogd_plus_directions", "pca_ogd_directions"]

Variant = Literal["ground_truth", "all", "average"]


def ogd(
    learning_rate: optax.ScalarOrSchedule,
    directions: DirectionsSource,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    estimator: Estimators = "adam",
    share: Share | None = None,
    guard: Guard = True,
    mu_dtype: jax.typing.DTypeLike | None = None,
    nu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam that keeps the outputs of old tasks, to first order: OGD, OGD+, PCA-OGD.

        g̃ = P g  in both moments,    Δ = −η P (m̂ / (√v̂ + ε)),    P x = x − Σ ⟨x, u⟩ u

    Guarantee: ⟨Δ, u⟩ = 0 for every protected u, and the first step descends. The
    outputs of a linear model on the protected inputs do not change at all. Those of
    other models change to second order in the distance from where the gradients were
    taken. Weight decay breaks the guarantee unless a `protect_update` follows it.

    OGD as published, with plain SGD, is `optax.chain(project_out(directions),
    optax.sgd(learning_rate))`. With momentum it needs a `protect_update(directions)`
    after it, since momentum holds older gradients.

    Args:
      learning_rate: η, a number or a schedule.
      directions: from `empty_directions`, or a function of the parameters that makes
        them in `init`; leave the heads of other tasks out of it.
      b1, b2, eps, eps_root, estimator, share, guard, mu_dtype, nu_dtype: as for
        `faithful_second_moment`.

    Returns:
      An optimizer. `set_subspace(state, directions)` protects what was learnt:

    >>> from adamr import empty_directions, get_subspace, set_subspace
    >>> f = lambda w, x: w @ x  # two classes
    >>> w = jnp.zeros((2, 3))
    >>> tx = ogd(0.1, empty_directions(w, capacity=4))
    >>> state = tx.init(w)
    >>> # ... train task 1, then
    >>> x, y = jnp.array([[1.0, 0.0, 0.0]]), jnp.array([1])
    >>> state = set_subspace(state, ogd_directions(get_subspace(state), f, w, x, y))
    >>> step, state = tx.update(jnp.ones((2, 3)), state, w)
    >>> print(step.round(3) + 0.0)  # the logit of class 1 at x stays
    [[-0.1 -0.1 -0.1]
     [ 0.  -0.1 -0.1]]

    References: Farajtabar, Azizan, Mott, Li, Orthogonal Gradient Descent for Continual
      Learning, arXiv:1910.07104.
    """
    options = MomentOptions(
        b1, b2, eps, eps_root, estimator, share, guard, mu_dtype, nu_dtype
    )
    return optax.chain(
        two_sided(directions, **options._asdict()),
        optax.scale_by_learning_rate(learning_rate),
    )


def ogd_directions(
    directions: Directions,
    logits_fn: Callable[[Any, Any], jax.Array],
    params: Any,
    inputs: Any,
    labels: Any = None,
    *,
    variant: Variant = "ground_truth",
    chunk_size: int | None = None,
) -> Directions:
    """OGD at the end of a task: the logit gradients of some of its samples are added.

    Args:
      directions: what is protected so far, with room for the task's.
      logits_fn, params, inputs, labels, variant, chunk_size: as for `logit_gradients`;
        the authors use about 200 inputs per task.
    """
    samples = logit_gradients(
        logits_fn, params, inputs, labels, variant=variant, chunk_size=chunk_size
    )
    return grow_directions(directions, samples)


def ogd_plus_directions(
    directions: Directions,
    logits_fn: Callable[[Any, Any], jax.Array],
    params: Any,
    inputs: Any,
    labels: Any = None,
    *,
    variant: Variant = "ground_truth",
    chunk_size: int | None = None,
) -> Directions:
    """OGD+ at the end of a task: all directions anew, at the newest parameters.

    The gradients that OGD stored belong to older parameters. Here stored samples of
    *all* tasks so far are differentiated again. For a linear model this is OGD.

    Args:
      directions: gives the shapes; its values are dropped.
      logits_fn, params, inputs, labels, variant, chunk_size: as for `logit_gradients`,
        with the samples of all tasks.

    >>> from adamr import empty_directions
    >>> f, w = lambda w, x: jnp.tanh(w @ x), jnp.ones((2, 3))
    >>> memory, labels = jnp.eye(3), jnp.array([0, 1, 1])
    >>> d = ogd_plus_directions(empty_directions(w, 3), f, w, memory, labels)
    >>> int(d.used)
    3

    References: Bennani, Doan, Sugiyama, Generalisation Guarantees for Continual
      Learning with Orthogonal Gradient Descent, arXiv:2006.11942.
    """
    empty = jax.tree.map(jnp.zeros_like, directions)
    return ogd_directions(
        empty, logits_fn, params, inputs, labels, variant=variant, chunk_size=chunk_size
    )


def pca_ogd_directions(
    directions: Directions,
    logits_fn: Callable[[Any, Any], jax.Array],
    params: Any,
    inputs: Any,
    labels: Any = None,
    *,
    count: int = 100,
    variant: Variant = "ground_truth",
    chunk_size: int | None = None,
) -> Directions:
    """PCA-OGD at the end of a task: the principal directions of its logit gradients.

    The authors take 3000 inputs and 100 directions per task. Their code centres the
    gradients, which loses the direction that all share; here they are not centred.

    Args:
      directions: what is protected so far, with room for `count` more.
      logits_fn, params, inputs, labels, variant, chunk_size: as for `logit_gradients`;
        all gradients are in memory at a time.
      count: how many principal directions are kept.

    References: Doan, Bennani, Mazoure, Rabusseau, Alquier, A Theoretical Analysis of
      Catastrophic Forgetting through the NTK Overlap Matrix, arXiv:2010.04003.
    """
    samples = logit_gradients(
        logits_fn, params, inputs, labels, variant=variant, chunk_size=chunk_size
    )
    return grow_directions(directions, principal_directions(samples, count))
