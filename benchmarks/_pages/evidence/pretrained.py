"""Facts and tables of the page on pretrained models, from `pretrained_<stream>.json`.

{{ llm instruct adam final_loss }}            1.516
{{ llm_least instruct forgetting lora_complement }}   refuses if another has less
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks._pages.evidence.results import read
from benchmarks._pages.tables import table
from benchmarks._pretrained.found import NAMES, REFERENCE, by_final, rows_of, values
from benchmarks.boundary import INSIDE, KEYS, WIDTH, layer_shapes
from examples.harness.statistics import interval

__all__ = ["FACTS", "TABLES", "for_readers"]

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
    mean, half = interval(found)
    return f"{mean:.{digits}f}" + (f" ±{half:.{digits}f}" if half == half else "")


def _mean(stream: str, method: str, key: str) -> float:
    return float(np.mean(values(_read(stream), method, key)))


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
        [SHORT[name], *(f"{a:.3f} → {b:.3f}" for a, b in _ends(stream, name))]
        for name in shown
    ]
    return "\n\n".join(
        (
            table(["method", *COLUMNS], whole),
            "Task by task, when learned → at the end:",
            table(["method", *tasks], each),
        )
    )


def _ends(stream: str, method: str) -> list[tuple[float, float]]:
    """Of every task the loss when it was learned and at the end, means over seeds."""
    found = [np.array(row["loss_matrix"], float) for row in _rows(stream, method)]
    matrix = np.mean(found, axis=0)
    return list(zip(np.diag(matrix), matrix[-1], strict=True))


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
        [_name(name), *(_told(stream, name, f"change.{key}", 2) for key in keys)]
        for name in by_final(_read(stream))
        if name != "lines"
    ]
    heads = ["method", "old answers moved", "along old inputs",
             "along singular directions, inputs", "outputs"]  # fmt: skip
    return table(heads, lines)


def room(stream: str) -> str:
    """How full the inputs of the kernels are after each task."""
    by_task = _rows(stream, REFERENCE)[0]["protected"][:-1]  # the last ends nothing
    heads = ["fan-in", *(f"task {i + 1}" for i in range(len(by_task)))]
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


def blind(side: str) -> str:
    """`along_inside` or `along_outside` of a change that knows nothing of the kernel.

    Of SmolLM2-135M's kernels, all entries changed alike.
    """
    shapes = layer_shapes(WIDTH, KEYS, INSIDE).values()
    of = {"inside": [m for _, m in shapes], "outside": [n for n, _ in shapes]}
    halves = [min(shape) // 2 for shape in shapes]
    changed = sum(half * other for half, other in zip(halves, of[side], strict=True))
    return f"{changed / sum(n * m for n, m in shapes):.2f}"


OSFT = {
    "adamw": "AdamW, nothing protected",
    "hooked": "projected gradients, then AdamW",
    "peft": "PEFT: factors, their gradients projected, then AdamW",
    "osft": "`adamr.osft`",
    "elementwise": "v element-wise, step and decay projected",
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


def number(stream: str, method: str, key: str) -> str:
    return f"{_mean(stream, method, key) + 0.0:.3f}"


def steps(stream: str) -> str:
    return str(_read(stream)["settings"]["steps"])


def count(stream: str) -> str:
    """Of the methods that were measured."""
    return str(len(by_final(_read(stream))))


def largest(stream: str) -> str:
    return _at_the_edge(stream, max)


def smallest(stream: str) -> str:
    return _at_the_edge(stream, min)


def _at_the_edge(stream: str, edge: Callable) -> str:
    """The methods for which the rate at this end of the grid was best."""
    found = []
    for name in by_final(_read(stream)):
        tuning = _read(stream)["methods"].get(name, {}).get("tuning", {})
        if tuning and tuning["rate"] == edge(rate for rate, *_ in tuning["sweep"]):
            found.append(NAMES[name])
    return "; ".join(found) or "none"


def least(stream: str, key: str, method: str) -> str:
    """The method's number, if no other has less."""
    found = {name: _mean(stream, name, key) for name in by_final(_read(stream))}
    if math.isnan(found[method]) or found[method] > min(found.values()):
        raise ValueError(f"{key} on {stream} is not least with {method}: {found}.")
    return f"{found[method]:.3f}"


def below(stream: str, key: str, method: str, rival: str) -> str:
    """By how much a method's number is less than the rival's, which it must be."""
    found = _mean(stream, rival, key) - _mean(stream, method, key)
    if not found >= 0.0:
        raise ValueError(f"{method} on {stream} is not below {rival}: {found:.3f}.")
    return f"{found:.3f}"


FACTS = {
    "llm": number,
    "llm_least": least,
    "llm_below": below,
    "llm_steps": steps,
    "llm_count": count,
    "llm_largest": largest,
    "llm_smallest": smallest,
    "llm_blind": blind,
}
TABLES = {
    "llm_methods": methods,
    "llm_change": change,
    "llm_room": room,
    "llm_fit": fit,
    "llm_osft": osft,
}
