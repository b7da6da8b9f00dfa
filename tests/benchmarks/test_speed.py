"""The benchmarks of scaling and of accelerators run, and count what they say."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("flax")
pytest.importorskip("matplotlib")
pytest.importorskip("tyro")

import adamr
from benchmarks import accelerator, adapters, boundary, scaling
from benchmarks._speed import rivals, timing


@pytest.mark.smoke
def test_power_law_finds_the_exponent_and_its_error():
    x = np.array([1.0, 10.0, 100.0, 1000.0])
    for p in (-1.0, 0.0, 0.5, 2.0):
        fit = scaling.power_law(x, 3 * x**p)
        np.testing.assert_allclose(fit["exponent"], p, atol=1e-12)
        assert fit["standard_error"] < 1e-12
    rng, errors, told = np.random.default_rng(0), [], []
    for _ in range(400):
        fit = scaling.power_law(x, x * np.exp(0.3 * rng.normal(size=4)))
        errors.append(fit["exponent"] - 1.0)
        told.append(fit["standard_error"] ** 2)
    np.testing.assert_allclose(np.mean(told), np.var(errors), rtol=0.2)


def test_scaling_writes_what_grows(tmp_path):
    config = scaling.Config(out=tmp_path, **{**scaling.QUICK, "sweeps": ("rank",)})
    scaling.main(dataclasses.replace(config, size=10_000))
    scaling.main(dataclasses.replace(config, sweeps=("devices",)))
    results = json.loads((tmp_path / "scaling.json").read_text())
    assert set(results) == {"rank", "devices"}  # an earlier sweep stays
    fits = results["rank"]["fits"]
    assert abs(fits["alias basis_bytes"]["exponent"] - 1) < 0.01
    assert fits["adam state_bytes"]["exponent"] == 0
    assert abs(results["devices"]["fits"]["adam state_bytes"]["exponent"] + 1) < 0.05
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


def test_bytes_that_an_update_must_move():
    params = {"kernel": jnp.zeros((64, 32)), "bias": jnp.zeros(32)}
    size = 64 * 32 + 32

    def moved(tx):
        return rivals.moved_bytes(params, tx.init(params))

    assert moved(optax.adam(1e-3)) == 4 * 7 * size + 2 * 4  # and the count
    subspace = adamr.empty_subspace(params, max_rank=4)
    shared = 2 * (size + size + 32 + 32) + size + (64 * 4 + 4)
    alias = adamr.adamr(1e-3, adamr.project_out(subspace))
    assert moved(alias) == 4 * shared + 2 * 4


def test_a_stepper_takes_the_mean_over_its_steps():
    seen = []

    def step(params, state, gradient):
        seen.append(gradient)
        return params, state

    run = timing.stepper(step, jnp.ones(1), jnp.ones(1), steps=3)
    assert run("g") > 0 and seen == ["g"] * 3


def measured(tmp_path, *parts):
    config = accelerator.Config(quick=True, parts=parts, out=tmp_path)
    return json.loads(accelerator.main(config).read_text())


def test_accelerator_on_what_is_at_hand(tmp_path):
    results = measured(tmp_path, "projection")
    assert results["limits"]["copy_bytes_per_s"] > 1e8
    assert 0 < results["projection"]["share_of_matmul_rate"] < 1.5
    kernels = 64 * (3 * 64 + 64 + 4 * 64 + 4 * 64)
    assert results["projection"]["operations"] == 4 * 8 * kernels
    assert jax.devices()[0].device_kind in results["machine"]["device"]


def test_pairs_on_what_is_at_hand(tmp_path):
    results = measured(tmp_path, "adapters")
    assert set(results["ratios"]) == {"pairs of 7B, alias / optax.adam"}
    for name in ("layer_inputs", "start_task", "inflora"):
        assert results["adapters"]["boundary"][name]["seconds"] > 0
    state = results["adapters"]["alias"]["state_bytes"]
    bases = 4 * 8 * (6 * 64 + 96)  # of seven A's, eight directions each
    assert state > bases + 4 * 8 * (6 * 64 + 96)  # and the first moment


@pytest.mark.slow
def test_all_parts_of_accelerator(tmp_path):
    results = measured(tmp_path, *accelerator.Config().parts)
    assert set(results["ratios"]) == set(accelerator.RATIOS)
    assert results["ratios"]["training with the alias"]["pairs"] == 11
    assert set(results["training"]) == {"adam", "alias", "adaptive"}
    assert {"adam", "muon", "shared", "alias"} <= set(results["update"])
    for told in results["update"].values():
        assert 0 < told["share_of_copy_rate"] < 1.5


def test_a_boundary_of_a_small_model(tmp_path):
    out = tmp_path / "boundary.json"
    config = boundary.Config(layers=2, rows=24, large=False, out=out)
    found = boundary.main(config)["small"]
    assert (found["leaves"], found["distinct"]) == (14, 8)
    assert json.loads(out.read_text())["small"] == found
    assert all(value > 0 for value in found.values())


def test_steps_on_the_adapters_of_a_small_model(tmp_path):
    out = tmp_path / "adapters.json"
    config = adapters.Config(layers=1, ranks=(4,), seconds=0.0, out=out)
    found = adapters.main(config)
    assert (found["leaves"], found["parameters"]) == (14, 81_408)
    assert json.loads(out.read_text()) == json.loads(json.dumps(found))
    (group,) = found["groups"]
    assert {n: r["target"] for n, r in group["ratios"].items()} == {
        "chain / adam": None,
        "alias / adam": 2.5,
    }
    assert all(0 < r["median"] < 100 for r in group["ratios"].values())


@pytest.mark.slow
def test_the_boundary_of_an_8b_layer_fits_beside_it():
    peaks = boundary.large(boundary.Config())["peak_bytes"]
    assert set(peaks) == set(boundary.layer_shapes(1, 1, 1))
    assert max(peaks.values()) < 2e9
