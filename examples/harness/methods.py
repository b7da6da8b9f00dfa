"""Every recipe as the shared loop runs it: optimizer, evidence of a step, task end.

Numbers that a recipe has a default for are taken from its signature, so an example runs
what the library recommends; where it departs, the line says so.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

import adamr
from examples.harness import task_ends
from examples.harness.replay import from_first_task, memory_gradient, memory_gradients
from examples.harness.setting import Setting, default_of

__all__ = ["METHODS", "Coefficient", "Method", "named"]


class Coefficient(NamedTuple):
    """The number that a method needs besides its learning rate.

    Attributes:
      name: of the recipe's parameter: c of SI, memory_strength of GEM, weight of ER.
      value: what runs without being told.
    """

    name: str
    value: float


def _own(recipe: Callable, name: str) -> Coefficient:
    return Coefficient(name, default_of(recipe, name))


class Method(NamedTuple):
    """One row of the table.

    Attributes:
      about: one line for tables and help.
      build: (learning rate, coefficient, setting) -> optimizer.
      evidence: (problem, params, memory, key) -> extra arguments of `update`, as in
        `replay`; None: the method needs no memory.
      boundary: what happens between two tasks, as in `task_ends`; None: nothing.
      learning_rate: for the permuted digits; sweep it elsewhere.
      coefficient: None: the method has none, and `build` ignores what it is given.
    """

    about: str
    build: Callable[[Any, Any, Setting], optax.GradientTransformation]
    evidence: Callable[..., dict] | None = None
    boundary: Callable[..., Any] | None = None
    learning_rate: float = 1e-3
    coefficient: Coefficient | None = None


def named(method: Method, coefficient: float) -> dict[str, float]:
    """The coefficient under its own name; nothing for a method without one."""
    return {} if method.coefficient is None else {method.coefficient.name: coefficient}


def _sgd_gpm(rate, _, s):
    return optax.chain(
        adamr.project_out(s.subspace), optax.scale_by_learning_rate(rate)
    )


def _shared_gpm(rate, _, s):
    return optax.chain(
        adamr.route_both_moments(adamr.project_out(s.subspace)),
        adamr.faithful_second_moment(),
        optax.scale_by_learning_rate(rate),
    )


def _decoupled_gpm(rate, _, s, strength=None):
    modifier = adamr.project_out(s.subspace)
    if strength is None:
        route = adamr.route_first_moment(modifier)
    else:
        route = adamr.routing.route_with_strength(modifier, strength)
    return optax.chain(
        route, adamr.faithful_second_moment(), optax.scale_by_learning_rate(rate)
    )


# λ F sets the scale of EWC's penalty and F goes with the size of the gradients, so the
# recipe has no default; this one is for the permuted digits.
EWC = Coefficient("strength", 100.0)
EWC_DECAY = 0.9  # γ of online EWC, which a boundary is given: 1 would be MAS's sum
SGP_SCALING = 10.0  # α of SGP, the authors' first; without it `grow_subspace` is GPM's


METHODS: dict[str, Method] = {
    "adam": Method("plain Adam", lambda rate, _, s: optax.adam(rate)),
    "sgd": Method("plain SGD", lambda rate, _, s: optax.sgd(rate), learning_rate=0.1),
    "gpm": Method(
        "GPM, v shared along the projected axis (the alias)",
        lambda rate, _, s: adamr.gpm(rate, s.subspace),
        boundary=task_ends.grow,
    ),
    "gpm_sgd": Method(
        "GPM as published: SGD", _sgd_gpm, boundary=task_ends.grow, learning_rate=0.1
    ),
    "gpm_shared": Method(
        "GPM's gradient into Adam: shared routing",
        _shared_gpm,
        boundary=task_ends.grow,
    ),
    "gpm_decoupled": Method(
        "GPM, element-wise decoupled routing, guarded",
        _decoupled_gpm,
        boundary=task_ends.grow,
    ),
    "gpm_adaptive": Method(
        "GPM, decoupled, overlap-adaptive strength (the paper's)",
        lambda rate, _, s: _decoupled_gpm(rate, _, s, adamr.overlap_adaptive_scale()),
        boundary=task_ends.grow,
    ),
    "gpm_two_sided": Method(
        "GPM's projection of gradient and update",
        lambda rate, _, s: optax.chain(
            adamr.two_sided(s.subspace), optax.scale_by_learning_rate(rate)
        ),
        boundary=task_ends.grow,
    ),
    "sgp": Method(
        "Scaled Gradient Projection",
        lambda rate, _, s: adamr.sgp(rate, s.subspace),
        boundary=functools.partial(task_ends.grow, scaling=SGP_SCALING),
    ),
    "gpm_si": Method(
        "GPM, and SI's proximal pull on what it leaves open",
        lambda rate, c, s: adamr.gpm_si(rate, s.subspace, c),
        boundary=task_ends.grow_and_consolidate_si,
        coefficient=_own(adamr.gpm_si, "c"),
    ),
    "adam_nscl": Method(
        "Adam-NSCL's update projection, on GPM's bases",
        lambda rate, _, s: adamr.adam_nscl(rate, s.subspace),
        boundary=task_ends.grow,
    ),
    "muon": Method(
        "Muon on GPM's projected gradient",
        lambda rate, _, s: adamr.muon(rate, adamr.project_out(s.subspace)),
        boundary=task_ends.grow,
        learning_rate=3e-3,
    ),
    "ogd": Method(
        "Orthogonal Gradient Descent, ground-truth logits",
        lambda rate, _, s: adamr.ogd(rate, s.directions),
        boundary=task_ends.add_directions,
    ),
    "l2": Method(
        "L2 towards the last task's solution",
        lambda rate, k, s: adamr.ewc(rate, k),
        boundary=task_ends.anchor_here,
        coefficient=_own(adamr.l2_sp, "strength"),
    ),
    "ewc": Method(
        "EWC, true Fisher, proximal",
        lambda rate, k, s: adamr.ewc(rate, k),
        boundary=task_ends.consolidate,
        coefficient=EWC,
    ),
    "ewc_additive": Method(
        "EWC, true Fisher, penalty in the gradient of both moments",
        lambda rate, k, s: adamr.ewc(rate, k, form="additive"),
        boundary=task_ends.consolidate,
        coefficient=EWC,
    ),
    "online_ewc": Method(
        f"online EWC, γ = {EWC_DECAY}",
        lambda rate, k, s: adamr.online_ewc(rate, k),
        boundary=functools.partial(
            task_ends.consolidate, rule="online", decay=EWC_DECAY
        ),
        coefficient=EWC,
    ),
    "mas": Method(
        "Memory Aware Synapses",
        lambda rate, k, s: adamr.mas(rate, k),
        boundary=functools.partial(task_ends.consolidate, kind="mas", rule="online"),
        coefficient=_own(adamr.mas, "strength"),
    ),
    "si": Method(
        "Synaptic Intelligence",
        lambda rate, c, s: adamr.si(rate, c),
        boundary=task_ends.consolidate_si,
        coefficient=_own(adamr.si, "c"),
    ),
    "rwalk": Method(
        "RWalk",
        lambda rate, k, s: adamr.rwalk(rate, k),
        boundary=task_ends.consolidate_rwalk,
        coefficient=_own(adamr.rwalk, "strength"),
    ),
    "gem": Method(
        "GEM in Adam's metric",
        lambda rate, k, s: adamr.gem(rate, k),
        evidence=memory_gradients,
        coefficient=_own(adamr.gem, "memory_strength"),
    ),
    "p_mgem": Method(
        "parameter-wise mGEM in Adam's metric",
        lambda rate, k, s: adamr.p_mgem(rate, k),
        evidence=memory_gradients,
        coefficient=_own(adamr.p_mgem, "memory_strength"),
    ),
    "d_mgem": Method(
        "data-wise mGEM in Adam's metric, a task's memory in two parts",
        lambda rate, k, s: adamr.d_mgem(rate, k),
        evidence=functools.partial(memory_gradients, parts=2),
        coefficient=_own(adamr.d_mgem, "memory_strength"),
    ),
    "agem": Method(
        "A-GEM in Adam's metric",
        lambda rate, _, s: adamr.agem(rate),
        evidence=memory_gradient,
    ),
    "er": Method(
        "experience replay",
        lambda rate, w, s: from_first_task(adamr.er(rate, w)),
        evidence=memory_gradient,
        coefficient=_own(adamr.er, "weight"),
    ),
    "mudman": Method(
        "MUDMAN's disruption mask",
        lambda rate, _, s: adamr.mudman(rate),
        evidence=functools.partial(memory_gradient, name="retain_gradient"),
    ),
    "mofo": Method(
        "MoFO: Adam's steps of the largest momenta, a share of them",
        lambda rate, share, s: adamr.mofo(rate, share),
        coefficient=_own(adamr.mofo, "share"),
    ),
    "hft": Method(
        "Half Fine-Tuning",
        lambda rate, _, s: adamr.hft(rate, jax.random.key(0)),
        boundary=task_ends.redraw,
    ),
}
