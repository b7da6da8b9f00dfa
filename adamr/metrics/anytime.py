"""Metrics from accuracies during the tasks: the anytime tensor.

    A[i, h, j]   accuracy on task j at evaluation h of task i   (T, H, T)

Each task is evaluated H times while it is learnt.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

__all__ = [
    "average_anytime_accuracy",
    "min_accuracy",
    "windowed_forgetting",
    "windowed_plasticity",
    "worst_case_accuracy",
]


def floating(x: ArrayLike) -> jax.Array:
    """`x` as an array of float32, or of its own dtype where that is wider."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def check_tasks(name: str, tasks: int, least: int) -> None:
    """Raises for fewer tasks than the metric needs."""
    if tasks < least:
        raise ValueError(
            f"{name} covers {tasks} task(s), expected at least {least}: the metric "
            "is undefined for fewer."
        )


def _anytime(anytime: ArrayLike, least: int = 1) -> jax.Array:
    """A, checked for its shape and to cover at least `least` tasks."""
    a = floating(anytime)
    if a.ndim != 3 or a.shape[0] != a.shape[2] or a.shape[1] < 1:
        raise ValueError(
            f"anytime has shape {a.shape}, expected (tasks, evaluations, tasks): "
            "[i, h, j] is the accuracy on task j at evaluation h of task i."
        )
    check_tasks("anytime", a.shape[0], least)
    return a


def min_accuracy(anytime: ArrayLike) -> jax.Array:
    """min-ACC: 1/(T−1) Σ_{j<T−1} min_{i>j, h} A[i, h, j]. In [0, 1].

    The lowest accuracy that each old task had at any evaluation after it was learnt.

    Trap: more frequent evaluations find lower minima; report how often you evaluate.

    Args:
      anytime: A, float (T, H, T) with T ≥ 2; only entries with i > j are read, and NaN
        among them is ignored.

    Returns:
      A scalar.

    Raises:
      ValueError: if anytime has another shape or T = 1.

    >>> a = [[[0.6, 0.1], [0.9, 0.1]], [[0.5, 0.7], [0.8, 0.9]]]
    >>> print(f"{min_accuracy(a):.2f}")
    0.50

    References:
      De Lange, van de Ven and Tuytelaars, Continual evaluation for lifelong learning:
      Identifying the stability gap, arXiv:2205.13452.
    """
    a = _anytime(anytime, least=2)
    lowest = jnp.nanmin(a, axis=1)
    later = jnp.tri(a.shape[0], k=-1, dtype=bool)
    return jnp.mean(jnp.nanmin(jnp.where(later, lowest, jnp.inf), axis=0)[:-1])


def worst_case_accuracy(anytime: ArrayLike) -> jax.Array:
    """WC-ACC: 1/T · A[T−1, H−1, T−1] + (1 − 1/T) · min-ACC. In [0, 1], at most ACC.

    The final accuracy on the last task, averaged with the worst of every older task.

    Trap: like min-ACC, it falls as evaluations become more frequent.

    Args:
      anytime: A, float (T, H, T). With T = 1 there is no older task, and the accuracy
        on the only one is returned.

    Returns:
      A scalar.

    Raises:
      ValueError: if anytime has another shape.

    >>> a = [[[0.6, 0.1], [0.9, 0.1]], [[0.5, 0.7], [0.8, 0.9]]]
    >>> print(f"{worst_case_accuracy(a):.2f}")
    0.70

    References:
      De Lange, van de Ven and Tuytelaars, Continual evaluation for lifelong learning:
      Identifying the stability gap, arXiv:2205.13452.
    """
    a = _anytime(anytime)
    share, current = 1 / a.shape[0], a[-1, -1, -1]
    if a.shape[0] == 1:
        return current
    return share * current + (1 - share) * min_accuracy(a)


