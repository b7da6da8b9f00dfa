"""Llama, Qwen and Gemma in float64 from Hugging Face files, one text at a time."""

import json
import math
from pathlib import Path

import numpy as np


def read_folder(folder):
    """config.json and the tensors, as float64."""
    from safetensors.numpy import load_file

    tensors = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        tensors |= load_file(file)
    config = json.loads((Path(folder) / "config.json").read_text())
    return config, {name: x.astype(np.float64) for name, x in tensors.items()}


def turns(n, theta, scaling):
    """Angle per position of each rotary pair."""
    angles = []
    for i in range(0, n, 2):
        w = theta ** (-i / n)
        kind = scaling.get("rope_type", "default")
        if kind == "linear":
            w = w / scaling["factor"]
        if kind == "llama3":
            length = 2 * math.pi / w
            old, factor = scaling["original_max_position_embeddings"], scaling["factor"]
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            if length > old / low:
                w = w / factor
            elif length >= old / high:
                smooth = (old / length - low) / (high - low)
                w = (1 - smooth) * w / factor + smooth * w
        angles.append(w)
    return np.array(angles)


def rotate(x, w):
    """(time, heads, n) by position · w."""
    angle = np.arange(len(x))[:, None, None] * w
    a, b = np.split(x, 2, -1)
    sin, cos = np.sin(angle), np.cos(angle)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def logits(config, tensors, tokens):
    """Next-token logits (time, vocabulary) of one text."""
    kind = config["model_type"]
    gemma = kind.startswith("gemma")
    heads, keys = config["num_attention_heads"], config["num_key_value_heads"]
    n = config.get("head_dim") or config["hidden_size"] // heads
    eps = config["rms_norm_eps"]
    time = len(tokens)
    ago = np.arange(time)[:, None] - np.arange(time)[None, :]

    def norm(x, name):
        w = tensors[f"{name}.weight"] + (1 if gemma else 0)
        return w * x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)

    def linear(x, name):
        bias = tensors.get(f"{name}.bias", 0.0)
        return x @ tensors[f"{name}.weight"].T + bias

    def attention(x, layer, i):
        at = f"{layer}.self_attn"
        q = linear(x, f"{at}.q_proj").reshape(time, heads, n)
        k = linear(x, f"{at}.k_proj").reshape(time, keys, n)
        v = linear(x, f"{at}.v_proj").reshape(time, keys, n)
        if kind in ("qwen3", "gemma3_text"):
            q, k = norm(q, f"{at}.q_norm"), norm(k, f"{at}.k_norm")
        local = (kind == "gemma2" and i % 2 == 0) or (
            kind == "gemma3_text" and i % 6 != 5
        )
        theta, scaling = config["rope_theta"], config.get("rope_scaling") or {}
        if kind == "gemma3_text" and local:
            theta, scaling = config["rope_local_base_freq"], {}
        w = turns(n, theta, scaling)
        q, k = rotate(q, w), rotate(k, w)
        seen = (ago >= 0) & (ago < config["sliding_window"] if local else True)
        out = np.empty((time, heads, n))
        for h in range(heads):
            g = h // (heads // keys)
            score = q[:, h] @ k[:, g].T / math.sqrt(n)
            if kind == "gemma2":
                cap = config["attn_logit_softcapping"]
                score = cap * np.tanh(score / cap)
            out[:, h] = softmax(np.where(seen, score, -np.inf)) @ v[:, g]
        return linear(out.reshape(time, heads * n), f"{at}.o_proj")

    def mlp(x, layer):
        gate = linear(x, f"{layer}.mlp.gate_proj")
        gate = gelu(gate) if gemma else silu(gate)
        return linear(
            gate * linear(x, f"{layer}.mlp.up_proj"), f"{layer}.mlp.down_proj"
        )

    x = tensors["model.embed_tokens.weight"][np.asarray(tokens)]
    x = x * math.sqrt(config["hidden_size"]) if gemma else x
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        before, after = f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm"
        y = attention(norm(x, before), layer, i)
        if gemma:
            x = x + norm(y, after)
            y = mlp(norm(x, f"{layer}.pre_feedforward_layernorm"), layer)
            x = x + norm(y, f"{layer}.post_feedforward_layernorm")
        else:
            x = x + y
            x = x + mlp(norm(x, after), layer)
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    out = norm(x, "model.norm") @ head.T
    if kind == "gemma2":
        cap = config["final_logit_softcapping"]
        out = cap * np.tanh(out / cap)
    return out
