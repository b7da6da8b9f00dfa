"""Facts of the page on pretrained models, from `pretrained_<stream>.json`.

{{ llm instruct adam final_loss }}            1.516
{{ llm_least instruct forgetting lora_complement }}   refuses if another has less
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks._pages.evidence.results import read
from benchmarks._pretrained.found import (
    NAMES,
    by_final,
    differences,
    ends,
    rows_of,
    values,
)
from benchmarks.boundary import INSIDE, KEYS, WIDTH, layer_shapes
from examples.llm.methods import METHODS

__all__ = ["FACTS"]


def _read(stream: str) -> dict[str, Any]:
    return read(f"pretrained_{stream}")


def _mean(stream: str, method: str, key: str) -> float:
    return float(np.mean(values(_read(stream), method, key)))


def number(stream: str, method: str, key: str, digits: str = "3") -> str:
    return f"{_mean(stream, method, key) + 0.0:.{digits}f}"


def rise(stream: str, method: str, task: str) -> str:
    """How far the loss of one task has risen since it was learned."""
    at = _read(stream)["settings"]["tasks"].split(",").index(task)
    learned, end = ends(_read(stream), method)[at]
    return f"{end - learned:.3f}"


def full(stream: str, method: str, fan_in: str) -> str:
    """The share of kernels' inputs, in percent, that is protected at the end."""
    rows = rows_of(_read(stream), method)
    return f"{100 * np.mean([row['protected'][-1][fan_in][0] for row in rows]):.0f} %"


def steps(stream: str) -> str:
    return str(_read(stream)["settings"]["steps"])


def gigabytes(stream: str, method: str) -> str:
    """At the peak of the process of the first seed."""
    return f"{rows_of(_read(stream), method)[0]['peak_memory'] / 1e9:.1f}"


def unmeasured(stream: str) -> str:
    """Names the methods of `examples.llm` that the stream does not have."""
    missing = [NAMES[name] for name in METHODS if not rows_of(_read(stream), name)]
    return f" Not measured: {'; '.join(missing)}." if missing else ""


def largest(stream: str) -> str:
    return _at_the_edge(stream, max)


def smallest(stream: str) -> str:
    return _at_the_edge(stream, min)


def _tunings(stream: str) -> dict[str, dict[str, Any]]:
    """How each method was tuned, by its name for readers."""
    held = _read(stream)["methods"]
    return {
        NAMES[name]: held[name]["tuning"]
        for name in by_final(_read(stream))
        if name in held
    }


def _at_the_edge(stream: str, edge: Callable) -> str:
    """The methods for which the rate at this end of the grid was best."""
    found = [
        name
        for name, tuning in _tunings(stream).items()
        if tuning["rate"] == edge(rate for rate, *_ in tuning["sweep"])
    ]
    return "; ".join(found) or "none"


def number_at_edge(stream: str) -> str:
    """The methods for which an end of the grid of their other number was best."""
    found = []
    for name, tuning in _tunings(stream).items():
        tried = sorted({number for _, number, _ in tuning["sweep"]})
        if len(tried) > 1 and tuning["coefficient"] in (tried[0], tried[-1]):
            found.append(name)
    return "; ".join(found) or "none"


def blind(side: str) -> str:
    """`along_inside` or `along_outside` of a change that knows nothing of the kernel.

    Of SmolLM2-135M's kernels, all entries changed alike.
    """
    shapes = layer_shapes(WIDTH, KEYS, INSIDE).values()
    of = {"inside": [m for _, m in shapes], "outside": [n for n, _ in shapes]}
    halves = [min(shape) // 2 for shape in shapes]
    changed = sum(half * other for half, other in zip(halves, of[side], strict=True))
    return f"{changed / sum(n * m for n, m in shapes):.2f}"


def least(stream: str, key: str, method: str) -> str:
    """The method's number, if no other has less."""
    found = {name: _mean(stream, name, key) for name in by_final(_read(stream))}
    if math.isnan(found[method]) or found[method] > min(found.values()):
        raise ValueError(f"{key} on {stream} is not least with {method}: {found}.")
    return f"{found[method]:.3f}"


def below(stream: str, key: str, method: str, rival: str) -> str:
    """By how much a method's number is less than the rival's, which it must be.

    On the seeds that both have.
    """
    found, _ = differences(_read(stream), method, rival, key)
    if not found <= 0.0:
        raise ValueError(f"{method} on {stream} is not below {rival}: {found:.3f}.")
    return f"{-found:.3f}"


FACTS = {
    "llm": number,
    "llm_full": full,
    "llm_gb": gigabytes,
    "llm_rise": rise,
    "llm_least": least,
    "llm_below": below,
    "llm_steps": steps,
    "llm_unmeasured": unmeasured,
    "llm_largest": largest,
    "llm_smallest": smallest,
    "llm_number_at_edge": number_at_edge,
    "llm_blind": blind,
}
