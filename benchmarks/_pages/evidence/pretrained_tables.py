"""Tables of the pages on pretrained models, from `pretrained_<stream>.json`."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks._pages.evidence.results import read
from benchmarks._pages.tables import table
from benchmarks._pretrained.found import (
    LEVER_NAMES,
    NAMES,
    REFERENCE,
    by_final,
    common_seeds,
    differences,
    ends,
    rows_of,
    value,
    values,
)
from benchmarks._pretrained.streams import OF_PAIRS, TITLES, arms
from examples.harness.statistics import interval
from examples.llm.methods import METHODS

__all__ = ["TABLES", "for_readers", "rates"]

SHORT = {
    "adam": "Adam on the pairs",
    "lora_restart": "pairs merged and drawn anew, nothing protected",
    "lora_random": "the lines above without `lora.inflora`",
    REFERENCE: "the lines above",
}
COLUMNS = {
    "when learned": "learned_loss",
    "at the end": "final_loss",
    "forgetting": "forgetting",
    "general text": "general",
    "KL": "kl",
    "score": "metrics.OP",
}
LEVER_COLUMNS = {head: key for head, key in COLUMNS.items() if head != "score"}


def _read(stream: str) -> dict[str, Any]:
    return read(f"pretrained_{stream}")


def _rows(stream: str, method: str) -> list[dict[str, Any]]:
    return rows_of(_read(stream), method)


def _name(method: str) -> str:
    return f"**{NAMES[method]}**" if method == REFERENCE else NAMES[method]


def _told(stream: str, method: str, key: str, digits: int = 3) -> str:
    found = values(_read(stream), method, key)
    if any(x is None for x in found):
        return ""
    return _within(*interval(found), digits)


def _within(mean: float, half: float, digits: int = 3, sign: str = "") -> str:
    return f"{mean:{sign}.{digits}f}" + (f" ±{half:.{digits}f}" if half == half else "")


def _rate(stream: str, method: str) -> str:
    held = _read(stream)["methods"]["adam" if method == "lines" else method]
    return f"{held['tuning']['rate']:g}"


def _line(stream: str, method: str) -> list[str]:
    return [_told(stream, method, key) for key in COLUMNS.values()]


def for_readers() -> str:
    """Two tables of the guide: a few methods, as a whole and task by task."""
    stream = "instruct"
    shown = [name for name in SHORT if _rows(stream, name)]
    whole = [[SHORT[name], *_line(stream, name)] for name in shown]
    tasks = _read(stream)["settings"]["tasks"].split(",")
    each = [
        [SHORT[name], *(f"{a:.3f} → {b:.3f}" for a, b in ends(_read(stream), name))]
        for name in shown
    ]
    return "\n\n".join(
        (
            table(["method", *COLUMNS], whole),
            "Task by task, when learned → at the end:",
            table(["method", *tasks], each),
        )
    )


def rates() -> str:
    """The losses from which the rate was chosen, by stream and method."""
    tuned = {"instruct": "six tasks", "installed": "installed text"}
    pairs = {REFERENCE: "chosen A", "lora_random": "random A"}
    sweeps = {
        f"{title}, {a}": {
            rate: f"{loss:.3f}"
            for rate, _, loss in _read(stream)["methods"][name]["tuning"]["sweep"]
        }
        for stream, title in tuned.items()
        for name, a in pairs.items()
    }
    lines = [
        [f"{rate:g}", *(sweep[rate] for sweep in sweeps.values())] for rate in OF_PAIRS
    ]
    return table(["rate", *sweeps], lines)


def methods(stream: str) -> str:
    """Every method, the lowest loss at the end first."""
    lines = [
        [_name(name), _rate(stream, name), *_line(stream, name)]
        for name in by_final(_read(stream))
    ]
    return table(["method", "rate", *COLUMNS], lines)


def change(stream: str) -> str:
    """Where the change of the weights went."""
    keys = ("moved", "along_inputs", "along_inside", "along_outside")
    lines = [
        [
            _name(name),
            *(
                _told(stream, name, f"change.{key}", 3 if key == "moved" else 2)
                for key in keys
            ),
        ]
        for name in by_final(_read(stream))
        if name != "lines"
    ]
    heads = ["method", "old outputs moved", "along old inputs",
             "along singular directions, inputs", "outputs"]  # fmt: skip
    return table(heads, lines)


def room(stream: str) -> str:
    """How full the inputs of the kernels are after each task."""
    by_task = _rows(stream, REFERENCE)[0]["protected"][:-1]  # the last ends nothing
    heads = ["fan-in", *(f"after task {i + 1}" for i in range(len(by_task)))]
    lines = [
        [n, *(f"{100 * task[n][0]:.0f} %" for task in by_task)] for n in by_task[0]
    ]
    return table(heads, lines)


def fit(stream: str) -> str:
    """How many of a task's rows the context cuts."""
    lines = [
        [name, *(str(x) for part in ("train", "test") for x in parts[part].values())]
        for name, parts in _read(stream)["fit"].items()
    ]
    heads = ["rows to learn", "shortened", "dropped"]
    tests = ["test rows", "shortened", "dropped"]
    return table(["task", *heads, *tests], lines)


