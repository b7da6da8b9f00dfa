"""Old outputs stay where they were, for every kind of model and of contraction."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adamr
from adamr.capture import contracted_axes
from tests.capture.still import assert_still

Axes = adamr.Axes


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


# Plain functions ------------------------------------------------------------------


def test_mlp():
    params = {"a": normal(0, 6, 8), "bias": normal(1, 8), "b": normal(2, 8, 3)}

    def forward(p, x):
        return jnp.tanh(x @ p["a"] + p["bias"][None]) @ p["b"]

    axes = assert_still(forward, params, normal(3, 4, 6), protected=2)
    assert axes["a"] == axes["b"] == Axes((0,))
    assert axes["bias"] is None
    assert adamr.capture.unread_leaves(axes) == {"bias": "added to data"}


EINSUMS = {
    "bi,oi->bo": ((3, 6), (4, 6), Axes((1,))),
    "bi,hio->bho": ((3, 6), (2, 6, 4), Axes((1,))),
    "bhi,ohi->bo": ((3, 2, 4), (5, 2, 4), Axes((1, 2))),
    "bhi,ioh->bo": ((3, 2, 4), (4, 5, 2), Axes((0, 2))),
    "bgi,oig->bgo": ((3, 2, 6), (5, 6, 2), Axes((1,), (2,))),
    "bgi,gio->bgo": ((3, 2, 6), (2, 6, 5), Axes((1,), (0,))),
    "abkl,lok->abo": ((1, 2, 3, 2), (2, 5, 3), Axes((0, 2))),
    "tbi,io->bto": ((2, 2, 6), (6, 5), Axes((0,))),
    "bji,io->bo": ((3, 2, 6), (6, 5), Axes((0,))),
    "i,io->o": ((6,), (6, 5), Axes((0,))),
    "bi,i->b": ((3, 6), (6,), Axes((0,))),
    "bi,io->bo": ((3, 1), (1, 5), Axes((0,))),
}


@pytest.mark.parametrize("equation", EINSUMS)
@pytest.mark.parametrize("kind", ["gram", "rows"])
def test_einsum(equation, kind):
    data, weight, expected = EINSUMS[equation]
    params = normal(0, *weight)
    forward = lambda w, x: jnp.einsum(equation, x, w)  # noqa: E731
    if weight == (1, 5):
        assert contracted_axes(forward, params, normal(1, *data)) == expected
        return
    axes = assert_still(forward, params, normal(1, *data), kind=kind)
    assert axes == expected


REARRANGED = {
    "transposed": ((4, 6), lambda w: w.T),
    "cast": ((6, 4), lambda w: w.astype(jnp.bfloat16).astype(jnp.float32)),
    "scaled": ((6, 4), lambda w: -2.0 * w / 3.0),
    "scaled by an array of one": ((6, 4), lambda w: w * jnp.full((1, 1), 3.0)),
    "merged": ((2, 3, 4), lambda w: w.reshape(6, 4)),
    "merged, moved": ((3, 4, 2), lambda w: w.transpose(2, 0, 1).reshape(6, 4)),
    "split outputs": ((6, 8), lambda w: w.reshape(6, 2, 4)[:, 1]),
    "one of a stack": ((3, 6, 4), lambda w: w[1]),
    "last of a stack": ((6, 4, 3), lambda w: w[..., -1]),
    "half of the outputs": ((6, 8), lambda w: w[:, 4:]),
    "half of the inputs": ((12, 4), lambda w: w[6:]),
    "split": ((6, 8), lambda w: jnp.split(w, 2, axis=1)[1]),
    "picked in the program": ((3, 6, 4), lambda w: w[jnp.argmax(jnp.arange(3))]),
    "after a barrier": ((6, 4), jax.lax.optimization_barrier),
    "expanded and squeezed": ((6, 4), lambda w: w[None, :, None][0, :, 0]),
    "with another parameter": ((6, 4), lambda w: w + w[::1]),
}  # fmt: skip


@pytest.mark.parametrize("how", REARRANGED)
def test_rearranged_leaves(how):
    shape, change = REARRANGED[how]
    forward = lambda w, x: x @ change(w)  # noqa: E731
    tolerance = 0.05 if how == "cast" else 1e-5
    assert_still(forward, normal(0, *shape), normal(1, 3, 6), tolerance=tolerance)


def test_axes_of_slices():
    x = normal(1, 3, 6)
    at = lambda change, *shape: contracted_axes(  # noqa: E731
        lambda w, x: x @ change(w), normal(0, *shape), x
    )
    assert at(lambda w: w[1], 3, 6, 4) == Axes((1,), (0,))
    assert at(lambda w: w[..., -1], 6, 4, 3) == Axes((0,), (2,))
    assert at(lambda w: w[:, 4:], 6, 8) == Axes((0,))
    assert at(lambda w: w[6:], 12, 4) == Axes((0,))
    assert at(lambda w: w.reshape(6, 2, 4)[:, 1], 6, 8) == Axes((0,))


def test_stacked_layers_in_a_python_loop():
    params = normal(0, 3, 6, 6) / 2

    def forward(w, x):
        for i in range(3):
            x = jnp.tanh(x @ w[i])
        return x

    axes = assert_still(forward, params, normal(1, 2, 6))
    assert axes == Axes((1,), (0,))


def test_weights_used_twice():
    params = {"w": normal(0, 8, 8) / 3, "v": normal(1, 8, 4)}

    def forward(p, x):
        h = jnp.tanh(x @ p["w"])
        h = jnp.tanh(jnp.einsum("bi,io->bo", h, p["w"]))
        return h @ p["v"]

    assert_still(forward, params, normal(2, 3, 8), protected=2)


@pytest.mark.parametrize("reverse", [False, True])
def test_scanned_layers(reverse):
    params = {"w": normal(0, 3, 6, 6) / 2, "shared": normal(1, 6, 6) / 3,
              "b": normal(2, 3, 6)}  # fmt: skip

    def forward(p, x):
        def layer(x, each):
            w, b = each
            return jnp.tanh(x @ w + b[None]) + x @ p["shared"], x

        return jax.lax.scan(layer, x, (p["w"], p["b"]), reverse=reverse)

    axes = assert_still(forward, params, normal(3, 1, 6), protected=2)
    assert axes["w"] == Axes((1,), (0,)) and axes["shared"] == Axes((0,))


def test_scans_in_scans_and_parameters_in_the_carry():
    params = {"w": normal(0, 4, 9, 9) / 3, "held": normal(1, 9, 9) / 3}

    def forward(p, x):
        def outer(carry, ws):
            held, x = carry

            def inner(x, w):
                return jnp.tanh(x @ w) @ held, None

            x, _ = jax.lax.scan(inner, x, ws)
            return (held, x), ws

        stacked = p["w"].reshape(2, 2, 9, 9)
        (held, x), ws = jax.lax.scan(outer, (p["held"], x), stacked)
        return x @ ws.reshape(4, 9, 9)[3] @ held

    axes = assert_still(forward, params, normal(2, 1, 9), protected=2)
    assert axes["w"] == Axes((1,), (0,)) and axes["held"] == Axes((0,))


def test_recurrent_network():
    params = {
        "in": normal(0, 4, 8),
        "back": normal(1, 8, 8) / 3,
        "out": normal(2, 8, 2),
    }

    def forward(p, xs):
        def step(h, x):
            h = jnp.tanh(x @ p["in"] + h @ p["back"])
            return h, h @ p["out"]

        return jax.lax.scan(step, jnp.zeros((1, 8)), xs.swapaxes(0, 1))[1]

    assert_still(forward, params, normal(3, 1, 3, 4), protected=3)


def test_experts():
    params = {
        "gate": normal(0, 6, 3),
        "up": normal(1, 3, 6, 8),
        "down": normal(2, 3, 8, 6),
    }

    def forward(p, x):
        weight = jax.nn.softmax(x @ p["gate"])
        chosen = jax.nn.one_hot(jnp.argmax(weight, -1), 3)
        given = jnp.einsum("te,ti->eti", chosen, x)
        h = jax.nn.gelu(jnp.einsum("eti,eio->eto", given, p["up"]))
        out = jnp.einsum("eto,eoi->eti", h, p["down"])
        return jnp.einsum("eti,te->ti", out, weight * chosen)

    axes = assert_still(forward, params, normal(3, 4, 6), protected=3)
    assert axes["up"] == axes["down"] == Axes((1,), (0,))


def test_vmap_over_seeds():
    params = {
        "emb": normal(0, 2, 9, 5),
        "w": normal(1, 2, 5, 6),
        "v": normal(2, 6, 4, 2),
    }

    def one(emb, w, v, tokens):
        return jnp.tanh(emb[tokens] @ w) @ v

    def forward(p, tokens):
        return jax.vmap(one, (0, 0, 2, None))(p["emb"], p["w"], p["v"], tokens)

    axes = assert_still(forward, params, jnp.array([[1, 2], [2, 7]]), protected=3)
    assert axes["w"] == Axes((1,), (0,)) and axes["v"] == Axes((0,), (2,))
    assert axes["emb"] == Axes((1,))  # all seeds look up the same


def test_vmap_over_seeds_and_data_of_their_own():
    params = {"emb": normal(0, 2, 9, 5), "conv": normal(1, 2, 3, 5, 4)}

    def one(p, tokens):
        x = p["emb"][tokens]
        return jax.lax.conv_general_dilated(
            x, p["conv"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )

    tokens = jnp.array([[[1, 2]], [[3, 8]]])
    axes = assert_still(jax.vmap(one), params, tokens, protected=2)
    assert axes["emb"] == Axes((1,), (0,))
    assert axes["conv"] == Axes((1, 2), (0,))


@pytest.mark.parametrize("look", [
    lambda w, i: w[i],
    lambda w, i: jnp.take(w, i, axis=0),
    lambda w, i: jnp.take(w, i, axis=0, mode="clip"),
    lambda w, i: jnp.take(w.T, i, axis=1),
    lambda w, i: jax.nn.one_hot(i, 9) @ w,
])  # fmt: skip
def test_embedding(look):
    axes = assert_still(look, normal(0, 9, 5), jnp.array([[1, 3], [3, -1]]))
    assert axes == Axes((0,))


CALLS = {
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "remat, nothing saved": functools.partial(
        jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable
    ),
    "closed": lambda f: lambda w, x: jax.closure_convert(f, w, x)[0](w, x),
    "vmap": lambda f: jax.vmap(f, (None, 0)),
    "vmap over columns": lambda f: (
        lambda w, x: jax.vmap(lambda c: f(c[:, None], x), 1)(w)
    ),
    "map": lambda f: lambda w, x: jax.lax.map(lambda row: f(w, row[None]), x),
    "fori": lambda f: lambda w, x: jax.lax.fori_loop(0, 3, lambda _, y: f(w, y), x),
}


@pytest.mark.parametrize("how", CALLS)
def test_calls(how):
    forward = CALLS[how](lambda w, x: jnp.tanh(x @ w))
    n = 6
    assert_still(forward, normal(0, n, n) / 3, normal(1, 2 if how != "fori" else 1, n))


def test_custom_derivatives():
    @jax.custom_vjp
    def product(w, x):
        return x @ w

    product.defvjp(lambda w, x: (x @ w, (w, x)), lambda r, g: (r[1].T @ g, g @ r[0].T))

    @jax.custom_jvp
    def other(w, x):
        return x @ w.T

    other.defjvp(lambda p, t: (other(*p), other(*p)))
    forward = lambda p, x: other(p["b"], jnp.tanh(product(p["a"], x)))  # noqa: E731
    params = {"a": normal(0, 6, 8), "b": normal(1, 4, 8)}
    assert_still(forward, params, normal(2, 3, 6), protected=2)


CONVS = {
    "same": (((1, 5, 4, 3), (3, 3, 3, 4)), {}),
    "valid": (((1, 4, 4, 3), (3, 3, 3, 4)), dict(padding="VALID")),
    "strided": (
        ((1, 6, 5, 3), (3, 3, 3, 4)),
        dict(window_strides=(2, 2), padding=[(1, 0), (0, 2)]),
    ),
    "dilated": (((1, 3, 3, 3), (2, 2, 3, 4)), dict(rhs_dilation=(2, 2))),
    "transposed": (
        ((1, 2, 2, 3), (3, 3, 3, 4)), dict(lhs_dilation=(2, 2), padding=[(1, 1)] * 2)
    ),
    "grouped": (((1, 3, 3, 6), (3, 3, 3, 4)), dict(feature_group_count=2)),
    "depthwise": (((1, 2, 2, 2), (3, 3, 1, 2)), dict(feature_group_count=2)),
    "channels first": (
        ((1, 3, 4, 4), (4, 3, 3, 3)),
        dict(padding="VALID", dimension_numbers=("NCHW", "OIHW", "NCHW")),
    ),
    "odd order": (
        ((3, 4, 1, 4), (3, 4, 3, 3)),
        dict(padding="VALID", dimension_numbers=("CHNW", "IOHW", "WNCH")),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["gram", "rows"])
@pytest.mark.parametrize("how", CONVS)
def test_convolution(how, kind):
    (data, weight), options = CONVS[how]
    usual = dict(window_strides=(1, 1), padding="SAME")
    options = usual | dict(dimension_numbers=("NHWC", "HWIO", "NHWC")) | options
    forward = lambda w, x: jax.lax.conv_general_dilated(x, w, **options)  # noqa: E731
    axes = assert_still(forward, normal(0, *weight), normal(1, *data), kind=kind)
    expected = {"channels first": (1, 2, 3), "odd order": (0, 2, 3)}
    assert axes == Axes(expected.get(how, (0, 1, 2)))


def test_attention_of_plain_functions():
    d, heads, head = 8, 2, 4
    params = {
        "fused": normal(0, d, 3 * d) / 3, "out": normal(1, d, d) / 3,
        "gate": normal(2, d, 16) / 3, "up": normal(3, d, 16) / 3,
        "down": normal(4, 16, d) / 3,
    }  # fmt: skip

    def forward(p, x):
        q, k, v = jnp.split(
            (x @ p["fused"]).reshape(*x.shape[:2], 3, heads, head), 3, 2
        )
        q, k, v = (y[:, :, 0] for y in (q, k, v))
        scores = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k) / 2)
        y = jnp.einsum("bhts,bshd->bthd", scores, v)
        x = x + jnp.einsum("bthd,hdm->btm", y, p["out"].reshape(heads, head, d))
        return x + (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]

    assert_still(forward, params, normal(5, 1, 3, d), protected=5, kind="rows")


# Libraries ------------------------------------------------------------------------


def test_nnx_transformer():
    from flax import nnx

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.LayerNorm(8, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
            self.up, self.down = (
                nnx.Linear(8, 16, rngs=rngs),
                nnx.Linear(16, 8, rngs=rngs),
            )

        def __call__(self, x):
            x = x + self.attention(self.norm(x))
            return x + self.down(nnx.gelu(self.up(x)))

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(11, 8, rngs=rngs)
            self.blocks = nnx.List([Block(rngs) for _ in range(2)])
            self.head = nnx.Linear(8, 5, rngs=rngs)

        def __call__(self, tokens):
            x = self.embed(tokens)
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    graph, params = nnx.split(Model(nnx.Rngs(0)), nnx.Param)
    forward = lambda p, x: nnx.merge(graph, p)(x)  # noqa: E731
    axes = assert_still(forward, params, jnp.array([[1, 4, 7]]),
                        protected=14, kind="rows")  # fmt: skip
    found = dict(zip(
        adamr._tree.flatten_with_names(params)[0],
        jax.tree.leaves(axes, is_leaf=lambda x: x is None or isinstance(x, Axes)),
        strict=True,
    ))  # fmt: skip
    out = next(a for name, a in found.items() if "out/kernel" in name)
    assert out == Axes((0, 1))


@pytest.mark.parametrize("remat", [False, True])
def test_nnx_scanned_and_rematerialised(remat):
    from flax import nnx

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(6, 6, rngs=rngs)

        def __call__(self, x):
            return x + jnp.tanh(self.linear(x))

    class Stacked(nnx.Module):
        def __init__(self):
            @nnx.split_rngs(splits=3)
            @nnx.vmap(in_axes=0, out_axes=0)
            def make(rngs):
                return Block(rngs)

            self.blocks = make(nnx.Rngs(0))

        def __call__(self, x):
            call = nnx.remat(lambda block, x: block(x)) if remat else lambda b, x: b(x)
            run = nnx.scan(call, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
            return run(self.blocks, x)

    graph, params = nnx.split(Stacked(), nnx.Param)
    forward = lambda p, x: nnx.merge(graph, p)(x)  # noqa: E731
    assert_still(forward, params, normal(0, 2, 6), protected=1, kind="rows")


@pytest.mark.parametrize("remat", [False, True])
def test_linen(remat):
    from flax import linen as nn

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
            return x + nn.Dense(8)(nn.gelu(nn.Dense(16)(x))), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(11, 8)(tokens)
            block = nn.remat(Block) if remat else Block
            scanned = nn.scan(
                block,
                length=2,
                variable_axes={"params": 0},
                split_rngs={"params": True},
            )
            x, _ = scanned()(x, None)
            x = nn.Conv(6, (2,))(x)
            box = nn.with_partitioning(nn.initializers.lecun_normal(), (None, None))
            return nn.Dense(3, kernel_init=box)(x)

    tokens = jnp.array([[1, 4, 7]])
    params = Model().init(jax.random.key(0), tokens)["params"]
    forward = lambda p, x: Model().apply({"params": p}, x)  # noqa: E731
    assert_still(forward, params, tokens, protected=9, kind="rows")


def test_equinox_mlp():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(6, 6, 8, 2, key=jax.random.key(0))
    forward = lambda m, x: jax.vmap(m)(x)  # noqa: E731
    axes = contracted_axes(forward, model, normal(1, 3, 6))
    assert axes.layers[0].weight == Axes((1,))
    assert axes.activation is None
    reasons = adamr.capture.unread_leaves(axes)
    assert reasons["activation"].startswith("not an array (")
    params, static = eqx.partition(model, eqx.is_array)
    assert_still(lambda p, x: jax.vmap(eqx.combine(p, static))(x), params,
                 normal(1, 3, 6), protected=3)  # fmt: skip


def test_equinox_attention_and_convolution():
    eqx = pytest.importorskip("equinox")

    class Model(eqx.Module):
        attention: eqx.nn.MultiheadAttention
        conv: eqx.nn.Conv1d
        norm: eqx.nn.LayerNorm
        heads: int = 2

        def __call__(self, x):
            x = jax.vmap(self.norm)(x)
            x = x + self.attention(x, x, x)
            return self.conv(x.T)

    keys = jax.random.split(jax.random.key(0))
    model = Model(
        eqx.nn.MultiheadAttention(2, 8, key=keys[0]),
        eqx.nn.Conv1d(8, 4, 2, key=keys[1]), eqx.nn.LayerNorm(8),
    )  # fmt: skip
    params, static = eqx.partition(model, eqx.is_inexact_array)
    forward = lambda p, x: jax.vmap(eqx.combine(p, static))(x)  # noqa: E731
    assert_still(forward, params, normal(1, 1, 3, 8), protected=5, kind="rows")


def test_haiku():
    hk = pytest.importorskip("haiku")

    def network(tokens):
        x = hk.Embed(11, 8)(tokens)
        x = x + hk.MultiHeadAttention(2, 4, w_init=hk.initializers.VarianceScaling())(
            x, x, x
        )
        x = hk.Conv1D(8, 2)(x)

        @hk.remat
        def block(x):
            return x + hk.Linear(8)(jax.nn.gelu(hk.Linear(16)(x)))

        x = hk.experimental.layer_stack(2)(block)(x)
        return hk.LayerNorm(-1, True, True)(x)

    tokens = jnp.array([[1, 4, 7]])
    transformed = hk.transform(network)
    params = transformed.init(jax.random.key(0), tokens)
    forward = lambda p, x: transformed.apply(p, None, x)  # noqa: E731
    assert_still(forward, params, tokens, protected=8, kind="rows")


@pytest.mark.filterwarnings("default::DeprecationWarning")
@jax.numpy_rank_promotion("allow")
def test_tunix_llama_with_lora():
    llama = pytest.importorskip("tunix.models.llama3.model")
    qwix = pytest.importorskip("qwix")
    from flax import nnx

    config = llama.ModelConfig(
        num_layers=2, vocab_size=32, embed_dim=16, hidden_dim=24, num_heads=2,
        head_dim=8, num_kv_heads=1, norm_eps=1e-5, rope_theta=10_000,
    )  # fmt: skip
    model = llama.Llama3(config, rngs=nnx.Rngs(0))
    where = r".*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    provider = qwix.LoraProvider(module_path=where, rank=4, alpha=8.0)
    model = qwix.apply_lora_to_model(
        model, provider, **model.get_model_input(), rngs=nnx.Rngs(0)
    )
    tokens = jnp.array([[1, 4, 7]])
    positions = jnp.arange(3)[None]
    attention = jnp.tril(jnp.ones((1, 3, 3), bool))

    def logits(model, tokens):
        return model(tokens, positions, None, attention)[0]

    graph, lora, rest = nnx.split(model, nnx.LoRAParam, ...)
    lora = jax.tree.map(lambda x: x + 0.1 * normal(1, *x.shape), lora)
    forward = lambda p, x: logits(nnx.merge(graph, p, rest), x)  # noqa: E731
    assert_still(forward, lora, tokens, protected=28, kind="rows")
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    params = jax.tree.map(lambda x: 0.3 * normal(2, *x.shape), params)
    forward = lambda p, x: logits(nnx.merge(graph, p, rest), x)  # noqa: E731
    assert_still(forward, params, tokens, protected=28 + 16, kind="rows")


@pytest.mark.parametrize("kind", list(jax.sharding.AxisType)[:2])
@pytest.mark.parametrize("masked", [False, True])
def test_sharded_arrays(kind, masked):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    place = lambda x, *spec: jax.device_put(  # noqa: E731
        x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    )
    params = {"a": normal(0, 12, 10), "b": normal(1, 10, 3)}
    x = normal(2, 8, 2, 12)
    mask = (normal(3, 8, 2) > 0) if masked else None
    out = jax.sharding.PartitionSpec("data") if kind.name == "Explicit" else None

    def forward(p, x, out=out):
        y = jnp.tanh(x @ p["a"])
        return jnp.einsum("bti,io->bto", y, p["b"], out_sharding=out)

    here = adamr.layer_inputs(
        functools.partial(forward, out=None), params, x, mask=mask
    )
    with jax.set_mesh(mesh):
        spread = {
            "a": place(params["a"], None, "model"),
            "b": place(params["b"], "model"),
        }
        read = jax.jit(lambda p, x, m: adamr.layer_inputs(forward, p, x, mask=m))
        there = read(spread, place(x, "data"), mask)
    for a, b in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
