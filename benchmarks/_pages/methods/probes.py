"""A small model, and how far a method's step on it is from what the method promises."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adamr
from adamr.subspaces.directions import coordinates

TASKS, RANK = 5, 16

# The reference model ------------------------------------------------------------

SHAPES = {"bias": (64,), "first": (64, 64), "second": (64, 32)}


def params() -> Any:
    rng = np.random.default_rng(0)
    return {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in SHAPES.items()}


def gradient(seed: int) -> Any:
    """Entries of very different scale; the direction changes every tenth seed."""
    rng, base = np.random.default_rng(seed), np.random.default_rng(1000 + seed // 10)

    def leaf(s):
        direction = base.normal(size=s) + 0.3 * rng.normal(size=s)
        return jnp.asarray(direction * 10 ** base.uniform(-1, 1, s), jnp.float32)

    return {name: leaf(shape) for name, shape in SHAPES.items()}


def subspace(weight: float = 1.0) -> adamr.Subspace:
    rng = np.random.default_rng(1)
    bases = {
        k: np.linalg.qr(rng.normal(size=(64, RANK)))[0] if len(s) == 2 else None
        for k, s in SHAPES.items()
    }
    weights = {k: b if b is None else np.full(RANK, weight) for k, b in bases.items()}
    return adamr.make_subspace(params(), bases, max_rank=RANK, weights=weights)


def directions() -> adamr.Directions:
    empty = adamr.empty_directions(params(), RANK)
    samples = [gradient(3000 + 10 * i) for i in range(RANK)]
    return adamr.grow_directions(empty, jax.tree.map(lambda *x: jnp.stack(x), *samples))


def one_memory(g: Any) -> dict:
    """A memory in slight conflict with g, and in more with what Adam makes of it.

    r = k g − sign g: ⟨g, r⟩ is just below 0, and ⟨sign g, r⟩ far below it, since the
    entries of g are of different size (Cauchy and Schwarz).
    """
    share = 0.99 * optax.tree.sum(jax.tree.map(jnp.abs, g)) / optax.tree.vdot(g, g)
    return {"memory_gradient": jax.tree.map(lambda x: share * x - jnp.sign(x), g)}


def memories(g: Any) -> dict:
    """Several such memories."""
    (one,) = one_memory(g).values()
    rng = np.random.default_rng(5)

    def stack(x):
        noise = rng.normal(size=(TASKS, *x.shape))
        return x[None] + jnp.asarray(0.1 * noise, jnp.float32)

    return {"memory_gradients": jax.tree.map(stack, one)}


def parts(g: Any) -> dict:
    """The same, as two parts of each task's memory."""
    (one,) = memories(g).values()
    both = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x[::-1]], axis=1), one)
    return {"memory_gradients": both}


def retained(g: Any) -> dict:
    return {"retain_gradient": jax.tree.map(lambda x, y: y + 0 * x, g, gradient(2007))}


# Probes: how far the step is from what the method promises ------------------------


class Promise(NamedTuple):
    """What no step may do, and how it is measured.

    Attributes:
      words: the promise.
      number: what the number counts.
      violation: (optimizer, evidence) -> the number.
      most: the largest number with which the promise counts as kept.
    """

    words: str
    number: str
    violation: Callable[[Any, Callable[[Any], dict]], float]
    most: float = 1e-5


def _steps(tx, evidence, count=40):
    update, state = jax.jit(tx.update), tx.init(params())
    for seed in range(count):
        g = gradient(seed)
        extra = evidence(g)
        step, state = update(g, state, params(), **extra)
        yield g, extra, step, state


def leak(tx, evidence):
    """Largest ‖Uᵀ Δ‖ / ‖Δ‖ over the protected leaves."""
    worst = 0.0
    for _, _, step, _ in _steps(tx, evidence):
        worst = max(worst, float(adamr.update_leak(step, subspace()).total))
    return worst


