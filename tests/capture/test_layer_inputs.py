"""Gram matrices, rows, sketches, masks: their values, and what is refused."""

import copy
import functools
import itertools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adamr
from adamr.capture import contracted_axes, coverage, layer_inputs
from adamr.capture.axes import Unread, plan_of, traced
from adamr.subspaces import (
    Covariance,
    SharedCovariance,
    empty_covariance,
    update_covariance,
)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def energy(forward, w, *inputs):
    """Σ wᵀ G w over the outputs of the leaf, in float64."""
    axes = contracted_axes(forward, w, *inputs)
    found = layer_inputs(forward, w, *inputs)
    gram = np.float64(found.moments[0]) * np.float64(found.counts[0])[..., None, None]
    order = (*axes.batch, *axes.protected)
    rest = [d for d in range(w.ndim) if d not in order]
    columns = np.float64(w).transpose(*order, *rest)
    columns = columns.reshape(*gram.shape[:-1], -1)
    return np.sum(columns * (gram @ columns))


def close(a, b, rtol=1e-6):
    np.testing.assert_allclose(a, b, rtol=rtol)


# Float64 twins --------------------------------------------------------------------

EINSUMS = {
    "bi,io->bo": ((5, 6), (6, 4)),
    "bgi,oig->bgo": ((3, 2, 6), (5, 6, 2)),
    "abkl,lok->abo": ((2, 2, 3, 2), (2, 5, 3)),
    "tbgi,ohig->tbgoh": ((2, 3, 2, 6), (5, 3, 6, 2)),
}


@pytest.mark.parametrize("equation", EINSUMS)
def test_gram_matrix_of_a_product(equation):
    x, w = (normal(i, *shape) for i, shape in enumerate(EINSUMS[equation]))
    y = np.einsum(equation, np.float64(x), np.float64(w))
    close(energy(lambda w, x: jnp.einsum(equation, x, w), w, x), np.sum(y**2))


@pytest.mark.smoke
def test_gram_matrix_of_a_look_up():
    tokens, w = np.array([[1, 3, 3], [0, -1, 3]]), normal(0, 6, 4)
    close(energy(lambda w, x: w[x], w, tokens), np.sum(np.float64(w)[tokens] ** 2))


