"""The evidence benchmarks: equal budgets, closed forms, and a cell from end to end."""

import functools
import json
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

import adamr
from adamr.routing.carrier import Routed
from benchmarks import evidence, forgetting
from benchmarks._evidence import benches, cells, pareto, runner
from benchmarks.strength_rules import RULES, conflict_scale
from benchmarks.strength_rules import method as rule_method
from examples.harness import report, statistics, task_ends
from examples.harness.problem import Data
from examples.harness.setting import setting_for


@pytest.mark.parametrize("name", benches.BENCHES)
def test_every_method_has_the_same_budget(name):
    bench = benches.BENCHES[name]
    plain = runner.configurations(bench.rates, None)
    assert len(plain) == len(bench.rates) == len(set(plain))
    for strengths in bench.strengths.values():
        penalised = runner.configurations(bench.rates, strengths)
        assert len(penalised) == len(set(penalised)) == len(plain)


def test_a_sweep_goes_on_where_its_best_is_at_the_edge():
    plain = runner.configurations((1e-3, 2e-3, 4e-3), None)
    assert runner.untried_neighbours(plain, [(2e-3, 0.0)]) == []
    assert runner.untried_neighbours(plain, [(4e-3, 0.0)]) == [(8e-3, 0.0)]
    assert runner.untried_neighbours(plain, [(1e-3, 0.0)]) == [(5e-4, 0.0)]
    strong = runner.configurations((1e-3, 2e-3, 4e-3, 8e-3), (0.3, 3.0))
    left = runner.untried_neighbours(strong, [(8e-3, 3.0)])
    assert left == [(0.032, 3.0), (8e-3, 30)]
    tried = [*strong, (8e-3, 30.0), (0.032, 3.0)]
    left = runner.untried_neighbours(tried, [(8e-3, 30.0)])
    assert left == [(2e-3, 30.0), (0.032, 30.0), (8e-3, 300.0)]


def test_a_sweep_goes_on_beside_all_that_tie_for_the_best():
    """Else the order of the grid would choose among what validation cannot tell."""
    tried = [(1e-3, 0.3), (2e-3, 0.3), (1e-3, 0.03), (4e-3, 0.3)]
    tied = [(1e-3, 0.3), (1e-3, 0.03)]
    left = runner.untried_neighbours(tried, tied)
    assert (2e-3, 0.03) in left and (1e-3, 3e-3) in left
    assert len(left) == len(set(left)) and not set(left) & set(tried)


def test_summary_in_closed_form():
    matrix = np.array([[0.9, 0.1, 0.1], [0.6, 0.8, 0.1], [0.5, 0.9, 0.7]])
    got = runner.summarize(matrix, 1.0)
    assert got["final"] == pytest.approx(2.1 / 3)
    assert got["learned"] == pytest.approx(2.4 / 3)
    assert got["forgetting"] == pytest.approx((0.4 - 0.1) / 2)  # task 1 gained 0.1
    loss = runner.summarize(-matrix, -1.0)
    assert loss["forgetting"] == pytest.approx(got["forgetting"])


def _row(name, learned, forgetting):
    runs = [
        {"final": 0.5, "learned": a, "forgetting": b}
        for a, b in zip(learned, forgetting, strict=True)
    ]
    return {"cell": name, "runs": runs}


def test_rows_are_compared_on_the_seeds_that_both_have():
    few, many = _row("few", [0.4, 0.5], [0, 0]), _row("many", [0.3, 0.2, 9.0], [0] * 3)
    got = pareto.compared(few, many, "learned")
    assert got == statistics.paired([0.4, 0.5], [0.3, 0.2])
    assert got["difference"] == pytest.approx(0.2)


