"""Whole models that Qwix or Flax has adapted: old outputs stay through every layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import adamr
from adamr import lora as room_of
from tests.lora.layers import largest, normal, optimizer, trained

SCALING = 2.0  # α / r of the provider below


def provider(qwix, where=".*"):
    return qwix.LoraProvider(module_path=where, rank=2, alpha=4.0)


def assert_kept(forward, base, lora, old, new, count):
    """Two tasks; `count` pairs, each with a kernel that takes the merge."""
    assert len(room_of.find_pairs(base, lora)) == count
    tx = optimizer(forward, base, lora, old)
    lora, state = trained(tx, forward, base, lora, tx.init(lora), old, 5)
    before = forward(lora, base, old)
    read = jax.jit(lambda p: adamr.layer_inputs(forward, p, base, old, kind="rows"))
    base, lora, state = room_of.start_task(
        base, lora, state, read(lora), jax.random.key(7), scaling=SCALING, threshold=1.0
    )
    assert largest(before, forward(lora, base, old)) < 1e-5
    then = forward(lora, base, new)
    lora, _ = trained(tx, forward, base, lora, state, new, 6, steps=10)
    assert largest(then, forward(lora, base, new)) > 0.05
    assert largest(before, forward(lora, base, old)) < 3e-5
    left = room_of.room(state, lora)
    assert len(left) == count and all(np.all(x.directions > 0) for x in left.values())


def split(model, call):
    graph, lora, base = nnx.split(model, nnx.LoRAParam, ...)
    return lambda p, base, x: call(nnx.merge(graph, p, base), x), base, lora


@pytest.mark.filterwarnings("default::DeprecationWarning")
def test_nnx_attention_adapted_by_qwix():
    qwix = pytest.importorskip("qwix")

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
            self.up = nnx.Linear(8, 12, rngs=rngs)
            self.down = nnx.Linear(12, 8, rngs=rngs)

        def __call__(self, x):
            x = x + self.attention(x)
            return x + self.down(nnx.gelu(self.up(x)))

    x, new = normal(0, 1, 3, 8), normal(1, 2, 3, 8)
    model = qwix.apply_lora_to_model(
        Block(nnx.Rngs(0)), provider(qwix), x, rngs=nnx.Rngs(1)
    )
    assert_kept(*split(model, lambda model, x: model(x)), x, new, 6)


@pytest.mark.filterwarnings("default::DeprecationWarning")
def test_scanned_linen_layers_adapted_by_qwix():
    qwix = pytest.importorskip("qwix")

    class Layer(linen.Module):
        @linen.compact
        def __call__(self, x, _):
            return x + jnp.tanh(linen.Dense(6)(x)), None

    class Stack(linen.Module):
        @linen.compact
        def __call__(self, x):
            scanned = linen.scan(
                Layer,
                length=2,
                variable_axes={"params": 0},
                split_rngs={"params": True},
            )
            return scanned()(x, None)[0]

    x, new = normal(0, 2, 6), normal(1, 4, 6)
    model = qwix.apply_lora_to_model(Stack(), provider(qwix))
    params = model.init(jax.random.key(0), x)["params"]
    kept = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (leaf, "lora" in jax.tree_util.keystr(path)), params
    )

    def part(wanted):
        is_pair = lambda pair: isinstance(pair, tuple)  # noqa: E731
        return jax.tree.map(
            lambda pair: pair[0] if pair[1] == wanted else None, kept, is_leaf=is_pair
        )

    def forward(lora, base, x):
        hole = lambda x: x is None  # noqa: E731
        whole = jax.tree.map(lambda a, b: b if a is None else a, lora, base,
                             is_leaf=hole)  # fmt: skip
        return model.apply({"params": whole}, x)

    assert_kept(forward, part(False), part(True), x, new, 1)


@pytest.mark.filterwarnings("default::DeprecationWarning")
@jax.numpy_rank_promotion("allow")
def test_tunix_llama_adapted_by_qwix():
    llama = pytest.importorskip("tunix.models.llama3.model")
    qwix = pytest.importorskip("qwix")
    config = llama.ModelConfig(
        num_layers=2, vocab_size=32, embed_dim=16, hidden_dim=24, num_heads=2,
        head_dim=8, num_kv_heads=1, norm_eps=1e-5, rope_theta=10_000,
    )  # fmt: skip
    model = llama.Llama3(config, rngs=nnx.Rngs(0))
    where = r".*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    model = qwix.apply_lora_to_model(
        model, provider(qwix, where), **model.get_model_input(), rngs=nnx.Rngs(0)
    )
    positions, attention = jnp.arange(3)[None], jnp.tril(jnp.ones((1, 3, 3), bool))

    def logits(model, tokens):
        return model(tokens, positions, None, attention)[0]

    old, new = jnp.array([[1, 4, 7]]), jnp.array([[2, 9, 8]])
    assert_kept(*split(model, logits), old, new, 14)


@pytest.mark.filterwarnings("default::DeprecationWarning")
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantized_kernel_of_qwix_in_an_nnx_optimizer(kind):
    """The merge is refused by name; a block beside the kernel trains, and is kept."""
    qwix = pytest.importorskip("qwix")
    rule = qwix.LoraRule(module_path=".*", rank=4, alpha=4.0, weight_qtype=kind)
    x, new = normal(0, 2, 8), normal(1, 4, 8)
    model = qwix.apply_lora_to_model(
        nnx.Linear(8, 5, rngs=nnx.Rngs(0)),
        qwix.LoraProvider([rule]),
        x,
        rngs=nnx.Rngs(1),
    )
    forward, base, lora = split(model, lambda model, x: model(x))
    with pytest.raises(ValueError, match="kernel/array/qvalue.*start_block"):
        room_of.find_pairs(base, lora)
    tx = optimizer(
        forward, base, lora, x,
        lambda s: room_of.train_block(adamr.adamr(0.1, adamr.project_out(s)), 2),
    )  # fmt: skip
    held = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, held, x):
        def loss(model):
            return jnp.mean((model(x) - 1) ** 2)

        wrt = nnx.DiffState(0, nnx.LoRAParam)
        held.update(model, nnx.grad(loss, argnums=wrt)(model))

    step(model, held, x)
    before = model(x)
    lora = nnx.state(model, nnx.LoRAParam)
    inputs = adamr.layer_inputs(forward, lora, base, x, kind="rows")
    lora, held.opt_state = room_of.start_block(
        lora, held.opt_state, inputs, jax.random.key(0), threshold=1.0
    )
    nnx.update(model, lora)
    assert largest(before, model(x)) < 1e-6
    then = model(new)
    for _ in range(5):
        step(model, held, new)
    assert largest(then, model(new)) > 0.05
    assert largest(before, model(x)) < 1e-5
