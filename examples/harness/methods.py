"""Every recipe as the shared loop runs it: optimizer, evidence of a step, boundary.

    evidence   (problem, params, memory, key) -> extra arguments of `update`
    boundary   (problem, setting, params, opt_state, data, key) -> opt_state

`examples.memory` and `examples.boundaries` have them.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

import adamr
from examples.harness import task_ends
from examples.harness.replay import from_first_task, memory_gradient, memory_gradients
from examples.harness.setting import Setting

__all__ = ["METHODS", "Method", "weight_of_memory"]


class Method(NamedTuple):
    """One row of the table.

    Attributes:
      about: one line for tables and help.
      build: (learning rate, strength, setting) -> optimizer.
      evidence: see the module; None: the method needs no memory.
      boundary: see the module; None: nothing happens between tasks.
      learning_rate: for the permuted digits; sweep it elsewhere.
      strength: of a penalty, in the convention with 1/2, γ of GEM, or how often replay
        counts the loss on its memory; None: the method has none.
    """

    about: str
    build: Callable[[Any, Any, Setting], optax.GradientTransformation]
    evidence: Callable[..., dict] | None = None
    boundary: Callable[..., Any] | None = None
    learning_rate: float = 1e-3
    strength: float | None = None


def weight_of_memory(k):
    """Of replay, where the loss on the memory counts k times the new one."""
    return k / (1 + k)


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


def _decoupled_gpm(rate, _, s, *strength):
    return optax.chain(
        adamr.route_first_moment(adamr.project_out(s.subspace)),
        *strength,
        adamr.faithful_second_moment(),
        optax.scale_by_learning_rate(rate),
    )


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
        boundary=functools.partial(task_ends.grow, scaling=10.0),
    ),
    "gpm_si": Method(
        "GPM, and SI's proximal pull on what it leaves open",
        lambda rate, c, s: adamr.gpm_si(rate, s.subspace, c),
        boundary=task_ends.grow_and_consolidate_si,
        strength=0.1,
    ),
    "adam_nscl": Method(
        "Adam-NSCL's update projection, on GPM's bases",
        lambda rate, _, s: adamr.adam_nscl(rate, s.subspace),
        boundary=task_ends.grow,
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
        strength=0.1,
    ),
    "ewc": Method(
        "EWC, true Fisher, proximal",
        lambda rate, k, s: adamr.ewc(rate, k),
        boundary=task_ends.consolidate,
        strength=100.0,
    ),
    "ewc_additive": Method(
        "EWC, true Fisher, penalty in the gradient of both moments",
        lambda rate, k, s: adamr.ewc(rate, k, form="additive"),
        boundary=task_ends.consolidate,
        strength=100.0,
    ),
    "online_ewc": Method(
        "online EWC, γ = 0.9",
        lambda rate, k, s: adamr.online_ewc(rate, k),
        boundary=functools.partial(task_ends.consolidate, rule="online", decay=0.9),
        strength=100.0,
    ),
    "mas": Method(
        "Memory Aware Synapses",
        lambda rate, k, s: adamr.mas(rate, k),
        boundary=functools.partial(task_ends.consolidate, kind="mas", rule="online"),
        strength=1.0,
    ),
    "si": Method(
        "Synaptic Intelligence",
        lambda rate, k, s: adamr.si(rate, k),
        boundary=task_ends.consolidate_si,
        strength=0.1,
    ),
    "rwalk": Method(
        "RWalk",
        lambda rate, k, s: adamr.rwalk(rate, k),
        boundary=task_ends.consolidate_rwalk,
        strength=10.0,
    ),
    "gem": Method(
        "GEM in Adam's metric",
        lambda rate, k, s: adamr.gem(rate, k),
        evidence=memory_gradients,
        strength=0.5,
    ),
    "p_mgem": Method(
        "parameter-wise mGEM in Adam's metric",
        lambda rate, k, s: adamr.p_mgem(rate, k),
        evidence=memory_gradients,
        strength=0.5,
    ),
    "d_mgem": Method(
        "data-wise mGEM in Adam's metric, a task's memory in two parts",
        lambda rate, k, s: adamr.d_mgem(rate, k),
        evidence=functools.partial(memory_gradients, parts=2),
        strength=0.5,
    ),
    "agem": Method(
        "A-GEM in Adam's metric",
        lambda rate, _, s: adamr.agem(rate),
        evidence=memory_gradient,
    ),
    "er": Method(
        "experience replay",
        lambda rate, k, s: from_first_task(adamr.er(rate, weight_of_memory(k))),
        evidence=memory_gradient,
        strength=1.0,
    ),
    "mudman": Method(
        "MUDMAN's disruption mask",
        lambda rate, _, s: adamr.mudman(rate),
        evidence=functools.partial(memory_gradient, name="retain_gradient"),
    ),
    "hft": Method(
        "Half Fine-Tuning",
        lambda rate, _, s: adamr.hft(rate, jax.random.key(0)),
        boundary=task_ends.redraw,
    ),
}
