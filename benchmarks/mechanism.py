"""The effective learning rate along old directions, measured against 1 / (1 − α).

    python -m benchmarks.mechanism [--quick] [--data FOLDER]

A gradient's part along old directions U is attenuated, f = g − α U Uᵀ g. Shared routing
computes v from f, decoupled routing from g. Three streams: one coordinate, a rotated
anisotropic quadratic, a byte transformer that moves from one text to another. Three
ways to keep v: element by element, shared along the fan-in, in the eigenbasis of U.
Five estimators of v, and two optimizers that normalize without one (Lion, Muon).

Next to 1 / (1 − α) are the prediction from second moments of g where U is not made of
coordinates (`predict` in `_evidence/inflation.py`), and what D mixes into U from
outside it (`with_mixing`, from one more run at α = 1).
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from benchmarks._evidence.gradients import (
    Source,
    along_adam,
    coordinate,
    language,
    quadratic,
)
from benchmarks._evidence.inflation import (
    ESTIMATORS,
    NORMALIZERS,
    ROUTES,
    VARIANTS,
    measure,
    predict,
    with_mixing,
)
from benchmarks._evidence.pictures import draw_mechanism, draw_over_time
from benchmarks._speed import timing
from examples.harness import report
from examples.lm.model import Preset
from examples.streams.text import read_domains

ALPHAS = (0.1, 0.25, 0.4, 0.5, 0.75, 0.9, 0.95, 0.99)
QUICK = ("adam", "adafactor", "yogi")
NORMALIZER_STEPS = 30  # Muon's steps cost much, and there is no v to fill
SCALE = 1000
OVER_TIME = {  # name -> optimizer, way to keep v
    "adam, element": ("adam", "element"),
    "adam, eigenbasis": ("adam", "eigenbasis"),
    "amsgrad, eigenbasis": ("amsgrad", "eigenbasis"),
}


@dataclasses.dataclass
class Config:
    """Effective learning rates along old directions, predicted and measured."""

    data: Path | None = None
    """Folder of text, one <domain>.txt or <domain>.train.txt and .valid.txt for each
    domain; the installed text by default. The first two domains are used."""
    quick: bool = False
    """Fewer steps and estimators, smaller matrices."""
    steps: int | None = None
    """Steps on each stream; each has its own default."""
    seed: int = 0
    out: Path = Path("benchmarks/results")


def sources(config: Config) -> dict[str, Source]:
    """The three streams."""
    preset = Preset(64, 64, 2, 4, steps=100, batch=8, eval_windows=1)
    size, rank = (128, 256), 16
    steps = {"coordinate": 400, "quadratic": 300, "language": 100}
    if config.quick:
        preset = Preset(32, 32, 1, 4, steps=40, batch=8, eval_windows=1)
        size, rank = (32, 64), 4
        steps = {"coordinate": 200, "quadratic": 200, "language": 60}
    if config.steps is not None:
        steps = dict.fromkeys(steps, config.steps)
    old, new = read_domains(config.data, 2)
    return {
        "coordinate": coordinate(steps["coordinate"], config.seed),
        "quadratic": quadratic(steps["quadratic"], config.seed, size, rank),
        "language": language(
            old, new, preset, steps=steps["language"], seed=config.seed, threshold=0.9
        ),
    }


def _late(x: Any) -> np.ndarray:
    """Means over the second half of the steps."""
    x = np.asarray(x, float)
    return x[:, x.shape[1] // 2 :].mean(axis=1)


def _worst(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.max(np.abs(found / expected - 1.0)))


def compare(
    source: Source, optimizer: str, variant: str, predicted: np.ndarray
) -> dict[str, Any]:
    """Inflations at `ALPHAS`, measured and predicted, and the worst relative errors.

    `predicted` is that of shared routing without mixing, from second moments of g.
    """
    alphas = np.array(ALPHAS)
    row: dict[str, Any] = {"optimizer": optimizer, "v": variant}
    for route in ROUTES:
        if optimizer in NORMALIZERS and route == "decoupled":
            continue
        found = measure(source, optimizer, variant, route, (0.0, *ALPHAS, 1.0))
        motion, gain = _late(found.motion), _late(found.gain)
        inflation = motion[1:-1] / motion[0] / (1.0 - alphas)
        row[route] = {"inflation": inflation.tolist()}
        if route == "shared":
            row[route]["error"] = _worst(inflation, 1.0 / (1.0 - alphas))
        # Rounding is all that is left along U where nothing mixes.
        mixed = float(motion[-1] / motion[0]) if variant == "element" else 0.0
        row[route]["mixed"] = mixed
        if optimizer in NORMALIZERS:
            continue
        expected = predicted if route == "shared" else np.ones(len(alphas))
        explained = with_mixing(alphas, expected, mixed)
        row[route] |= {
            "gain": (gain[1:-1] / gain[0]).tolist(),
            "explained": explained.tolist(),
            "explained_error": _worst(inflation, explained),
        }
    return row


def over_time(source: Source, alpha: float, b2: float) -> dict[str, Any]:
    """Energy of v along U, and gains, when protection begins after an old task.

    The moments of the old task are kept; v forgets it in about 1 / (1 − b2) steps.
    """
    steps = len(jax.tree.leaves(source.old)[0])
    joined = jax.tree.map(lambda *pair: np.concatenate(pair), source.old, source.given)
    both, curves = source._replace(given=joined), {}
    for name, (optimizer, variant) in OVER_TIME.items():
        for route in ROUTES:
            found = measure(
                both, optimizer, variant, route, (0.0, alpha), b2=b2, since=steps
            )
            energy, gain = np.asarray(found.energy), np.asarray(found.gain)
            curves[f"{name}, {route}"] = {
                "energy": energy[1].tolist(),
                "gain": (gain[1] / gain[0]).tolist(),
            }
            curves[f"{name}, raw"] = {"energy": energy[0].tolist()}
    return {"alpha": alpha, "b2": b2, "since": steps, "curves": curves}


def contests(streams: dict[str, Source], estimators: Sequence[str]) -> Iterator:
    """(stream, scale of its gradients, optimizer, way to keep v), and for `compare`."""
    for name, source in streams.items():
        gradients = along_adam(source)
        predicted = {
            v: predict(gradients, source.subspace, v, np.array(ALPHAS))
            for v in VARIANTS
        }
        for optimizer, variant in itertools.product(estimators, VARIANTS):
            yield name, 1, optimizer, variant, source, predicted[variant]
        first = jax.tree.map(lambda x: x[:NORMALIZER_STEPS], source.given)
        short = source._replace(given=first)
        for optimizer, variant in itertools.product(NORMALIZERS, VARIANTS):
            slow = (name, optimizer) == ("language", "muon, converged")
            if variant != "fan_in" and not slow:
                yield name, 1, optimizer, variant, short, predicted[variant]
        if name == "language":
            # Yogi's v starts at 1e-6, which squares of small gradients do not reach.
            larger = jax.tree.map(lambda x: SCALE * x, source.given)
            larger = source._replace(given=larger)
            for variant in VARIANTS:
                yield name, SCALE, "yogi", variant, larger, predicted[variant]


def _line(name: str, row: dict[str, Any]) -> str:
    shared, at = row["shared"], ALPHAS.index(0.9)
    optimizer = row["optimizer"] + f", {row['scale']} g" * (row["scale"] > 1)
    text = f"{name:11} {optimizer:16} {row['v']:11}"
    text += f"{shared['inflation'][at]:7.2f} {100 * shared['error']:9.2f} %"
    if "explained" in shared:
        text += (
            f"{shared['explained'][at]:10.2f} {row['decoupled']['inflation'][at]:9.2f}"
        )
        text += f" {row['decoupled']['mixed']:6.3f}"
    return text


def run(config: Config) -> dict[str, Any]:
    streams, rows = sources(config), []
    estimators = QUICK if config.quick else ESTIMATORS
    print(
        "at α = 0.9, where 1 / (1 − α) is 10:\n"
        "stream      optimizer        v            shared  worst error  explained  "
        "decoupled  mixed"
    )
    for name, scale, optimizer, variant, *how in contests(streams, estimators):
        found = compare(how[0], optimizer, variant, how[1])
        row = {"stream": name, "scale": scale, **found}
        rows.append(row)
        print(_line(name, row), flush=True)
    return {
        "machine": timing.machine(),
        "versions": report.versions(),
        "config": {
            "quick": config.quick,
            "seed": config.seed,
            "steps": {n: len(jax.tree.leaves(x.given)[0]) for n, x in streams.items()},
            "data": config.data and config.data.name,
        },
        "alphas": ALPHAS,
        "predicted": [1.0 / (1.0 - a) for a in ALPHAS],
        "rows": rows,
        "over_time": over_time(streams["language"], alpha=0.9, b2=0.95),
    }


def main(config: Config) -> None:
    content = run(config)
    config.out.mkdir(parents=True, exist_ok=True)
    report.write(config.out / "mechanism.json", content)
    draw_mechanism(content, config.out / "mechanism.png")
    draw_over_time(content, config.out / "mechanism_over_time.png")


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m benchmarks.mechanism"))
