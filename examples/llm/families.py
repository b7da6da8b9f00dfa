"""Which of Tunix's models a Hugging Face config.json describes, and its sizes.

Llama (Llama 2 and 3, SmolLM2), Qwen 2 and 3, Gemma 2 and the text part of Gemma 3. What
Tunix does not compute (biases, other activations, yarn) is refused rather than ignored.
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import jax.typing

from examples.llm.errors import ModelError
from examples.llm.rotary import frequencies

__all__ = ["FAMILIES", "Family", "family_of"]

Config = Mapping[str, Any]

GELU = ("gelu_pytorch_tanh", "gelu_fast", "gelu_new")
GEMMA3_PERIOD = 6  # five layers of local attention, one of global


class Family(NamedTuple):
    """A model of Tunix.

    Attributes:
      package: below `tunix.models`.
      loader: its module with `create_model_from_safe_tensors`.
      config: from (config.json, dtype) to Tunix's `ModelConfig`.
      rotary: from config.json to the frequencies that Tunix's own code would not use;
        None where it does.
      norms: names of a layer's norms in the safetensors.
      biases: whether q, k and v have them.
      head_norms: whether each head of q and k is normalised.
    """

    package: str
    loader: str
    config: Callable[[Config, Any], Any]
    rotary: Callable[[Config], tuple[float, ...]] | None
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    biases: bool = False
    head_norms: bool = False

    def tensors(self, config: Config) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors that config.json makes one expect."""
        width, wide = need(config, "hidden_size"), need(config, "intermediate_size")
        sizes = _sizes(config)
        queries = sizes["num_heads"] * sizes["head_dim"]
        keys = sizes["num_kv_heads"] * sizes["head_dim"]
        layer = {
            "self_attn.q_proj.weight": (queries, width),
            "self_attn.k_proj.weight": (keys, width),
            "self_attn.v_proj.weight": (keys, width),
            "self_attn.o_proj.weight": (width, queries),
            "mlp.gate_proj.weight": (wide, width),
            "mlp.up_proj.weight": (wide, width),
            "mlp.down_proj.weight": (width, wide),
        }
        if self.biases:
            biases = {"q": queries, "k": keys, "v": keys}
            layer |= {f"self_attn.{k}_proj.bias": (n,) for k, n in biases.items()}
        if self.head_norms:
            layer |= {f"self_attn.{k}_norm.weight": (sizes["head_dim"],) for k in "qk"}
        layer |= {f"{norm}.weight": (width,) for norm in self.norms}
        embedding = (need(config, "vocab_size"), width)
        outside = {"embed_tokens.weight": embedding, "norm.weight": (width,)}
        inside = {
            f"layers.{i}.{name}": shape
            for i in range(sizes["num_layers"])
            for name, shape in layer.items()
        }
        head = {} if tied(config) else {"lm_head.weight": embedding}
        return {f"model.{name}": x for name, x in (outside | inside).items()} | head


def need(config: Config, name: str) -> Any:
    if config.get(name) is None:
        raise ModelError(f"config.json: found no {name!r}, expected it.")
    return config[name]


def expect(config: Config, name: str, *allowed: Any) -> None:
    """Refuses a value for which Tunix has no code; a missing name is allowed."""
    if name in config and config[name] not in allowed:
        raise ModelError(
            f"config.json: {name} is {config[name]!r}, expected "
            f"{' or '.join(map(repr, allowed))}: Tunix computes nothing else."
        )


def tied(config: Config) -> bool:
    """Whether the output layer is the embedding; Gemma's always is."""
    gemma = str(config.get("model_type")).startswith("gemma")
    return bool(config.get("tie_word_embeddings", gemma))


def head_dim(config: Config) -> int:
    wide = need(config, "hidden_size") // need(config, "num_attention_heads")
    return config.get("head_dim") or wide


def rotary_options(config: Config) -> tuple[float, Config]:
    """The base and the scaling, as config.json of transformers 4 and 5 have them."""
    options = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return options.get("rope_theta", config.get("rope_theta", 10_000.0)), options


def _frequencies(config: Config) -> tuple[float, ...]:
    return frequencies(head_dim(config), *rotary_options(config))


def _sizes(config: Config) -> dict[str, int]:
    heads = need(config, "num_attention_heads")
    return {
        "num_layers": need(config, "num_hidden_layers"),
        "embed_dim": need(config, "hidden_size"),
        "hidden_dim": need(config, "intermediate_size"),
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": head_dim(config),
    }


def _tunix(package: str) -> Any:
    return importlib.import_module(f"tunix.models.{package}.model")


def _llama(config: Config, dtype: jax.typing.DTypeLike) -> Any:
    del dtype
    expect(config, "hidden_act", "silu")
    expect(config, "attention_bias", False, None)
    expect(config, "mlp_bias", False, None)
    return _tunix("llama3").ModelConfig(
        **_sizes(config),
        vocab_size=need(config, "vocab_size"),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        rope_theta=rotary_options(config)[0],
        weight_tying=tied(config),
    )


