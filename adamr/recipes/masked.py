"""Optimizers under a mask: MUDMAN masks coordinates, half fine-tuning leaves."""

import jax
import optax

from adamr.modifiers.mask import disruption_mask
from adamr.protection.frozen import freeze_masked
from adamr.protection.half import Groups, half_fine_tuning

__all__ = ["hft", "mudman"]


def mudman(
    learning_rate: optax.ScalarOrSchedule,
    decay: float = 0.9,
    *,
    b1: float = 0.9,
    b2: float = 0.99,
    eps: float = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    """MUDMAN's disruption mask with Adam: `disruption_mask`, then Adam frozen under it.

        r = decay · r + (1 − decay) · retain_gradient
        g̃ = [sign g = sign r] g / ‖g‖
        Δ = m̂ / (√v̂ + eps)  where g̃ ≠ 0,   0 elsewhere; m and v move there alone

    Where a coordinate is masked, its step is exactly zero and its moments stay. The
    authors take plain gradient steps at 0.1, then one on the retained loss at 0.001,
    and unlearn against a copy of the model that relearns. The last two belong to the
    training loop.

    Extra argument of `update`:
      retain_gradient: tree like the gradient: that of the loss to be retained.

    Args:
      learning_rate: a number or a schedule.
      decay: of the average of retain gradients.
      b1: decay of the first moment.
      b2: decay of the second moment. Up to 1 − (1 − b1)² a coordinate that is freed
        late does not start with too large a step (see `freeze_masked`).
      eps: outside the root; the gradient has norm 1 before the mask.

    Returns:
      An optimizer.

    Raises:
      ValueError: at update, without `retain_gradient`.

    >>> import jax.numpy as jnp
    >>> g, r = jnp.array([1.0, -2.0, 3.0]), jnp.array([1.0, 1.0, -1.0])
    >>> tx = mudman(0.1)
    >>> print(tx.update(g, tx.init(g), retain_gradient=r)[0] < 0)
    [ True False False]

    References: Sondej et al., Robust LLM Unlearning with MUDMAN, arXiv:2506.12484.
    """
    adam = optax.adam(learning_rate, b1, b2, eps)
    return optax.chain(disruption_mask(decay), freeze_masked(adam))


def hft(
    learning_rate: optax.ScalarOrSchedule,
    key: jax.Array,
    groups: Groups | None = None,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Half fine-tuning with AdamW: `half_fine_tuning` around it.

        Δ = AdamW's step   in a random half of the leaves of each category
        Δ = 0              in the others, drawn anew by `redraw_half`

    Call `adamr.reset_moments(adamr.redraw_half(opt_state))` between two tasks.

    Args:
      learning_rate: a number or a schedule.
      key: a PRNG key; like `groups` a static argument of `optax.inject_hyperparams`.
      groups: (path, shape) -> category of a leaf, or None to train it always.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: outside the root.
      weight_decay: decoupled, scaled by the learning rate; none on frozen leaves.

    Returns:
      An optimizer; `update` needs `params`.

    >>> import jax.numpy as jnp
    >>> params = {"up": jnp.ones((2, 2)), "down": jnp.ones((2, 2))}
    >>> tx = hft(0.1, jax.random.key(0))
    >>> steps, _ = tx.update(params, tx.init(params), params)
    >>> sorted(f"{x[0, 0]:.2f}" for x in steps.values())
    ['-0.10', '0.00']

    References:
      Hui et al., HFT: Half Fine-Tuning for Large Language Models, arXiv:2404.18466.
    """
    adam = optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay)
    return half_fine_tuning(adam, key, groups)
