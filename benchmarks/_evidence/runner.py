"""One cell of the evidence: its own sweep, its seeds, its numbers, kept on disk.

Every cell has the same budget: as many configurations as its bench has learning
rates. A method with a coefficient takes every second rate at two coefficients. Then the
sweep continues with what lies one step of the grid next to the best, or next to those
that tie for it, and beyond the grid at its edges, for at most `ROUNDS` rounds. It sees
the first three tasks, their validation examples and one seed that no result uses.

The committed results call the coefficient `strength`, and so do the rows here.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks._evidence import pareto, trade_off
from benchmarks._evidence.benches import BENCHES, Made, make
from benchmarks._speed import timing
from examples import streams
from examples.harness import loop
from examples.harness.methods import Method
from examples.harness.report import commit, versions, write
from examples.harness.setting import Setting, setting_for
from examples.vision.problem import feed

__all__ = ["configurations", "quicker", "run_cell", "run_cells"]

TUNING_SEED, TUNING_TASKS = 1000, 3
ROUNDS = 4


DEFINITIONS = {
    "final": "mean over tasks of the measure after the whole stream",
    "learned": "mean over tasks of the measure just after the task: plasticity",
    "forgetting": "mean over old tasks of the best earlier measure minus the last one "
    "(of the loss: the last minus the lowest)",
    "measure": "accuracy, or loss in nats per symbol, on test data",
    "sweep": "[learning rate, coefficient, score] on the validation data of the first "
    "three tasks with seed 1000; score: accuracy, or minus the loss; it continues "
    "next to the best, and those that tie for it, beyond the grid at its edges",
    "pareto_front": "cells for which no other is better in both `learned` and "
    "`forgetting` by more than the 95 % interval of the paired difference",
}


def configurations(
    rates: Sequence[float], coefficients: Sequence[float] | None
) -> list[tuple[float, float]]:
    """(rate, coefficient) pairs, as many for every method."""
    if coefficients is None:
        return [(rate, 0.0) for rate in rates]
    return [(rate, k) for k in coefficients for rate in rates[1::2]]


def _with_ends(values: set[float]) -> list[float]:
    """Sorted, with one more at both ends, by the steps there."""
    known = sorted(values)
    if len(known) < 2:  # a method without a coefficient
        return known
    ends = known[0] ** 2 / known[1], known[-1] ** 2 / known[-2]
    below, above = (float(f"{x:.2g}") for x in ends)
    return [below, *known, above]


def _beside(values: list[float], x: float) -> list[float]:
    at = values.index(x)
    return values[max(at - 1, 0) : at + 2]


def untried_neighbours(
    tried: Sequence[tuple[float, float]], best: Sequence[tuple[float, float]]
) -> list[tuple[float, float]]:
    """Configurations one step of the grid next to the best ones, not tried yet."""
    rates, coefficients = (_with_ends({c[axis] for c in tried}) for axis in range(2))
    found = []
    for rate, coefficient in best:
        found += [(x, coefficient) for x in _beside(rates, rate)]
        found += [(rate, x) for x in _beside(coefficients, coefficient)]
    return [c for c in dict.fromkeys(found) if c not in tried]


def _setting(made: Made, tasks: int, directions: int) -> Setting:
    params = jax.eval_shape(made.problem.init, jax.random.key(0))
    return setting_for(
        params,
        made.axes,
        tasks=tasks,
        unprotected=made.unprotected,
        threshold=made.bench.threshold,
        samples=made.bench.samples,
        new_directions=directions,
        max_rank=made.bench.max_rank,
    )


def _learn(made: Made, stream, method: Method, runs, memory: float, directions: int):
    """The history of runs (rate, coefficient, seed) on a stream."""
    bench = made.bench
    rates, coefficients, seeds = zip(*runs, strict=True)
    room = max(1, round(memory * stream.train.x.shape[1])) if memory else 0
    chunks = loop.learn(
        made.problem, method, _setting(made, len(stream.task_names), directions),
        feed(stream, bench.batch), rates=rates, coefficients=coefficients,
        seeds=list(seeds), steps=bench.steps, memory_size=room,
    )  # fmt: skip
    _, _, history = loop.last(chunks)
    return history


def _tune(made: Made, method: Method, tried, memory, directions) -> list[float]:
    """Each configuration's final accuracy, or minus its final loss; NaN is worst."""
    count = min(TUNING_TASKS, len(made.stream.task_names))
    stream = streams.for_tuning(made.stream, count)
    runs = [(rate, k, TUNING_SEED) for rate, k in tried]
    history = _learn(made, stream, method, runs, memory, directions)
    if made.bench.measure == "accuracy":
        score = history.accuracy[:, -1, -1].mean(-1)
    else:
        score = -history.loss[:, -1, -1].mean(-1)
    return np.where(np.isfinite(score), score, -np.inf).tolist()


def summarize(matrix: np.ndarray, sign: float) -> dict[str, float]:
    """Final, learned and forgetting of one run; sign 1 for accuracy, -1 for loss.

    final       mean over tasks j of M[T-1, j]
    learned     mean over tasks j of M[j, j]: plasticity
    forgetting  mean over j < T-1 of the best earlier M[i, j] minus the last one
    """
    last = len(matrix) - 1
    best = [(sign * matrix[j:last, j]).max() for j in range(last)]
    lost = np.array(best) - sign * matrix[last, :last]
    return {
        "final": float(matrix[-1].mean()),
        "learned": float(matrix.diagonal().mean()),
        "forgetting": float(lost.mean()),
    }


