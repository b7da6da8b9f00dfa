"""Trust regions: old tasks whose space the new gradient shares, and scaled weights.

Trust Region Gradient Projection keeps GPM's frozen space M and a basis B_j per task.
When the gradient of a new task lies largely in B_j, task j is trusted: its weights are
reused through a small learnable matrix Q instead of being blocked,

    W_eff = W + Σ_j B_j (Q_j − I) B_jᵀ W        (Flax layout: fan-in first)

while the step of W stays projected off M. Old tasks keep their own Q, and so their
function: the steps of W are orthogonal to every B_j (`test_old_tasks_are_unchanged`).

The weights are scaled by `adamr.scales`.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adamr import _tree
from adamr.subspaces.columns import (
    FLOOR,
    TOLERANCE,
    append,
    matmul,
    normalized,
    on_host,
    places,
    residual_columns,
    to_columns,
    to_storage,
    transpose,
    used_columns,
)
from adamr.subspaces.grow import sample_rows
from adamr.subspaces.subspace import Subspace, coordinates, layout

__all__ = ["TrustRegion", "grow_task_subspace", "trust_region"]


class TrustRegion(NamedTuple):
    """The trusted tasks of every layer.

    Attributes:
      subspaces: their bases, the most trusted first, one `Subspace` per rank of trust;
        empty where fewer tasks are trusted.
      tasks: in leaf order, int32 (count, *batch): which task it is, −1 for none.
      scores: in leaf order, float32 (T, *batch): ‖Proj_B(G)‖ / ‖G‖ of every task.
    """

    subspaces: tuple[Subspace, ...]
    tasks: tuple[jax.Array | None, ...]
    scores: tuple[jax.Array | None, ...]


def _score(basis, weights, g) -> jax.Array:
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


def trust_region(
    bases_per_task: Sequence[Subspace],
    gradients: Any,
    *,
    threshold: float = 0.5,
    count: int = 2,
) -> TrustRegion:
    """Per layer, the `count` tasks that share most of the gradient, above `threshold`.

        s_j = ‖B_j B_jᵀ G‖ / ‖G‖,   trusted: the largest s_j with s_j > threshold

    Args:
      bases_per_task: one `Subspace` per task, all of the same shapes, from
        `grow_task_subspace`. A list of fixed length with empty subspaces for the tasks
        to come keeps one compiled program: an empty one is never trusted.
      gradients: G, tree like the parameters: gradient of the new task's loss at the
        start, on a batch of its samples, before any projection.
      threshold: ε1; the authors use 0.5 (0.2 on permuted MNIST).
      count: K, how many tasks to trust at most.

    Returns:
      A `TrustRegion`; jittable, shapes depend on `count` and the number of tasks only.
      A gradient that is zero or not finite trusts nobody.

    Raises:
      ValueError: for no task, subspaces of different shapes, gradients they were not
        made for, or count < 1.

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
        raise ValueError("bases_per_task must hold at least one task.")
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
        left = jnp.where(scores > threshold, scores, -1.0)
        chosen, tasks = [], []
        for _ in range(count):
            best = jnp.argmax(left, axis=0, keepdims=True).astype(jnp.int32)
            trusted = jnp.take_along_axis(left, best, axis=0) >= 0
            tasks.append(jnp.where(trusted, best, -1)[0])
            small = (1, *weights[0].shape[:-1], 1)

            def pick(stored, best=best, trusted=trusted, small=small):
                stacked = jnp.stack(stored)
                taken = jnp.take_along_axis(stacked, best.reshape(small), axis=0)
                return jnp.where(trusted.reshape(small), taken, 0.0)[0]

            chosen.append((pick(bases), pick(weights)))
            place = jax.lax.broadcasted_iota(jnp.int32, left.shape, 0)
            left = jnp.where(place == best, -1.0, left)
        return chosen, jnp.stack(tasks), scores

    leaves = _tree.flatten(gradients)[0]
    bases = zip(*(s.bases for s in bases_per_task), strict=True)
    weights = zip(*(s.weights for s in bases_per_task), strict=True)
    found = [leaf(*each) for each in zip(leaves, bases, weights, strict=True)]
    chosen, tasks, scores = zip(*found, strict=True)
    subspaces = tuple(
        Subspace(*zip(*(one[k] for one in chosen), strict=True)) for k in range(count)
    )
    return TrustRegion(subspaces, tasks, scores)


