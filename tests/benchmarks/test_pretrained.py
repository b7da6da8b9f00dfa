"""The evidence on pretrained models: shares of a change, and one tiny stream."""

import dataclasses
import json
import math
import shutil

import jax
import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("tyro")

from benchmarks._pretrained import cell, change, found  # noqa: E402
from benchmarks._pretrained.streams import (  # noqa: E402
    LEVERS,
    STREAMS,
    VARIANTS,
    arms,
    grid,
)
from examples.llm.methods import METHODS  # noqa: E402


def test_a_change_across_old_inputs_moves_no_response():
    w = {"k": np.ones((4, 3), np.float32)}
    met = {"k": np.diag([0.5, 0.5, 0.0, 0.0]).astype(np.float32)}
    d = np.zeros((4, 3), np.float32)
    d[3] = 2.0
    moved = change.moved(w, {"k": w["k"] + d}, met)
    assert moved == {"moved": 0.0, "along_inputs": 0.0}


def test_a_change_along_old_inputs_is_counted_against_a_blind_one():
    # All of D lies along one of n = 4 inputs, which has all the energy: 4 times a
    # change without preference. ‖XD‖ / ‖XW‖ = 2 / 1.
    w = {"k": np.ones((4, 3), np.float32)}
    met = {"k": np.diag([1.0, 0.0, 0.0, 0.0]).astype(np.float32)}
    d = np.zeros((4, 3), np.float32)
    d[0] = 2.0
    moved = change.moved(w, {"k": w["k"] + d}, met)
    assert moved == pytest.approx({"moved": 2.0, "along_inputs": 4.0})


def test_shares_along_singular_directions(tmp_path):
    w = {"k": np.diag([4.0, 3.0, 2.0, 1.0]).astype(np.float32)}
    d = np.zeros((4, 4), np.float32)
    d[0, 3] = 1.0  # a leading direction inside, none outside
    after = {"k": w["k"] + d}
    for _ in range(2):  # the second time from disk
        shares = change.share_of_singular(w, after, tmp_path / "cache")
        assert shares == pytest.approx({"along_inside": 1.0, "along_outside": 0.0})
    assert len(list((tmp_path / "cache").iterdir())) == 1
    still = change.share_of_singular(w, w, tmp_path / "cache")
    assert still == {"along_inside": 0.0, "along_outside": 0.0}
    other = {"k": w["k"][::-1, ::-1].copy()}  # of another model
    shares = change.share_of_singular(other, {"k": other["k"] + d}, tmp_path / "cache")
    assert shares == pytest.approx({"along_inside": 0.0, "along_outside": 1.0})


def test_every_method_has_three_rates_and_its_own_is_one_of_them():
    for name, method in METHODS.items():
        rates, coefficients = grid(name, method)
        assert len(set(rates)) == 3 and method.learning_rate in rates
        assert (len(coefficients) > 1) <= (method.coefficient is not None)
    assert grid("adam", METHODS["adam"]).rates == (3e-4, 1e-3, 3e-3)
    assert grid("lora_complement", METHODS["lora_complement"]).rates == (
        grid("adam", METHODS["adam"]).rates
    )


def test_levers_change_one_setting_each():
    changed = [{**arm.options, **arm.setting} for arm in LEVERS.values()]
    masked = LEVERS["first-token-masked"]
    assert all(len(c) == 1 for c in changed if c != masked.setting)
    assert set(LEVERS).isdisjoint(METHODS)
    assert set(arms()) == {*LEVERS, *METHODS, *VARIANTS}


def test_a_sweep_continues_where_it_stopped(monkeypatch):
    losses = {3e-4: math.nan, 1e-3: 2.0, 3e-3: 3.0}
    seen = []

    def score(plan, rate, coefficient):
        seen.append((rate, coefficient))
        return None, losses[rate] - (coefficient == 1 / 6)

    monkeypatch.setattr(cell, "_score", score)
    kept = []
    sweep = [[1e-3, 0.5, 2.0]]
    tuned = cell._tuned(None, "er", sweep, lambda: kept.append(len(sweep)))
    assert seen == [(3e-4, 0.5), (3e-3, 0.5), (1e-3, 1 / 6), (1e-3, 1 / 25)]
    assert (tuned["rate"], tuned["coefficient"]) == (1e-3, 1 / 6)
    assert kept == [2, 3, 4, 5] and sweep[1] == [3e-4, 0.5, None]


def measured(final: float, **more) -> dict:
    row = {"seed": 0, "learned_loss": final - 0.1, "final_loss": final}
    return {"tuning": {"rate": 1e-3, "coefficient": 0.0}, "rows": [row], **more}


def test_the_reversed_order_takes_the_rates_of_the_first(tmp_path, monkeypatch):
    from benchmarks import pretrained

    jobs = []

    def note(job):
        jobs.append(job)
        return measured(1.5, about={"model": "m"}, fit={})

    monkeypatch.setattr(pretrained, "_measured", note)
    config = pretrained.Config("instruct-reversed", "adam", out=tmp_path)
    with pytest.raises(SystemExit, match="adam is not there yet"):
        pretrained.main(config)
    before = {"methods": {"adam": measured(2.0)}}
    (tmp_path / "pretrained_instruct.json").write_text(json.dumps(before))
    pretrained.main(config)
    assert [job.tuning for job in jobs] == [before["methods"]["adam"]["tuning"]]
    told = json.loads((tmp_path / "pretrained_instruct_reversed.json").read_text())
    assert told["methods"] == {"adam": measured(1.5)}
    assert told["about"] == {"model": "m"} and jobs[0].about is None
    pretrained.main(dataclasses.replace(config, seeds=2))
    assert jobs[1].about == {"model": "m"} and jobs[1].seeds == (1,)
    assert (tmp_path / "pretrained.png").stat().st_size > 5_000


