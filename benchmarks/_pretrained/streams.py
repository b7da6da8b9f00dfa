"""The streams that a pretrained model learns, and what each method is tuned over."""

from pathlib import Path
from typing import Any, NamedTuple

from examples.llm.methods import METHODS, Method
from examples.llm.options import Config

__all__ = [
    "LEVERS",
    "STREAMS",
    "TITLES",
    "TUNED_ON",
    "VARIANTS",
    "Arm",
    "Grid",
    "arms",
    "config",
    "grid",
    "settings",
]

INSTRUCT = ("WikiSQL", "DSTC8-json", "TLDR-ko", "Banking-intent", "TLDR-shell")
INSTRUCT = (*INSTRUCT, "PubMedQA")

STREAMS: dict[str, dict[str, Any]] = {
    "instruct": {"tasks": ",".join(INSTRUCT)},
    "instruct-reversed": {"tasks": ",".join(reversed(INSTRUCT))},
    "installed": {},
}
TITLES = {
    "instruct": "six instruction tasks",
    "instruct-reversed": "in reversed order",
    "installed": "installed text",
}
TUNED_ON = {"instruct-reversed": "instruct"}  # the same tasks
ROWS = {"steps": 30, "batch": 6, "context": 80, "generated": 16, "new_tokens": 32}

# Rates that all methods try, on low-rank pairs and on all weights.
OF_PAIRS = (3e-4, 1e-3, 3e-3)
OF_ALL = (3e-5, 1e-4, 3e-4)
# Beside the number that a method has by default.
COEFFICIENTS = {
    "er": (1 / 6, 1 / 25),
    "ewc": (1.0, 1e4),
    "si": (0.01, 10.0),
    "gpm_si_full": (0.01, 10.0),
    "o_lora": (0.05, 5.0),
    "mofo": (0.05, 0.2),
}


class Arm(NamedTuple):
    """A method with the settings in which it departs from the stream's.

    Attributes:
      method: of `examples.llm`.
      options: of its command line.
      setting: fields of `task_ends.Setting` that no option sets.
    """

    method: str
    options: dict[str, Any]
    setting: dict[str, Any]


class Grid(NamedTuple):
    """What tuning chooses from: first a rate, then a coefficient at that rate."""

    rates: tuple[float, ...]
    coefficients: tuple[float, ...]


# One setting of the protected pairs changed; the last one beside that before it.
LEVERS = {
    "threshold-0.8": Arm("lora_complement", {"threshold": 0.8}, {}),
    "threshold-0.99": Arm("lora_complement", {"threshold": 0.99}, {}),
    "capacity-128": Arm("lora_complement", {"capacity": 128}, {}),
    "captured-192": Arm("lora_complement", {"captured": 192}, {}),
    "general-0": Arm("lora_complement", {"general": 0}, {}),
    "not-normalized": Arm("lora_complement", {}, {"normalize": False}),
    "first-token-masked": Arm("lora_complement", {}, {"normalize": False, "skip": 1}),
}


# Given no general text, as most rivals; tuned on their own.
VARIANTS = {
    f"{name}-general-0": Arm(name, {"general": 0}, {})
    for name in ("lora_complement", "lora_random")
}


def arms() -> dict[str, Arm]:
    """Every method, and the protected pairs with one setting changed.

    The levers are not scored.
    """
    methods = {name: Arm(name, {}, {}) for name in METHODS} | VARIANTS
    unscored = {"generated": 0}  # saves time
    levers = {
        name: arm._replace(options=arm.options | unscored)
        for name, arm in LEVERS.items()
    }
    return methods | levers


def grid(name: str, method: Method) -> Grid:
    rates = OF_ALL if method.trains == "all" else OF_PAIRS
    default = 0.0 if method.coefficient is None else method.coefficient.value
    return Grid(rates, (default, *COEFFICIENTS.get(name, ())))


def settings(stream: str) -> dict[str, Any]:
    """Of the command line of `examples.llm`, besides data, model and method."""
    own = STREAMS[stream]
    return own | ROWS if "tasks" in own else own


def config(stream: str, arm: Arm, data: Path, model: Path | None) -> Config:
    """As `python -m examples.llm` would be told."""
    told = {"method": arm.method, "model": model, **settings(stream)}
    if "tasks" in told:
        told["data"] = data
    return Config(**told | arm.options)
