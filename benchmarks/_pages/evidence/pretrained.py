"""Facts and tables of the page on pretrained models, from `pretrained_<stream>.json`.

{{ llm instruct adam final_loss }}            1.516
{{ llm_least instruct forgetting lora_complement }}   refuses if another has less
"""

import math
from typing import Any

import numpy as np

from benchmarks._pages.evidence.results import read
from benchmarks._pages.tables import table
from examples.harness.statistics import interval

__all__ = ["FACTS", "TABLES", "for_readers"]

NAMES = {
    "adam": "Adam on the pairs",
    "lines": "Adam on the pairs, LiNeS at the end",
    "lora_restart": "Adam, pairs merged and drawn anew (control)",
    "lora_complement": "**protected pairs**",
    "lora_random": "protected pairs, random A",
    "inflora": "InfLoRA",
    "keeplora": "KeepLoRA's start",
    "o_lora": "O-LoRA",
    "ewc": "EWC on the pairs",
    "si": "SI on the pairs",
    "er": "replay of 16 rows a task",
    "gpm_shared": "GPM on A and B, shared routing",
    "gpm_decoupled": "GPM on A and B, decoupled",
    "gpm_adaptive": "GPM on A and B, adaptive",
    "gpm": "GPM on A and B, shared v",
    "adam_full": "Adam on all weights",
    "gpm_full": "GPM on all kernels",
    "gpm_si_full": "GPM and SI on all weights",
    "osft": "OSFT, exact",
    "osft_hooked": "OSFT as PEFT does it",
    "mofo": "MoFO on all weights",
}
REFERENCE = "lora_complement"
SHORT = {
    "adam": "Adam on the pairs",
    "lora_restart": "the same, merged and drawn anew",
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


def _stem(stream: str) -> str:
    return f"pretrained_{stream.replace('-', '_')}"


def _rows(stream: str, method: str) -> list[dict[str, Any]]:
    """One per seed; LiNeS is kept with Adam, whose last state it scales."""
    held = read(_stem(stream))["methods"]
    if method == "lines":
        return held.get("adam", {}).get("lines", [])
    return held.get(method, {}).get("rows", [])


def _value(row: dict[str, Any], key: str) -> float | None:
    """`general` is the rise of the loss on general text."""
    if key == "general":
        return row["general_loss_after"] - row["general_loss_before"]
    for part in key.split("."):
        row = row.get(part) if isinstance(row, dict) else None
    return row


def _told(rows: list[dict[str, Any]], key: str, digits: int = 3) -> str:
    values = [_value(row, key) for row in rows]
    if any(x is None for x in values):
        return ""
    mean, half = interval(values)
    return f"{mean:.{digits}f}" + (f" ±{half:.{digits}f}" if half == half else "")


def _mean(stream: str, method: str, key: str) -> float:
    return float(np.mean([_value(row, key) for row in _rows(stream, method)]))


def _by_final(stream: str) -> list[str]:
    known = [name for name in NAMES if _rows(stream, name)]
    return sorted(known, key=lambda name: _mean(stream, name, "final_loss"))


def _rate(stream: str, method: str) -> str:
    held = read(_stem(stream))["methods"]["adam" if method == "lines" else method]
    return f"{held['tuning']['rate']:g}"


def _line(stream: str, method: str) -> list[str]:
    return [_told(_rows(stream, method), key) for key in COLUMNS.values()]


def for_readers() -> str:
    """Two tables of the guide: a few methods, as a whole and task by task."""
    stream = "instruct"
    shown = [n for n in ("adam", "lora_restart", REFERENCE) if _rows(stream, n)]
    whole = [[SHORT[name], *_line(stream, name)] for name in shown]
    tasks = read(_stem(stream))["settings"]["tasks"].split(",")
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
        [NAMES[name], _rate(stream, name), *_line(stream, name)]
        for name in _by_final(stream)
    ]
    return table(["method", "rate", *COLUMNS], lines)


def change(stream: str) -> str:
    """Where the change of the weights went."""
    keys = ("moved", "along_inputs", "along_inside", "along_outside")
    lines = [
        [NAMES[name], *(_told(_rows(stream, name), f"change.{key}", 2) for key in keys)]
        for name in _by_final(stream)
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


def number(stream: str, method: str, key: str) -> str:
    return f"{_mean(stream, method, key) + 0.0:.3f}"


def steps(stream: str) -> str:
    return str(read(_stem(stream))["settings"]["steps"])


def count(stream: str) -> str:
    """Of the methods that were measured."""
    return str(len(_by_final(stream)))


def least(stream: str, key: str, method: str) -> str:
    """The method's number, if no other has less."""
    found = {name: _mean(stream, name, key) for name in _by_final(stream)}
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
}
TABLES = {
    "llm_methods": methods,
    "llm_change": change,
    "llm_room": room,
}
