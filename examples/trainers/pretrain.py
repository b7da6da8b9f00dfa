"""A stand-in for pretraining: the whole model learns general text with Adam."""

from collections.abc import Callable

import jax
import optax
from flax import nnx

from examples.trainers.text import Text

__all__ = ["pretrain"]


def pretrain(
    model: nnx.Module,
    loss: Callable[[nnx.Module, jax.Array], jax.Array],
    text: Text,
    steps: int,
) -> None:
    """Changes the parameters that are in no low-rank pair."""
    kernels = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=kernels)

    @nnx.jit
    def step(model: nnx.Module, optimizer: nnx.Optimizer, batch: jax.Array) -> None:
        gradient = nnx.grad(loss, argnums=nnx.DiffState(0, kernels))
        optimizer.update(model, gradient(model, batch))

    for batch in text.batches(steps):
        step(model, optimizer, batch)