def convolved(x, w, stride, dilation, groups):
    """NHWC with HWIO, "VALID", in float64, one output at a time."""
    x, w = np.float64(x), np.float64(w)
    kh, kw, cin, cout = w.shape
    rows, columns = (
        (n - (k - 1) * dilation - 1) // stride + 1
        for n, k in zip(x.shape[1:3], (kh, kw), strict=True)
    )
    y = np.zeros((len(x), rows, columns, cout))
    per = cout // groups
    for i, j, o in itertools.product(range(rows), range(columns), range(cout)):
        channels = slice(o // per * cin, (o // per + 1) * cin)
        for a, b in itertools.product(range(kh), range(kw)):
            part = x[:, i * stride + a * dilation, j * stride + b * dilation, channels]
            y[:, i, j, o] += part @ w[a, b, :, o]
    return y


@pytest.mark.parametrize(
    "stride, dilation, groups", [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 1, 2), (1, 2, 4)]
)
def test_gram_matrix_of_a_convolution(stride, dilation, groups):
    x, w = normal(0, 2, 7, 6, 4), normal(1, 3, 2, 4 // groups, 4)

    def forward(w, x):
        return jax.lax.conv_general_dilated(
            x, w, (stride, stride), "VALID", rhs_dilation=(dilation, dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups,
        )  # fmt: skip

    y = convolved(x, w, stride, dilation, groups)
    np.testing.assert_allclose(forward(w, x), y, atol=1e-4)
    if groups == 1:
        close(energy(forward, w, x), np.sum(y**2))
        return
    # Groups share one space, so the Gram matrix is the sum over groups.
    per = 4 // groups
    each = [
        convolved(np.roll(x, -g * per, -1)[..., :per], w, stride, dilation, 1)
        for g in range(groups)
    ]
    close(energy(forward, w, x), sum(np.sum(y**2) for y in each))


def test_gram_matrix_of_a_weight_used_twice_and_in_a_scan():
    w, x = normal(0, 6, 6) / 3, normal(1, 4, 6)

    def forward(w, x):
        x = jnp.tanh(x @ w)
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=3)[0]

    y, total, w64 = np.float64(x), 0.0, np.float64(w)
    for _ in range(4):
        total += np.sum((y @ w64) ** 2)
        y = np.tanh(y @ w64)
    close(energy(forward, w, x), total)
    assert int(layer_inputs(forward, w, x).counts[0]) == 16


# What is kept ---------------------------------------------------------------------


def attention(p, x):
    q, k, v = (jnp.einsum("btd,dhe->bthe", x, p[n]) for n in "qkv")
    scores = jax.nn.softmax(jnp.einsum("bthe,bshe->bhts", q, k))
    y = jnp.einsum("bhts,bshe->bthe", scores, v)
    x = x + jnp.einsum("bthe,hed->btd", y, p["out"])
    return x + (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]


def weights(d=6, lead=()):
    shapes = dict(q=(d, 2, 3), k=(d, 2, 3), v=(d, 2, 3), out=(2, 3, d), gate=(d, 8),
                  up=(d, 8), down=(8, d))  # fmt: skip
    return {n: normal(i, *lead, *s) / 3 for i, (n, s) in enumerate(shapes.items())}


ORDER = sorted(weights())


def test_leaves_that_meet_the_same_share_it():
    p, x = weights(), normal(9, 2, 4, 6)
    found = layer_inputs(attention, p, x)
    same = dict(zip(ORDER, found.same_as, strict=True))
    assert same["k"] == same["q"] == same["v"] == ORDER.index("k")
    assert same["gate"] == same["up"] == ORDER.index("gate")
    assert len(set(found.same_as)) == 4
    assert len(jax.tree.leaves(found)) == 2 * 4
    assert found.moments[ORDER.index("k")] is found.moments[ORDER.index("q")]
    compiled = jax.jit(functools.partial(layer_inputs, attention))(p, x)
    assert isinstance(compiled, SharedCovariance)
    assert compiled.same_as == found.same_as
    for a, b in zip(compiled.moments, found.moments, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "again", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_shared_covariances_are_copied_and_pickled(again):
    found = layer_inputs(attention, weights(), normal(9, 2, 4, 6))
    other = again(found)
    assert jax.tree.structure(other) == jax.tree.structure(found)
    jax.tree.map(np.testing.assert_array_equal, other, found)


def test_scanned_leaves_that_meet_the_same_share_it_through_casts():
    def forward(p, x):
        def block(x, p):
            half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), p)
            y = attention(half, x.astype(jnp.bfloat16))
            return y.astype(jnp.float32), None

        return jax.lax.scan(block, x, p)[0]

    p, x = weights(lead=(3,)), normal(9, 2, 4, 6)
    found = layer_inputs(forward, p, x)
    assert len(set(found.same_as)) == 4
    assert found.moments[0].shape == (3, 8, 8)


