"""Captured layer inputs: what is grown from them protects the layer's response."""

import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import adamr
from adamr.capture import (
    capture_inputs,
    capture_linen_inputs,
    kernel_axes,
    linen_kernel_axes,
)


def images(seed=0, shape=(1, 3, 2, 3)):
    return jax.random.normal(jax.random.key(seed), shape)


def attention():
    layer = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
    return layer, jax.random.normal(jax.random.key(1), (2, 3, 8))


def layers():
    """Each with fewer rows than its fan-in, so that a basis is not full."""
    rngs = nnx.Rngs(0)
    conv = dict(in_features=3, out_features=4, use_bias=False, rngs=rngs)
    return {
        "linear": (nnx.Linear(5, 4, rngs=rngs), jnp.eye(5)[:2] + 1.0),
        "two leading axes": (nnx.Linear(3, 4, rngs=rngs), images(shape=(1, 2, 3))),
        "general": (
            nnx.LinearGeneral((3, 2), (2, 4), axis=(-2, -1), rngs=rngs),
            images(shape=(3, 3, 2)),
        ),
        "general, axes swapped": (
            nnx.LinearGeneral((3, 2), 4, axis=(-1, -2), rngs=rngs),
            images(shape=(3, 3, 2)),
        ),
        "general, batch axis": (
            nnx.LinearGeneral(5, 4, axis=-1, batch_axis={0: 2}, rngs=rngs),
            images(shape=(2, 3, 5)),
        ),
        "einsum": (
            nnx.Einsum("nta, hab -> nthb", (2, 5, 3), rngs=rngs),
            images(shape=(1, 3, 5)),
        ),
        "einsum, two axes, kernel's order": (
            nnx.Einsum("...ab,bac->...c", (3, 2, 4), rngs=rngs),
            images(shape=(2, 2, 2, 3)),
        ),
        "einsum, experts": (
            nnx.Einsum("nei,eoi->neo", (2, 4, 5), (2, 4), rngs=rngs),
            images(shape=(3, 2, 5)),
        ),
        "einsum, summed input": (
            nnx.Einsum("nsi,io->no", (5, 4), rngs=rngs),
            images(shape=(3, 2, 5)),
        ),
        "conv same": (nnx.Conv(kernel_size=(3, 2), **conv), images()),
        "conv valid": (
            nnx.Conv(kernel_size=(3, 3), padding="VALID", **conv),
            images(shape=(1, 5, 4, 3)),
        ),
        "conv strided": (
            nnx.Conv(kernel_size=(3, 3), strides=2, padding=[(1, 0), (0, 2)], **conv),
            images(shape=(1, 6, 5, 3)),
        ),
        "conv dilated": (
            nnx.Conv(kernel_size=(2, 2), kernel_dilation=2, **conv),
            images(),
        ),
        "conv circular": (
            nnx.Conv(kernel_size=(3, 3), padding="CIRCULAR", **conv),
            images(),
        ),
        "conv reflect, no batch": (
            nnx.Conv(kernel_size=(3, 3), padding="REFLECT", **conv),
            images(shape=(3, 2, 3)),
        ),
        "conv 1d causal": (
            nnx.Conv(kernel_size=(3,), padding="CAUSAL", **conv),
            images(shape=(1, 6, 3)),
        ),
        "conv in groups": (
            nnx.Conv(
                6,
                4,
                (3, 3),
                feature_group_count=2,
                padding="VALID",
                rngs=rngs,
                use_bias=False,
            ),  # fmt: skip
            images(shape=(1, 4, 4, 6)),
        ),
        "embed": (nnx.Embed(7, 4, rngs=rngs), jnp.array([[1, 3], [3, -1]])),
    }


def weight_of(layer):
    name = "embedding" if isinstance(layer, nnx.Embed) else "kernel"
    return name, getattr(layer, name)


def without_bias(layer, y):
    bias = getattr(layer, "bias", None)
    return np.asarray(y) - (0 if bias is None else np.asarray(bias[...]))


ONE_SPACE = [k for k in layers() if "batch" not in k and "experts" not in k]


