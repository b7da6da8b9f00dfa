"""Fisher information and memory-aware importance: closed forms, twins, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adamr import fisher_information
from adamr.penalties import memory_aware_importance
from tests.references import penalty as reference


def linear(params, x):
    return x @ params["w"]


def logistic(w, x):
    return jnp.array([0.0, 1.0]) * w * x


def draw(seed=0, n=7, features=4, classes=3):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(features, classes)).astype(np.float32)
    x = rng.normal(size=(n, features)).astype(np.float32)
    return w, x, rng.integers(0, classes, n)


@pytest.mark.smoke
@pytest.mark.parametrize("kind", ["true", "sampled", "empirical", "predicted"])
def test_t14_fisher(kind):
    """At w = 0 every label has a gradient of ±½; their mean is 0, its square no F."""
    inputs = jnp.ones(2)
    extra = {
        "sampled": {"key": jax.random.key(0)},
        "empirical": {"labels": jnp.array([0, 1])},
    }.get(kind, {})
    f = fisher_information(logistic, jnp.zeros([]), inputs, kind=kind, **extra)
    np.testing.assert_allclose(f, 0.25, rtol=1e-6)

    def loss(w):
        log_p = jax.nn.log_softmax(jax.vmap(logistic, (None, 0))(w, inputs))
        return -jnp.mean(log_p[jnp.arange(2), jnp.array([0, 1])])

    assert jax.grad(loss)(jnp.zeros([])) ** 2 == 0


@pytest.mark.parametrize("chunk_size", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("kind", ["true", "empirical", "predicted"])
def test_fisher_is_the_float64_twin_for_any_chunk(kind, chunk_size):
    w, x, labels = draw()
    given = {"labels": jnp.array(labels)} if kind == "empirical" else {}
    f = fisher_information(
        linear, {"w": jnp.array(w)}, jnp.array(x), kind=kind, chunk_size=chunk_size,
        **given,
    )  # fmt: skip
    expected = reference.fisher(w, x, labels, kind)
    np.testing.assert_allclose(f["w"], expected, rtol=2e-5, atol=1e-8)


def test_sampled_labels_give_the_true_fisher_in_the_mean():
    w, x, _ = draw(n=5)
    many = jnp.array(np.repeat(x, 4000, axis=0))
    f = fisher_information(
        linear, {"w": jnp.array(w)}, many, kind="sampled", key=jax.random.key(1)
    )
    np.testing.assert_allclose(f["w"], reference.fisher(w, x), rtol=0.06)
    chunked = fisher_information(
        linear, {"w": jnp.array(w)}, many, kind="sampled", key=jax.random.key(1),
        chunk_size=999,
    )  # fmt: skip
    np.testing.assert_allclose(f["w"], chunked["w"], rtol=1e-4)


def test_a_sequence_is_one_sample():
    """Empirical: the square of the sum over positions. True: the sum of squares."""
    w, x, labels = draw(n=6)
    sequences, ys = x.reshape(2, 3, 4), labels.reshape(2, 3)
    p = reference.softmax(x.astype(np.float64) @ w)
    scores = x[:, :, None] * (np.eye(3)[labels] - p)[:, None, :]
    expected = (scores.reshape(2, 3, 4, 3).sum(axis=1) ** 2).mean(axis=0)
    params = {"w": jnp.array(w)}
    f = fisher_information(
        linear, params, jnp.array(sequences), jnp.array(ys), kind="empirical"
    )
    np.testing.assert_allclose(f["w"], expected, rtol=1e-5)
    f = fisher_information(linear, params, jnp.array(sequences))
    np.testing.assert_allclose(f["w"], 3 * reference.fisher(w, x), rtol=1e-5)


def test_importances_work_under_jit_and_with_trees_of_inputs():
    w, x, labels = draw()

    def logits(params, sample):
        return (sample["a"] + sample["b"]) @ params["w"]

    inputs = {"a": jnp.array(x) / 4, "b": jnp.array(x) * 3 / 4}
    params = {"w": jnp.array(w), "absent": None}

    @jax.jit
    def both(params, labels):
        f = fisher_information(
            logits, params, inputs, labels, kind="empirical", chunk_size=2
        )
        return f, memory_aware_importance(logits, params, inputs, chunk_size=2)

    f, omega = both(params, jnp.array(labels))
    assert f["absent"] is None and omega["absent"] is None
    expected = reference.fisher(w, x, labels, "empirical")
    np.testing.assert_allclose(f["w"], expected, rtol=2e-5, atol=1e-8)
    np.testing.assert_allclose(omega["w"], reference.mas(w, x), rtol=2e-5)


def test_bfloat16_parameters_give_float32_importance():
    w, x, _ = draw()
    params = {"w": jnp.array(w, jnp.bfloat16)}
    f = fisher_information(linear, params, jnp.array(x, jnp.bfloat16))
    omega = memory_aware_importance(linear, params, jnp.array(x, jnp.bfloat16))
    assert f["w"].dtype == omega["w"].dtype == jnp.float32
    np.testing.assert_allclose(f["w"], reference.fisher(w, x), rtol=0.1, atol=2e-3)
    # A mean of many small squares would stall at 1/256 of its value in bfloat16.
    many = jnp.ones((4096, 1), jnp.bfloat16)
    f = fisher_information(
        linear, {"w": jnp.zeros((1, 2), jnp.bfloat16)}, many, chunk_size=1
    )
    np.testing.assert_allclose(f["w"], 0.25, rtol=1e-5)


def test_memory_is_bounded_by_the_chunk():
    """Working memory goes with the chunk, not with the samples."""
    w, x = jnp.zeros((16, 8)), jnp.ones((64, 16))

    def memory(chunk_size):
        program = jax.jit(
            lambda w: fisher_information(linear, w, x, chunk_size=chunk_size)
        ).lower({"w": w})
        return program.compile().memory_analysis().temp_size_in_bytes

    assert memory(4) < memory(None) / 4


def test_t17_memory_aware_importance():
    x = jnp.array([[1.0, -0.5], [1.0, 0.5]])
    w = jnp.ones(2)
    np.testing.assert_allclose(memory_aware_importance(jnp.dot, w, x), [2, 1])
    batch = memory_aware_importance(jnp.dot, w, x, per_sample=False)
    np.testing.assert_allclose(batch, [2, 0.5])
    # Chunks of one sample are per-sample.
    alone = memory_aware_importance(jnp.dot, w, x, per_sample=False, chunk_size=1)
    np.testing.assert_allclose(alone, [2, 1])
    doubled = memory_aware_importance(lambda w, x: 2 * jnp.dot(w, x), w, x)
    np.testing.assert_allclose(doubled, [8, 4])


@pytest.mark.parametrize("per_sample", [True, False])
def test_mas_is_the_float64_twin(per_sample):
    w, x, _ = draw(3)
    omega = memory_aware_importance(
        linear, {"w": jnp.array(w)}, jnp.array(x), per_sample=per_sample
    )
    np.testing.assert_allclose(omega["w"], reference.mas(w, x, per_sample), rtol=2e-5)


def test_errors_say_what_was_expected():
    w, x, labels = draw()
    params, x, labels = {"w": jnp.array(w)}, jnp.array(x), jnp.array(labels)
    for match, arguments in [
        ("kind is 'exact'", {"kind": "exact"}),
        ("labels missing", {"kind": "empirical"}),
        ("labels given", {"labels": labels}),
        ("key missing", {"kind": "sampled"}),
        ("key given", {"key": jax.random.key(0)}),
        (r"shape \(3,\), expected", {"kind": "empirical", "labels": labels[:3]}),
        ("integers", {"kind": "empirical", "labels": labels * 1.0}),
        (r"lie in .* expected \[0, 2\]", {"kind": "empirical", "labels": labels + 9}),
        ("chunk_size must be", {"chunk_size": 0}),
    ]:
        with pytest.raises(ValueError, match=match):
            fisher_information(linear, params, x, **arguments)
    for inputs in (x[:0], jnp.float32(1), {"a": x, "b": x[:2]}):
        with pytest.raises(ValueError, match="one leading axis"):
            fisher_information(linear, params, inputs)
        with pytest.raises(ValueError, match="one leading axis"):
            memory_aware_importance(linear, params, inputs)


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("kind", ["true", "sampled", "empirical", "predicted"])
def test_one_logit_is_that_of_a_sigmoid(shape, kind):
    """F of one logit z equals F of the two logits (0, z), for every kind."""
    w, x = jnp.array([0.3, -0.2]), jnp.array([[1.0, 2.0], [0.5, -1.0], [2.0, 0.1]])
    options = {
        "sampled": {"key": jax.random.key(1)},
        "empirical": {"labels": [0, 1, 1]},
    }.get(kind, {})

    def two(w, x):
        return jnp.stack([0.0, x @ w])

    one = fisher_information(
        lambda w, x: (x @ w).reshape(shape), w, x, kind=kind, **options
    )
    np.testing.assert_allclose(
        one, fisher_information(two, w, x, kind=kind, **options), rtol=1e-6
    )
    assert (one > 0).all()
    if kind == "true":
        p = 1 / (1 + np.exp(-np.asarray(x @ w, np.float64)))
        by_hand = np.mean((p * (1 - p))[:, None] * np.asarray(x) ** 2, axis=0)
        np.testing.assert_allclose(one, by_hand, rtol=1e-5)


def test_millions_of_passes_are_refused():
    def logits(w, x):
        return w * jnp.ones((100, 50_000))

    with pytest.raises(ValueError, match="5000000 backward passes.*kind='sampled'"):
        fisher_information(logits, jnp.ones([]), jnp.ones(2))