@pytest.mark.smoke
def test_portions_add_up_to_the_whole():
    p, x = weights(), normal(9, 6, 4, 6)
    read = jax.jit(functools.partial(layer_inputs, attention))
    whole = read(p, x)
    total = update_covariance(read(p, x[:4]), read(p, x[4:]))
    assert isinstance(total, SharedCovariance) and total.same_as == whole.same_as
    subspace = adamr.empty_subspace(p, axes=contracted_axes(attention, p, x))
    plain = empty_covariance(subspace)
    for part in (x[:1], x[1:]):
        plain = update_covariance(plain, layer_inputs(attention, p, part))
    assert type(plain) is Covariance
    for other in (total, plain):
        for a, b in zip(other.moments, whole.moments, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        assert [int(n) for n in other.counts] == [int(n) for n in whole.counts]


def test_a_state_takes_what_was_read():
    p, x = weights(), normal(9, 2, 4, 6)
    axes = contracted_axes(attention, p, x)
    tx = adamr.adamr(1e-2, adamr.project_out(adamr.empty_subspace(p, axes=axes)))
    state = tx.init(p)
    read = jax.jit(functools.partial(layer_inputs, attention))
    by_gram = adamr.protect_inputs(state, read(p, x), threshold=0.9)
    by_rows = adamr.protect_inputs(
        state, layer_inputs(attention, p, x, kind="rows"), threshold=0.9
    )
    ranks = [
        [int(r) for r in adamr.subspaces.rank(adamr.get_subspace(s))]
        for s in (by_gram, by_rows)
    ]
    assert ranks[0] == ranks[1] and min(ranks[0]) > 0


def test_leaves_in_portions():
    p, x = weights(), normal(9, 2, 4, 6)
    axes = contracted_axes(attention, p, x)
    subspace = adamr.empty_subspace(p, axes=axes, unprotected=["out", "q"])
    for leaves in (["gate"], lambda name: name == "gate", subspace):
        found = layer_inputs(attention, p, x, leaves=leaves)
        wanted = {"gate"} if leaves is not subspace else set(ORDER) - {"out", "q"}
        there = {n for n, m in zip(ORDER, found.moments, strict=True) if m is not None}
        assert there == wanted
    with pytest.raises(ValueError, match="'nowhere', which no leaf"):
        layer_inputs(attention, p, x, leaves=["nowhere"])
    with pytest.raises(ValueError, match="sequence of str"):
        layer_inputs(attention, p, x, leaves="gate")
    with pytest.raises(ValueError, match="subspace of 1 leaves"):
        layer_inputs(attention, p, x, leaves=adamr.empty_subspace({"w": x[0]}))


def test_rows_and_sketches_stand_for_the_same_gram_matrix():
    p, x = weights(), normal(9, 2, 4, 6)
    grams = layer_inputs(attention, p, x)
    rows = layer_inputs(attention, p, x, kind="rows")
    sketch = layer_inputs(attention, p, x, kind="sketch", max_rows=6)
    some = layer_inputs(attention, p, x, kind="rows", max_rows=3)
    for i, name in enumerate(ORDER):
        assert rows[name].shape[0] == 8
        np.testing.assert_array_equal(some[name], rows[name][np.array([0, 4, 7])])
        total = grams.moments[i] * 8
        np.testing.assert_allclose(rows[name].T @ rows[name], total, atol=1e-4)
        if name != "down":  # rank 6 at most: the sketch is exact
            np.testing.assert_allclose(sketch[name].T @ sketch[name], total, atol=1e-4)


def test_rows_of_unit_length():
    x = jnp.array([[3.0, 4.0], [0.0, 0.0], [1e30, 0.0]])
    w = jnp.ones((2, 3))
    forward = lambda w, x: x @ w  # noqa: E731
    rows = layer_inputs(forward, w, x, kind="rows", normalize=True)
    np.testing.assert_allclose(rows, [[0.6, 0.8], [0, 0], [1, 0]], rtol=1e-6)
    gram = layer_inputs(forward, w, x, normalize=True)
    np.testing.assert_allclose(gram.moments[0] * 3, rows.T @ rows, rtol=1e-6)


# Masks ----------------------------------------------------------------------------

MASK = np.array([[1, 1, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]], bool)


def masked(forward, params, *inputs, mask, **options):
    """The masked Gram matrices, checked against chosen rows of the unmasked call."""
    found = layer_inputs(forward, params, *inputs, mask=mask, **options)
    rows = layer_inputs(forward, params, *inputs, kind="rows", **options)
    rows = [x for x in jax.tree.leaves(rows, is_leaf=lambda x: x is None)]
    for gram, count, x in zip(found.moments, found.counts, rows, strict=True):
        if gram is None:
            continue
        keep = np.repeat(mask.reshape(-1), x.shape[0] // mask.size)
        assert int(count) == keep.sum()
        np.testing.assert_allclose(gram * count, x[keep].T @ x[keep], atol=1e-4)
    return found


def test_masked_positions_are_dropped():
    p, x = weights(), normal(9, 3, 4, 6)
    masked(attention, p, x, mask=MASK)
    masked(attention, p, x, mask=MASK.any(1))
    compiled = jax.jit(lambda p, x, m: layer_inputs(attention, p, x, mask=m))
    found = compiled(p, x, MASK.astype(np.float32))
    wanted = layer_inputs(attention, p, x, mask=MASK)
    np.testing.assert_allclose(found.moments[0], wanted.moments[0], rtol=1e-4)


def test_masks_find_their_axes_wherever_they_went():
    """As many positions as data, in another order: shapes alone would not tell."""
    mask = np.array([[1, 0, 0], [1, 1, 0], [1, 1, 1]], bool)
    p = {"a": normal(0, 5, 4), "b": normal(1, 7, 5)}

    def one(p, x):  # vectors, as Equinox has them
        return p["b"] @ jnp.tanh(p["a"] @ x)

    def twice(p, x):
        return jax.vmap(jax.vmap(one, (None, 0)), (None, 0))(p, x)

    def time_first(p, x):
        return twice(p, x.swapaxes(0, 1))

    x = normal(2, 3, 3, 4)
    for forward in (twice, time_first):
        found = layer_inputs(forward, p, x, mask=mask)
        chosen = np.asarray(x)[mask]
        hidden = np.tanh(chosen @ np.asarray(p["a"]).T)
        for gram, rows in zip(found.moments, (chosen, hidden), strict=True):
            np.testing.assert_allclose(gram * 6, rows.T @ rows, atol=1e-4)


def test_masks_in_a_recurrent_network():
    p = {"in": normal(0, 4, 5), "back": normal(1, 5, 5) / 3, "out": normal(2, 5, 2)}

    def forward(p, xs):
        def step(h, x):
            h = jnp.tanh(x @ p["in"] + h @ p["back"])
            return h, h

        _, hs = jax.lax.scan(step, jnp.zeros((3, 5)), xs.swapaxes(0, 1))
        return hs @ p["out"]

    x = normal(3, 3, 3, 4)
    mask = np.array([[1, 0, 0], [1, 1, 0], [1, 1, 1]], bool)
    found = layer_inputs(forward, p, x, mask=mask)
    h, before, after = np.zeros((3, 5)), [], []
    for t in range(3):
        before.append(h)
        h = np.tanh(
            np.asarray(x)[:, t] @ np.asarray(p["in"]) + h @ np.asarray(p["back"])
        )
        after.append(h)
    rows = [np.stack(before, 1)[mask], np.asarray(x)[mask], np.stack(after, 1)[mask]]
    for gram, count, chosen in zip(found.moments, found.counts, rows, strict=True):
        assert int(count) == 6
        np.testing.assert_allclose(gram * 6, chosen.T @ chosen, atol=1e-4)


def test_masks_of_scanned_blocks_and_tokens_and_positions():
    p = {"blocks": weights(lead=(2,)), "emb": normal(8, 9, 6), "pos": normal(7, 4, 6)}

    def forward(p, tokens):
        x = p["emb"][tokens] + p["pos"][jnp.arange(4)][None]
        return jax.lax.scan(lambda x, b: (attention(b, x), None), x, p["blocks"])[0]

    tokens = jnp.arange(12).reshape(3, 4) % 9
    found = layer_inputs(forward, p, tokens, mask=MASK)
    seen = np.bincount(np.asarray(tokens)[MASK], minlength=9)
    names = adamr._tree.flatten_with_names(p)[0]
    by_name = dict(zip(names, zip(*found, strict=True), strict=True))
    np.testing.assert_array_equal(np.diag(by_name["emb"][0]) * 4, seen)
    # Positions do not depend on the data: all of them count.
    np.testing.assert_array_equal(by_name["pos"][0] * 4, np.eye(4))
    np.testing.assert_array_equal(by_name["blocks/q"][1], [4, 4])


def test_masks_of_images_and_of_sequences():
    w, x = normal(0, 3, 2, 3), normal(1, 3, 4, 2)

    def forward(w, x):
        return jax.lax.conv_general_dilated(
            x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )

    masked(forward, w, x, mask=MASK)
    masked(forward, w, x, mask=MASK.any(1))


def test_leaves_whose_rows_are_not_those_of_the_mask_are_refused():
    p = {"gate": normal(0, 6, 2), "up": normal(1, 2, 6, 3), "head": normal(2, 6, 3)}

    def forward(p, x):
        order = jnp.argsort((x @ p["gate"])[..., 0].reshape(-1))
        given = x.reshape(-1, 6)[order].reshape(2, -1, 6)
        return jnp.einsum("eti,eio->eto", given, p["up"]), x.mean(1) @ p["head"]

    x = normal(3, 3, 4, 6)
    told = r"shape \(3, 4\).*: head, up\. It must have the leading axes"
    with pytest.raises(ValueError, match=told):
        layer_inputs(forward, p, x, mask=MASK)
    masked(forward, p, x, mask=MASK, leaves=["gate"])
    with pytest.raises(ValueError, match=r"meet: up\. It must"):
        layer_inputs(forward, p, x, mask=MASK.any(1))


def test_masks_that_fit_nothing():
    p, x = weights(), normal(9, 3, 4, 6)
    with pytest.raises(ValueError, match=r"mask has shape \(2, 4\), expected the lead"):
        layer_inputs(attention, p, x, mask=np.ones((2, 4)))
    with pytest.raises(ValueError, match="mask hides every row"):
        layer_inputs(attention, p, x, mask=np.zeros((3, 4)))
    with pytest.raises(ValueError, match="mask is a number"):
        layer_inputs(attention, p, x, mask=True)
    nothing = jax.jit(lambda m: layer_inputs(attention, p, x, mask=m))(np.zeros(3))
    subspace = adamr.empty_subspace(p, axes=contracted_axes(attention, p, x))
    grown = adamr.grow_subspace(subspace, nothing)
    assert not any(int(r) for r in adamr.subspaces.rank(grown))


# Reasons --------------------------------------------------------------------------


def unread(forward, params, *inputs):
    plan = plan_of(traced(forward, params, inputs))
    return [a.reason if isinstance(a, Unread) else a for a in plan]


def test_if_nothing_can_be_read_a_warning_says_so():
    with pytest.warns(UserWarning, match=r"no leaf can be read off forward: b \(added"):
        axes = contracted_axes(
            lambda p, x: x + p["b"], {"b": normal(0, 1, 4)}, normal(1, 3, 4)
        )
    assert axes == {"b": None}


def test_reasons():
    x, w = normal(0, 3, 4), normal(1, 4, 4)
    because = lambda forward, *p: unread(forward, list(p), x)[0]  # noqa: E731
    assert because(lambda p, x: x + p[0][0][:3], w[None]) == "added to data"
    assert (
        because(lambda p, x: x * p[0][None], w[0]) == "multiplied elementwise with data"
    )
    assert because(lambda p, x: jnp.tanh(p[0]).sum() * x, w) == "used by tanh"
    assert "contracted with another" in because(lambda p, x: x @ (p[0] @ p[1]), w, w)
    assert because(lambda p, x: x @ p[1], w, w) == "not used by forward"
    assert because(lambda p, x: x @ p[0], w.astype(int)).startswith("not floating (int")
    assert because(
        lambda p, x: jax.lax.while_loop(lambda c: c.sum() < 0, lambda c: c @ p[0], x), w
    ) == "used inside a while loop"  # fmt: skip
    assert because(
        lambda p, x: jax.lax.cond(x.sum() > 0, lambda w: x @ w, lambda w: x, p[0]), w
    ).startswith("used inside cond")
    assert because(lambda p, x: (x @ p[0]) @ p[0].T, w) == (
        "met along axes (0,) and along axes (1,), as a tied embedding is"
    )
    assert because(lambda p, x: p[0][x.astype(int)[:, 0]] @ p[0].T, w).startswith("met")
    assert because(lambda p, x: x @ jnp.concatenate(p), w[:2], w[2:]) == (
        "used by concatenate"
    )
    assert because(lambda p, x: x @ p[0] + p[0].sum(), w) == "used by reduce_sum"
    assert because(lambda p, x: x @ p[0][::-1], w) == "used by rev"
    assert because(
        lambda p, x: x.reshape(3, 2, 2)[:, 0] @ p[0].reshape(2, 2, 4)[0], w
    ).startswith("contracted along a part of axis 0")
    assert because(
        lambda p, x: jnp.einsum("bi,iko->bko", x[:, :2], p[0].reshape(2, 2, 4)), w
    ).startswith("contracted along a part of axis 0")


def test_a_pallas_kernel_is_named():
    pl = pytest.importorskip("jax.experimental.pallas")

    def kernel(x, w, y):
        y[...] = x[...] @ w[...]

    def forward(w, x):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return pl.pallas_call(kernel, out_shape=shape, interpret=True)(x, w)

    assert unread(forward, normal(0, 4, 4), normal(1, 3, 4)) == [
        "used in a Pallas kernel"
    ]


def test_what_is_not_used_for_the_output_does_not_count():
    def forward(w, x):
        jnp.linalg.norm(w)
        return x @ w

    assert unread(forward, normal(0, 4, 4), normal(1, 3, 4)) == [adamr.Axes((0,))]


def test_a_loss_is_read_as_well():
    def loss(p, x):
        return jnp.mean(jnp.square(jnp.tanh(x @ p["a"]) @ p["b"]))

    p = {"a": normal(0, 4, 5), "b": normal(1, 5, 2)}
    assert unread(loss, p, normal(2, 3, 4)) == [adamr.Axes((0,))] * 2


def test_shapes_are_enough_for_axes():
    p, x = weights(), normal(9, 2, 4, 6)
    like = lambda t: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), t)  # noqa: E731
    assert contracted_axes(attention, like(p), like(x)) == contracted_axes(
        attention, p, x
    )
    with pytest.raises(ValueError, match="needs values, got a ShapeDtypeStruct"):
        layer_inputs(attention, like(p), x)


