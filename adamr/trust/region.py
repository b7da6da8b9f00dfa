"""Trust regions: the old tasks whose inputs the gradient of a new task shares.

Trust Region Gradient Projection keeps GPM's frozen space M and a basis B_j per task.
When the gradient of a new task lies largely in B_j, task j is trusted: its weights are
reused through a small learnable matrix Q instead of being blocked,

    W_eff = W + Σ_j B_j (Q_j − I) B_jᵀ W        (Flax layout: fan-in first)

while the step of W stays projected off M. Old tasks keep their own Q, and the steps of
W are orthogonal to every B_j, so the function of an old task does not change.

`adamr.trust.scaled_weights` computes W_eff.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adamr import _tree
from adamr.subspaces.columns import (
    ENERGY_FLOOR,
    THRESHOLD_SLACK,
    append_columns,
    matmul,
    normalized_samples,
    on_host,
    orthonormal_new,
    residual_columns,
    residual_gram,
    spectrum,
    to_columns,
    to_storage,
    transpose,
    unit_trace,
    used_columns,
)
from adamr.subspaces.grow import entries, evidence_of
from adamr.subspaces.subspace import Subspace, coordinates, layout

__all__ = ["TrustRegion", "grow_task_subspace", "trust_region"]


class TrustRegion(NamedTuple):
    """The trusted tasks of every layer.

    Attributes:
      subspaces: `count` subspaces: for every layer, the basis of its most trusted task
        in the first, of the next in the second, and so on. A layer that trusts fewer
        tasks has an empty basis in the rest.
      tasks: in leaf order, int32 (count, *batch): the numbers of the trusted tasks, −1
        for none; None for an unprotected leaf.
      scores: in leaf order, float32 (tasks, *batch): s_j = ‖B_j B_jᵀ G‖ / ‖G‖ of every
        task; None for an unprotected leaf.
    """

    subspaces: tuple[Subspace, ...]
    tasks: tuple[jax.Array | None, ...]
    scores: tuple[jax.Array | None, ...]


def _score(basis: jax.Array, weights: jax.Array, g: jax.Array) -> jax.Array:
    """‖Bᵀ G‖ / ‖G‖ per batch slice; 0 where G is zero or not finite."""
    how = layout(basis, weights)
    each = tuple(d for d in range(g.ndim) if d not in how.batch)
    g = g.astype(jnp.float32)
    peak = jnp.max(jnp.abs(g), axis=each, keepdims=True)
    g = g / jnp.where(peak > 0, peak, 1.0)
    total = jnp.sum(jnp.square(g), axis=each)
    coords = coordinates(basis, weights, g)
    rest = tuple(range(len(how.batch), coords.ndim))
    inside = jnp.sum(jnp.square(coords), axis=rest)
    usable = jnp.isfinite(total) & (total > 0)
    return jnp.where(usable, jnp.sqrt(inside / jnp.where(usable, total, 1.0)), 0.0)


def _of_task(
    stored: Sequence[jax.Array], task: jax.Array, trusted: jax.Array
) -> jax.Array:
    """The array of one task, chosen per batch slice; 0 where that is not trusted."""
    taken = jnp.take_along_axis(jnp.stack(stored), task, axis=0)
    return jnp.where(trusted, taken, 0.0)[0]


def trust_region(
    bases_per_task: Sequence[Subspace],
    gradients: Any,
    *,
    threshold: float = 0.5,
    count: int = 2,
) -> TrustRegion:
    """Chooses, per layer, at most `count` tasks whose space holds most of the gradient.

        s_j = ‖B_j B_jᵀ G‖ / ‖G‖,   trusted: the largest s_j with s_j > threshold

    The function runs under jit.

    Args:
      bases_per_task: B_j, one `Subspace` per task, all of the same shapes, from
        `grow_task_subspace`. A list of fixed length with empty subspaces for the tasks
        to come keeps one compiled program: an empty one is never trusted.
      gradients: G, tree like the parameters: gradient of the new task's loss at the
        start, on a batch of its samples, before any projection.
      threshold: ε1 in [0, 1]; the authors use 0.5 (0.2 on permuted MNIST).
      count: K ≥ 1, how many tasks a layer may trust.

    Returns:
      A `TrustRegion` whose shapes depend only on `count`, the number of tasks and the
      shapes of the subspaces. A layer whose gradient is zero or not finite trusts none.

    Raises:
      ValueError: for no task, subspaces of different shapes, gradients of other leaves,
        or count < 1.

    >>> from adamr import make_subspace
    >>> g = jnp.array([[3.0], [4.0]])
    >>> tasks = [make_subspace(g, jnp.eye(2)[:, i : i + 1]) for i in (0, 1)]
    >>> region = trust_region(tasks, g, count=1)
    >>> print(region.scores[0].round(3), region.tasks[0])
    [0.6 0.8] [1]

    References:
      Lin, Yang, Fan, Zhang, TRGP: Trust Region Gradient Projection for Continual
      Learning, arXiv:2202.02931.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}.")
    if not bases_per_task:
        raise ValueError("bases_per_task is empty, expected at least one task.")
    shapes = [jax.tree.map(jnp.shape, s) for s in bases_per_task]
    for task, s in enumerate(bases_per_task):
        s.check(gradients, f"bases_per_task[{task}]")
        if shapes[task] != shapes[0]:
            raise ValueError(
                f"bases_per_task[{task}] has shapes {shapes[task]}, expected those of "
                f"task 0: {shapes[0]}."
            )

    def leaf(g, bases, weights):
        if bases[0] is None:
            return [(None, None)] * count, None, None
        pairs = list(zip(bases, weights, strict=True))
        if _tree.is_hole(g):
            batch = [n for n in weights[0].shape[:-1] if n > 1]
            scores = jnp.zeros((len(pairs), *batch))
        else:
            scores = jnp.stack([_score(b, w, g) for b, w in pairs])
        small = (1, *weights[0].shape[:-1], 1)
        left = jnp.where(scores > threshold, scores, -1.0)
        chosen, tasks = [], []
        for _ in range(count):
            best = jnp.argmax(left, axis=0, keepdims=True).astype(jnp.int32)
            trusted = jnp.take_along_axis(left, best, axis=0) >= 0
            tasks.append(jnp.where(trusted, best, -1)[0])
            which = best.reshape(small), trusted.reshape(small)
            chosen.append((_of_task(bases, *which), _of_task(weights, *which)))
            place = jax.lax.broadcasted_iota(jnp.int32, left.shape, 0)
            left = jnp.where(place == best, -1.0, left)
        return chosen, jnp.stack(tasks), scores

    leaves = _tree.flatten(gradients)[0]
    bases = zip(*(s.bases for s in bases_per_task), strict=True)
    weights = zip(*(s.weights for s in bases_per_task), strict=True)
    found = [leaf(*each) for each in zip(leaves, bases, weights, strict=True)]
    chosen, tasks, scores = zip(*found, strict=True)
    by_rank = zip(*chosen, strict=True)
    subspaces = tuple(Subspace(*zip(*pairs, strict=True)) for pairs in by_rank)
    return TrustRegion(subspaces, tasks, scores)