@pytest.mark.parametrize("kind", [k for k in ONE_SPACE if "groups" not in k])
def test_samples_times_kernel_is_the_layers_output(kind):
    """Proves the row order, patches included: X W equals the layer without its bias."""
    layer, x = layers()[kind]
    name, weight = weight_of(layer)
    axes = kernel_axes(layer)[name].protected
    samples = capture_inputs(layer, x)[name]
    kernel = np.moveaxis(np.asarray(weight[...]), axes, range(len(axes)))
    got = samples @ kernel.reshape(samples.shape[-1], -1)
    y = without_bias(layer, layer(x))
    np.testing.assert_allclose(got, y.reshape(got.shape), atol=1e-5)


def test_samples_of_batched_kernels_are_those_of_each_slice():
    layer, x = layers()["general, batch axis"]
    samples = capture_inputs(layer, x)["kernel"]
    np.testing.assert_array_equal(samples, x)
    assert kernel_axes(layer)["kernel"] == adamr.Axes((1,), (0,))
    layer, x = layers()["einsum, experts"]
    samples = capture_inputs(layer, x)["kernel"]
    np.testing.assert_array_equal(samples, jnp.swapaxes(x, 0, 1))
    assert kernel_axes(layer)["kernel"] == adamr.Axes((2,), (0,))


def protected_step(model, samples, axes):
    """A step of noise projected off the samples; not zero where a leaf is protected."""
    params = nnx.state(model, nnx.Param)
    s = adamr.empty_subspace(params, axes=axes)
    s = adamr.grow_subspace(s, samples, threshold=1.0)
    keys = iter(jax.random.split(jax.random.key(9), 100))
    noise = jax.tree.map(lambda p: jax.random.normal(next(keys), p.shape), params)
    steps = adamr.subspaces.project(s, noise)
    names, leaves = adamr._tree.flatten_with_names(steps)
    for name, u, basis in zip(names, leaves, s.bases, strict=True):
        # Nothing was said of biases and the like: they stand still.
        assert basis is None or jnp.linalg.norm(u) > 0.1, name
    kept = [u if b is not None else 0 * u for u, b in zip(leaves, s.bases, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(params), kept)


def add(model, step):
    params = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda p, u: p + u, params, step))


@pytest.mark.parametrize("kind", layers())
def test_what_was_captured_is_protected(kind):
    """A step projected off the captured inputs does not change the layer's output."""
    layer, x = layers()[kind]
    before = layer(x)
    add(layer, protected_step(layer, capture_inputs(layer, x), kernel_axes(layer)))
    np.testing.assert_allclose(layer(x), before, atol=1e-5)
    other = jnp.zeros_like(x) if x.dtype == jnp.int32 else x[::-1] + 1.0
    assert jnp.max(jnp.abs(layer(other) - layers()[kind][0](other))) > 1e-2


def test_attention_layers_and_their_axes():
    layer, x = attention()
    samples, axes = capture_inputs(layer, x), kernel_axes(layer)
    for name in ("query", "key", "value"):
        np.testing.assert_allclose(samples[name]["kernel"], x.reshape(6, 8), rtol=1e-6)
        assert axes[name]["kernel"] == adamr.Axes((0,))
        assert samples[name]["bias"] is None
    assert samples["out"]["kernel"].shape == (6, 8)
    assert axes["out"]["kernel"] == adamr.Axes((0, 1))
    params = nnx.state(layer, nnx.Param)
    s = adamr.empty_subspace(params, axes=axes)
    s = adamr.grow_subspace(s, samples)
    assert any(int(r) > 0 for r in adamr.subspaces.rank(s) if r is not None)


@pytest.mark.smoke
def test_axes_of_a_model_of_shapes_alone():
    model = nnx.eval_shape(lambda: attention()[0])
    assert jax.tree.leaves(kernel_axes(model)) == jax.tree.leaves(
        kernel_axes(attention()[0])
    )