def test_a_function_that_closes_over_its_parameters():
    p, x = weights(), normal(9, 2, 4, 6)
    for function in (contracted_axes, layer_inputs):
        with pytest.raises(ValueError, match="makes no use of params"):
            function(lambda _, x: attention(p, x), p, x)


def test_nothing_to_read():
    with pytest.raises(ValueError, match=r"no layer input can be read: \w+ \(added to"):
        layer_inputs(lambda p, x: x + p["b"], {"b": jnp.ones(3)}, jnp.ones(3))
    with pytest.raises(TypeError, match="forward must be a function"):
        contracted_axes(weights(), weights())


@pytest.mark.parametrize("kind", ["gram", "rows"])
def test_inputs_that_are_empty_or_not_finite(kind):
    p, x = weights(), normal(9, 2, 4, 6)
    with pytest.raises(ValueError, match=r"shape \(0, 4, 6\): no rows to read"):
        layer_inputs(attention, p, x[:0], kind=kind)
    with pytest.raises(ValueError, match="NaN or infinite entries in what down meets"):
        layer_inputs(attention, p, x.at[0, 0, 0].set(jnp.nan), kind=kind)


def test_leaves_that_are_no_arrays():
    params = {"act": jnp.tanh, "rate": 0.5, "w": normal(0, 4, 4), "none": None,
              "steps": jnp.zeros((), jnp.int32)}  # fmt: skip

    def forward(p, x):
        return p["act"](x @ p["w"] * p["rate"] + p["steps"])

    x = normal(1, 3, 4)
    axes = contracted_axes(forward, params, x)
    assert [axes[name] for name in ("act", "rate", "steps", "none")] == [None] * 4
    reasons = adamr.capture.unread_leaves(axes)
    assert reasons.pop("act").startswith("not an array (")
    assert reasons == {"rate": "not an array (float)", "steps": "not floating (int32)"}
    found = layer_inputs(forward, params, x)
    with pytest.warns(UserWarning, match=r"steps \(not floating"):
        subspace = adamr.empty_subspace(params, axes=axes)
    grown = adamr.grow_subspace(subspace, found)
    table = repr(coverage(grown, params, axes))
    assert "unprotected: not an array (float)" in table and "w      4×4" in table


