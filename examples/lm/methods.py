"""The methods compared: each name is one way to compose protection with Adam.

All protect the same subspace, the span of earlier domains' layer inputs, at every
`nnx.Linear` kernel inside the blocks. Embeddings, positions, LayerNorms and the head
get plain Adam in all of them except gpm_si.

Learning rates: the one of lowest final loss in a sweep over the default preset and data
with seed 100, which no default run uses (adaptive_unguarded takes adaptive's; gpm_si:
seed 0):

    final loss / forgetting     1e-3            3e-3            1e-2
    adam                    3.008 / 0.950   3.028 / 1.147   3.370 / 1.162
    shared                  3.003 / 0.792   2.969 / 0.992   3.181 / 1.145
    fixed                   3.017 / 0.891   2.984 / 1.073
    adaptive                3.050 / 0.965   3.009 / 1.104
    alias                   3.003 / 0.692   3.017 / 0.955   3.099 / 0.983
    gpm_si                  2.857 / 0.357   2.750 / 0.304   2.897 / 0.301
    update                  2.988 / 0.695   3.022 / 0.975   3.161 / 1.073
    two_sided               2.986 / 0.774   3.026 / 1.065

Of muon and mofo, which came later, `--lr-grid 1e-3,3e-3,1e-2` saw the first three
domains: final loss 3.348, 2.910, 2.888 and 3.361, 3.357, 3.653.

One seed each: differences in final loss below about 0.05 say nothing. A smaller rate
forgets less and learns less, so compare forgetting at equal rates (`--learning-rate`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import adamr
from examples.harness.methods import Coefficient, Method
from examples.harness.setting import Setting, default_of
from examples.harness.task_ends import grow, grow_and_consolidate_si

FIXED_STRENGTH = 0.5


class ToldState(NamedTuple):
    strength: jax.Array
    subspace: adamr.Subspace | None


def _tell(strength: float, subspace: adamr.Subspace | None = None):
    """Changes nothing; holds what curves show where no other link does."""

    def init(params):
        del params
        return ToldState(jnp.asarray(strength, jnp.float32), subspace)

    def update(updates, state, params=None):
        del params
        return updates, state

    return optax.GradientTransformation(init, update)


def _chain(learning_rate: float, *links) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        *links,
        optax.scale_by_learning_rate(learning_rate),
    )


def _adam(learning_rate, _, s: Setting):
    return _chain(learning_rate, _tell(0.0, s.subspace), optax.scale_by_adam())


def _shared(learning_rate, _, s: Setting):
    route = adamr.route_both_moments(adamr.project_out(s.subspace))
    return _chain(learning_rate, _tell(1.0), route, adamr.faithful_second_moment())


def _fixed(learning_rate, _, s: Setting):
    return _chain(
        learning_rate,
        adamr.route_first_moment(adamr.project_out(s.subspace)),
        adamr.constant_scale(FIXED_STRENGTH),
        adamr.faithful_second_moment(),
    )


def _adaptive(learning_rate, _, s: Setting, guard=True):
    return _chain(
        learning_rate,
        adamr.routing.route_with_strength(
            adamr.project_out(s.subspace), adamr.overlap_adaptive_scale()
        ),
        adamr.faithful_second_moment(guard=guard),
    )


def _adaptive_unguarded(learning_rate, _, s: Setting):
    return _adaptive(learning_rate, _, s, guard=False)


def _clipped(optimizer):
    return optax.chain(optax.clip_by_global_norm(1.0), _tell(1.0), optimizer)


def _alias(learning_rate, _, s: Setting):
    return _clipped(adamr.adamr(learning_rate, adamr.project_out(s.subspace)))


def _gpm_si(learning_rate, c, s: Setting):
    # SI's path integral sees clipped gradients here: c is in that scale.
    return _clipped(adamr.gpm_si(learning_rate, s.subspace, c))


def _update(learning_rate, _, s: Setting):
    protect = adamr.protect_update(s.subspace)
    return _chain(learning_rate, _tell(1.0), optax.scale_by_adam(), protect)


def _two_sided(learning_rate, _, s: Setting):
    return _chain(
        learning_rate,
        _tell(1.0),
        adamr.route_both_moments(adamr.project_out(s.subspace)),
        adamr.faithful_second_moment(),
        adamr.protect_update(s.subspace),
    )


def _in_blocks(path, shape):
    """Embeddings, positions and the head stay with Adam, as Muon's authors have it."""
    return adamr.default_axes(path, shape) if "blocks" in path else None


def _muon(learning_rate, _, s: Setting):
    modifier = adamr.project_out(s.subspace)
    return _clipped(
        adamr.muon(
            learning_rate,
            modifier,
            axes=_in_blocks,
            adam_learning_rate=learning_rate / 10,
        )
    )


def _mofo(learning_rate, share, s: Setting):
    told = _tell(0.0, s.subspace)
    return optax.chain(
        optax.clip_by_global_norm(1.0), told, adamr.mofo(learning_rate, share)
    )


def _method(about: str, build, learning_rate: float) -> Method:
    return Method(about, build, boundary=grow, learning_rate=learning_rate)


METHODS = {
    "adam": _method("Adam, no protection", _adam, 1e-3),
    "shared": _method("projected gradient in both moments", _shared, 3e-3),
    "fixed": _method(f"decoupled, strength {FIXED_STRENGTH:g}", _fixed, 3e-3),
    "adaptive": _method("decoupled, overlap-adaptive strength", _adaptive, 3e-3),
    "alias": _method("adamr(): decoupled, v shared along the fan-in", _alias, 1e-3),
    "gpm_si": Method(
        "GPM through a shared v, and SI's proximal pull on what it leaves open",
        _gpm_si,
        boundary=grow_and_consolidate_si,
        learning_rate=3e-3,
        coefficient=Coefficient("c", default_of(adamr.gpm_si, "c")),
    ),
    "muon": _method("Muon on the projected gradient", _muon, 1e-2),
    "mofo": Method(
        "Adam's steps of the largest momenta alone, no protection",
        _mofo,
        boundary=grow,
        learning_rate=3e-3,
        coefficient=Coefficient("share", default_of(adamr.mofo, "share")),
    ),
    "update": _method("projected update (Adam-NSCL)", _update, 1e-3),
    "two_sided": _method("projected gradient and update", _two_sided, 1e-3),
    "adaptive_unguarded": _method(
        "adaptive with v from the raw gradient alone", _adaptive_unguarded, 3e-3
    ),
}
DEFAULT = ("adam", "shared", "gpm_si")
