"""Learning-rate schedules for streams of tasks: optax schedules, count -> value.

    infinite_schedule         warm up once, cool down to a constant, anneal on demand
    wsd_s_schedule            constant in each task, inverse-linear decay at its end
    rewarm_redecay_schedule   warm-up and cosine in each task

`infinite_schedule` needs no length of a task; the other two need `task_steps`. All are
stated with p(a, n) = clip((count − a) / n, 0, 1), the progress of n steps that begin at
step a.
"""

import itertools
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from optax import Schedule

__all__ = ["infinite_schedule", "rewarm_redecay_schedule", "wsd_s_schedule"]


def _progress(count: jax.Array, begin: ArrayLike, steps: ArrayLike) -> jax.Array:
    """p(begin, steps); the difference is taken in integers: exact for large counts."""
    return jnp.clip((count - begin) / jnp.maximum(steps, 1), 0.0, 1.0)


def _between(start: float | jax.Array, end: float, share: jax.Array) -> jax.Array:
    """From start to end as share goes from 0 to 1; exact at both ends."""
    return start * (1.0 - share) + end * share


def _cosine(p: jax.Array) -> jax.Array:
    """(1 − cos πp) / 2."""
    return 0.5 * (1.0 - jnp.cos(jnp.pi * p))


def _inverse_sqrt(p: jax.Array) -> jax.Array:
    """h(p) / h(1), with h(x) = 1 − 1/√(1 + 10x)."""

    def h(x):  # 10 is the timescale in the code of arXiv:2503.02844
        return 1.0 - jax.lax.rsqrt(1.0 + 10.0 * x)

    return h(p) / h(1.0)


_COOLDOWNS = {"cosine": _cosine, "inverse_sqrt": _inverse_sqrt}


def _check_values(init_value: float, **values: float) -> None:
    """Positive and not increasing, in the order given; init_value at most the first."""
    numbers = [float("inf"), *values.values()]
    ordered = all(a >= b for a, b in itertools.pairwise(numbers))
    if not ordered or not 0.0 < numbers[-1] or numbers[1] == float("inf"):
        got = ", ".join(f"{name}={value}" for name, value in values.items())
        raise ValueError(f"expected {' >= '.join(values)} > 0, got {got}.")
    if not 0.0 <= init_value <= numbers[1]:
        raise ValueError(f"expected 0 <= init_value <= peak_value, got {init_value}.")


def _check_steps(**counts: int) -> None:
    """At least 1 each, except that there may be no warm-up."""
    for name, steps in counts.items():
        least = 0 if name == "warmup_steps" else 1
        if steps < least:
            raise ValueError(f"{name} must be at least {least}, got {steps}.")