class Shared(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
        self.blocks = nnx.List([nnx.Linear(3, 3, rngs=nnx.Rngs(i)) for i in range(11)])
        self.norm = nnx.LayerNorm(3, rngs=nnx.Rngs(0))

    def __call__(self, x):
        x = self.linear(self.linear(x))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def test_a_layer_called_twice_has_both_inputs_and_order_is_the_params():
    model, x = Shared(), jnp.arange(6.0).reshape(2, 3)
    samples = capture_inputs(model, x)
    twice = jnp.concatenate([x, model.linear(x)])
    np.testing.assert_allclose(samples["linear"]["kernel"], twice, rtol=1e-5)
    params = nnx.state(model, nnx.Param)
    names = adamr._tree.flatten_with_names(params)[0]
    ours = adamr._tree.flatten_with_names(samples)[0]
    assert [n.replace("/value", "") for n in names] == [
        n.replace("/value", "") for n in ours
    ]
    by_layer = [model.linear(model.linear(x))]
    for block in list(model.blocks)[:-1]:
        by_layer.append(block(by_layer[-1]))
    for i, expected in enumerate(by_layer):
        got = samples["blocks"][i]["kernel"]
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_max_samples_are_spread_over_all_rows():
    layer = nnx.Linear(1, 2, rngs=nnx.Rngs(0))
    x = jnp.arange(100.0)[:, None]
    samples = capture_inputs(layer, x, max_samples=3)["kernel"]
    np.testing.assert_array_equal(samples[:, 0], [0, 50, 99])


@pytest.mark.smoke
def test_no_hook_stays_after_an_error():
    original = nnx.Linear.__call__
    with pytest.raises(Exception, match="dot_general|shape"):
        capture_inputs(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), jnp.ones((2, 4)))
    assert nnx.Linear.__call__ is original


# Transforms inside the model -----------------------------------------------------


class Residual(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(6, 6, rngs=rngs)

    def __call__(self, x):
        return x + jnp.tanh(self.linear(x))


class Stacked(nnx.Module):
    def __init__(self, reverse=False):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return Residual(rngs)

        self.blocks, self.reverse = make(nnx.Rngs(0)), reverse

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry, reverse=self.reverse)
        def run(block, x):
            return block(x)

        return run(self.blocks, x)


@pytest.mark.parametrize("reverse", [False, True])
def test_scanned_layers_have_a_space_each(reverse):
    model, x = Stacked(reverse), images(shape=(2, 6))
    samples, axes = capture_inputs(model, x), kernel_axes(model)
    assert axes["blocks"]["linear"]["kernel"] == adamr.Axes((1,), (0,))
    kernels = model.blocks.linear.kernel[...]
    biases, expected = model.blocks.linear.bias[...], x
    for i in (2, 1, 0) if reverse else (0, 1, 2):
        got = samples["blocks"]["linear"]["kernel"][i]
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
        expected = expected + jnp.tanh(expected @ kernels[i] + biases[i][None])
    before = model(x)
    add(model, protected_step(model, samples, axes))
    np.testing.assert_allclose(model(x), before, atol=1e-4)


def test_scanned_layers_that_are_equal_are_told_apart_by_their_turn():
    model, x = Stacked(), images(shape=(2, 6))
    model.blocks.linear.kernel[...] = jnp.zeros((3, 6, 6))
    samples = capture_inputs(model, x)["blocks"]["linear"]["kernel"]
    assert samples.shape == (3, 2, 6)
    np.testing.assert_array_equal(samples[0], x)


class Jitted(nnx.Module):
    def __init__(self):
        self.inner = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        self.run = nnx.jit(lambda layer, x: layer(x))

    def __call__(self, x):
        return self.run(self.inner, x)


def test_layers_under_jit_are_seen_compiled_or_not():
    model, x = Jitted(), jnp.ones((2, 3))
    for _ in range(2):
        np.testing.assert_array_equal(capture_inputs(model, x)["inner"]["kernel"], x)
        model(x)


@pytest.mark.parametrize("in_axes", [(None, 0), (0, None)])
def test_a_layer_under_vmap_is_named(in_axes):
    class Mapped(nnx.Module):
        def __init__(self):
            self.inner = nnx.Linear(3, 2, rngs=nnx.Rngs(0))

        def __call__(self, x):
            split = nnx.split(self.inner)
            graph, state = split
            if in_axes[0] == 0:
                state = jax.tree.map(lambda p: jnp.stack([p, p]), state)
            run = lambda s, x: nnx.merge(graph, s)(x)  # noqa: E731
            return jax.vmap(run, in_axes=in_axes)(state, x)

    with pytest.raises(ValueError, match="inner/kernel was called under vmap"):
        capture_inputs(Mapped(), jnp.ones((2, 3)))


