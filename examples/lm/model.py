"""A small decoder-only transformer over bytes, and its sizes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

BYTES = 256


@dataclasses.dataclass(frozen=True)
class Preset:
    """Size of the model and of a run.

    Attributes:
      context: bytes in a window.
      width: of the residual stream.
      layers: number of blocks.
      heads: attention heads per block.
      steps: optimizer steps per domain.
      batch: windows per step.
      eval_windows: held-out windows per domain.
      dtype: of the computation; parameters are float32.
    """

    context: int
    width: int
    layers: int
    heads: int
    steps: int
    batch: int
    eval_windows: int
    dtype: str = "float32"


PRESETS = {
    "tiny": Preset(16, 16, 1, 2, steps=10, batch=4, eval_windows=8),
    "default": Preset(64, 64, 2, 4, steps=160, batch=16, eval_windows=128),
    "256m": Preset(
        512, 1152, 16, 18, steps=1000, batch=32, eval_windows=128, dtype="bfloat16"
    ),
}


class Attention(nnx.Module):
    """Causal self-attention; query, key and value come from one kernel."""

    def __init__(self, preset: Preset, rngs: nnx.Rngs):
        options = {"use_bias": False, "dtype": preset.dtype, "rngs": rngs}
        self.qkv = nnx.Linear(preset.width, 3 * preset.width, **options)
        self.out = nnx.Linear(preset.width, preset.width, **options)
        self.heads = preset.heads

    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (*x.shape[:-1], self.heads, x.shape[-1] // self.heads)
        q, k, v = (part.reshape(shape) for part in jnp.split(self.qkv(x), 3, -1))
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.reshape(x.shape))


class Block(nnx.Module):
    """Pre-LayerNorm attention and two-layer perceptron."""

    def __init__(self, preset: Preset, rngs: nnx.Rngs):
        options = {"use_bias": False, "dtype": preset.dtype, "rngs": rngs}
        self.norm1 = nnx.LayerNorm(preset.width, dtype=preset.dtype, rngs=rngs)
        self.attention = Attention(preset, rngs)
        self.norm2 = nnx.LayerNorm(preset.width, dtype=preset.dtype, rngs=rngs)
        self.up = nnx.Linear(preset.width, 4 * preset.width, **options)
        self.down = nnx.Linear(4 * preset.width, preset.width, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm1(x))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Transformer(nnx.Module):
    """Bytes (..., context) to logits of the next byte (..., context, 256)."""

    def __init__(self, preset: Preset, rngs: nnx.Rngs):
        options = {"dtype": preset.dtype, "rngs": rngs}
        self.embedding = nnx.Embed(BYTES, preset.width, **options)
        self.position = nnx.Embed(preset.context, preset.width, **options)
        self.blocks = nnx.List(Block(preset, rngs) for _ in range(preset.layers))
        self.norm = nnx.LayerNorm(preset.width, **options)
        self.head = nnx.Linear(preset.width, BYTES, **options)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embedding(tokens)
        places = self.position(jnp.arange(tokens.shape[-1]))
        x = x + jnp.broadcast_to(places, x.shape)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)).astype(jnp.float32)


def create(preset: Preset, seed: int) -> tuple[nnx.GraphDef, Any]:
    """A new model as graph definition and parameters."""
    model = Transformer(preset, nnx.Rngs(seed))
    return nnx.split(model, nnx.Param)
