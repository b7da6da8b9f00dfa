"""Which strength of a projection wins where: falling, constant, rising, conflict-only.

    python -m benchmarks.strength_rules [--quick]
    python -m benchmarks.strength_rules --streams text-low-8 --data DIR

    x  <-  g − α (g − g̃),    s̄ the smoothed overlap ‖g − g̃‖² / ‖g‖²

    full              α = 1
    half              α = ½
    falling           α = ½ (1 − s̄)      the rule of arXiv:2604.22407
    falling_1         α = 1 − s̄
    rising            α = s̄
    *_leaf            the same, one s̄ and one α per leaf
    conflict          α = 1 if ⟨g, r⟩ < 0, else 0; r the gradient on a memory
    conflict_leaf     the same, leaf by leaf

All on GPM's projection, with v shared along the fan-in (where the projection itself is
kept) and element-wise (where Adam bends it). Sweeps, seeds, resuming and files as in
`benchmarks.forgetting`.
"""

import dataclasses
import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import tyro

import adamr
from adamr.routing.carrier import Routed
from benchmarks._evidence.cells import MODIFIERS
from benchmarks._evidence.runner import quicker, run_cell, run_cells
from examples.harness.methods import Method

MEMORY = 0.01  # share of each task's examples, for the rules that look at old losses


class ConflictState(NamedTuple):
    strength: jax.Array


def conflict_scale(per_leaf: bool) -> optax.GradientTransformationExtraArgs:
    """Strength 1 where the raw gradient opposes the memory's, 0 elsewhere."""

    def init(params):
        count = len(jax.tree.leaves(params)) if per_leaf else 1
        return ConflictState(jnp.zeros(count))

    def update(routed, state, params=None, *, memory_gradient, **extra):
        del state, params, extra
        raw, treedef = jax.tree.flatten(routed.raw)
        inner = jnp.stack(
            jax.tree.leaves(jax.tree.map(jnp.vdot, routed.raw, memory_gradient))
        )
        inner = inner if per_leaf else jnp.sum(inner)[None]
        strength = (inner < 0).astype(jnp.float32)
        alphas = jnp.broadcast_to(strength, (len(raw),))
        first = [
            jnp.where(a > 0, x, g)
            for x, g, a in zip(jax.tree.leaves(routed.first), raw, alphas, strict=True)
        ]
        first = jax.tree.unflatten(treedef, first)
        return Routed(first, routed.second, routed.raw), ConflictState(strength)

    return optax.GradientTransformationExtraArgs(init, update)


def _overlap(alpha_max=1.0, **options):
    return lambda: adamr.overlap_adaptive_scale(alpha_max, **options)


def _rising(overlap):
    return overlap


RULES = {
    "full": lambda: adamr.constant_scale(1.0),
    "half": lambda: adamr.constant_scale(0.5),
    "falling": _overlap(0.5),
    "falling_1": _overlap(1.0),
    "falling_leaf": _overlap(0.5, aggregate="leaf"),
    "rising": _overlap(rule=_rising),
    "rising_leaf": _overlap(rule=_rising, aggregate="leaf"),
    "conflict": lambda: conflict_scale(False),
    "conflict_leaf": lambda: conflict_scale(True),
}


@functools.cache
def method(rule: str, routing: str) -> Method:
    """GPM's projection at the strength of a rule."""

    def build(rate, _, setting):
        project = adamr.project_out(setting.subspace)
        if routing == "shared_v":
            return adamr.adamr(rate, project, strength=RULES[rule]())
        return optax.chain(
            adamr.routing.route_with_strength(project, RULES[rule]()),
            adamr.faithful_second_moment(),
            optax.scale_by_learning_rate(rate),
        )

    evidence = MODIFIERS["agem"].evidence if rule.startswith("conflict") else None
    name = f"rule/{routing}/{rule}"
    return Method(name, build, evidence, MODIFIERS["gpm"].boundary)


@dataclasses.dataclass
class Config:
    """Forgetting and plasticity of GPM at strengths that follow different rules."""

    streams: str = "permuted-digits"
    """By commas; the text streams need --data."""
    routings: str = "shared_v,decoupled"
    """By commas."""
    quick: bool = False
    """Permuted digits with half the steps, fewer seeds and rates, v shared only."""
    data: Path = Path("data")
    """Folder with `text/` and `vision/`."""
    out: Path = Path("benchmarks/results")
    """Where results and pictures go; finished cells there are not run again."""


def main(config: Config) -> None:
    names = ["permuted-digits"] if config.quick else config.streams.split(",")
    routings = ["shared_v"] if config.quick else config.routings.split(",")
    for name in names:
        bench = quicker(name) if config.quick else name
        methods = [method(rule, routing) for routing in routings for rule in RULES]
        work = [
            (
                m.about,
                functools.partial(
                    run_cell, method=m, memory=MEMORY if m.evidence else 0.0
                ),
            )
            for m in methods
        ]
        run_cells("strength_rules", bench, config.data, work, config.out)


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m benchmarks.strength_rules"))
