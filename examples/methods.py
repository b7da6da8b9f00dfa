"""Every recipe as the shared loop runs it: optimizer, evidence of a step, boundary.

    evidence   (gradient_of, params, memory, key) -> extra arguments of `update`
    boundary   (problem, setting, params, opt_state, data, key) -> opt_state

`gradient_of(params, data)` is the gradient of the mean loss. A boundary sees the
finished task's `Data` and one run; it runs eagerly, between two chunks.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adamr
from examples.memory import Memory
from examples.problem import Data

__all__ = [
    "METHODS",
    "Method",
    "Setting",
    "grow",
    "memory_gradient",
    "setting_for",
]


class Setting(NamedTuple):
    """What optimizers are built from beside their learning rate.

    Attributes:
      subspace: empty, with room, for every protected kernel.
      directions: empty, with room for `new_directions` per task; None without any.
      threshold: energy share of a task's layer inputs that becomes protected.
      samples: examples that a boundary looks at.
      new_directions: of OGD, per task.
    """

    subspace: adamr.Subspace
    directions: Any
    threshold: float
    samples: int
    new_directions: int


class Method(NamedTuple):
    """One row of the table.

    Attributes:
      about: one line for tables and help.
      build: (learning rate, strength, setting) -> optimizer.
      evidence: see the module; None: the method needs no memory.
      boundary: see the module; None: nothing happens between tasks.
      learning_rate: for the permuted digits; sweep it elsewhere.
      strength: of a penalty, in the convention with 1/2; None: the method has none.
    """

    about: str
    build: Callable[[Any, Any, Setting], optax.GradientTransformation]
    evidence: Callable[..., dict] | None = None
    boundary: Callable[..., Any] | None = None
    learning_rate: float = 1e-3
    strength: float | None = None


def setting_for(
    params: Any,
    axes: Any,
    *,
    tasks: int,
    unprotected: tuple[str, ...] = ("head",),
    threshold: float = 0.97,
    samples: int = 128,
    new_directions: int = 0,
) -> Setting:
    """A setting for a model; each direction costs a copy of the model in memory."""
    return Setting(
        adamr.empty_subspace(params, axes=axes, unprotected=unprotected),
        adamr.empty_directions(params, tasks * new_directions)
        if new_directions
        else None,
        threshold,
        samples,
        new_directions,
    )


# Evidence -----------------------------------------------------------------------


def _draw(memory: Memory, key: jax.Array, count: int) -> Data:
    """Examples drawn from all seen tasks alike."""
    which, where = jax.random.split(key)
    weights = memory.seen.astype(jnp.float32)
    weights = jnp.where(weights.sum() > 0, weights, 1.0)
    task = jax.random.choice(
        which, len(weights), (count,), p=weights / jnp.sum(weights)
    )
    place = jax.random.randint(where, (count,), 0, memory.data.labels.shape[1])
    inputs, labels, classes = memory.data
    return Data(inputs[task, place], labels[task, place], classes[task])


def memory_gradient(
    gradient_of, params, memory, key, *, name="memory_gradient", count=None
):
    """The gradient on `count` stored examples; None: as many as a task's memory has."""
    count = memory.data.labels.shape[1] if count is None else count
    gradient = gradient_of(params, _draw(memory, key, count))
    any_seen = jnp.any(memory.seen)
    return {name: jax.tree.map(lambda g: jnp.where(any_seen, g, 0.0), gradient)}


def _memory_gradients(gradient_of, params, memory, key):
    del key
    each = jax.vmap(gradient_of, in_axes=(None, 0))(params, memory.data)
    return {"memory_gradients": each, "memory_mask": memory.seen}


# Boundaries ---------------------------------------------------------------------


def _some(data: Data, key: jax.Array, count: int) -> Data:
    n = len(data.labels)
    chosen = np.asarray(jax.random.permutation(key, n)[: min(count, n)])
    return Data(data.inputs[chosen], data.labels[chosen], data.classes)


def grow(problem, setting, params, opt_state, data, key, *, importance=None):
    inputs = _some(data, key, setting.samples).inputs
    subspace = adamr.grow_subspace(
        adamr.get_subspace(opt_state),
        problem.capture(params, inputs),
        threshold=setting.threshold,
        importance=importance,
    )
    return adamr.set_subspace(opt_state, subspace)


def _logits_fn(problem, data):
    def one(params, x):
        logits = problem.logits(params, x[None])[0]
        return jnp.where(jnp.asarray(data.classes), logits, -1e30)

    return one


@functools.partial(jax.jit, static_argnames=("problem", "kind"))
def _fisher(problem, params, data, key, kind):
    logits = _logits_fn(problem, data)
    if kind == "mas":
        return adamr.memory_aware_importance(
            lambda p, x: problem.logits(p, x[None])[0], params, data.inputs,
            chunk_size=32,
        )  # fmt: skip
    key = key if kind == "sampled" else None
    return adamr.fisher_information(
        logits, params, data.inputs, kind=kind, key=key, chunk_size=32
    )


def _consolidate(
    problem, setting, params, opt_state, data, key, *, kind="true", **options
):
    some, draw = jax.random.split(key)
    data = _some(data, some, setting.samples)
    fisher = _fisher(problem, params, data, draw, kind)
    return adamr.consolidate(opt_state, params, fisher, **options)