def infinite_schedule(
    init_value: float,
    peak_value: float,
    constant_value: float,
    end_value: float,
    *,
    warmup_steps: int,
    cooldown_steps: int,
    anneal_steps: int,
    anneal_begin: int | None = None,
    cooldown: Literal["cosine", "inverse_sqrt"] = "cosine",
) -> Schedule:
    """Infinite learning rate: the length of training need not be known in advance.

        warm-up    init + (peak − init) · p(0, W)                       count < W
        cool-down  peak + (constant − peak) · c(p(W, C))                then, until
        constant   constant                                             N
        anneal     constant · (end / constant)^p(N, A)                  count ≥ N

        c(x) = (1 − cos πx)/2   or   h(x)/h(1), h(x) = 1 − 1/√(1 + 10x)

    init, peak, constant and end are init_value, peak_value, constant_value and
    end_value; W, C and A are warmup_steps, cooldown_steps and anneal_steps; N is
    anneal_begin; c(x) is the first form for cooldown="cosine", the second for
    "inverse_sqrt".

    Keep the checkpoint of step N, anneal a copy of it for use, and learn the next task
    from the kept one: its count is N, so with a later `anneal_begin` (or None) it
    continues at `constant_value` without a new warm-up.

    Args:
      init_value: value at count 0, in [0, peak_value].
      peak_value: value after the warm-up, at least constant_value.
      constant_value: value after the cool-down, at least end_value.
      end_value: value after the anneal; positive, since the anneal is exponential.
      warmup_steps: W ≥ 0.
      cooldown_steps: C ≥ 1, counted from the end of the warm-up.
      anneal_steps: A ≥ 1, counted from anneal_begin. A third-party port divides by
        A + N; here the anneal takes A steps, as in the code of arXiv:2503.02844.
      anneal_begin: N ≥ W + C, or None to never anneal.
      cooldown: "cosine" or "inverse_sqrt".

    Returns:
      A schedule, count -> value, continuous everywhere.

    Raises:
      ValueError: for values that are not in order, counts of steps that are too low, or
        an unknown cooldown.

    >>> schedule = infinite_schedule(
    ...     0.0, 1.0, 0.5, 0.05,
    ...     warmup_steps=10, cooldown_steps=100, anneal_begin=200, anneal_steps=50,
    ... )
    >>> print([f"{schedule(n):.3f}" for n in (5, 10, 60, 110, 225, 250)])
    ['0.500', '1.000', '0.750', '0.500', '0.158', '0.050']

    References:
      Ibrahim et al., Simple and Scalable Strategies to Continually Pre-train Large
      Language Models, arXiv:2403.08763.
      Singh et al., Beyond Cosine Decay: On the effectiveness of Infinite Learning Rate
      Schedule for Continual Pre-training, arXiv:2503.02844.
    """
    _check_values(
        init_value,
        peak_value=peak_value,
        constant_value=constant_value,
        end_value=end_value,
    )
    _check_steps(
        warmup_steps=warmup_steps,
        cooldown_steps=cooldown_steps,
        anneal_steps=anneal_steps,
    )
    if anneal_begin is not None and anneal_begin < warmup_steps + cooldown_steps:
        raise ValueError(
            "anneal_begin must be at least warmup_steps + cooldown_steps = "
            f"{warmup_steps + cooldown_steps}, got {anneal_begin}."
        )
    if cooldown not in _COOLDOWNS:
        raise ValueError(
            f"cooldown is {cooldown!r}, expected one of {list(_COOLDOWNS)}."
        )

    def schedule(count):
        count = jnp.asarray(count)
        warm = _between(init_value, peak_value, _progress(count, 0, warmup_steps))
        cooled = _COOLDOWNS[cooldown](_progress(count, warmup_steps, cooldown_steps))
        value = _between(peak_value, constant_value, cooled)
        if anneal_begin is not None:
            annealed = _progress(count, anneal_begin, anneal_steps)
            value = value * (end_value / constant_value) ** annealed
        return jnp.where(count < warmup_steps, warm, value)

    return schedule


def _check_tasks(task_steps: int | Sequence[int], name: str, least: int) -> None:
    """Every task must have at least `least` steps, the value of `name`."""
    lengths = [task_steps] if isinstance(task_steps, int) else list(task_steps)
    if not lengths or min(lengths) < least:
        raise ValueError(
            f"task_steps must be an int or a sequence of ints, each at least {name} = "
            f"{least}, got {task_steps}."
        )


def _position(
    count: jax.Array, task_steps: int | Sequence[int]
) -> tuple[jax.Array, ArrayLike, jax.Array]:
    """Step within the task, length of the task, and whether the task is the first."""
    if isinstance(task_steps, int):
        return count % task_steps, task_steps, count < task_steps
    ends = jnp.asarray(list(itertools.accumulate(task_steps)))
    lengths = jnp.asarray(list(task_steps))
    task = jnp.searchsorted(ends, count, side="right")
    # After the last task its step keeps counting, so the schedule stays at its end.
    task = jnp.minimum(task, len(lengths) - 1)
    return count - (ends - lengths)[task], lengths[task], task == 0


