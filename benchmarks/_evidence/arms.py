"""One thing changed at a time: what the moments see, how far a step goes along U.

    f = g − α (g − g̃)      first moment          second moment
    none                   g                     g
    route_first            f                     g
    route_both             f                     f
    route_second           g                     f

The denominator alone: m from f in all, v from f, c·g, a mixture or g. The rate alone:
the step of one route, its part along U made as long as that of the other.

Element by element "v from g" means max(g², f²), the library's guard: where an input is
dead, g is 0 and f is not (`unguarded` shows what comes of it).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import adamr
from adamr import diagnostics
from adamr.protection.eigenbasis import in_eigenbasis
from adamr.routing.carrier import Routed
from examples.harness.methods import METHODS, Method

__all__ = ["ARMS", "Arm", "VARIANTS", "method_for"]

VARIANTS = ("element", "fan_in", "eigenbasis")
PLAIN = VARIANTS[:1]
ALPHA, WEAK = 0.9, 0.5

ROUTES = {
    "first": adamr.route_first_moment,
    "both": adamr.route_both_moments,
    "second": adamr.route_second_moment,
}
STRENGTHS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "none": functools.partial(adamr.constant_scale, 0.0),
    "strong": functools.partial(adamr.constant_scale, ALPHA),
    "weak": functools.partial(adamr.constant_scale, WEAK),
    "adaptive": functools.partial(adamr.overlap_adaptive_scale, alpha_max=WEAK),
}
DENOMINATORS: dict[str, Callable[[Any, Any], Any]] = {  # (g, f) -> what v is fed
    "g": lambda g, f: g,
    "c g": lambda g, f: (1.0 - ALPHA) * g,
    "mixture": lambda g, f: jnp.sqrt((jnp.square(g) + jnp.square(f)) / 2.0),
    "f": lambda g, f: f,
}


class Arm(NamedTuple):
    """One intervention.

    Attributes:
      about: one line for tables.
      route: of `ROUTES`.
      strength: of `STRENGTHS`.
      denominator: of `DENOMINATORS`; None: as the route has it.
      matched: the arm whose length along U the step takes; None: its own.
      variants: the ways to keep v in which the arm makes sense.
    """

    about: str
    route: str
    strength: str = "strong"
    denominator: str | None = None
    matched: str | None = None
    variants: tuple[str, ...] = ("element", "eigenbasis")


ARMS = {
    "none": Arm("plain Adam", "first", "none", "g", variants=VARIANTS),
    "route_both": Arm("m and v from f: shared", "both", variants=VARIANTS),
    "route_first": Arm("m from f, v from g", "first", "strong", "g", variants=VARIANTS),
    "route_second": Arm("m from g, v from f", "second"),
    "v from mixture": Arm("m from f, v from both", "first", "strong", "mixture"),
    "v from c g": Arm(f"m from f, v from {1 - ALPHA:.1f} g", "first", "strong", "c g"),
    "unguarded": Arm(
        "m from f, v from g to the letter", "first", variants=PLAIN
    ),
    "both, rate of first": Arm(
        "shared, along U as long as decoupled", "both", matched="route_first"
    ),
    "first, rate of both": Arm(
        "decoupled, along U as long as shared",
        "first", "strong", "g", matched="route_both",
    ),
    "both, weak": Arm(f"shared, α = {WEAK}", "both", "weak", variants=PLAIN),
    "first, weak": Arm(
        f"decoupled, α = {WEAK}", "first", "weak", "g", variants=PLAIN
    ),
    "both, adaptive": Arm(
        f"shared, α = {WEAK} (1 − s)", "both", "adaptive", variants=PLAIN
    ),
    "first, adaptive": Arm(
        f"decoupled, α = {WEAK} (1 − s)", "first", "adaptive", "g", variants=PLAIN
    ),
}  # fmt: skip


def _feed(denominator: str | None, guard: bool) -> optax.GradientTransformation:
    """A link that replaces what v is fed, and nothing else."""

    def leaf(g, f):
        raw = jnp.maximum(jnp.abs(g), jnp.abs(f)) if guard else g
        return DENOMINATORS[str(denominator)](raw, f)

    def replace(routed, params):
        del params
        if denominator is None:
            return routed
        second = jax.tree.map(leaf, routed.raw, routed.first)
        return Routed(routed.first, second, routed.raw)

    return optax.stateless(replace)


class MatchedState(NamedTuple):
    subspace: adamr.Subspace
    step: Any
    other: Any


def _matched(
    step: optax.GradientTransformationExtraArgs,
    other: optax.GradientTransformationExtraArgs,
    subspace: adamr.Subspace,
) -> optax.GradientTransformation:
    """The step of one optimizer; per leaf its part along U as long as the other's."""

    def init_fn(params):
        return MatchedState(subspace, step.init(params), other.init(params))

    def update_fn(updates, state, params=None):
        own, own_state = step.update(updates, state.step, params)
        like, other_state = other.update(updates, state.other, params)
        ratios = diagnostics.effective_learning_rate(own, like, state.subspace)
        leaves, treedef = jax.tree.flatten(own)
        outside = jax.tree.leaves(adamr.subspaces.project(state.subspace, own))
        made = [
            # A step with nothing along U has no direction there to stretch.
            x if r is None else p + jnp.where(jnp.isfinite(r), r, 1.0) * (x - p)
            for x, p, r in zip(leaves, outside, ratios.per_leaf, strict=True)
        ]
        state = MatchedState(state.subspace, own_state, other_state)
        return jax.tree.unflatten(treedef, made), state

    return optax.GradientTransformation(init_fn, update_fn)


def _direction(arm: Arm, variant: str, subspace: adamr.Subspace):
    if variant == "fan_in":
        merge = adamr.faithful_second_moment(share=subspace, guard=False)
    else:
        merge = adamr.faithful_second_moment(guard=False)
    moments = optax.chain(_feed(arm.denominator, guard=variant == "element"), merge)
    if variant == "eigenbasis":
        moments = in_eigenbasis(moments, subspace)
    made = optax.chain(
        ROUTES[arm.route](adamr.project_out(subspace)),
        STRENGTHS[arm.strength](),
        moments,
    )
    if arm.matched is None:
        return made
    other = _direction(ARMS[arm.matched], variant, subspace)
    return _matched(made, other, subspace)


@functools.cache
def method_for(name: str, variant: str) -> Method:
    """The arm as the shared loop takes it; GPM's bases grow at every boundary."""
    arm = ARMS[name]

    def build(rate, coefficient, setting):
        del coefficient
        return optax.chain(
            _direction(arm, variant, setting.subspace),
            optax.scale_by_learning_rate(rate),
        )

    return Method(arm.about, build, boundary=METHODS["gpm"].boundary)