def _add_directions(problem, setting, params, opt_state, data, key):
    directions = adamr.get_subspace(opt_state)
    data = _some(data, key, setting.new_directions)
    directions = adamr.ogd_directions(
        directions, lambda p, x: problem.logits(p, x[None])[0], params, data.inputs,
        data.labels, chunk_size=32,
    )  # fmt: skip
    return adamr.set_subspace(opt_state, directions)


def _anchor_here(problem, setting, params, opt_state, data, key):
    del problem, setting, data, key
    ones = jax.tree.map(jnp.ones_like, params)
    return adamr.consolidate(opt_state, params, ones, rule="replace")


def _path(problem, setting, params, opt_state, data, key):
    del problem, setting, data, key
    return adamr.consolidate_path(opt_state, params, damping=1e-3)


def _walk(problem, setting, params, opt_state, data, key):
    del problem, setting, data, key
    return adamr.consolidate_walk(opt_state, params)


def _redraw(problem, setting, params, opt_state, data, key):
    del problem, setting, params, data, key
    return adamr.reset_moments(adamr.redraw_half(opt_state))


# The table ----------------------------------------------------------------------


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
        boundary=grow,
    ),
    "gpm_sgd": Method(
        "GPM as published: SGD", _sgd_gpm, boundary=grow, learning_rate=0.1
    ),
    "gpm_shared": Method(
        "GPM's gradient into Adam: shared routing", _shared_gpm, boundary=grow
    ),
    "gpm_decoupled": Method(
        "GPM, element-wise decoupled routing, guarded", _decoupled_gpm, boundary=grow
    ),
    "gpm_adaptive": Method(
        "GPM, decoupled, overlap-adaptive strength (the paper's)",
        lambda rate, _, s: _decoupled_gpm(rate, _, s, adamr.overlap_adaptive_scale()),
        boundary=grow,
    ),
    "gpm_two_sided": Method(
        "GPM's projection of gradient and update",
        lambda rate, _, s: optax.chain(
            adamr.two_sided(s.subspace), optax.scale_by_learning_rate(rate)
        ),
        boundary=grow,
    ),
    "sgp": Method(
        "Scaled Gradient Projection",
        lambda rate, _, s: adamr.sgp(rate, s.subspace),
        boundary=functools.partial(grow, importance=10.0),
    ),
    "adam_nscl": Method(
        "Adam-NSCL's update projection, on GPM's bases",
        lambda rate, _, s: adamr.adam_nscl(rate, s.subspace),
        boundary=grow,
    ),
    "ogd": Method(
        "Orthogonal Gradient Descent, ground-truth logits",
        lambda rate, _, s: adamr.ogd(rate, s.directions),
        boundary=_add_directions,
    ),
    "l2": Method(
        "L2 towards the last task's solution",
        lambda rate, k, s: adamr.ewc(rate, k),
        boundary=_anchor_here,
        strength=0.1,
    ),
    "ewc": Method(
        "EWC, true Fisher, proximal",
        lambda rate, k, s: adamr.ewc(rate, k),
        boundary=_consolidate,
        strength=100.0,
    ),
    "ewc_additive": Method(
        "EWC, true Fisher, penalty in the gradient of both moments",
        lambda rate, k, s: adamr.ewc(rate, k, form="additive"),
        boundary=_consolidate,
        strength=100.0,
    ),
    "online_ewc": Method(
        "online EWC, γ = 0.9",
        lambda rate, k, s: adamr.online_ewc(rate, k),
        boundary=functools.partial(_consolidate, rule="online", decay=0.9),
        strength=100.0,
    ),
    "mas": Method(
        "Memory Aware Synapses",
        lambda rate, k, s: adamr.mas(rate, k),
        boundary=functools.partial(_consolidate, kind="mas", rule="online"),
        strength=1.0,
    ),
    "si": Method(
        "Synaptic Intelligence",
        lambda rate, k, s: adamr.si(rate, k),
        boundary=_path,
        strength=0.1,
    ),
    "rwalk": Method(
        "RWalk", lambda rate, k, s: adamr.rwalk(rate, k), boundary=_walk, strength=10.0
    ),
    "gem": Method(
        "GEM in Adam's metric",
        lambda rate, _, s: adamr.gem(rate),
        evidence=_memory_gradients,
    ),
    "p_mgem": Method(
        "parameter-wise mGEM in Adam's metric",
        lambda rate, _, s: adamr.p_mgem(rate),
        evidence=_memory_gradients,
    ),
    "agem": Method(
        "A-GEM in Adam's metric",
        lambda rate, _, s: adamr.agem(rate),
        evidence=memory_gradient,
    ),
    "er": Method(
        "experience replay, half of the gradient from memory",
        lambda rate, _, s: adamr.er(rate),
        evidence=memory_gradient,
    ),
    "mudman": Method(
        "MUDMAN's disruption mask",
        lambda rate, _, s: adamr.mudman(rate),
        evidence=functools.partial(memory_gradient, name="retain_gradient"),
    ),
    "hft": Method(
        "Half Fine-Tuning",
        lambda rate, _, s: adamr.hft(rate, jax.random.key(0)),
        boundary=_redraw,
    ),
}
