"""What was measured, by method: `pretrained_<stream>.json` as tables and pictures."""

from typing import Any

import numpy as np

from examples.harness.statistics import interval, paired

__all__ = [
    "LEVER_NAMES",
    "NAMES",
    "REFERENCE",
    "by_final",
    "common_seeds",
    "differences",
    "ends",
    "rows_of",
    "value",
    "values",
]

NAMES = {
    "adam": "Adam on the pairs",
    "lines": "Adam on the pairs, LiNeS at the end",
    "lora_restart": "pairs merged and drawn anew, nothing protected (control)",
    "lora_complement": "protected pairs",
    "lora_random": "protected pairs, random A",
    "lora_complement-general-0": "protected pairs, no general text",
    "lora_random-general-0": "protected pairs, random A, no general text",
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
    "osft_shared_v": "OSFT, exact, one v per kernel",
    "osft_hooked": "OSFT by projected gradients, AdamW",
    "mofo": "MoFO on all weights",
}
REFERENCE = "lora_complement"  # the method that the guide recommends
LEVER_NAMES = {
    "threshold-0.8": "threshold 0.8 instead of 0.9",
    "threshold-0.99": "threshold 0.99",
    "capacity-128": "capacity 128 instead of the whole fan-in",
    "captured-192": "inputs of 192 rows instead of 64",
    "general-0": "general text not protected",
    "not-normalized": "inputs at their own lengths",
    "first-token-masked": "at their own lengths, the first token left out",
}


def rows_of(result: dict[str, Any], method: str) -> list[dict[str, Any]]:
    """One per seed; LiNeS is kept with Adam, whose last state it scales."""
    held = result["methods"]
    if method == "lines":
        return held.get("adam", {}).get("lines", [])
    return held.get(method, {}).get("rows", [])


def value(row: dict[str, Any], key: str) -> float | None:
    """`general` is the rise of the loss on general text; "a.b" reads b of a."""
    if key == "general":
        return row["general_loss_after"] - row["general_loss_before"]
    found: Any = row
    for part in key.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def values(result: dict[str, Any], method: str, key: str) -> list[float | None]:
    return [value(row, key) for row in rows_of(result, method)]


def by_final(result: dict[str, Any]) -> list[str]:
    """The methods that were measured, the lowest loss at the end first."""
    known = [name for name in NAMES if rows_of(result, name)]

    def final(name):
        return interval(values(result, name, "final_loss"))[0]

    return sorted(known, key=final)


def ends(result: dict[str, Any], method: str) -> list[tuple[float, float]]:
    """Of every task the loss when it was learned and at the end, means over seeds."""
    found = [np.array(row["loss_matrix"], float) for row in rows_of(result, method)]
    matrix = np.mean(found, axis=0)
    return list(zip(np.diag(matrix), matrix[-1], strict=True))


def common_seeds(result: dict[str, Any], method: str, rival: str) -> list[int]:
    own, other = (
        {row["seed"] for row in rows_of(result, name)} for name in (method, rival)
    )
    return sorted(own & other)


def differences(
    result: dict[str, Any], method: str, rival: str, key: str
) -> tuple[float, float]:
    """Method minus rival on the seeds that both have: mean, half of the interval."""
    own, other = (
        {row["seed"]: value(row, key) for row in rows_of(result, name)}
        for name in (method, rival)
    )
    seeds = common_seeds(result, method, rival)
    found = paired([own[s] for s in seeds], [other[s] for s in seeds])
    return found["difference"], found["half_width"]
