"""Task boundaries from the loss alone, for streams that do not announce them.

With μ and σ² the mean and variance of the last `window` losses, and μ_f, σ_f² those at
the last firing (μ_f = level, σ_f = 0 before the first):

    peak   becomes true   if  μ > μ_f + σ_f
    fire                  if  peak  and  μ < level  and  σ² < variance
    peak   becomes false  when it fires

So it fires once per rise and fall of the loss, when a task has been learnt: the moment
to grow a subspace or to measure importance.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

__all__ = ["PlateauDetector", "PlateauState", "plateau_detector"]


class PlateauState(NamedTuple):
    """What a plateau detector remembers.

    Attributes:
      losses: float32 (window,), the newest last.
      count: int32: how many of them are losses, at most window.
      last_mean: μ_f, float32.
      last_variance: σ_f², float32.
      peak: bool: whether the loss has risen since the last firing.
    """

    losses: jax.Array
    count: jax.Array
    last_mean: jax.Array
    last_variance: jax.Array
    peak: jax.Array


class PlateauDetector(NamedTuple):
    """`init() -> state` and `update(state, loss) -> (state, fired)`."""

    init: Callable[[], PlateauState]
    update: Callable[[PlateauState, ArrayLike], tuple[PlateauState, jax.Array]]


def plateau_detector(
    level: float, variance: float = 0.1, window: int = 5
) -> PlateauDetector:
    """Online-LoRA's detector of loss plateaus, as pure functions that run under jit.

    A loss that is not finite is ignored: the state does not change and nothing fires.

    The authors' code differs in two places, both of which need a known first task: it
    starts with `peak` true and never fires during the first task, and it decides on
    windows that are not yet full. Here a plateau counts only after the loss has been
    above `level`, and only with a full window, so a stream that starts low and stays
    flat never fires.

    Trap: a new peak is measured against the deviation σ_f of the window itself, so
    noise on a long plateau can fire again: on 2000 steps of white noise the detector
    fires 3 times in all with a window of 5, once with 50. A rise of d inside the window
    gives it a variance of at most d²/4, so a rise with d² < 4 · variance may fire on
    its way up. Feed it a smoothed loss, take a longer window, and keep `variance`
    small.

    Args:
      level: the mean loss below which a task counts as learnt; finite, in the scale of
        the loss.
      variance: the variance that a plateau stays below; positive; the authors use 0.1.
      window: the number of losses in the window, at least 2; the authors use 5.

    Returns:
      A `PlateauDetector`. `update` takes a scalar loss; `fired` is a bool scalar, which
      the loop reads outside the step.

    Raises:
      ValueError: if level is not finite, variance is not positive or window is below 2;
        from `update`, if loss is not a scalar.

    >>> detector = plateau_detector(level=2.0)
    >>> state = detector.init()
    >>> for step, loss in enumerate([5.0] * 6 + [1.0] * 10):
    ...     state, fired = detector.update(state, loss)
    ...     if fired:
    ...         print(step)
    10

    References:
      Wei et al., Online-LoRA: Task-free Online Continual Learning via Low Rank
      Adaptation, arXiv:2411.05663.
    """
    if not -jnp.inf < level < jnp.inf:
        raise ValueError(f"level must be a finite number, got {level}.")
    if not variance > 0:
        raise ValueError(f"variance must be positive, got {variance}.")
    if window < 2:
        raise ValueError(f"window must be at least 2, got {window}.")

    def init():
        return PlateauState(
            losses=jnp.zeros([window], jnp.float32),
            count=jnp.zeros([], jnp.int32),
            last_mean=jnp.full([], level, jnp.float32),
            last_variance=jnp.zeros([], jnp.float32),
            peak=jnp.zeros([], bool),
        )

    def update(state, loss):
        loss = jnp.asarray(loss, jnp.float32)
        if loss.ndim:
            raise ValueError(f"loss has shape {loss.shape}, expected a scalar.")
        losses = jnp.append(state.losses[1:], loss)
        count = jnp.minimum(state.count + 1, window)
        held = jnp.arange(window) >= window - count
        mean = jnp.mean(losses, where=held)
        spread = jnp.var(losses, where=held)

        peak = state.peak | (mean > state.last_mean + jnp.sqrt(state.last_variance))
        plateau = (count == window) & (mean < level) & (spread < variance)
        usable = jnp.isfinite(loss)
        fired = usable & peak & plateau
        new = PlateauState(
            losses=losses,
            count=count,
            last_mean=jnp.where(fired, mean, state.last_mean),
            last_variance=jnp.where(fired, spread, state.last_variance),
            peak=peak & ~fired,
        )
        state = jax.tree.map(lambda n, o: jnp.where(usable, n, o), new, state)
        return state, fired

    return PlateauDetector(init, update)