def _qwen(package: str) -> Callable[[Config, Any], Any]:
    def build(config, dtype):
        expect(config, "hidden_act", "silu")
        expect(config, "use_sliding_window", False, None)
        if package == "qwen3":
            expect(config, "attention_bias", False, None)
        theta, scaling = rotary_options(config)
        if package == "qwen2":
            expect(scaling, "rope_type", "default")
            expect(scaling, "type", "default")
        return _tunix(package).ModelConfig(
            **_sizes(config),
            vocab_size=need(config, "vocab_size"),
            norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=theta,
            use_tied_embedding=tied(config),
            dtype=jnp.dtype(dtype),
            param_dtype=jnp.dtype(dtype),
        )

    return build


def _gemma_only(config: Config) -> None:
    """What both versions of Gemma have in common, written into Tunix's code."""
    activation = "hidden_activation" if "hidden_activation" in config else "hidden_act"
    expect(config, activation, *GELU)
    expect(config, "attention_bias", False, None)
    expect(config, "rms_norm_eps", 1e-6)
    expect(config, "tie_word_embeddings", True)
    # Gemma's own default of both is 256, whatever the width.
    need(config, "query_pre_attn_scalar")
    expect(config, "query_pre_attn_scalar", need(config, "head_dim"))


def _gemma2(config: Config, dtype: jax.typing.DTypeLike) -> Any:
    del dtype
    _gemma_only(config)
    kinds = _tunix("gemma").AttentionType
    local_first = (kinds.LOCAL_SLIDING, kinds.GLOBAL)
    layers = need(config, "num_hidden_layers")
    return _tunix("gemma").ModelConfig(
        **_sizes(config),
        num_embed=need(config, "vocab_size"),
        final_logit_softcap=config.get("final_logit_softcapping", 30.0),
        attn_logits_soft_cap=config.get("attn_logit_softcapping", 50.0),
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        attention_types=tuple(local_first[i % 2] for i in range(layers)),
        sliding_window_size=config.get("sliding_window", 4096),
    )


def _gemma3(config: Config, dtype: jax.typing.DTypeLike) -> Any:
    _gemma_only(config)
    expect(config, "sliding_window_pattern", GEMMA3_PERIOD)
    expect(config, "_sliding_window_pattern", GEMMA3_PERIOD)
    expect(config, "use_bidirectional_attention", False, None)
    expect(config, "final_logit_softcapping", None)
    expect(config, "attn_logit_softcapping", None)
    layers = need(config, "num_hidden_layers")
    kinds = ["sliding_attention"] * (GEMMA3_PERIOD - 1) + ["full_attention"]
    expect(config, "layer_types", [kinds[i % GEMMA3_PERIOD] for i in range(layers)])
    by_kind = config.get("rope_parameters") or {}
    scaling = by_kind.get("full_attention", config.get("rope_scaling")) or {}
    local = by_kind.get("sliding_attention", {})
    expect(scaling, "rope_type", "default", "linear")
    expect(local, "rope_type", "default")
    return _tunix("gemma3").ModelConfig(
        **_sizes(config),
        num_embed=need(config, "vocab_size"),
        sliding_window_size=config.get("sliding_window", 4096),
        local_base_frequency=local.get(
            "rope_theta", config.get("rope_local_base_freq", 10_000.0)
        ),
        global_base_frequency=scaling.get(
            "rope_theta", config.get("rope_theta", 1_000_000.0)
        ),
        global_scale_factor=scaling.get("factor", 1.0),
        param_dtype=jnp.dtype(dtype),
    )


GEMMA_NORMS = (
    *("input_layernorm", "post_attention_layernorm"),
    *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
)

# Gemma 1 is missing: Tunix 0.1.7 looks for its norms under the names of Gemma 2.
FAMILIES = {
    "llama": Family("llama3", "params", _llama, _frequencies),
    "qwen2": Family("qwen2", "params", _qwen("qwen2"), None, biases=True),
    "qwen3": Family("qwen3", "params", _qwen("qwen3"), _frequencies, head_norms=True),
    "gemma2": Family("gemma", "params_safetensors", _gemma2, _frequencies, GEMMA_NORMS),
    "gemma3_text": Family(
        "gemma3", "params_safetensors", _gemma3, None, GEMMA_NORMS, head_norms=True
    ),
}


def family_of(config: Config) -> Family:
    """By `model_type` of config.json.

    Raises:
      ModelError: for one that Tunix or this file does not know, and for quantized
        weights.
    """
    name = config.get("model_type")
    if name not in FAMILIES:
        architectures = ", ".join(config.get("architectures") or []) or "none"
        raise ModelError(
            f"config.json: model_type is {name!r} (architectures: {architectures}), "
            f"expected one of {', '.join(FAMILIES)}."
        )
    if config.get("quantization_config"):
        raise ModelError(
            "config.json: the weights are quantized (quantization_config), expected "
            "float32, float16 or bfloat16."
        )
    expect(config, "partial_rotary_factor", 1.0, None)
    return FAMILIES[name]