@pytest.mark.smoke
def test_front_keeps_what_is_not_clearly_beaten():
    rows = [
        _row("good", [0.90, 0.92, 0.93], [0.10, 0.11, 0.14]),
        _row("beaten", [0.80, 0.81, 0.82], [0.20, 0.21, 0.22]),
        _row("stable", [0.80, 0.82, 0.81], [0.01, 0.03, 0.02]),
        _row("within", [0.60, 0.95, 0.70], [0.11, 0.12, 0.13]),
    ]
    assert pareto.front(rows, "accuracy") == ["good", "stable", "within"]
    rows.append(_row("diverged", [np.nan] * 3, [np.nan] * 3))
    rows[-1]["runs"] = [dict.fromkeys(run, None) for run in rows[-1]["runs"]]
    assert pareto.front(rows, "accuracy") == ["good", "stable", "within"]


def test_for_a_loss_less_is_better():
    rows = [_row("low", [1.0, 1.1, 1.3], [0.1, 0.1, 0.2])]
    rows.append(_row("high", [2.0, 2.2, 2.1], [0.8, 0.9, 0.7]))
    assert pareto.front(rows, "loss") == ["low"]
    assert pareto.front(rows, "accuracy") == ["low", "high"]


def test_patterns_choose_cells_in_order():
    got = forgetting.chosen("gpm/shared_v/adam none/*/adam gpm/shared_v/*")
    names = [cell.name for cell in got]
    assert names[:2] == ["gpm/shared_v/adam", "none/shared/adam"]
    assert len(names) == len(set(names)) == 5
    with pytest.raises(ValueError, match="gpm/nothing"):
        forgetting.chosen("gpm/nothing")


def test_conflict_is_where_the_gradient_opposes_the_memory():
    g = {"a": jnp.array([1.0, 0.0]), "b": jnp.array([1.0])}
    memory = {"a": jnp.array([-3.0, 0.0]), "b": jnp.array([2.0])}
    routed = Routed(jax.tree.map(jnp.zeros_like, g), g, g)
    for per_leaf, b in ((True, 1.0), (False, 0.0)):
        tx = conflict_scale(per_leaf)
        out, state = tx.update(routed, tx.init(g), memory_gradient=memory)
        assert out.first["b"][0] == b and not jnp.any(out.first["a"])
        assert state.strength.tolist() == ([1.0, 0.0] if per_leaf else [1.0])


@pytest.fixture(scope="module")
def small():
    bench = benches.BENCHES["permuted-digits"]._replace(
        options={"limit": 60, "tasks": 3}, steps=6, batch=4, seeds=2, samples=8,
        rates=(1e-3, 1e-2),
    )  # fmt: skip
    benches.BENCHES["small"] = bench
    yield "small"
    del benches.BENCHES["small"]


def test_a_cell_is_run_once_and_then_read(small, tmp_path, monkeypatch):
    calls = []
    cell = forgetting.chosen("gpm/shared_v/adam")[0]

    def run(*wanted):
        calls.append(wanted)
        return runner.run_cell(*wanted, method=cells.method(cell))

    work = [(cell.name, run)]
    first, again = (
        runner.run_cells("forgetting", small, tmp_path, work, tmp_path)
        for _ in range(2)
    )
    assert len(calls) == 1
    assert json.dumps(report.finite(first)) == json.dumps(again)
    (row,) = again
    assert len(row["runs"]) == 2 and len(row["sweep"]) > 2  # both rates are edges
    tried = [(rate, k) for rate, k, _ in row["sweep"]]
    top = max(score for *_, score in row["sweep"])
    best = [(rate, k) for rate, k, score in row["sweep"] if score == top]
    assert best[0] == (row["learning_rate"], row["strength"])
    left = runner.untried_neighbours(tried, best)
    assert row["at_the_edge_of_the_sweep"] == bool(left)
    content = json.loads((tmp_path / "forgetting_small.json").read_text())
    assert content["pareto_front"] == [cell.name]
    assert (tmp_path / "forgetting_small.png").stat().st_size > 5000

    (more,) = runner.run_cells(
        "forgetting", small, tmp_path, work, tmp_path, seeds={cell.name: 3}
    )
    assert len(calls) == 2 and more["seeds"] == [0, 1, 2]
    assert more["runs"][:2] == row["runs"] and more["sweep"] == row["sweep"]
    assert more["runs"][2] not in row["runs"]

    bench = benches.BENCHES[small]
    monkeypatch.setitem(benches.BENCHES, small, bench._replace(steps=8))
    with pytest.raises(SystemExit, match="steps was 6, is 8"):
        runner.run_cells("forgetting", small, tmp_path, work, tmp_path)