def test_layers_stacked_along_a_later_axis_are_refused():
    @nnx.split_rngs(splits=5)
    @nnx.vmap(in_axes=0, out_axes=1)
    def make(rngs):
        return nnx.Linear(3, 4, use_bias=False, rngs=rngs)

    with pytest.raises(ValueError, match="pass its Axes by hand"):
        kernel_axes(make(nnx.Rngs(0)))


# What is refused, and what stays as it was --------------------------------------


def test_masked_convolution_is_refused():
    layer = nnx.Conv(3, 4, (3,), mask=jnp.ones((3, 3, 4)), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="masked convolution"):
        capture_inputs(layer, jnp.ones((1, 5, 3)))


@pytest.mark.parametrize("token", [7, -8])
def test_tokens_outside_the_embedding_are_refused(token):
    layer = nnx.Embed(7, 4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="expected at least -7 and less than 7"):
        capture_inputs(layer, jnp.array([0, token]))


def test_einsum_that_sums_its_kernel_is_refused():
    layer = nnx.Einsum("ni,ijo->no", (3, 2, 4), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="meets neither input nor output"):
        capture_inputs(layer, jnp.ones((1, 3)))


def test_einsum_told_at_the_call():
    class Told(nnx.Module):
        def __init__(self):
            self.inner = nnx.Einsum("ni,io->no", (3, 4), rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.inner(x, einsum_str="bin,io->bno")

    samples = capture_inputs(Told(), images(shape=(1, 3, 2)))["inner"]["kernel"]
    np.testing.assert_array_equal(samples, images(shape=(1, 3, 2))[0].T)


def test_the_model_stays_as_it_was():
    class Noisy(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
            self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
            self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.dropout(self.norm(self.linear(x)))

    model = Noisy()
    graph, before = nnx.split(model)
    before = jax.tree.map(jnp.copy, before)
    capture_inputs(model, images(shape=(4, 3)))
    after_graph, after = nnx.split(model)
    assert graph == after_graph
    same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), before, after)
    assert all(jax.tree.leaves(same))


def test_other_threads_trace_undisturbed_while_one_captures():
    started, done = threading.Event(), threading.Event()

    class Slow(nnx.Module):
        def __init__(self):
            self.inner = nnx.Linear(3, 2, rngs=nnx.Rngs(0))

        def __call__(self, x):
            started.set()
            assert done.wait(60)
            return self.inner(x)

    found, other = [], nnx.Linear(3, 2, rngs=nnx.Rngs(1))
    thread = threading.Thread(
        target=lambda: found.append(capture_inputs(Slow(), jnp.ones((2, 3))))
    )
    thread.start()
    try:
        assert started.wait(60)
        nnx.jit(lambda layer, x: layer(x))(other, jnp.ones((1, 3)))
    finally:
        done.set()
        thread.join(60)
    np.testing.assert_array_equal(found[0]["inner"]["kernel"], np.ones((2, 3)))


def test_without_flax_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "flax", None)
    with pytest.raises(ImportError, match="adamr\\[examples\\]"):
        capture_inputs(None)


# linen --------------------------------------------------------------------------


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(7, 8, name="embed")(tokens)
        x = nn.MultiHeadDotProductAttention(2, name="attention")(x)
        x = nn.Conv(6, (3,), name="conv")(x)
        return nn.Dense(4, name="dense")(x)


