"""Metrics from accuracies after each task: the accuracy matrix.

    R[i, j]   accuracy on task j after learning task i   (T, T)

Two relations always hold: ACC = LA + (T − 1)/T · BWT, and forgetting ≥ −BWT.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from adamr.metrics.anytime import check_tasks, floating

__all__ = [
    "average_accuracy",
    "backward_transfer",
    "forgetting",
    "forward_transfer",
    "intransigence",
    "learning_accuracy",
]


def _matrix(matrix: ArrayLike, least: int = 1) -> jax.Array:
    """R, checked to be square and to cover at least `least` tasks."""
    r = floating(matrix)
    if r.ndim != 2 or r.shape[0] != r.shape[1]:
        raise ValueError(
            f"matrix has shape {r.shape}, expected (tasks, tasks): one row after each "
            "task, one column per task."
        )
    check_tasks("matrix", r.shape[0], least)
    return r


def _per_task(
    name: str, x: ArrayLike, tasks: int, shapes: tuple[tuple[int, ...], ...]
) -> jax.Array:
    """One number per task, from an array of one of the `shapes`."""
    x = floating(x)
    if x.shape not in shapes:
        expected = " or ".join(map(str, shapes))
        raise ValueError(f"{name} has shape {x.shape}, expected {expected}.")
    return jnp.broadcast_to(x, (tasks,))


def average_accuracy(matrix: ArrayLike) -> jax.Array:
    """ACC: mean_j R[T−1, j], the accuracy on all tasks in the end. In [0, 1].

    Trap: the average *incremental* accuracy of class-incremental papers is the mean of
    this number over all prefixes of the stream, and is higher.

    Args:
      matrix: R, float (T, T).

    Returns:
      A scalar.

    Raises:
      ValueError: if matrix is not square.

    >>> print(f"{average_accuracy([[0.9, 0.1], [0.7, 0.8]]):.2f}")
    0.75

    References:
      Lopez-Paz and Ranzato, Gradient Episodic Memory for Continual Learning,
      arXiv:1706.08840.
    """
    return jnp.mean(_matrix(matrix)[-1])


def learning_accuracy(matrix: ArrayLike) -> jax.Array:
    """LA: mean_j R[j, j], the accuracy on each task just after learning it. In [0, 1].

    Trap: it measures plasticity alone; a learner that forgets everything may score
    best.

    Args:
      matrix: R, float (T, T); only the diagonal is read.

    Returns:
      A scalar.

    Raises:
      ValueError: if matrix is not square.

    >>> print(f"{learning_accuracy([[0.9, 0.1], [0.7, 0.8]]):.2f}")
    0.85

    References:
      Riemer et al., Learning to Learn without Forgetting by Maximizing Transfer and
      Minimizing Interference, arXiv:1810.11910.
    """
    return jnp.mean(jnp.diagonal(_matrix(matrix)))


def backward_transfer(matrix: ArrayLike) -> jax.Array:
    """BWT: 1/(T−1) Σ_{j<T−1} (R[T−1, j] − R[j, j]). In [−1, 1]; negative: forgotten.

    Trap: GEM's own code divides by T, which shrinks the number by (T−1)/T; some
    repositories report both. Avalanche's "forgetting" is −BWT, first minus last.

    Args:
      matrix: R, float (T, T) with T ≥ 2; the diagonal and the last row are read.

    Returns:
      A scalar.

    Raises:
      ValueError: if matrix is not square or T = 1.

    >>> print(f"{backward_transfer([[0.9, 0.1], [0.7, 0.8]]):.2f}")
    -0.20

    References:
      Lopez-Paz and Ranzato, Gradient Episodic Memory for Continual Learning,
      arXiv:1706.08840.
    """
    r = _matrix(matrix, least=2)
    return jnp.mean(r[-1, :-1] - jnp.diagonal(r)[:-1])


def forward_transfer(matrix: ArrayLike, baseline: ArrayLike) -> jax.Array:
    """FWT: 1/(T−1) Σ_{j≥1} (R[j−1, j] − b_j), the gain before learning. In [−1, 1].

    Trap: GEM's own code divides by T. With a separate head per task, the head of task j
    is untrained in row j − 1 and the number means nothing.

    Args:
      matrix: R, float (T, T) with T ≥ 2; the first superdiagonal is read.
      baseline: b, accuracy of an untrained model: float (T,), or one number for all
        tasks; b_0 is not read.

    Returns:
      A scalar.

    Raises:
      ValueError: if matrix is not square, T = 1, or baseline is neither () nor (T,).

    >>> print(f"{forward_transfer([[0.9, 0.3], [0.7, 0.8]], 0.1):.2f}")
    0.20

    References:
      Lopez-Paz and Ranzato, Gradient Episodic Memory for Continual Learning,
      arXiv:1706.08840.
    """
    r = _matrix(matrix, least=2)
    tasks = r.shape[0]
    b = _per_task("baseline", baseline, tasks, ((), (tasks,)))
    return jnp.mean(jnp.diagonal(r, offset=1) - b[1:])


def forgetting(matrix: ArrayLike) -> jax.Array:
    """F: 1/(T−1) Σ_{j<T−1} (max_{l<T−1} R[l, j] − R[T−1, j]). In [−1, 1].

    The best accuracy on task j before the last task was learnt, minus the final one;
    negative if the last task improved on it. The maximum includes the rows before task
    j was learnt; NaN entries there are ignored.

    Trap: Mammoth takes the maximum over all rows, including the last, and so is never
    negative. Avalanche takes first minus last, which is −BWT.

    Args:
      matrix: R, float (T, T) with T ≥ 2.

    Returns:
      A scalar.

    Raises:
      ValueError: if matrix is not square or T = 1.

    >>> r = [[0.8, 0.1, 0.1], [0.9, 0.8, 0.1], [0.7, 0.7, 0.9]]
    >>> print(f"{forgetting(r):.2f}")
    0.15

    References:
      Chaudhry et al., Riemannian Walk for Incremental Learning: Understanding
      Forgetting and Intransigence, arXiv:1801.10112.
    """
    r = _matrix(matrix, least=2)
    return jnp.mean(jnp.nanmax(r[:-1, :-1], axis=0) - r[-1, :-1])


def intransigence(matrix: ArrayLike, reference: ArrayLike) -> jax.Array:
    """I_k = a*_k − R[k, k]: how much a task lost by learning in sequence. In [−1, 1].

    Trap: it is one number per task; papers report the last, I_{T−1}, or the mean. It
    depends on the reference: the authors train it jointly on tasks 0 … k; a model
    trained on task k alone gives another number.

    Args:
      matrix: R, float (T, T); only the diagonal is read.
      reference: a*, float (T,), accuracy of the reference model on each task.

    Returns:
      I, (T,), one number per task; negative where learning in sequence helped.

    Raises:
      ValueError: if matrix is not square or reference is not (T,).

    >>> print(intransigence([[0.75, 0.0], [0.5, 0.5]], [1.0, 0.75]))
    [0.25 0.25]

    References:
      Chaudhry et al., Riemannian Walk for Incremental Learning: Understanding
      Forgetting and Intransigence, arXiv:1801.10112.
    """
    r = _matrix(matrix)
    tasks = r.shape[0]
    return _per_task("reference", reference, tasks, ((tasks,),)) - jnp.diagonal(r)