OSFT = {
    "adamw": "AdamW, nothing protected",
    "hooked": "projected gradients, then AdamW",
    "peft": "PEFT: factors, their gradients projected, then AdamW",
    "shared_v": "`adamr.osft` with `share_v=True`",
    "osft": "`adamr.osft`",
}


def osft() -> str:
    """What singular directions let through, each method at its best rate."""
    rows = read("osft_leak_smollm2")["rows"]
    lines = []
    for method, name in OSFT.items():
        tried = [row for row in rows if row["method"] == method]
        best = min(tried, key=lambda row: row["learned"])
        told = (f"{best[key]:.1e}" for key in ("leak", "moved"))
        losses = (f"{best[key]:.3f}" for key in ("learned", "general"))
        lines.append([name, f"{best['learning_rate']:g}", *told, *losses])
    heads = ["method", "rate", "leak", "moved", "task", "general text"]
    return table(heads, lines)


def levers(stream: str) -> str:
    """The reference, and it with one setting changed, at the same rate."""
    shown = {REFERENCE: "as on this page, seed 0", **LEVER_NAMES}
    lines = []
    for name in shown:
        for row in _rows(stream, name)[:1]:
            full = (
                f"{100 * share:.0f} %" for share, _ in row["protected"][-1].values()
            )
            told = (f"{value(row, key):.3f}" for key in LEVER_COLUMNS.values())
            lines.append([shown[name], *told, *full])
    (row, *_) = _rows(stream, REFERENCE)
    heads = (f"protected of {n}" for n in row["protected"][-1])
    return table(["setting", *LEVER_COLUMNS, *heads], lines)


def streams(stream: str, *others: str) -> str:
    """The methods that were measured on more than the first stream, on all."""
    results = [_read(name) for name in (stream, *others)]
    shown = [
        name
        for name in by_final(results[0])
        if any(rows_of(result, name) for result in results[1:])
    ]
    lines = [
        [_name(name), *(_learned_and_kept(found, name) for found in results)]
        for name in shown
    ]
    return table(["method", *(TITLES[name] for name in (stream, *others))], lines)


def _learned_and_kept(result: dict[str, Any], method: str) -> str:
    if not rows_of(result, method):
        return ""
    learned, end, general = (
        interval(values(result, method, key))[0]
        for key in ("learned_loss", "final_loss", "general")
    )
    return f"{learned:.3f} → {end:.3f}, {general:+.3f}"


def paired(rival: str, *names: str) -> str:
    """The reference minus a rival on each stream; bold: zero is not in the interval."""
    lines = []
    for stream in names:
        result = _read(stream)
        seeds = common_seeds(result, REFERENCE, rival)
        if not seeds:
            continue
        told = []
        for key in list(COLUMNS.values())[:-1]:
            mean, half = differences(result, REFERENCE, rival, key)
            said = _within(mean, half, sign="+")
            told.append(f"**{said}**" if abs(mean) > half else said)
        lines.append([TITLES[stream], str(len(seeds)), *told])
    return table(["stream", "seeds", *list(COLUMNS)[:-1]], lines)


def costs(*names: str) -> str:
    """Seconds and peak memory, of the runs that had one core for themselves."""
    alone = {
        method: [r for n in names for r in _rows(n, method) if _timed_alike(r)]
        for method in NAMES
    }
    found = {
        method: [
            _median(rows, lambda row: row["seconds_per_step"]),
            _median(rows, functools.partial(_at_a_boundary, method)),
            _median(rows, lambda row: (row["peak_memory"] or np.nan) / 1e9),
        ]
        for method, rows in alone.items()
        if rows
    }
    lines = [
        [
            _name(method),
            f"{step:.2f}",
            f"{step / found['adam'][0]:.2f}",
            f"{boundary:.0f}" if boundary else "",
            f"{peak:.1f}",
        ]
        for method, (step, boundary, peak) in sorted(found.items(), key=lambda x: x[1])
    ]
    heads = [
        "seconds a step",
        "ratio to Adam on the pairs",
        "seconds a boundary",
        "GB at the peak",
    ]
    return table(["method", *heads], lines)


def _timed_alike(row: dict[str, Any]) -> bool:
    """With one core to itself, on the machine that most rows are of."""
    return row.get("cores") == 1 and "machine" not in row


def _median(rows: list[dict[str, Any]], of: Callable[[dict[str, Any]], float]) -> float:
    return float(np.nanmedian([of(row) for row in rows]))


def _at_a_boundary(method: str, row: dict[str, Any]) -> float:
    """The median over tasks, with what some methods do before a task begins."""
    seconds = row["boundary_seconds"]
    if not seconds:
        return 0.0
    if METHODS[arms()[method].method].start is None:
        return float(np.median(seconds))
    return float(np.median(seconds[::2]) + np.median(seconds[1::2]))


TABLES = {
    "llm_methods": methods,
    "llm_change": change,
    "llm_room": room,
    "llm_fit": fit,
    "llm_osft": osft,
    "llm_levers": levers,
    "llm_streams": streams,
    "llm_paired": paired,
    "llm_costs": costs,
}