def _split(
    columns: jax.Array, met: jax.Array, by_gram: bool
) -> tuple[jax.Array, jax.Array]:
    """‖m_iᵀ R‖² along each column m_i, and R̂ R̂ᵀ, of samples or their Gram matrix."""
    if by_gram:
        gram, _ = unit_trace(met)
        along = jnp.sum(columns * matmul(gram, columns), axis=-2)
        return along, residual_gram(columns, gram)
    samples, _ = normalized_samples(met)
    residual = residual_columns(columns, transpose(samples))
    along = jnp.sum(jnp.square(matmul(samples, columns)), axis=-2)
    return along, matmul(residual, transpose(residual))


@functools.partial(jax.jit, static_argnames=("by_gram", "threshold"))
def _grow_leaf(task, task_weights, basis, weights, met, by_gram, threshold):
    """The basis and weights of the task, then those of the memory."""
    columns, lam = to_columns(basis, weights)
    capacity = columns.shape[-1]
    old, rest = _split(columns, met, by_gram)
    new, vectors = spectrum(rest)
    energy = jnp.concatenate([old, new], axis=-1)
    order = jnp.argsort(-energy, axis=-1, stable=True)
    ranked = jnp.take_along_axis(energy, order, axis=-1)
    before = jnp.cumsum(ranked, axis=-1) - ranked
    short = before < threshold - (THRESHOLD_SLACK if threshold < 1 else 0.0)
    floor = ENERGY_FLOOR["float32" if by_gram else str(ranked.dtype)]
    wanted = short & (ranked > floor)
    wanted = jnp.take_along_axis(wanted, jnp.argsort(order, axis=-1), axis=-1)

    free = capacity - jnp.sum(used_columns(columns), axis=-1, dtype=jnp.int32)
    count = jnp.minimum(jnp.sum(wanted[..., capacity:], axis=-1, dtype=jnp.int32), free)
    grown = append_columns(columns, orthonormal_new(columns, vectors, count), count)
    added = used_columns(grown) & ~used_columns(columns)
    lam = jnp.where(added, 1.0, lam)

    chosen = wanted[..., :capacity] | added
    order = jnp.argsort(~chosen, axis=-1, stable=True)
    chosen = jnp.take_along_axis(chosen, order, axis=-1)
    own = jnp.take_along_axis(grown, order[..., None, :], axis=-1)
    own = jnp.where(chosen[..., None, :], own, 0.0)
    own = to_storage(own, chosen.astype(lam.dtype), task, task_weights)
    return *own, *to_storage(grown, lam, basis, weights)


