"""A Llama in a GGUF file becomes a folder of Hugging Face files."""

import errno
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from examples.llm.errors import ModelError
from examples.streams.folders import library

__all__ = ["byte_level", "convert_gguf", "write_folder"]

LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTSIDE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
CONTROL = 3  # GGUF's type of tokens such as <|im_start|>


def convert_gguf(source: Path, folder: Path) -> None:
    """Writes model.safetensors (float32), tokenizer.json, config.json, the template.

    Sizes, rotary base and tokenizer come from the file's metadata.

    Args:
      source: the GGUF file, quantized or not.
      folder: exists.

    Raises:
      ModelError: for a file that is cut off or no GGUF, and for an architecture other
        than Llama or a tokenizer other than SmolLM's.
    """
    meta, tensors = _read(source)
    _expect(source, meta, "general.architecture", "llama")
    _expect(source, meta, "tokenizer.ggml.model", "gpt2")
    _expect(source, meta, "tokenizer.ggml.pre", "smollm")
    try:
        config = _config(meta, tied="output.weight" not in tensors)
        heads = {
            "attn_q": config["num_attention_heads"],
            "attn_k": config["num_key_value_heads"],
        }
        weights = {
            _name(name): _halves(x, heads.get(name.split(".")[-2]))
            for name, x in tensors.items()
        }
    except KeyError as error:
        raise ModelError(
            f"{source}: found nothing known for {error}, expected the metadata and the "
            "tensors of a Llama."
        ) from error
    tokenizer = _tokenizer(meta)
    write_folder(folder, weights, config, tokenizer)
    if "tokenizer.chat_template" in meta:
        template = meta["tokenizer.chat_template"]
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def write_folder(
    folder: Path,
    weights: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    tokenizer: Any,
) -> None:
    """The three files that `models.load` and a tokenizer read.

    Raises:
      OSError: when the disk is full.
    """
    safetensors = library("safetensors.numpy", "safetensors", "to write weights")
    try:
        safetensors.save_file(dict(weights), folder / "model.safetensors")
        tokenizer.save(str(folder / "tokenizer.json"))
    except Exception as error:  # both libraries raise their own instead of OSError
        if "No space left on device" in str(error):
            raise OSError(errno.ENOSPC, str(error)) from error
        raise
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _read(source: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    gguf = library("gguf", "gguf", "to read a GGUF file")
    try:
        reader = gguf.GGUFReader(source)
        meta = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {
            t.name: np.asarray(gguf.dequantize(t.data, t.tensor_type), np.float32)
            for t in reader.tensors
        }
    except (IndexError, KeyError, NotImplementedError, ValueError) as error:
        raise ModelError(
            f"{source}: found what cannot be read as GGUF ({error}), expected a "
            "complete file."
        ) from error
    return meta, tensors


def _expect(source: Path, meta: Mapping[str, Any], name: str, value: str) -> None:
    if meta.get(name) != value:
        raise ModelError(
            f"{source}: {name} is {meta.get(name)!r}, expected {value!r}. Other models "
            "are read from a folder of Hugging Face files."
        )


def _config(meta: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    heads = meta["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": meta.get("llama.attention.head_count_kv", heads),
        "head_dim": meta["llama.rope.dimension_count"],
        # Stored as float32; the shortest decimal that means the same number.
        "rms_norm_eps": float(
            str(np.float32(meta["llama.attention.layer_norm_rms_epsilon"]))
        ),
        "rope_theta": meta.get("llama.rope.freq_base", 10_000.0),
        "max_position_embeddings": meta["llama.context_length"],
        "vocab_size": len(meta["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": tied,
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
    }


def _name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    match name.split("."):
        case ["blk", layer, part, "weight"]:
            return f"model.layers.{layer}.{LAYER[part]}.weight"
        case [part, "weight"]:
            return f"{OUTSIDE[part]}.weight"
    raise KeyError(name)


def _halves(kernel: np.ndarray, heads: int | None) -> np.ndarray:
    """Rows of q and k in Hugging Face's order: a head's first half, then its second.

    GGUF has the two rows of each rotary pair next to each other. Other kernels, for
    which heads is None, are as they should be.
    """
    if heads is None:
        return kernel
    rows, columns = kernel.shape
    pairs = kernel.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, columns)


def _tokenizer(meta: Mapping[str, Any]) -> Any:
    tokens: Sequence[str] = meta["tokenizer.ggml.tokens"]
    kinds = meta["tokenizer.ggml.token_type"]
    return byte_level(
        {token: index for index, token in enumerate(tokens)},
        [tuple(pair.split(" ")) for pair in meta["tokenizer.ggml.merges"]],
        [t for t, kind in zip(tokens, kinds, strict=True) if kind == CONTROL],
    )


def byte_level(
    vocabulary: dict[str, int], merges: list[tuple[str, ...]], control: list[str]
) -> Any:
    """SmolLM's byte pairs: digits are single tokens, spaces belong to the next word."""
    parts = library("tokenizers", "tokenizers", "to read and write text as tokens")
    tokenizer = parts.Tokenizer(parts.models.BPE(vocab=vocabulary, merges=merges))
    splits = parts.pre_tokenizers
    tokenizer.pre_tokenizer = splits.Sequence(
        [
            splits.Digits(individual_digits=True),
            splits.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = parts.decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [parts.AddedToken(t, special=True, normalized=False) for t in control]
    )
    return tokenizer
