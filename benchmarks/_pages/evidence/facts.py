"""Numbers for the prose. A fact is a word and its arguments, by blanks:

    {{ final permuted-digits gpm/shared_v }}                        0.908
    {{ gains text-low-8 si/own over gpm/shared_v }}                 0.15

Streams and cells are lists by commas, and cells may be patterns; several numbers become
"0.05 to 0.07". `gains` and `loses` refuse a difference of the other sign, so that the
sentence around them stays true.
"""

import math
from collections.abc import Callable, Sequence

from benchmarks._evidence.inflation import ESTIMATORS
from benchmarks._pages.evidence import pretrained
from benchmarks._pages.evidence.results import (
    cell_names,
    gain,
    means,
    read,
    rows,
    sign,
    streams_of,
)

__all__ = ["FACTS", "fact"]


def _span(numbers: Sequence[float], digits: int) -> str:
    """The number, or the lowest and the highest."""
    if not all(map(math.isfinite, numbers)):
        raise ValueError("a run diverged: there is no number to print.")
    ends = dict.fromkeys(f"{x + 0.0:.{digits}f}" for x in (min(numbers), max(numbers)))
    return " to ".join(ends)


def _measure(measure: str, digits: int) -> Callable[[str, str], str]:
    def told(streams: str, cells: str) -> str:
        found = [means(stream, cells, measure) for stream in streams.split(",")]
        return _span(sum(found, []), digits)

    return told


def _differences(streams: str, cells: str, rival: str, measure: str) -> list[float]:
    return [
        gain(stream, cell, rival, measure)[0]
        for stream in streams.split(",")
        for cell in cell_names(stream, cells)
    ]


def _gains(factor: float, measure: str) -> Callable[..., str]:
    def told(streams: str, cells: str, over: str, rival: str) -> str:
        if over != "over":
            raise ValueError(f"expected 'over', got {over!r}.")
        found = [factor * x for x in _differences(streams, cells, rival, measure)]
        if min(found) < -0.005:
            raise ValueError(f"{cells} over {rival} on {streams}: {found}.")
        return _span([abs(x) for x in found], 2)

    return told


def within(streams: str, cells: str, over: str, rival: str) -> str:
    """The largest difference in final measure, whatever its sign."""
    del over
    return f"{max(map(abs, _differences(streams, cells, rival, 'final'))):.2f}"


def _most(factor: float) -> Callable[..., str]:
    """Of many differences the largest, where some have the other sign."""

    def told(streams: str, cells: str, over: str, rival: str) -> str:
        del over
        found = max(factor * x for x in _differences(streams, cells, rival, "final"))
        if found < 0.0:
            raise ValueError(f"the largest is {found}.")
        return f"{found:.2f}"

    return told


def _extreme(pick: Callable[[float], float]) -> Callable[[str, str], str]:
    def told(stream: str, cells: str) -> str:
        found = [x for x in means(stream, cells, "final") if math.isfinite(x)]
        return f"{max(found, key=lambda x: pick(sign(stream) * x)):.3f}"

    return told


def apart(streams: str, cells: str) -> str:
    """The largest distance of two final measures on one stream."""
    found = [means(stream, cells, "final") for stream in streams.split(",")]
    return f"{max(max(x) - min(x) for x in found):.2f}"


def coefficient(streams: str, cells: str) -> str:
    """What the sweep took besides the learning rate."""
    found = [
        rows("forgetting", stream)[cell]["strength"]
        for stream in streams.split(",")
        for cell in cell_names(stream, cells)
    ]
    ends = dict.fromkeys(f"{x:g}" for x in (min(found), max(found)))
    return " to ".join(ends)


def rate(streams: str, cell: str) -> str:
    """The learning rate that the sweep took on every one of the streams."""
    found = {
        rows("forgetting", stream)[name]["learning_rate"]
        for stream in streams.split(",")
        for name in cell_names(stream, cell)
    }
    if len(found) != 1:
        raise ValueError(f"{cell} has the rates {found} on {streams}.")
    return f"{found.pop():g}"