def test_options_of_another_kind():
    forward, w, x = lambda w, x: x @ w, jnp.ones((2, 2)), jnp.ones((1, 2))
    with pytest.raises(ValueError, match="kind must be 'gram', 'rows' or 'sketch'"):
        layer_inputs(forward, w, x, kind="svd")
    with pytest.raises(ValueError, match="kind='sketch' needs max_rows"):
        layer_inputs(forward, w, x, kind="sketch")
    for options in (dict(max_rows=3), dict(kind="rows", max_rows=0)):
        with pytest.raises(ValueError, match="max_rows must be at least 1, and is for"):
            layer_inputs(forward, w, x, **options)


def test_a_vocabulary_is_refused_unless_asked():
    p = {"emb": jnp.ones((20000, 2)), "w": jnp.ones((2, 2))}
    forward = lambda p, x: p["emb"][x] @ p["w"]  # noqa: E731
    tokens = jnp.array([1, 2])
    with pytest.raises(ValueError, match="emb has a fan-in of 20000.*leaves="):
        layer_inputs(forward, p, tokens)
    axes = contracted_axes(forward, p, tokens)
    with pytest.raises(ValueError, match="emb has a fan-in of 20000.*unprotected="):
        adamr.empty_subspace(p, axes=axes)
    with pytest.raises(ValueError, match="emb has a fan-in of 20000"):
        adamr.empty_subspace(p)
    asked = adamr.empty_subspace(p, axes=axes, max_fan_in=None, max_rank=2)
    assert asked.bases[0].shape == (20000, 1, 2)
    subspace = adamr.empty_subspace(p, axes=axes, unprotected=["emb"])
    found = layer_inputs(forward, p, tokens, leaves=subspace)
    assert found.moments[0] is None and found.moments[1].shape == (2, 2)


