"""How far a step moves along old directions, for many strengths at once.

    f = g − α U Uᵀ g           what enters the first moment
    motion = ‖UᵀΔ‖ / ‖Uᵀg‖     along old directions, per unit of the raw gradient
    rate   = ‖UᵀΔ‖ / ‖Uᵀf‖     the effective learning rate, motion / (1 − α)
    gain   = mean u_kᵀ D u_k   of D = 1 / √v̂ alone: without what D mixes in from outside

Inflations are these over their values at α = 0.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adamr
from adamr import diagnostics
from adamr.protection.eigenbasis import in_eigenbasis
from adamr.subspaces.subspace import coordinates
from benchmarks._evidence.gradients import Source

__all__ = [
    "ESTIMATORS",
    "NORMALIZERS",
    "ROUTES",
    "VARIANTS",
    "Measured",
    "measure",
    "predict",
    "with_mixing",
]

ROUTES = {"shared": adamr.route_both_moments, "decoupled": adamr.route_first_moment}
VARIANTS = ("element", "fan_in", "eigenbasis")
ESTIMATORS = ("adam", "amsgrad", "adafactor", "rmsprop", "yogi")
DECAYS = {"rmsprop": None}  # of the bias correction; every other estimator has b2


def _muon(**options) -> optax.GradientTransformation:
    matrices = optax.contrib.MuonDimensionNumbers()
    return optax.contrib.scale_by_muon(
        weight_dimension_numbers=lambda tree: jax.tree.map(lambda _: matrices, tree),
        **options,
    )


NORMALIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "lion": optax.scale_by_lion,
    "muon": _muon,
    # Schulz's quintic converges to the polar factor; optax's own coefficients do not.
    "muon, converged": functools.partial(
        _muon, ns_coeffs=(1.875, -1.25, 0.375), ns_steps=20
    ),
}


class Measured(NamedTuple):
    """One number a step: (strengths, steps); NaN where an optimizer has no v."""

    motion: jax.Array
    gain: jax.Array
    energy: jax.Array


def _preconditioner(optimizer, variant, subspace, b2) -> optax.GradientTransformation:
    if optimizer in NORMALIZERS:
        link: Any = optax.chain(
            optax.stateless(lambda routed, _: routed.first), NORMALIZERS[optimizer]()
        )
    else:
        share = "fan_in" if variant == "fan_in" else None
        link = adamr.faithful_second_moment(b2=b2, estimator=optimizer, share=share)
    return in_eigenbasis(link, subspace) if variant == "eigenbasis" else link


@functools.partial(
    jax.jit,
    static_argnames=("gradient", "optimizer", "variant", "route", "b2", "since"),
)
def _scan(
    gradient,
    optimizer,
    variant,
    route,
    b2,
    since,
    alphas,
    params,
    subspace,
    rate,
    given,
):
    def run(alpha):
        # Raw until `since`: protection begins with the moments of the old task.
        strength = alpha if since == 0 else lambda t: jnp.where(t < since, 0.0, alpha)
        tx = optax.chain(
            ROUTES[route](adamr.project_out(subspace)),
            adamr.constant_scale(strength),
            _preconditioner(optimizer, variant, subspace, b2),
        )

        def step(carry, now):
            params, state = carry
            g = gradient(params, now)
            delta, state = tx.update(g, state, params)
            motion = diagnostics.effective_learning_rate(g, delta, subspace).total
            gain = energy = jnp.nan
            if optimizer not in NORMALIZERS:
                seen = diagnostics.moment_statistics(
                    state, subspace, b2=DECAYS.get(optimizer, b2)
                )
                gain, energy = seen.old_learning_rate, seen.old_energy
                gain, energy = gain.total, energy.total
            params = jax.tree.map(lambda p, d: p - rate * d, params, delta)
            return (params, state), Measured(motion, gain, energy)

        return jax.lax.scan(step, (params, tx.init(params)), given)[1]

    return jax.vmap(run)(alphas)


def measure(
    source: Source,
    optimizer: str,
    variant: str,
    route: str,
    alphas: Any,
    *,
    b2: float = 0.999,
    since: int = 0,
) -> Measured:
    """Every strength on the same stream.

    Args:
      source: the stream.
      optimizer: an estimator of v, or a name of `NORMALIZERS`.
      variant: of `VARIANTS`; what normalizes by itself has no "fan_in".
      route: of `ROUTES`.
      alphas: (strengths,) in [0, 1].
      b2: decay of v.
      since: steps before the strength sets in.
    """
    return _scan(
        source.gradient, optimizer, variant, route, b2, since,
        jnp.asarray(alphas, jnp.float32), source.params, source.subspace,
        source.learning_rate, source.given,
    )  # fmt: skip


def predict(
    gradients: Any, subspace: adamr.Subspace, variant: str, alphas: Any
) -> np.ndarray:
    """The inflation under shared routing from second moments of g alone.

    f along U, divided by the root of E[f²] and seen along U again; in the eigenbasis
    that is 1 / (1 − α). Element by element E[f²] is that of a mixture; with v shared
    along the fan-in and a share s of the energy along U, (1 − s (2α − α²)) E[g²].
    What D mixes in from outside U is left out (see `with_mixing`).
    """
    alphas = np.asarray(alphas)
    if variant == "eigenbasis":
        return 1.0 / (1.0 - alphas)

    @jax.jit
    def squared(alpha):
        total = jnp.zeros([])
        leaves = zip(jax.tree.leaves(gradients), *subspace, strict=True)
        for g, basis, weights in leaves:
            along = jax.vmap(functools.partial(coordinates, basis, weights))
            old = jnp.einsum("ir,tro->tio", basis[:, 0], along(g))
            v = jnp.mean(jnp.square(g - alpha * old), axis=0)
            v = jnp.mean(v, axis=0, keepdims=True) if variant == "fan_in" else v
            total += jnp.sum(jnp.square(along(old / jnp.sqrt(v)[None])))
        return total

    return np.sqrt([float(squared(a) / squared(0.0)) for a in alphas])


def with_mixing(alphas: Any, inflation: Any, mixed: float) -> np.ndarray:
    """√((1 − φ²) inflation² + φ² / (1 − α)²), the two parts taken as independent.

    Args:
      alphas: (strengths,) below 1.
      inflation: (strengths,) without mixing.
      mixed: φ, the motion at α = 1 over that at α = 0: f has nothing along U there,
        and what moves comes from outside U through D.
    """
    outside = np.square(mixed) / np.square(1.0 - np.asarray(alphas))
    return np.sqrt((1.0 - mixed**2) * np.square(inflation) + outside)