@functools.partial(jax.jit, static_argnames="threshold")
def _grow_leaf(task, task_weights, basis, weights, samples, threshold):
    columns, lam = to_columns(basis, weights)
    samples, usable = normalized(samples)
    capacity = columns.shape[-1]
    old = jnp.sum(jnp.square(matmul(samples, columns)), axis=-2)
    residual = residual_columns(columns, transpose(samples))
    new, vectors = jnp.linalg.eigh(matmul(residual, transpose(residual)))
    new, vectors = jnp.maximum(new[..., ::-1], 0.0), vectors[..., ::-1]
    energy = jnp.concatenate([old, new], axis=-1)
    order = jnp.argsort(-energy, axis=-1, stable=True)
    ranked = jnp.take_along_axis(energy, order, axis=-1)
    before = jnp.cumsum(ranked, axis=-1) - ranked
    short = before < threshold - (TOLERANCE if threshold < 1 else 0.0)
    wanted = short & (ranked > FLOOR[str(ranked.dtype)])
    wanted = jnp.take_along_axis(wanted, jnp.argsort(order, axis=-1), axis=-1)

    free = capacity - jnp.sum(used_columns(columns), axis=-1, dtype=jnp.int32)
    count = jnp.minimum(jnp.sum(wanted[..., capacity:], axis=-1, dtype=jnp.int32), free)
    vectors = vectors[..., :capacity]
    fresh = (places(vectors.shape[-1], count.shape) < count[..., None])[..., None, :]
    vectors = jnp.where(fresh, vectors, 0.0)
    # Twice is enough; QR fills zero columns with anything: mask after it.
    for _ in range(2):
        vectors = jnp.linalg.qr(residual_columns(columns, vectors)).Q
        vectors = jnp.where(fresh, vectors, 0.0)
    grown = append(columns, vectors, count)
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
    """The task's own subspace, and the frozen one grown by what is new in it.

    With M the basis of `memory`, R the samples as columns and R̂ = R − M Mᵀ R, ranks
    the old directions by ‖m_iᵀ R‖² and the singular directions of R̂ by σ̂_i², all in
    one list, and takes the fewest, largest first, whose sum reaches threshold · ‖R‖².
    These are the task's basis; the new ones among them are appended to M.

    The authors' code drops the strongest new direction when it appends (an index
    compared with > instead of ≥); here it is in, so span B_t ⊆ span M always
    (`test_task_subspace_keeps_the_strongest_new_direction`).

    Args:
      memory: the frozen space M of all tasks so far; empty at first.
      samples: as for `grow_subspace`.
      threshold: energy share in [0, 1].

    Returns:
      (task, memory), both of the shapes of `memory`. Where room ends the strongest new
      directions are in. Samples that are zero or (under jit) not finite give an empty
      task subspace and leave the memory as it was.

    Raises:
      ValueError: as `grow_subspace`.

    >>> from adamr import empty_subspace
    >>> from adamr.subspaces import rank
    >>> memory = empty_subspace({"w": jnp.zeros((3, 2))})
    >>> first, memory = grow_task_subspace(memory, {"w": jnp.eye(3)[:1]})
    >>> second, memory = grow_task_subspace(memory, {"w": jnp.eye(3)[1:2]})
    >>> [int(rank(s)[0]) for s in (first, second, memory)]
    [1, 1, 2]

    References: Lin, Yang, Fan, Zhang, TRGP, arXiv:2202.02931.
    """
    if not 0.0 <= threshold <= 1.0:
        raise ValueError(f"threshold must lie in [0, 1], got {threshold}.")
    names, leaves = _tree.flatten_with_names(samples)
    if len(leaves) != len(memory.bases):
        raise ValueError(
            f"samples must have one entry (an array or None) per parameter leaf: got "
            f"{len(leaves)} {names}, expected {len(memory.bases)}."
        )
    task, grown = [], []
    for name, x, basis, weights in zip(names, leaves, *memory, strict=True):
        found: Any = basis, weights
        own: Any = jax.tree.map(jnp.zeros_like, found)
        if basis is not None and weights is not None and not _tree.is_hole(x):
            rows = sample_rows(name, jnp.asarray(x), basis, weights)
            results = on_host(
                _grow_leaf, *own, basis, weights, rows, threshold=threshold
            )
            own, found = results[:2], results[2:]
        task.append(own)
        grown.append(found)
    return Subspace(*zip(*task, strict=True)), Subspace(*zip(*grown, strict=True))