def test_methods_by_their_last_loss():
    lines = {"lines": [{"seed": 0, "final_loss": 1.2}]}
    result = {"methods": {"adam": measured(2.0, **lines), "er": measured(1.5)}}
    assert found.by_final(result) == ["lines", "er", "adam"]
    assert found.values(result, "er", "tuning.rate") == [None]
    general = {"general_loss_before": 1.0, "general_loss_after": 1.5}
    assert found.value(general, "general") == 0.5


def test_differences_are_of_the_seeds_that_both_have():
    def rows(*finals):
        return {"rows": [{"seed": i, "final_loss": x} for i, x in enumerate(finals)]}

    result = {"methods": {"adam": rows(2.0, 2.2, 2.4), "er": rows(1.5, 1.8)}}
    mean, half = found.differences(result, "er", "adam", "final_loss")
    # -0.5 and -0.4: spread √(0.005), t(0.975, 1) = 12.706
    assert mean == pytest.approx(-0.45)
    assert half == pytest.approx(12.706 * (0.005 / 2) ** 0.5, rel=1e-4)


def test_tables_of_streams_levers_differences_and_costs(monkeypatch):
    """What pages show of results that are still made."""
    pytest.importorskip("scipy")
    from benchmarks._pages.evidence import pretrained_tables as tables

    def rows(final, seconds, seeds=2):
        return [
            {
                "seed": seed,
                "learned_loss": final - 0.1,
                "final_loss": final + 0.01 * seed,
                "forgetting": 0.1,
                "general_loss_before": 4.0,
                "general_loss_after": 4.25,
                "kl": 0.5,
                "protected": [{"8": [0.25, 0.5]}],
                "cores": 1,
                "seconds_per_step": seconds,
                "boundary_seconds": [4.0, 1.0, 6.0, 1.0] if final == 1.0 else [],
                "peak_memory": None if seed else 2e9,
            }
            for seed in range(seeds)
        ]

    found = {
        "lora_complement": rows(1.0, 2.0),
        "adam": rows(1.5, 1.0),
        "threshold-0.8": rows(1.2, 2.0, seeds=1),
    }
    result = {"methods": {name: {"rows": own} for name, own in found.items()}}
    monkeypatch.setattr(tables, "_read", lambda stream: result)
    lever = "| threshold 0.8 instead of 0.9 | 1.100 | 1.200 | 0.100 | 0.250 | 0.500 |"
    assert f"{lever} 25 % |" in tables.levers("instruct")
    both = tables.streams("instruct", "instruct-reversed")
    assert "| Adam on the pairs | 1.400 → 1.505, +0.250 | 1.400 → 1.505, +0.25" in both
    minus = "| six instruction tasks | 2 | **-0.500 ±0.000** | **-0.500 ±0.000** | +0"
    assert minus in tables.paired("adam", "instruct")
    assert "| **protected pairs** | 2.00 | 2.00 | 6 | 2.0 |" in tables.costs("instruct")


def test_every_lever_has_a_name_for_readers():
    assert set(found.LEVER_NAMES) == set(LEVERS)
    assert set(METHODS) < set(found.NAMES)


def test_results_of_another_model_are_refused():
    about = {"model": "this", "context": 80}
    cell._require(about, about, "--out")
    with pytest.raises(SystemExit, match="--out has results of model that, not this"):
        cell._require({"model": "that", "context": 80}, about, "--out")


@pytest.mark.slow
@pytest.mark.filterwarnings("default::DeprecationWarning")
@pytest.mark.parametrize("name", ["adam", "lora_complement", "osft_hooked"])
def test_a_cell_from_sweep_to_row(name, tmp_path, monkeypatch):
    pytest.importorskip("tunix")
    pytest.importorskip("qwix")
    from benchmarks import pretrained
    from examples.llm.tiny import write_tiny

    monkeypatch.setitem(STREAMS, "instruct", {"tasks": "TLDR-ko,TLDR-shell"})
    for task in ("TLDR-ko", "TLDR-shell", "General"):
        (tmp_path / task).mkdir()
        rows = [{"prompt": f"{i}?\n", "answer": f"{i % 3} x"} for i in range(12)]
        for part in ("train", "eval", "test"):
            (tmp_path / task / f"{part}.json").write_text(json.dumps(rows))
    model = write_tiny(tmp_path / "model")

    def in_process(job):
        cell.main(job, tmp_path / "found.json")
        return json.loads((tmp_path / "found.json").read_text())

    monkeypatch.setattr(pretrained, "_measured", in_process)
    config = pretrained.Config(
        "instruct", name, data=tmp_path, model=model, out=tmp_path, cache=tmp_path
    )
    with jax.numpy_rank_promotion("allow"):
        pretrained.main(config)
        told = (tmp_path / "pretrained_instruct.json").read_text()
        shutil.rmtree(model)  # what is finished is not run again
        pretrained.main(config)
    assert (tmp_path / "pretrained_instruct.json").read_text() == told
    whole = json.loads(told)
    assert whole["fit"]["TLDR-ko"]["test"] == {"rows": 12, "shortened": 0, "dropped": 0}
    assert whole["about"]["model"] == "model"
    result = whole["methods"][name]
    (row,) = result["rows"]
    assert len(result["tuning"]["sweep"]) == 3
    assert row["change"]["moved"] > 0
    assert (row["protected"] is not None) == (name == "lora_complement")
    assert ("lines" in result) == (name == "adam")