# The table ------------------------------------------------------------------------


def test_coverage_says_why():
    p = {"b": jnp.ones(3), "out": jnp.ones((3, 2)), "w": jnp.ones((4, 5, 3))}

    def forward(p, x):
        x = jax.lax.scan(lambda x, w: ((x @ w) @ w.T, None), x, p["w"])[0]
        return (x[:, :3] + p["b"][None]) @ p["out"]

    x = jnp.ones((2, 5))
    axes = contracted_axes(forward, p, x)
    with pytest.warns(UserWarning, match=r"2 leaves stay unprotected: b \(added to d"):
        subspace = adamr.empty_subspace(p, axes=axes, max_rank=2)
    table = coverage(subspace, p, axes)
    assert [leaf.reason is None for leaf in table] == [False, True, False]
    assert table[1][2:] == ((0,), (), 3, 2, 4 * (6 + 2), None)
    assert "met along axes (1,) and" in str(table)
    assert "b" in str(coverage(subspace, p)) and "see why" in str(coverage(subspace, p))
    stacked = adamr.empty_subspace(
        p, axes={"b": None, "out": None, "w": adamr.Axes((1,), (0,))}
    )
    leaf = coverage(stacked, p)[2]
    assert leaf.protected == (1,) and leaf.batch == (0,) and leaf.capacity == 5
    with pytest.raises(ValueError, match="was made for 3 parameter leaves"):
        coverage(subspace, {"w": p["w"]})