def grow_task_subspace(
    memory: Subspace, samples: Any, *, threshold: float = 0.97
) -> tuple[Subspace, Subspace]:
    """The task's own subspace, and the frozen space grown by its new directions.

    With M the basis of `memory`, R the samples as columns and R̂ = R − M Mᵀ R, ranks
    the old directions by ‖m_iᵀ R‖² and the singular directions of R̂ by σ̂_i², all in
    one list, and takes the fewest, largest first, whose sum reaches threshold · ‖R‖².
    These are the task's basis; the new ones among them are appended to M.

    A `Covariance` holds R Rᵀ, and this needs no more: ‖m_iᵀ R‖² = m_iᵀ R Rᵀ m_i, and
    σ̂_i² are the eigenvalues of (I − M Mᵀ) R Rᵀ (I − M Mᵀ). Its float32 sums leave 1e-6
    of the energy as noise.

    Guarantee: span B_t ⊆ span M. The authors' code drops the strongest new direction
    when it appends (an index compared with > instead of ≥); this function appends it.

    Args:
      memory: the frozen space M of all tasks so far; empty at first.
      samples: `layer_inputs(forward, params, x)` of the task, or another `Covariance`;
        or a tree like the parameters, or a tuple in leaf order, of float arrays
        (num_samples, n), n the fan-in, (layers, num_samples, n) for stacked kernels, or
        None.
      threshold: energy share in [0, 1].

    Returns:
      (task, memory), both of the shapes of `memory`. Where there is too little room,
      the strongest new directions are added. Samples that are zero or (under jit) not
      finite give an empty task subspace and leave the memory unchanged.

    Raises:
      ValueError: for samples of the wrong shape, empty or (outside jit) not finite, or
        a threshold outside [0, 1].

    >>> from adamr import empty_subspace, layer_inputs
    >>> from adamr.subspaces import rank
    >>> params = {"w": jnp.ones((3, 2))}
    >>> memory = empty_subspace(params)
    >>> inputs = layer_inputs(lambda p, x: x @ p["w"], params, jnp.eye(3)[:1])
    >>> first, memory = grow_task_subspace(memory, inputs)
    >>> second, memory = grow_task_subspace(memory, {"w": jnp.eye(3)[1:2]})
    >>> [int(rank(s)[0]) for s in (first, second, memory)]
    [1, 1, 2]

    References:
      Lin, Yang, Fan, Zhang, TRGP: Trust Region Gradient Projection for Continual
      Learning, arXiv:2202.02931.
    """
    if not 0.0 <= threshold <= 1.0:
        raise ValueError(f"threshold must lie in [0, 1], got {threshold}.")
    names, leaves, by_gram = entries(samples, memory)
    task, grown = [], []
    for name, x, basis, weights in zip(names, leaves, *memory, strict=True):
        own, own_weights = jax.tree.map(jnp.zeros_like, (basis, weights))
        if basis is not None and weights is not None and not _tree.is_hole(x):
            met, is_gram = evidence_of(name, jnp.asarray(x), basis, weights, by_gram)
            arrays = own, own_weights, basis, weights, met
            own, own_weights, basis, weights = on_host(
                _grow_leaf, *arrays, by_gram=is_gram, threshold=threshold
            )
        task.append((own, own_weights))
        grown.append((basis, weights))
    return Subspace(*zip(*task, strict=True)), Subspace(*zip(*grown, strict=True))