def average_anytime_accuracy(anytime: ArrayLike) -> jax.Array:
    """AAA: mean_{i, h} of mean_{j≤i} A[i, h, j]. In [0, 1].

    The accuracy on all tasks seen so far, including the current one, averaged over
    every evaluation of the stream.

    Trap: papers that evaluate only at the ends of tasks give the same name to the mean
    over task ends; a tensor with H = 1 gives that number.

    Args:
      anytime: A, float (T, H, T); only entries with j ≤ i are read.

    Returns:
      A scalar.

    Raises:
      ValueError: if anytime has another shape.

    >>> a = [[[0.6, 0.1], [0.8, 0.1]], [[0.4, 0.6], [0.7, 0.9]]]
    >>> print(f"{average_anytime_accuracy(a):.3f}")
    0.675

    References:
      Caccia et al., New Insights on Reducing Abrupt Representation Change in Online
      Continual Learning, arXiv:2104.05025.
    """
    a = _anytime(anytime)
    tasks = a.shape[0]
    seen = jnp.tri(tasks, dtype=bool)
    per_task = jnp.where(seen, jnp.mean(a, axis=1), 0.0)
    return jnp.mean(jnp.sum(per_task, axis=1) / jnp.arange(1, tasks + 1))


def windowed_forgetting(anytime: ArrayLike, window: int) -> jax.Array:
    """WF^Δ: mean_j of the largest drop of task j within Δ evaluations. In [0, 1].

    With S_j the accuracies on task j at all evaluations of the stream, in order, and Δ
    = `window`,

        WF^Δ = 1/T Σ_j max_n ( max_{n−Δ < m ≤ n} S_j[m] − S_j[n] )

    Trap: Δ counts evaluations, not steps, so only numbers at the same frequency of
    evaluation can be compared; the authors report Δ = 10 and 100. A task that never
    drops counts 0.

    Args:
      anytime: A, float (T, H, T), in the order of measurement; NaN is ignored.
      window: Δ ≥ 2, the number of consecutive evaluations, both ends included.

    Returns:
      A scalar.

    Raises:
      ValueError: if anytime has another shape or window is below 2.

    >>> a = [[[0.6, 0.1], [0.9, 0.1]], [[0.5, 0.7], [0.8, 0.9]]]
    >>> print(f"{windowed_forgetting(a, 2):.2f}")
    0.20

    References:
      De Lange, van de Ven and Tuytelaars, Continual evaluation for lifelong learning:
      Identifying the stability gap, arXiv:2205.13452.
    """
    a = _anytime(anytime)
    if window < 2:
        raise ValueError(f"window is {window}, expected at least 2 evaluations.")
    series = jnp.reshape(a, (-1, a.shape[2]))
    measured = ~jnp.isnan(series)
    highest = jax.lax.reduce_window(
        jnp.where(measured, series, -jnp.inf),
        jnp.array(-jnp.inf, series.dtype),
        jax.lax.max,
        window_dimensions=(window, 1),
        window_strides=(1, 1),
        padding=((window - 1, 0), (0, 0)),
    )
    drop = jnp.where(measured, highest - series, 0.0)
    return jnp.mean(jnp.max(drop, axis=0))


def windowed_plasticity(anytime: ArrayLike, window: int) -> jax.Array:
    """WP^Δ: mean_j of the largest rise of task j within Δ evaluations. In [0, 1].

    With S_j the accuracies on task j at all evaluations of the stream, in order, and Δ
    = `window`,

        WP^Δ = 1/T Σ_j max_n ( S_j[n] − min_{n−Δ < m ≤ n} S_j[m] )

    Trap: recovering what was just forgotten counts as a rise, so read it together with
    `windowed_forgetting`.

    Args:
      anytime: A, float (T, H, T), in the order of measurement; NaN is ignored.
      window: Δ ≥ 2, the number of consecutive evaluations, both ends included.

    Returns:
      A scalar.

    Raises:
      ValueError: if anytime has another shape or window is below 2.

    >>> a = [[[0.6, 0.1], [0.9, 0.1]], [[0.5, 0.7], [0.8, 0.9]]]
    >>> print(f"{windowed_plasticity(a, 2):.2f}")
    0.45

    References:
      De Lange, van de Ven and Tuytelaars, Continual evaluation for lifelong learning:
      Identifying the stability gap, arXiv:2205.13452.
    """
    return windowed_forgetting(-_anytime(anytime), window)
