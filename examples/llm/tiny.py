"""A random model of two layers as Hugging Face files: the real code path, quickly."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import jax.typing
import numpy as np

from examples.llm.conversion import byte_level, write_folder
from examples.llm.families import family_of, head_dim
from examples.llm.models import Model, load

__all__ = ["tiny", "write_tiny"]

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256 + len(CONTROL),
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
    """A folder with config.json, random weights and a tokenizer of single bytes.

    Args:
      folder: is made.
      seed: of the weights.
      dtype: NumPy's, of the file.
      **changes: entries of config.json, `model_type` among them; by default a Llama
        with grouped queries and a tied output layer.
    """
    config = {"model_type": "llama", **SIZES, **changes}
    rng = np.random.default_rng(seed)
    names = sorted(family_of(config).tensors(config))
    weights = {name: _random(name, config, rng).astype(dtype) for name in names}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_folder(folder, weights, config, _byte_tokenizer())
    return folder


def _random(name: str, config: dict[str, Any], rng: np.random.Generator) -> np.ndarray:
    """Kernels that keep the scale of their inputs, norms near one, small biases."""
    width, wide = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * head_dim(config)
    keys = config["num_key_value_heads"] * head_dim(config)
    vocabulary = config["vocab_size"]
    shapes = {
        "embed_tokens": (vocabulary, width),
        "lm_head": (vocabulary, width),
        "q_proj": (queries, width),
        "k_proj": (keys, width),
        "v_proj": (keys, width),
        "o_proj": (width, queries),
        "gate_proj": (wide, width),
        "up_proj": (wide, width),
        "down_proj": (width, wide),
        "q_norm": (head_dim(config),),
        "k_norm": (head_dim(config),),
    }
    part, kind = name.split(".")[-2:]
    shape = shapes.get(part, (width,))
    if kind == "bias":
        return rng.normal(size=shape[:1]) / 10
    if len(shape) == 1:
        gemma = config["model_type"].startswith("gemma")  # whose norms add one
        return (0 if gemma else 1) + rng.normal(size=shape) / 10
    return rng.normal(size=shape) / np.sqrt(shape[1])


def _byte_tokenizer() -> Any:
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*CONTROL, *letters]
    return byte_level({t: i for i, t in enumerate(tokens)}, [], list(CONTROL))
