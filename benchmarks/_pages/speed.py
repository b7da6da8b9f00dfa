"""Puts the committed measurements of time and memory into docs/benchmarks.md.

python -m benchmarks._pages.speed
"""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks._pages.tables import table, written

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "benchmarks" / "results"

# command -> what it writes, in benchmarks/results unless a folder is named
SPEED = {
    "step_time": "`step_time.json`",
    "adapters": "`adapters.json`",
    "accelerator": "`accelerator_cpu.json`",
    "boundary": "`boundary.json`",
    "constraint_cost": "prints one line of JSON",
    "memory": "the tables of `docs/scaling.md`",
    "scaling": "`scaling.json`",
    "throughput": "`throughput.json`, `throughput-nproc1.json`",
    "avalanche": "`avalanche.json`",
}
EVIDENCE = {
    "evidence": "all of the next four",
    "mechanism": "`mechanism.json`",
    "interventions": "`interventions.json`",
    "forgetting": "`forgetting_*.json`",
    "strength_rules": "`strength_rules_*.json`",
    "pretrained": "`pretrained_*.json`",
    "osft_leak": "`osft_leak.json`, `osft_leak_smollm2.json`",
    "report": "`report.html`",
}


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def told(ratio: dict[str, float]) -> str:
    """The median and its 95 % interval."""
    return f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def spread(values: list[float]) -> str:
    """From the least to the largest."""
    return f"{min(values):.2f}–{max(values):.2f}"


def size(number: float) -> str:
    mantissa, exponent = f"{number:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def commands(group: dict[str, str]) -> str:
    lines = []
    for name, result in group.items():
        text = importlib.import_module(f"benchmarks.{name}").__doc__ or ""
        lines.append([f"`benchmarks.{name}`", text.split("\n")[0], result])
    heads = ["`python -m`", "what it measures", "result"]
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def step_time() -> str:
    groups = read("step_time")["groups"]
    sizes = sorted({g["parameters"] for g in groups})

    def column(parameters: int) -> list[str]:
        mine = [g for g in groups if g["parameters"] == parameters]
        (plain,) = (g for g in mine if g["rank"] is None)
        ranked = [g for g in mine if g["rank"] is not None]
        adam, shared = plain["rivals"]["adam"], plain["rivals"]["shared"]

        def over_ranks(comparison: str) -> str:
            return spread([g["ratios"][comparison]["median"] for g in ranked])

        times = [g["rivals"]["alias"]["milliseconds"] for g in ranked]
        return [
            f"{adam['milliseconds']:.2f}",
            f"{plain['ratios']['elementwise / adam']['median']:.2f}",
            f"{plain['ratios']['shared / adam']['median']:.2f}",
            f"{shared['state_bytes'] / adam['state_bytes']:.3f}",
            over_ranks("alias / chain"),
            over_ranks("adaptive / chain"),
            spread([time / adam["milliseconds"] for time in times]),
        ]

    labels = [
        "`optax.adam`, milliseconds",
        "element-wise routed / `optax.adam`",
        "v shared along the fan-in / `optax.adam`",
        "bytes of its state / Adam's",
        "alias / `chain(project_out, adam)`",
        "overlap-adaptive alias / the chain",
        "alias / `optax.adam`, which protects nothing",
    ]
    rows = zip(labels, *map(column, sizes), strict=True)
    return table(["", *map(size, sizes)], [list(row) for row in rows])


def training() -> str:
    ratios = read("accelerator_cpu")["ratios"]
    return table(["a whole step", "times Adam's"], [
        ["with the alias", told(ratios["training with the alias"])],
        ["with its overlap-adaptive form",
         told(ratios["training with the adaptive alias"])],
    ])  # fmt: skip


def adapters() -> str:
    lines = []
    for group in read("adapters")["groups"]:
        rivals = group["rivals"]
        bases = rivals["chain"]["state_bytes"] - rivals["adam"]["state_bytes"]
        ratios = (group["ratios"][name] for name in ("alias / adam", "chain / adam"))
        lines.append([str(group["rank"]), *map(told, ratios), f"{bases / 1e6:.0f}"])
    heads = ["directions per A", "alias / Adam", "chain / Adam", "bases, MB"]
    return table(heads, lines)


def boundary() -> str:
    found = read("boundary")
    peak = max(found["large"]["peak_bytes"].values())
    small = found["small"]
    return table(["at a task boundary", "measured"], [
        ["grow all bases in float64 on the host, the first time",
         f"{small['outside_jit_first_s']:.1f} s"],
        ["the same again", f"{small['outside_jit_s']:.1f} s"],
        ["compile the same in float32", f"{small['jit_compile_s']:.1f} s"],
        ["run what was compiled", f"{small['jit_s']:.1f} s"],
        ["8B model, most memory for one kernel beyond parameters and inputs",
         f"{peak / 1e6:.0f} MB"],
    ])  # fmt: skip


def throughput() -> str:
    lines = []
    for file, threads in (("throughput", "two cores"), ("throughput-nproc1", "one")):
        for width, found in read(file)["by width"].items():
            speeds = found["steps per second"]
            lines.append([
                f"{width}, {threads}",
                *(f"{speeds[name]:,.0f}" for name in ("plain", "logged", "loop")),
                f"{found['loop / plain, in steps per second']:.1f}",
                f"{found['5 seeds / 1 seed, in time']:.1f}",
            ])  # fmt: skip
    heads = [
        "width, cores", "plain loop", "logged", "our loop", "ours / plain",
        "time of 5 seeds / 1",
    ]  # fmt: skip
    return table(heads, lines)


def avalanche() -> str:
    labels = {"naive": "nothing", "ewc": "EWC", "agem": "A-GEM"}
    config = read("avalanche")["config"]
    labels["agem_60"] = f"A-GEM, {config['memory']} examples a step"
    lines = []
    for name, found in read("avalanche")["methods"].items():
        speeds, accuracy = found["steps per second"], found["accuracy"]
        lines.append([
            labels[name],
            *(f"{speeds[side]:,.0f}" for side in ("ours", "avalanche")),
            f"{found['ratio']:.1f}",
            f"{found['ratio, everything']:.1f}",
            *(f"{accuracy[side][0]:.3f}" for side in ("ours", "avalanche")),
        ])  # fmt: skip
    heads = [
        "method", "ours, steps/s", "Avalanche, steps/s", "ratio",
        "ratio, everything", "ours, accuracy", "Avalanche, accuracy",
    ]  # fmt: skip
    return table(heads, lines)


TABLES: dict[str, Callable[[], str]] = {
    "speed": lambda: commands(SPEED),
    "evidence": lambda: commands(EVIDENCE),
    "step time": step_time,
    "training": training,
    "adapters": adapters,
    "boundary": boundary,
    "throughput": throughput,
    "avalanche": avalanche,
}


def main() -> None:
    page = PAGE.read_text()
    for name, make in TABLES.items():
        page = written(page, name, make())
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
