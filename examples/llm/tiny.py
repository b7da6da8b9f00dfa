"""A random model of two layers as Hugging Face files: the real code path, quickly."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import jax.typing
import numpy as np

from examples.llm.conversion import byte_level, write_folder
from examples.llm.families import family_of
from examples.llm.models import Model, load
from examples.streams.folders import library

__all__ = ["tiny", "write_tiny"]

MERGED = ("t", "h")
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": len(CONTROL) + 256 + 1,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny(
    folder: Path,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    seed: int = 0,
    **changes: Any,
) -> Model:
    """Writes and loads it; arguments as in `write_tiny` and `models.load`."""
    return load(write_tiny(folder, seed=seed, **changes), dtype)


def write_tiny(
    folder: Path, *, seed: int = 0, dtype: Any = np.float32, **changes: Any
) -> Path:
    """A folder with config.json, random weights and a tokenizer of bytes and `th`.

    Args:
      folder: is made.
      seed: of the weights.
      dtype: NumPy's, of the file.
      **changes: entries of config.json, `model_type` among them; by default a Llama
        with grouped queries and a tied output layer.
    """
    config = {"model_type": "llama", **SIZES, **changes}
    rng = np.random.default_rng(seed)
    mean = 0 if config["model_type"].startswith("gemma") else 1  # Gemma adds one
    weights = {
        name: _random(name, shape, mean, rng).astype(dtype)
        for name, shape in family_of(config).tensors(config).items()
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_folder(folder, weights, config, _byte_tokenizer())
    return folder


def _random(
    name: str, shape: tuple[int, ...], mean: int, rng: np.random.Generator
) -> np.ndarray:
    """Kernels that keep the scale of their inputs, norms near `mean`, small biases."""
    if len(shape) == 2:
        return rng.normal(size=shape) / np.sqrt(shape[1])
    return (0 if name.endswith("bias") else mean) + rng.normal(size=shape) / 10


def _byte_tokenizer() -> Any:
    tokenizers = library("tokenizers", "tokenizers", "to write text as tokens")
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = [*CONTROL, *letters, "".join(MERGED)]
    return byte_level({t: i for i, t in enumerate(tokens)}, [MERGED], list(CONTROL))
