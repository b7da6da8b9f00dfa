"""Numbers of a stream: from losses and scores after each task, logits and memory."""

import resource
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adamr import metrics

__all__ = [
    "answer_loss",
    "kl_to_base",
    "of_losses",
    "of_scores",
    "peak_memory",
]


def _mean(values: jax.Array, answer: jax.Array) -> jax.Array:
    """Over the positions that predict a token of an answer, which is the next one."""
    weights = answer[:, 1:].astype(jnp.float32)
    return jnp.sum(values * weights) / jnp.sum(weights)


def answer_loss(logits: jax.Array, tokens: jax.Array, answer: jax.Array) -> jax.Array:
    """Mean cross-entropy of the answer's tokens in nats, each given those before it.

    Args:
      logits: (n, length, ids) of any float dtype; the last position predicts nothing.
      tokens: (n, length) int32.
      answer: (n, length) bool, tokens that count; the first of a row never does.

    Returns:
      A scalar, float32; NaN if no token counts.
    """
    logits = logits[:, :-1].astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return _mean(losses, answer)


def kl_to_base(base: jax.Array, logits: jax.Array, answer: jax.Array) -> jax.Array:
    """How far a model's predictions went from the base model's, in nats a token.

        mean of Σ_v p(v) (log p(v) − log q(v)), p of the base model, q of the other

    Args:
      base: (n, length, ids), logits of the base model.
      logits: as `base`, of the model as it is now.
      answer: (n, length) bool, tokens whose prediction counts.

    Returns:
      A scalar, float32; NaN if no token counts.
    """
    log_p, log_q = (
        jax.nn.log_softmax(x[:, :-1].astype(jnp.float32)) for x in (base, logits)
    )
    # Where p is 0, its logarithm may be −∞, and the summand is 0.
    gap = jnp.where(log_p == -jnp.inf, 0.0, log_p - log_q)
    return _mean(jnp.sum(jnp.exp(log_p) * gap, axis=-1), answer)


def of_scores(matrix: np.ndarray) -> dict[str, float]:
    """OP, BWT and forgetting from scores, of which a higher one is better.

    With R[i, j] the score of task j after task i, T tasks and x̄ a mean over tasks:

        OP = mean_j R[T−1, j]
        BWT = 1/(T−1) Σ_{j<T−1} (R[T−1, j] − R[j, j])
        BWT/T = 1/T Σ_j (R[T−1, j] − R[j, j])
        forgetting = 1/(T−1) Σ_{j<T−1} (max_{l<T−1} R[l, j] − R[T−1, j])

    Papers give either sum the name BWT, so compare them by their divisor.

    Args:
      matrix: R, (T, T); entries above the diagonal may be NaN. With one task there is
        OP alone.
    """
    numbers = {"OP": metrics.average_accuracy(matrix)}
    tasks = len(matrix)
    if tasks > 1:
        transfer = metrics.backward_transfer(matrix)
        numbers["BWT"] = transfer
        numbers["BWT/T"] = transfer * (tasks - 1) / tasks
        numbers["forgetting"] = metrics.forgetting(matrix)
    return {name: float(value) for name, value in numbers.items()}


def of_losses(matrix: np.ndarray) -> dict[str, float]:
    """The same from losses in nats, of which a lower one is better.

        final_loss = mean_j L[T−1, j]
        learned_loss = mean_j L[j, j]
        forgetting = 1/(T−1) Σ_{j<T−1} (L[T−1, j] − min_{l<T−1} L[l, j])

    Args:
      matrix: L, (T, T); entries above the diagonal may be NaN. With one task nothing
        can be forgotten, and there is no such number.
    """
    matrix = np.asarray(matrix)
    numbers = {
        "final_loss": metrics.average_accuracy(matrix),
        "learned_loss": metrics.learning_accuracy(matrix),
    }
    if len(matrix) > 1:
        numbers["forgetting"] = metrics.forgetting(-matrix)
    return {name: float(value) for name, value in numbers.items()}


def peak_memory(before: dict[str, int | None] | None = None) -> dict[str, int | None]:
    """Bytes at the peak of this process so far.

    resident: of main memory; device: of the fullest local accelerator, None where JAX
    does not say, as on a CPU. At least `before`, of a process that was continued.
    """
    unit = 1 if sys.platform == "darwin" else 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    found = {"resident": [resident], "device": peaks}
    for name, known in (before or {}).items():
        found[name] += [] if known is None else [known]
    return {name: max(all_of, default=None) for name, all_of in found.items()}