@pytest.mark.parametrize("jit", [False, True])
def test_few_rows_are_spread_over_those_that_count(jit):
    """A mask that shows one position in 16 hides no whole task."""
    x = normal(0, 16, 16, 3)
    mask = jnp.zeros((16, 16), bool).at[:, 5].set(True)

    def rows(most, mask):
        read = lambda x, mask: layer_inputs(  # noqa: E731
            lambda w, x: x @ w, jnp.ones((3, 2)), x, mask=mask, kind="rows",
            max_rows=most,
        )  # fmt: skip
        return (jax.jit(read) if jit else read)(x, mask)

    np.testing.assert_array_equal(rows(4, mask), x[jnp.array([0, 5, 10, 15]), 5])
    np.testing.assert_array_equal(rows(1, mask), x[:1, 5])
    found = rows(20, mask)  # all 16, and zeros
    np.testing.assert_array_equal(found[:16], x[:, 5])
    assert found.shape == (20, 3) and not jnp.any(found[16:])
    every = rows(8, jnp.ones((16, 16), bool))
    places = np.linspace(0, 255, 8).round().astype(int)
    np.testing.assert_array_equal(every, x.reshape(-1, 3)[places])


def test_few_rows_of_slices_that_are_used_one_by_one():
    def forward(w, x):
        for i in range(3):
            x = x @ w[i]
        return x

    w, x = normal(0, 3, 4, 4), normal(1, 9, 4)
    found = layer_inputs(forward, w, x, kind="rows", max_rows=4)
    assert found.shape == (3, 4, 4) and jnp.all(jnp.any(found != 0, axis=-1))
    np.testing.assert_array_equal(found[0], x[jnp.array([0, 3, 5, 8])])


def test_a_model_in_training_mode_is_told():
    def forward(w, x, key):
        drop = jax.jit(lambda x: x * jax.random.bernoulli(key, 0.8, x.shape))
        return drop(x) @ w

    w, x = jnp.ones((3, 2)), normal(0, 4, 3)
    with pytest.warns(UserWarning, match="draws random numbers .dropout"):
        layer_inputs(forward, w, x, jax.random.key(1))
