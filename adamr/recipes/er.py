"""Experience replay as an optimizer."""

import optax

from adamr.modifiers.replay import replay_routing
from adamr.routing.merge import faithful_second_moment

__all__ = ["er"]


def er(
    learning_rate: optax.ScalarOrSchedule,
    weight: optax.ScalarOrSchedule = 0.5,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    """Experience replay with Adam: m from the mixture, v from both parts of it.

    With g the gradient on new data and g_mem = `memory_gradient`, w = `weight`:

        m_t = b1 m_{t−1} + (1 − b1) ((1 − w) g + w g_mem)
        v_t = b2 v_{t−1} + (1 − b2) ((1 − w) g² + w g_mem²)
        step = −learning_rate · m̂_t / (√v̂_t + eps)

    On the average of both losses Adam itself would feed v with the mixture squared.

    Extra argument of `update`:
      memory_gradient: tree like the gradient: that of the loss on a batch from memory.
        While there is none, pass the gradient itself: the step is Adam's.

    Args:
      learning_rate: a number or a schedule.
      weight: w in [0, 1], or a schedule of the step count. With a small memory of text
        1/6 ended far below ½ (docs/evidence/memory.md).
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: outside the root.

    Returns:
      An optimizer.

    Raises:
      ValueError: for a weight outside [0, 1]; at update, without `memory_gradient`.

    >>> import jax.numpy as jnp
    >>> g, memory = jnp.array([1.0, 3.0]), jnp.array([1.0, -3.0])
    >>> tx = er(0.1)
    >>> step, _ = tx.update(g, tx.init(g), memory_gradient=memory)
    >>> print([f"{x:.3f}" for x in step])
    ['-0.100', '-0.000']

    References:
      Chaudhry et al., On Tiny Episodic Memories in Continual Learning,
      arXiv:1902.10486.
    """
    return optax.chain(
        replay_routing(weight),
        faithful_second_moment(b1, b2, eps),
        optax.scale_by_learning_rate(learning_rate),
    )