def fronts(cell: str) -> str:
    """On how many streams a cell is on the front."""
    streams = streams_of("forgetting")
    (name,) = cell_names(streams[0], cell)
    on = sum(name in read(f"forgetting_{s}")["pareto_front"] for s in streams)
    return f"{on} of {len(streams)}"


def front_size(stream: str) -> str:
    content = read(f"forgetting_{stream}")
    return f"{len(content['pareto_front'])} of {len(content['rows'])}"


def cells_in_all() -> str:
    return str(sum(len(rows(b, s)) for b in ("forgetting", "strength_rules")
                   for s in streams_of(b)))  # fmt: skip


def inflation(streams: str, optimizers: str, v: str, route: str) -> str:
    """Of the rate along old directions at α = 0.9."""
    content = read("mechanism")
    at = content["alphas"].index(0.9)
    wanted, names = streams.split(","), optimizers.split(",")
    found = [
        row[route]["inflation"][at]
        for row in content["rows"]
        if row["scale"] == 1 and row["stream"] in wanted
        and row["optimizer"] in names and row["v"] == v
    ]  # fmt: skip
    return _span(found, 1)


def worst_error(streams: str, v: str) -> str:
    """Of 1 / (1 − α) under shared routing, in percent rounded up, over estimators of v.

    Without Yogi in the transformer, whose v does not leave its initial value.
    """
    wanted = streams.split(",")
    found = [
        100 * row["shared"]["error"]
        for row in read("mechanism")["rows"]
        if row["stream"] in wanted and row["v"] == v
        and row["optimizer"] in ESTIMATORS
        and (row["stream"], row["optimizer"]) != ("language", "yogi")
    ]  # fmt: skip
    return f"{math.ceil(10 * max(found)) / 10:.1f}"


def arm(stream: str, v: str, name: str, measure: str) -> str:
    """Of an intervention at its own rate; `gain`, `loss`: against shared routing.

    The underscores of a name may stand for its blanks.
    """
    (row,) = (
        row for row in read("interventions")["rows"]
        if (row["stream"], row["v"]) == (stream, v)
        and row["arm"] in (name, name.replace("_", " "))
    )  # fmt: skip
    found = row["own"]
    if measure in ("gain", "loss"):
        better = 1.0 if (stream == "digits") == (measure == "gain") else -1.0
        difference = better * found["final - route_both"]["difference"]
        if difference < 0.0:
            raise ValueError(f"the {measure} is {difference:.3f}.")
        return f"{difference:.3f}"
    return f"{found[measure]['mean']:.{0 if measure == 'motion' else 3}f}"


FACTS: dict[str, Callable[..., str]] = {
    "final": _measure("final", 3),
    "learned": _measure("learned", 3),
    "forgetting": _measure("forgetting", 2),
    "gains": _gains(1.0, "final"),
    "loses": _gains(-1.0, "final"),
    "learns_more": _gains(1.0, "learned"),
    "learns_less": _gains(-1.0, "learned"),
    "forgets_less": _gains(1.0, "forgetting"),
    "forgets_more": _gains(-1.0, "forgetting"),
    "most_gained": _most(1.0),
    "most_lost": _most(-1.0),
    "best": _extreme(lambda x: x),
    "worst": _extreme(lambda x: -x),
    "within": within,
    "apart": apart,
    "coefficient": coefficient,
    "rate": rate,
    "fronts": fronts,
    "front_size": front_size,
    "cells_in_all": cells_in_all,
    "inflation": inflation,
    "worst_error": worst_error,
    "arm": arm,
    **pretrained.FACTS,
}


def fact(text: str) -> str:
    """What stands for `{{ text }}`."""
    name, *arguments = text.split()
    try:
        return FACTS[name](*arguments)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{{{{ {text} }}}}: {error}") from error