def _finite(made, method, **options):
    row = runner.run_cell(made, None, 2, method=method, **options)
    assert all(np.isfinite(list(run.values())).all() for run in row["runs"])


@pytest.mark.slow
@pytest.mark.parametrize("cell", cells.CELLS, ids=lambda cell: cell.name)
def test_every_cell_runs(small, tmp_path, cell):
    run = functools.partial(forgetting.run, cell)
    (row,) = runner.run_cells("x", small, tmp_path, [(cell.name, run)], tmp_path)
    assert all(run["final"] is not None for run in row["runs"])


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_runs(small, tmp_path, rule):
    made = benches.make(small, tmp_path)
    for routing in ("shared_v", "decoupled"):
        _finite(made, rule_method(rule, routing), memory=0.02)


def test_headlines_are_compared_where_both_results_exist(tmp_path, capsys):
    def write(folder, stem, final):
        rows = [
            {"cell": cell, "runs": [{"final": x, "forgetting": 1 - x}] * 2}
            for cell, x in final.items()
        ]
        folder.mkdir(exist_ok=True)
        (folder / f"{stem}.json").write_text(json.dumps({"rows": rows}))

    full, quick = tmp_path / "full", tmp_path / "quick"
    cells = ["gpm/shared_v/adam", "gpm/shared/adam", "gpm/shared/sgd"]
    write(full, evidence.DIGITS, dict(zip(cells, (0.9, 0.8, 0.85), strict=True)))
    stem = f"{evidence.DIGITS}_quick"
    write(quick, stem, dict(zip(cells, (0.7, 0.6, 0.65), strict=True)))
    console = Console(width=120)
    assert evidence.compare(quick, full, console) == 0
    not_run = 2 * (len(evidence.HEADLINES) - 2)
    assert capsys.readouterr().out.count("not run") == not_run
    write(quick, stem, dict(zip(cells, (0.5, 0.6, 0.65), strict=True)))
    assert evidence.compare(quick, full, console) == 1
    assert "DIFFERS" in capsys.readouterr().out


@pytest.mark.parametrize("modifier", ["gpm", "gpm_si"])
def test_shared_v_is_the_alias_where_some_kernels_are_unprotected(modifier):
    shapes = {"embedding": (7, 4), "kernel": (4, 3), "scale": (4,)}
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    setting = setting_for(params, None, tasks=2, unprotected=("embedding",))
    ours = cells.method(cells.Cell(modifier, "shared_v")).build(1e-3, 0.1, setting)
    made = cells.MODIFIERS[modifier]
    alias = made.wrap(adamr.adamr(1e-3, made.make(0.1, setting)))
    state, other = ours.init(params), alias.init(params)
    for seed in range(3):
        g = optax.tree.random_like(jax.random.key(seed), params)
        steps, state = ours.update(g, state, params)
        expected, other = alias.update(g, other, params)
        chex.assert_trees_all_equal(steps, expected)


def test_directions_of_sequences_are_those_of_their_last_position():
    p = {"w": jnp.zeros((3, 4))}
    problem = types.SimpleNamespace(logits=lambda p, x: x @ p["w"])
    inputs = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    labels = np.array([[0, 1, 2, 3, 1], [3, 2, 1, 0, 2]])
    modifier = adamr.project_out(adamr.empty_directions(p, 4))
    setting = types.SimpleNamespace(new_directions=2)
    state = task_ends.add_directions(
        problem, setting, p, modifier.init(p), Data(inputs, labels, None),
        jax.random.key(0),
    )  # fmt: skip
    for x, y in zip(inputs, labels, strict=True):
        gradient = {"w": jnp.zeros((3, 4)).at[:, y[-1]].set(x[-1])}
        left, _ = modifier.update(gradient, state)
        assert float(optax.tree.norm(left)) < 1e-5
