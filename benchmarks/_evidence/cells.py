"""Modifier × routing × optimizer: the cells of the evidence, as the loop's methods.

    modifier    what changes the gradient, with its evidence and its task boundary
    routing     which moment sees the change, and what else keeps it alive
    optimizer   the estimator of v after it, or plain SGD

    none            no modifier
    shared          g̃ in both moments: what `chain(modifier, adam)` does
    decoupled       g̃ in the first moment, g in the second (guarded)
    adaptive        decoupled, with the overlap-adaptive strength of arXiv:2604.22407
    shared_v        decoupled, v shared along the fan-in of what can be protected
    eigenbasis      decoupled, moments in the eigenbasis of the protected space
    update          g in both moments, the update projected
    two_sided       gradient and update projected
    own             the library's recipe for what has a penalty, a constraint or replay

From `eigenbasis` to `two_sided`, routings are for projections only.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import optax

import adamr
from examples.harness import methods, task_ends
from examples.harness.methods import Method
from examples.harness.replay import from_first_task
from examples.harness.setting import Setting

__all__ = ["CELLS", "ESTIMATORS", "MODIFIERS", "Cell", "method"]

WEIGHT_DECAY = 0.01


class Cell(NamedTuple):
    modifier: str
    routing: str = "shared"
    optimizer: str = "adam"

    @property
    def name(self) -> str:
        return "/".join(self)


class Modifier(NamedTuple):
    """How a modifier is made, fed and moved over a task boundary.

    Attributes:
      make: (coefficient, setting) -> g -> g̃.
      protects: `setting` -> what projections protect; None: not a projection.
      own: (rate, coefficient, setting) -> the library's recipe; None: there is none.
      evidence, boundary: see `examples.harness.methods.Method`.
      memory: share of each task's examples that are kept.
      wrap: around the optimizer, except around the library's recipe.
    """

    make: Callable[[Any, Setting], optax.GradientTransformation]
    protects: Callable[[Setting], Any] | None = None
    own: Callable[..., optax.GradientTransformation] | None = None
    evidence: Callable[..., dict] | None = None
    boundary: Callable[..., Any] | None = None
    memory: float = 0.0
    wrap: Callable[[Any], Any] = lambda tx: tx


def _replay(share: float, times: float | None = None) -> Modifier:
    """Counts the loss on the memory `times` as often as the new one; None: swept."""
    er = methods.METHODS["er"]

    def weight(k):
        k = k if times is None else times
        return k / (1 + k)

    return Modifier(
        lambda k, _: from_first_task(adamr.modifiers.mix_gradients(weight(k))),
        own=lambda rate, k, s: er.build(rate, weight(k), s),
        evidence=er.evidence,
        memory=share,
    )


def _constraint(name: str, make, own) -> Modifier:
    return Modifier(
        lambda k, s: make(k),
        own=own,
        evidence=methods.METHODS[name].evidence,
        memory=0.01,
    )


def _gem(name: str, **options) -> Modifier:
    recipe = getattr(adamr, name)
    return _constraint(
        name,
        functools.partial(adamr.gem_constraint, **options),
        lambda rate, k, s: recipe(rate, k, **options),
    )


MODIFIERS = {
    "none": Modifier(lambda _, s: optax.identity()),
    "gpm": Modifier(
        lambda _, s: adamr.project_out(s.subspace),
        lambda s: s.subspace,
        boundary=methods.METHODS["gpm"].boundary,
    ),
    "sgp": Modifier(
        lambda _, s: adamr.project_out(s.subspace),
        lambda s: s.subspace,
        boundary=methods.METHODS["sgp"].boundary,
    ),
    "ogd": Modifier(
        lambda _, s: adamr.project_out(s.directions),
        lambda s: s.directions,
        boundary=methods.METHODS["ogd"].boundary,
    ),
    "ewc": Modifier(
        lambda k, s: adamr.quadratic_penalty(k),
        own=lambda rate, k, s: adamr.ewc(rate, k),
        boundary=functools.partial(
            methods.METHODS["ewc"].boundary, kind="sampled"
        ),
    ),
    "si": Modifier(
        lambda k, s: adamr.quadratic_penalty(2 * k),
        own=lambda rate, c, s: adamr.si(rate, c),
        boundary=methods.METHODS["si"].boundary,
        wrap=adamr.penalties.track_si,
    ),
    "gpm_si": Modifier(
        lambda k, s: optax.chain(
            adamr.quadratic_penalty(2 * k), adamr.project_out(s.subspace)
        ),
        lambda s: s.subspace,
        own=lambda rate, c, s: adamr.gpm_si(rate, s.subspace, c),
        boundary=task_ends.grow_and_consolidate_si,
        wrap=adamr.penalties.track_si,
    ),
    "agem": _constraint(
        "agem", lambda _: adamr.agem_constraint(), lambda rate, _, s: adamr.agem(rate)
    ),
    "gem": _gem("gem"),
    "gem_mean": _gem("gem", average=True),
    "p_mgem": _gem("p_mgem", partition="leaf"),
    "p_mgem_mean": _gem("p_mgem", partition="leaf", average=True),
    "d_mgem_mean": _gem("d_mgem", average=True),
    "replay_0.5": _replay(0.005, 1.0),
    "replay_1": _replay(0.01, 1.0),
    "replay_0.5_weighted": _replay(0.005),
    "replay_1_weighted": _replay(0.01),
}  # fmt: skip

ESTIMATORS = {"adam": "adam", "adamw": "adam", "adafactor": "adafactor",
              "rmsprop": "rmsprop"}  # fmt: skip


def _decay(optimizer: str, subspace: Any = None) -> list:
    """The weight decay of adamw, outside the protected space where one is given."""
    if optimizer != "adamw":
        return []
    decay = optax.add_decayed_weights(WEIGHT_DECAY)
    return [decay] if subspace is None else [decay, adamr.protect_update(subspace)]


def _links(cell: Cell, modifier: Modifier, coefficient, setting: Setting) -> list:
    """Gradient to unscaled step."""
    change = modifier.make(coefficient, setting)
    guard = modifier.protects(setting) if modifier.protects else None
    moments = functools.partial(
        adamr.faithful_second_moment, estimator=ESTIMATORS[cell.optimizer]
    )
    first = adamr.route_first_moment(change)
    match cell.routing:
        case "shared":
            links = [adamr.route_both_moments(change), moments()]
        case "decoupled":
            links = [first, moments()]
        case "adaptive":
            strength = adamr.overlap_adaptive_scale()
            links = [adamr.routing.route_with_strength(change, strength), moments()]
        case "shared_v":
            # As in the alias: only a bare projection needs no guard there.
            bounded = True if cell.modifier in ("gpm", "sgp") else "shared"
            shared = moments(share=setting.subspace, guard=bounded)
            return [first, shared, *_decay(cell.optimizer, guard)]
        case "eigenbasis":
            links = [first, adamr.in_eigenbasis(moments(), guard)]
        case "update":
            whole = adamr.route_both_moments(optax.identity())
            decay = _decay(cell.optimizer)
            return [whole, moments(), *decay, adamr.protect_update(guard)]
        case "two_sided":
            decay, both = _decay(cell.optimizer), adamr.route_both_moments(change)
            return [both, moments(), *decay, adamr.protect_update(guard)]
        case _:
            raise ValueError(f"routing: got {cell.routing!r} in {cell.name}.")
    return [*links, *_decay(cell.optimizer)]


@functools.cache
def method(cell: Cell, sgd_factor: float = 100.0) -> Method:
    """The cell as `harness.loop.learn` takes it; see `Bench.sgd_factor`."""
    modifier = MODIFIERS[cell.modifier]

    def build(rate, coefficient, setting):
        if cell.routing == "own":
            return modifier.own(rate, coefficient, setting)
        if cell.optimizer == "sgd":
            change = modifier.make(coefficient, setting)
            return modifier.wrap(optax.chain(change, optax.sgd(sgd_factor * rate)))
        links = _links(cell, modifier, coefficient, setting)
        return modifier.wrap(optax.chain(*links, optax.scale_by_learning_rate(rate)))

    return Method(cell.name, build, modifier.evidence, modifier.boundary)


def _cells() -> list[Cell]:
    projection = ["shared", "decoupled", "adaptive", "shared_v", "eigenbasis",
                  "update", "two_sided"]  # fmt: skip
    other = ["shared", "decoupled", "adaptive", "shared_v", "own"]
    routings = {"gpm": projection, "sgp": projection}
    routings["gpm_si"] = ["shared", "shared_v", "own"]
    routings["ogd"] = ["shared", "decoupled", "adaptive", "two_sided"]
    routings |= dict.fromkeys(["gem_mean", "p_mgem_mean", "d_mgem_mean"], ["own"])
    routings |= {name: other for name in MODIFIERS if name not in ("none", *routings)}
    cells = [Cell("none", "shared", o) for o in (*ESTIMATORS, "sgd")]
    for modifier, names in routings.items():
        cells.append(Cell(modifier, "shared", "sgd"))
        for optimizer in ESTIMATORS:
            cells += [
                Cell(modifier, routing, optimizer)
                for routing in names
                if routing != "own" or optimizer == "adam"
            ]
    return cells


CELLS = _cells()