def linen_protected(model, x, samples, axes, variables):
    """The module's output before and after a protected step, which is not zero."""
    p = variables["params"]
    s = adamr.empty_subspace(p, axes=axes)
    s = adamr.grow_subspace(s, samples, threshold=1.0)
    noise = jax.tree.map(lambda w: jax.random.normal(jax.random.key(9), w.shape), p)
    leaves, treedef = jax.tree.flatten(adamr.subspaces.project(s, noise))
    for u, basis in zip(leaves, s.bases, strict=True):
        assert basis is None or jnp.linalg.norm(u) > 0.1
    moved = [
        w if b is None else w + u
        for w, u, b in zip(jax.tree.leaves(p), leaves, s.bases, strict=True)
    ]
    after = {**variables, "params": jax.tree.unflatten(treedef, moved)}
    return model.apply(variables, x), model.apply(after, x)


def test_linen_samples_give_the_layers_outputs():
    model, tokens = LinenModel(), jnp.array([[1, 3, -1]])
    variables = model.init(jax.random.key(0), tokens)
    samples = capture_linen_inputs(model, variables, tokens)
    outputs = model.apply(variables, tokens, capture_intermediates=True)[1]
    outputs = outputs["intermediates"]
    p = variables["params"]
    where = [("embed", "embedding"), ("conv", "kernel"), ("dense", "kernel")]
    found = [(samples[a][b], p[a][b], outputs[a]) for a, b in where]
    attention = samples["attention"], p["attention"], outputs["attention"]
    found.append(tuple(x["query"] for x in attention))
    found[-1] = (found[-1][0]["kernel"], found[-1][1]["kernel"], found[-1][2])
    for rows, kernel, output in found:
        got = rows @ np.asarray(kernel).reshape(rows.shape[-1], -1)
        expected = output["__call__"][0].reshape(got.shape)
        np.testing.assert_allclose(got, expected, atol=1e-5)
    axes = linen_kernel_axes(model, variables, tokens)
    assert axes["attention"]["out"]["kernel"] == adamr.Axes((0, 1))
    assert axes["attention"]["query"]["bias"] is None
    before, after = linen_protected(model, tokens, samples, axes, variables)
    np.testing.assert_allclose(after, before, atol=1e-4)


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + jnp.tanh(nn.Dense(6)(inputs=x)), None


class LinenStack(nn.Module):
    transform: str = "scan"

    @nn.compact
    def __call__(self, x):
        if self.transform == "remat":
            return nn.remat(LinenBlock)()(x, None)[0]
        axes = dict(variable_axes={"params": 0}, split_rngs={"params": True})
        return nn.scan(LinenBlock, length=3, **axes)()(x, None)[0]


def test_linen_scanned_layers_have_a_space_each():
    model, x = LinenStack(), images(shape=(2, 6))
    variables = model.init(jax.random.key(0), x)
    samples = capture_linen_inputs(model, variables, x)
    assert jax.tree.leaves(samples)[0].shape == (3, 2, 6)
    np.testing.assert_allclose(jax.tree.leaves(samples)[0][0], x, rtol=1e-6)
    axes = linen_kernel_axes(model, variables, x)
    before, after = linen_protected(model, x, samples, axes, variables)
    np.testing.assert_allclose(after, before, atol=1e-4)


def test_linen_layers_under_remat_are_named():
    model, x = LinenStack("remat"), images(shape=(2, 6))
    variables = model.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="Dense_0/kernel was called under"):
        capture_linen_inputs(model, variables, x)


def test_linen_kernels_with_batch_axes_boxes_and_equations():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.DenseGeneral(5, batch_dims=(0,), axis=-1)(x)
            box = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "x"))
            x = nn.Dense(4, kernel_init=box)(x)
            return nn.Einsum((3, 4), "...i,oi->...o")(x)

    model, x = Model(), images(shape=(2, 3, 6))
    variables = model.init(jax.random.key(0), x)
    samples = capture_linen_inputs(model, variables, x)
    axes = linen_kernel_axes(model, variables, x)
    assert axes["DenseGeneral_0"]["kernel"] == adamr.Axes((1,), (0,))
    assert axes["Dense_0"]["kernel"] == adamr.Axes((0,))
    assert axes["Einsum_0"]["kernel"] == adamr.Axes((1,))
    np.testing.assert_array_equal(samples["DenseGeneral_0"]["kernel"], x)
    assert samples["Dense_0"]["kernel"].shape == (6, 5)
    assert samples["Einsum_0"]["kernel"].shape == (6, 4)
