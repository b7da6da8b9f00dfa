"""Leaves grown together: what is shared is solved once, and nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adamr
from adamr.subspaces import together

SIZES = {"q": (12, 8), "k": (12, 4), "v": (12, 4), "out": (8, 12), "odd": (12, 3)}


def rows(seed, n):
    rng = np.random.default_rng(seed)
    return jnp.asarray(
        rng.normal(size=(20, n)) * np.exp(-np.arange(n) / 3), jnp.float32
    )


def made(seed=0):
    params = {name: jnp.zeros(shape) for name, shape in SIZES.items()}
    shared = rows(seed, 12)
    samples = dict.fromkeys(("q", "k", "v"), shared)
    return params, samples | {"out": rows(seed + 1, 8), "odd": rows(seed + 2, 12)}


def one_by_one(subspace, samples):
    """Every leaf grown alone, by a copy of its samples."""
    for name in samples:
        alone = {
            k: x + 0.0 if k == name and x is not None else None
            for k, x in samples.items()
        }
        subspace = adamr.grow_subspace(subspace, alone, threshold=0.9)
    return subspace


@pytest.mark.parametrize("jitted", [False, True])
def test_growing_together_equals_growing_apart(jitted):
    params, samples = made()
    empty = adamr.empty_subspace(params, max_rank=6)

    def grow(subspace, samples):
        return adamr.grow_subspace(subspace, samples, threshold=0.9)

    grow = jax.jit(grow) if jitted else grow
    together, apart = empty, empty
    for seed in range(2):
        samples = made(10 * seed)[1]
        together = grow(together, samples)
        apart = one_by_one(apart, samples)
    for a, b in zip(together.bases, apart.bases, strict=True):
        projectors = [np.asarray(x)[:, 0] @ np.asarray(x)[:, 0].T for x in (a, b)]
        np.testing.assert_allclose(*projectors, atol=1e-3 if jitted else 1e-6)


def test_many_leaves_grow_in_portions_of_bounded_memory_inside_jit(monkeypatch):
    params = {name: jnp.zeros((12, 3)) for name in "abcde"}
    samples = {name: rows(seed, 12) for seed, name in enumerate(params)}
    empty = adamr.empty_subspace(params, max_rank=6)

    def grow(subspace, samples):
        return adamr.grow_subspace(subspace, samples, threshold=0.9)

    whole = jax.jit(grow)(empty, samples)
    # Of one leaf: three bases of 12 x 6 and 20 rows of 12, in float32.
    monkeypatch.setattr(together, "MOST_BYTES", 2 * 4 * (3 * 72 + 240))
    again = lambda *arrays: grow(*arrays)  # noqa: E731  # traced anew
    program = jax.make_jaxpr(again)(empty, samples)
    loops = [e for e in program.eqns if e.primitive is jax.lax.scan_p]
    assert [e.params["length"] for e in loops] == [2, 2]  # and one leaf by itself
    parts = jax.jit(again)(empty, samples)
    # Rounding the samples to float32 once more moves these bases by 2e-6, and the two
    # programs round differently.
    for x, y in zip(whole.bases, parts.bases, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5)


def test_leaves_with_other_bases_do_not_share():
    """The same samples, but one leaf knew a direction already."""
    params, samples = made()
    samples = dict.fromkeys(("q", "k", "v"), samples["q"]) | {"out": None, "odd": None}
    known = np.linalg.qr(np.random.default_rng(5).normal(size=(12, 1)))[0]
    bases = {name: jnp.zeros((12, 0)) for name in ("q", "v", "odd")}
    bases |= {"k": known, "out": jnp.zeros((8, 0))}
    s = adamr.make_subspace(params, bases, max_rank=6)
    together = adamr.grow_subspace(s, samples, threshold=0.9)
    apart = one_by_one(s, samples)
    for a, b in zip(together.bases, apart.bases, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    k, _, _, q, v = together.bases
    np.testing.assert_array_equal(q[..., :6], v[..., :6])
    assert np.abs(np.asarray(k)[:, 0, 0] - known[:, 0]).max() < 1e-6
    assert np.abs(np.asarray(k) - np.asarray(q)).max() > 0.1


@pytest.mark.parametrize("jitted", [False, True])
def test_shared_samples_are_solved_once(monkeypatch, jitted):
    """Three leaves that met the same rows, two of another kind: three eigenproblems."""
    solved = []
    host, device = np.linalg.eigh, jnp.linalg.eigh

    def on_host(x):
        solved.append(1)
        return host(x)

    def on_device(x):
        jax.debug.callback(lambda: solved.append(1))
        return device(x)

    monkeypatch.setattr(np.linalg, "eigh", on_host)
    monkeypatch.setattr(jnp.linalg, "eigh", on_device)
    params, samples = made()
    empty = adamr.empty_subspace(params, max_rank=5)

    def grow(subspace, shared, own):
        samples = dict.fromkeys(("q", "k", "v"), shared) | own
        return adamr.grow_subspace(subspace, samples)

    if jitted:
        jax.clear_caches()
        grow = jax.jit(grow)
    own = {name: samples[name] for name in ("out", "odd")}
    jax.block_until_ready(grow(empty, samples["q"], own))
    jax.effects_barrier()
    assert len(solved) == 3


@pytest.mark.parametrize("count", [200, 25])
def test_growth_in_the_complement_is_exact_for_nearly_dependent_rows(count):
    """Fewest directions, orthonormal, and the known ones keep their bits."""
    rng = np.random.default_rng(3)
    n, threshold = 40, 0.95
    known = np.linalg.qr(rng.normal(size=(n, 10)))[0]
    x = rng.normal(size=(count, 6)) @ rng.normal(size=(6, n))
    x = x + 1e-4 * rng.normal(size=x.shape) + 0.3 * rng.normal(size=(count, n)) / n
    params = {"w": jnp.zeros((n, 3))}
    before = adamr.make_subspace(params, {"w": jnp.asarray(known)})
    after = adamr.grow_subspace(
        before, {"w": jnp.asarray(x, jnp.float32)}, threshold=threshold
    )
    u = np.asarray(after.bases[0], np.float64)[:, 0]
    u = u[:, np.sum(u * u, axis=0) > 0.5]
    assert u.shape[1] > 10
    np.testing.assert_allclose(u.T @ u, np.eye(u.shape[1]), atol=1e-6)
    np.testing.assert_array_equal(u[:, :10], np.asarray(before.bases[0])[:, 0, :10])
    shares = [
        np.sum((x @ u[:, :k]) ** 2) / np.sum(x * x)
        for k in (u.shape[1] - 1, u.shape[1])
    ]
    assert shares[0] < threshold <= shares[1] + 1e-6
    rest = x - x @ known @ known.T
    best = np.linalg.svd(rest)[2][: u.shape[1] - 10]
    np.testing.assert_allclose(u[:, 10:] @ u[:, 10:].T, best.T @ best, atol=1e-5)