def weight_sides() -> tuple[adamr.Subspace, adamr.Subspace]:
    axes = {"bias": None, "first": adamr.Axes((0,)), "second": adamr.Axes((0,))}
    return adamr.weight_subspaces(params(), axes, keep=0.25)


def leak_of_both_sides(tx, evidence):
    """The same for the directions of the inputs and of the outputs."""
    worst = 0.0
    for _, _, step, _ in _steps(tx, evidence):
        for side in weight_sides():
            worst = max(worst, float(adamr.update_leak(step, side).total))
    return worst


def direction_leak(tx, evidence):
    worst = 0.0
    for _, _, step, _ in _steps(tx, evidence):
        along = jnp.linalg.norm(coordinates(directions(), step))
        worst = max(worst, float(along / optax.tree.norm(step)))
    return worst


def _one_by_one(rows):
    """The gradients of a tree with more axes, in front, than the parameters."""
    rows = jax.tree.map(lambda x, p: x.reshape(-1, *p.shape), rows, params())
    for k in range(len(rows["bias"])):
        yield jax.tree.map(lambda x, k=k: x[k], rows)


def conflict(tx, evidence):
    """Largest increase of a memory's loss along the step, −cos of Δ and g_k."""
    worst = 0.0
    for _, extra, step, _ in _steps(tx, evidence):
        (rows,) = extra.values()
        for row in _one_by_one(rows):
            cosine = optax.tree.vdot(step, row) / (
                optax.tree.norm(step) * optax.tree.norm(row)
            )
            worst = max(worst, -float(cosine))
    return worst


def disruption(tx, evidence):
    """Largest step where the gradient's sign differs from the retained one's."""
    worst = 0.0
    for g, extra, step, _ in _steps(tx, evidence):
        r = extra["retain_gradient"]
        outside = jax.tree.map(
            lambda u, a, b: jnp.max(jnp.abs(jnp.where(a * b < 0, u, 0.0))), step, g, r
        )
        most = max(float(jnp.max(jnp.abs(u))) for u in jax.tree.leaves(step))
        worst = max(worst, max(map(float, jax.tree.leaves(outside))) / most)
    return worst


def stiffness(tx, evidence):
    """Growth of ‖θ − θ*‖ in 400 steps under a strong penalty and small gradients."""
    del evidence
    start = jax.tree.map(lambda x: x + 0.1, params())
    state = tx.init(params())
    state = adamr.set_anchor(
        state,
        adamr.modifiers.Anchor(
            jax.tree.map(lambda x: jnp.full_like(x, 1e3), params()), params()
        ),
    )

    def step(carry, key):
        theta, state = carry
        noise = jax.tree.map(lambda x: 0.01 * jax.random.normal(key, x.shape), params())
        updates, state = tx.update(noise, state, theta)
        theta = optax.apply_updates(theta, updates)
        return (theta, state), optax.tree.norm(optax.tree.sub(theta, params()))

    keys = jax.random.split(jax.random.key(0), 400)
    _, distances = jax.lax.scan(step, (start, state), keys)
    first = optax.tree.norm(optax.tree.sub(start, params()))
    return float(jnp.max(jnp.where(jnp.isnan(distances), jnp.inf, distances)) / first)


OUTSIDE = Promise(
    "no step enters the protected space",
    "largest share of a step inside it",
    leak,
)
OUTSIDE_BOTH = Promise(
    "no step enters the protected space of inputs or that of outputs",
    "largest share of a step inside one of them",
    leak_of_both_sides,
)
OFF_DIRECTIONS = Promise(
    "no step moves along a stored direction",
    "largest share of a step along them",
    direction_leak,
)
NO_CONFLICT = Promise(
    "no step increases a memory loss, to first order",
    "largest increase, as the cosine between step and ascent",
    conflict,
)
STILL = Promise(
    "what is masked does not move",
    "largest masked step, as a share of the largest step",
    disruption,
)
STABLE = Promise(
    "training is stable however large the penalty's weight is",
    "largest distance to the anchor, as a multiple of the first",
    stiffness,
    most=1.001,
)
