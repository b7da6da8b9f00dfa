"""What is trained of a pretrained model, and the programs that all methods share."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import adamr
from adamr.subspaces import covariance
from examples.harness import meshes
from examples.llm import measures
from examples.llm.models import (
    Model,
    Parts,
    cast,
    full_forward,
    lora_forward,
    split,
    with_lora,
)
from examples.llm.placement import put_rows, split_moments
from examples.llm.tokens import Encoded, take

__all__ = [
    "Learner",
    "capture",
    "full_learner",
    "inputs_of",
    "logits_on",
    "lora_learner",
    "mean_loss",
    "portion",
]

PORTION = 16  # rows; see `portion`
TOKENS = jax.ShapeDtypeStruct((1, 8), jnp.int32)


class Learner(NamedTuple):
    """A model as trained and frozen parameters.

    Attributes:
      forward: (trained, base, tokens) -> logits (batch, time, vocabulary).
      trained: before the first task: the low-rank pairs, or all parameters.
      base: what stays frozen while a task is learned; () where all parameters train.
      scaling: by which the model multiplies A·B; None without pairs.
      model, parts: whose module `forward` computes.
    """

    forward: Callable[[Any, Any, jax.Array], jax.Array]
    trained: Any
    base: Any
    scaling: float | None
    model: Model
    parts: Parts

    def traced(self) -> tuple[Any, ...]:
        """`forward` and shapes of its arguments, for what is read off its equations."""

        def bare(x):
            return jax.ShapeDtypeStruct(x.shape, x.dtype)

        return self.forward, *jax.tree.map(bare, (self.trained, self.base)), TOKENS

    def module_trees(self, trained: Any, base: Any) -> tuple[Any, Any]:
        """Pairs and kernels, as the generator of answers takes them."""
        return (self.parts.lora, trained) if self.scaling is None else (trained, base)


def lora_learner(model: Model, rank: int, alpha: float, seed: int = 0) -> Learner:
    """Low-rank pairs beside every kernel of attention and MLP; the rest is frozen."""
    model = with_lora(model, rank, alpha, seed)
    parts = split(model.module)
    forward = lora_forward(parts, model.dtype)
    return Learner(forward, parts.lora, parts.base, alpha / rank, model, parts)


def full_learner(model: Model) -> Learner:
    """All parameters, in float32."""
    parts = split(model.module)
    whole = full_forward(parts, model.dtype)
    trained = cast(parts.base, jnp.float32)

    def forward(trained, base, tokens):
        del base
        return whole(trained, tokens)

    return Learner(forward, trained, (), None, model, parts)


@functools.partial(jax.jit, static_argnames="forward")
def _loss(forward, trained, base, tokens, answer):
    return measures.answer_loss(forward(trained, base, tokens), tokens, answer)


@functools.partial(jax.jit, static_argnames="forward")
def _logits(forward, trained, base, tokens):
    return forward(trained, base, tokens)


@functools.partial(
    jax.jit, static_argnames=("forward", "normalize", "mesh", "subspace")
)
def capture(forward, normalize, mesh, subspace, trained, base, tokens, mask):
    """What the leaves of a subspace, of which shapes are enough, meet in some rows."""

    def whole(trained, tokens):
        return forward(trained, base, tokens)

    met = adamr.layer_inputs(
        whole, trained, tokens, mask=mask, normalize=normalize, leaves=subspace,
        max_fan_in=None,  # the subspace has room for them
    )  # fmt: skip
    return split_moments(met, mesh)


def portion(mesh: jax.sharding.Mesh | None) -> int:
    """How many rows are scored or captured at once: a multiple of the mesh's parts."""
    parts = 1 if mesh is None else meshes.batch_parts(mesh)
    return parts * -(-PORTION // parts)


def _portions(
    encoded: Encoded, size: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Tokens, answers and lengths, always as many rows; those added count nothing."""
    for first in range(0, len(encoded.tokens), size):
        rows = np.arange(first, min(first + size, len(encoded.tokens)))
        tokens, answer = take(encoded, rows)
        more = (0, size - len(rows))
        yield (
            np.pad(tokens, (more, (0, 0)), mode="edge"),
            np.pad(answer, (more, (0, 0))),
            np.pad(encoded.lengths[rows], more),
        )


def mean_loss(learner: Learner, trained: Any, base: Any, encoded: Encoded) -> float:
    """Nats per answer token over all rows."""
    total = count = 0.0
    mesh = learner.model.mesh
    for tokens, answer, _ in _portions(encoded, portion(mesh)):
        here = float(answer[:, 1:].sum())
        rows = put_rows((tokens, answer), mesh)
        loss = _loss(learner.forward, trained, base, *rows)
        total, count = total + here * float(loss), count + here
    return total / count


def logits_on(learner: Learner, trained: Any, base: Any, tokens: Any) -> jax.Array:
    """Logits of a few rows."""
    tokens = put_rows(tokens, learner.model.mesh)
    return _logits(learner.forward, trained, base, tokens)


def inputs_of(
    learner: Learner,
    trained: Any,
    base: Any,
    encoded: Encoded,
    subspace: adamr.Subspace,
    *,
    normalize: bool,
    skip: int = 0,
) -> Any:
    """What the protected leaves meet in these rows, without padding.

    `skip` tokens at the start of each row do not count: the first has activations so
    large that in some layers they alone reach a threshold.
    """
    total, mesh = None, learner.model.mesh
    for tokens, _, lengths in _portions(encoded, portion(mesh)):
        at = np.arange(tokens.shape[1])
        mask = (skip <= at) & (at < lengths[:, None])
        rows = put_rows((tokens, mask), mesh)
        found = capture(
            learner.forward, normalize, mesh, subspace, trained, base, *rows
        )
        total = found if total is None else _added(total, found)
    return total


# In place: the Gram matrices of a model take as much memory as its kernels.
_added = jax.jit(covariance.update_covariance, donate_argnums=0)
