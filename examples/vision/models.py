"""The networks of the continual-learning literature, in Flax NNX (and one in linen).

    mlp       two hidden layers of ReLUs, for digits
    resnet18  GEM's reduced ResNet-18: 20 filters instead of 64, for 32 × 32 images
    alexnet   GPM's three convolutions and two hidden layers, for 32 × 32 images

All have one head over all classes of the stream: a task-incremental stream masks the
classes of other tasks, which is the same as a head per task.

References:
  Lopez-Paz, Ranzato, Gradient Episodic Memory, arXiv:1706.08840. Saha, Garg, Roy,
  Gradient Projection Memory, arXiv:2103.09762.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen, nnx

__all__ = ["MODELS", "AlexNet", "LinenMLP", "MLP", "ResNet18"]


class MLP(nnx.Module):
    """Flat images to logits through hidden layers of ReLUs, no biases.

    Subspace methods protect kernels; a bias would move freely, so GPM's authors and
    these networks have none.
    """

    def __init__(
        self,
        shape: Sequence[int],
        classes: int,
        rngs: nnx.Rngs,
        hidden: Sequence[int] = (256, 256),
    ):
        sizes = [_count(shape), *hidden]
        self.layers = nnx.List(
            nnx.Linear(n, m, use_bias=False, rngs=rngs)
            for n, m in zip(sizes, sizes[1:], strict=False)
        )
        self.head = nnx.Linear(sizes[-1], classes, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0], -1)
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.head(x)


class LinenMLP(linen.Module):
    """The same network in linen."""

    classes: int
    hidden: Sequence[int] = (256, 256)

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0], -1)
        for width in self.hidden:
            x = linen.relu(linen.Dense(width, use_bias=False)(x))
        return linen.Dense(self.classes, use_bias=False, name="head")(x)


class ResidualBlock(nnx.Module):
    """Two 3 × 3 convolutions around a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, rngs: nnx.Rngs):
        self.conv1 = _conv(inputs, outputs, 3, stride, rngs)
        self.norm1 = _norm(outputs, rngs)
        self.conv2 = _conv(outputs, outputs, 3, 1, rngs)
        self.norm2 = _norm(outputs, rngs)
        self.shortcut = nnx.data(None)
        if stride != 1 or inputs != outputs:
            self.shortcut = _conv(inputs, outputs, 1, stride, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet18(nnx.Module):
    """Four stages of two blocks; batch statistics of the batch at hand, always.

    Running statistics move with the data although no weight does, which no protection
    of weights can see; GPM's authors switch them off as well.
    """

    def __init__(
        self, shape: Sequence[int], classes: int, rngs: nnx.Rngs, filters: int = 20
    ):
        self.conv = _conv(shape[-1], filters, 3, 1, rngs)
        self.norm = _norm(filters, rngs)
        widths = [filters * 2**i for i in range(4)]
        before, blocks = filters, []
        for i, width in enumerate(widths):
            blocks.append(ResidualBlock(before, width, 1 if i == 0 else 2, rngs))
            blocks.append(ResidualBlock(width, width, 1, rngs))
            before = width
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(before, classes, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm(self.conv(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(axis=(1, 2)))


class AlexNet(nnx.Module):
    """Convolutions 4, 3, 2 with pooling, two hidden layers of 2048, no biases."""

    def __init__(
        self,
        shape: Sequence[int],
        classes: int,
        rngs: nnx.Rngs,
        hidden: Sequence[int] = (2048, 2048),
    ):
        filters, windows = (64, 128, 256), (4, 3, 2)
        side, before, convs = shape[0], shape[-1], []
        for count, window in zip(filters, windows, strict=True):
            convs.append(_conv(before, count, window, 1, rngs, "VALID"))
            before, side = count, (side - window + 1) // 2
        self.convs = nnx.List(convs)
        sizes = [before * side * side, *hidden]
        self.layers = nnx.List(
            nnx.Linear(n, m, use_bias=False, rngs=rngs)
            for n, m in zip(sizes, sizes[1:], strict=False)
        )
        self.head = nnx.Linear(sizes[-1], classes, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for conv in self.convs:
            x = nnx.max_pool(nnx.relu(conv(x)), (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.head(x)


def _count(shape: Sequence[int]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count


def _conv(inputs, outputs, window, stride, rngs, padding="SAME") -> nnx.Conv:
    return nnx.Conv(
        inputs, outputs, (window, window), strides=stride, padding=padding,
        use_bias=False, rngs=rngs,
    )  # fmt: skip


class BatchStatistics(nnx.Module):
    """Normalises by the batch's own mean and variance; keeps no running ones."""

    def __init__(self, width: int, rngs: nnx.Rngs, epsilon: float = 1e-5):
        del rngs
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        axes = tuple(range(x.ndim - 1))
        mean, variance = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
        shape = (1,) * (x.ndim - 1) + (-1,)
        x = (x - mean) * jax.lax.rsqrt(variance + self.epsilon)
        return x * self.scale[...].reshape(shape) + self.bias[...].reshape(shape)


def _norm(width: int, rngs: nnx.Rngs) -> BatchStatistics:
    return BatchStatistics(width, rngs)


MODELS: dict[str, Callable[..., nnx.Module]] = {
    "mlp": MLP,
    "resnet18": ResNet18,
    "alexnet": AlexNet,
}