def wsd_s_schedule(
    init_value: float,
    peak_value: float,
    end_value: float,
    *,
    warmup_steps: int,
    decay_steps: int,
    task_steps: int | Sequence[int],
) -> Schedule:
    """WSD-S: constant, then a short decay; each task starts from the decayed weights.

    For step n of a task of N steps, with t = p(N − D, D):

        warm-up   init + (peak − init) · p(0, W)       first task only, n < W
        constant  peak                                 until N − D
        decay     1 / (t / end + (1 − t) / peak)       1/value is linear in t

    init, peak and end are init_value, peak_value and end_value; W and D are
    warmup_steps and decay_steps. Plain WSD branches from the weights before the decay.
    WSD-S continues from the decayed ones: the value jumps back to the peak at a
    boundary, without a second warm-up. t is 1 at step N, so the last step of a task,
    N − 1, is one step short of end_value.

    Args:
      init_value: value at count 0, in [0, peak_value].
      peak_value: value of the constant phase, at least end_value.
      end_value: value at the end of the decay; positive.
      warmup_steps: W ≥ 0, within the first task.
      decay_steps: D ≥ 1, the last steps of every task; the authors use about a tenth.
      task_steps: N: one number, for tasks that follow each other without end; or one
        number per task, and the value after the last task is end_value.

    Returns:
      A schedule, count -> value.

    Raises:
      ValueError: for values that are not in order, counts of steps that are too low,
        or a task shorter than warmup_steps + decay_steps.

    >>> schedule = wsd_s_schedule(
    ...     0.0, 1.0, 0.1, warmup_steps=4, decay_steps=10, task_steps=100
    ... )
    >>> print([f"{schedule(n):.3f}" for n in (2, 50, 95, 99, 100, 195)])
    ['0.500', '1.000', '0.182', '0.110', '1.000', '0.182']

    References:
      Wen et al., Understanding Warmup-Stable-Decay Learning Rates: A River Valley Loss
      Landscape Perspective, arXiv:2410.05192.
    """
    _check_values(init_value, peak_value=peak_value, end_value=end_value)
    _check_steps(warmup_steps=warmup_steps, decay_steps=decay_steps)
    _check_tasks(task_steps, "warmup_steps + decay_steps", warmup_steps + decay_steps)

    def schedule(count):
        step, steps, first = _position(jnp.asarray(count), task_steps)
        warm = _between(init_value, peak_value, _progress(step, 0, warmup_steps))
        t = _progress(step, steps - decay_steps, decay_steps)
        value = 1.0 / _between(1.0 / peak_value, 1.0 / end_value, t)
        return jnp.where(first & (step < warmup_steps), warm, value)

    return schedule


def rewarm_redecay_schedule(
    init_value: float,
    peak_value: float,
    end_value: float,
    *,
    warmup_steps: int,
    task_steps: int | Sequence[int],
) -> Schedule:
    """Re-warming and re-decaying: a warm-up and a cosine for every task.

    For step n of a task of N steps:

        warm-up  start + (peak − start) · p(0, W)                   n < W
        cosine   peak + (end − peak) · (1 − cos(π p(W, N − W)))/2   then

    peak and end are peak_value and end_value, W is warmup_steps. start is init_value
    for the first task and end_value for the others, so that the schedule is continuous;
    some implementations re-warm from 0. Re-warming itself causes forgetting, less of it
    with a lower peak: replay old data.

    Args:
      init_value: value at count 0, in [0, peak_value].
      peak_value: value after each warm-up, at least end_value.
      end_value: value at the end of each task, reached at its step N; positive.
      warmup_steps: W ≥ 0.
      task_steps: N: one number, for tasks that follow each other without end; or one
        number per task, and the value after the last task is end_value.

    Returns:
      A schedule, count -> value.

    Raises:
      ValueError: for values that are not in order, counts of steps that are too low,
        or a task that is not longer than its warm-up.

    >>> schedule = rewarm_redecay_schedule(
    ...     0.0, 1.0, 0.1, warmup_steps=10, task_steps=[110, 210]
    ... )
    >>> print([f"{schedule(n):.3f}" for n in (5, 10, 60, 110, 115, 120, 320)])
    ['0.500', '1.000', '0.550', '0.100', '0.550', '1.000', '0.100']

    References:
      Ibrahim et al., Simple and Scalable Strategies to Continually Pre-train Large
      Language Models, arXiv:2403.08763.
      Gupta et al., Continual Pre-Training of Large Language Models: How to (re)warm
      your model?, arXiv:2308.04014.
    """
    _check_values(init_value, peak_value=peak_value, end_value=end_value)
    _check_steps(warmup_steps=warmup_steps)
    _check_tasks(task_steps, "warmup_steps + 1", warmup_steps + 1)

    def schedule(count):
        step, steps, first = _position(jnp.asarray(count), task_steps)
        start = jnp.where(first, init_value, end_value)
        warm = _between(start, peak_value, _progress(step, 0, warmup_steps))
        decayed = _cosine(_progress(step, warmup_steps, steps - warmup_steps))
        value = _between(peak_value, end_value, decayed)
        return jnp.where(step < warmup_steps, warm, value)

    return schedule