def _results(made: Made, method: Method, runs, memory, directions) -> list[dict]:
    history = _learn(made, made.stream, method, runs, memory, directions)
    accuracy = made.bench.measure == "accuracy"
    whole, sign = (history.accuracy, 1.0) if accuracy else (history.loss, -1.0)
    return [summarize(m[:, -1], sign) for m in whole]


def _tuned(
    made: Made, method: Method, coefficients, memory, directions
) -> dict[str, Any]:
    """A row with the sweep of a cell and no seeds."""
    start, tried, scores = time.perf_counter(), [], []
    more = configurations(made.bench.rates, coefficients)
    for _ in range(1 + ROUNDS):
        tried += more
        scores += _tune(made, method, more, memory, directions)
        top = max(scores)
        best = [c for c, s in zip(tried, scores, strict=True) if s == top]
        more = untried_neighbours(tried, best)
        if not more:
            break
    rate, coefficient = best[0]
    return {
        "cell": method.about,
        "learning_rate": rate,
        "strength": coefficient,
        "at_the_edge_of_the_sweep": bool(more),
        "sweep": [[*c, s] for c, s in zip(tried, scores, strict=True)],
        "seeds": [],
        "runs": [],
        "seconds": {"sweep": time.perf_counter() - start, "results": 0.0},
    }


def run_cell(
    made: Made,
    row: dict[str, Any] | None,
    seeds: int,
    *,
    method: Method,
    coefficients: Sequence[float] | None = None,
    memory: float = 0.0,
    directions: int = 0,
) -> dict[str, Any]:
    """Tunes a method and learns the stream with every seed that `row` lacks."""
    row = row or _tuned(made, method, coefficients, memory, directions)
    start, new = time.perf_counter(), list(range(len(row["seeds"]), seeds))
    runs = [(row["learning_rate"], row["strength"], seed) for seed in new]
    # The directions of all seeds at once may not fit into memory.
    portions = [[run] for run in runs] if directions else [runs]
    found = []
    for portion in portions:
        found += _results(made, method, portion, memory, directions)
    took = row["seconds"]["results"] + time.perf_counter() - start
    return {
        **row,
        "seeds": [*row["seeds"], *new],
        "runs": [*row["runs"], *found],
        "seconds": {**row["seconds"], "results": took},
    }


def quicker(name: str) -> str:
    """Registers the bench with half the steps, 3 seeds and half the rates."""
    bench, small = BENCHES[name], f"{name}-quick"
    BENCHES[small] = bench._replace(
        steps=bench.steps // 2, seeds=3, rates=bench.rates[1::2]
    )
    return small


def _read(path: Path, bench: dict[str, Any]) -> dict[str, dict]:
    """Rows of earlier runs by cell; refuses those of another bench."""
    if not path.exists():
        return {}
    saved = json.loads(path.read_text())
    now = json.loads(json.dumps(bench))
    differ = [key for key in now if saved["bench"].get(key) != now[key]]
    if differ:
        told = "; ".join(
            f"{key} was {saved['bench'].get(key)!r}, is {now[key]!r}" for key in differ
        )
        raise SystemExit(
            f"{path} holds results of another bench ({told}): move it away, or give "
            "another --out."
        )
    return {row["cell"]: row for row in saved["rows"]}


def run_cells(
    what: str,
    bench: str,
    data: Path,
    work: Sequence[tuple[str, Callable[[Made, dict | None, int], dict[str, Any]]]],
    out: Path,
    seeds: Mapping[str, int] | None = None,
) -> list[dict[str, Any]]:
    """Runs the cells and seeds that `<out>/<what>_<bench>.json` lacks, one by one.

    Args:
      what: name of the benchmark.
      bench: name of the stream.
      data: folder of the data sets.
      work: (name of the cell, (made, earlier row, seeds) -> row) in the order to run
        them.
      out: folder of the results; the picture goes there as well.
      seeds: of cells that have more than the bench gives every one.

    Returns:
      All rows, earlier ones included.
    """
    measure = BENCHES[bench].measure
    about = {"name": bench, **BENCHES[bench]._asdict()}
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{what}_{bench.replace('-', '_')}.json"
    rows = _read(path, about)
    for index, (name, run) in enumerate(work):
        row, count = rows.get(name), (seeds or {}).get(name, BENCHES[bench].seeds)
        if row and len(row["seeds"]) >= count:
            continue
        commits = [*(row["commit"].split() if row else []), commit()]
        row = run(make(bench, data), row, count)
        rows[name] = {**row, "commit": " ".join(dict.fromkeys(commits))}
        each = list(rows.values())
        content = {
            "machine": timing.machine(),
            "versions": versions(),
            "bench": about,
            "definitions": DEFINITIONS,
            "pareto_front": pareto.front(each, measure),
            "rows": each,
        }
        write(path, content)
        final, lost = (
            np.mean([run[key] for run in row["runs"]])
            for key in ("final", "forgetting")
        )
        print(
            f"{bench} {index + 1}/{len(work)} {name}: final {final:.3f}, forgetting "
            f"{lost:.3f}, rate {row['learning_rate']:g} "
            f"({sum(row['seconds'].values()):.0f} s)",
            flush=True,
        )
        if index % 10 == 9:  # programs hold memory maps, of which there are few
            jax.clear_caches()
    each = list(rows.values())
    pareto.report(bench, each, measure)
    trade_off.draw(path.with_suffix(".png"), bench, each, measure)
    return each
