"""Streams of gradients with a protected subspace: from a formula to a transformer.

A source's gradient may depend on the parameters (a quadratic, where every optimizer
walks its own way) or be a record (a transformer, where all see the same gradients).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import adamr
from adamr.subspaces.subspace import rank
from examples.harness.setting import kernel_axes
from examples.lm.model import Preset, create
from examples.streams.domains import Domain, check_lengths, sample_windows

__all__ = ["Source", "along_adam", "coordinate", "language", "quadratic"]

UNPROTECTED = ("embedding", "position", "norm", "head")
CAPTURED = 4096  # layer inputs per kernel from which the old domain's basis is found


class Source(NamedTuple):
    """One stream of gradients.

    Attributes:
      params: where it starts; kernels (in, out).
      subspace: the old directions.
      given: what each step brings, leading axis of steps.
      gradient: (params, what the step brings) -> gradient.
      learning_rate: of every optimizer on it.
      old: gradients of the old task, one per step; None if there is no old task.
    """

    params: Any
    subspace: adamr.Subspace
    given: Any
    gradient: Callable[[Any, Any], Any]
    learning_rate: float
    old: Any = None


def along_adam(source: Source, b2: float = 0.999) -> Any:
    """The gradients that plain Adam meets; what is given if they are a record."""
    if source.learning_rate == 0.0:
        return source.given
    tx = optax.adam(source.learning_rate, b2=b2)

    def step(carry, now):
        params, state = carry
        g = source.gradient(params, now)
        updates, state = tx.update(g, state, params)
        return (optax.apply_updates(params, updates), state), g

    start = source.params, tx.init(source.params)
    return jax.lax.scan(step, start, source.given)[1]


def coordinate(
    steps: int, seed: int, inputs: int = 8, outputs: int = 32, noise: float = 0.3
) -> Source:
    """Gradients of constant mean and variance; one coordinate is old.

    The mean has orthogonal rows, so that coordinates are also singular directions.
    """
    rng = np.random.default_rng(seed)
    mean = np.sqrt(outputs) * np.linalg.qr(rng.normal(size=(outputs, inputs)))[0].T
    given = mean + noise * rng.normal(size=(steps, inputs, outputs))
    given = np.geomspace(1.0, 10.0, inputs)[:, None] * given
    params = {"w": jnp.zeros((inputs, outputs))}
    old = np.eye(inputs, dtype=np.float32)[:, inputs // 2 :][:, :1]
    return Source(
        params,
        adamr.make_subspace(params, {"w": old}),
        {"w": jnp.asarray(given, jnp.float32)},
        lambda params, now: now,
        0.0,
    )


def quadratic(
    steps: int, seed: int, size: tuple[int, int] = (128, 256), rank: int = 16
) -> Source:
    """½ ‖H^½ (w − w*)‖², H = R diag(h) Rᵀ, noise of covariance H; some of R is old.

    h runs from 1 to 100. At 128 and more on both axes Adafactor factors v.
    """
    rng, (inputs, outputs) = np.random.default_rng(seed), size
    rotation = np.linalg.qr(rng.normal(size=(inputs, inputs)))[0]
    h = np.geomspace(1.0, 100.0, inputs)
    hessian = jnp.asarray((rotation * h) @ rotation.T, jnp.float32)
    root = jnp.asarray(rotation * np.sqrt(h), jnp.float32)
    target = jnp.asarray(rng.normal(size=(inputs, outputs)), jnp.float32)
    given = jnp.asarray(rng.normal(size=(steps, inputs, outputs)), jnp.float32)
    params = {"w": jnp.zeros((inputs, outputs))}
    basis = rotation[:, :: inputs // rank].astype(np.float32)

    def gradient(params, now):
        return {"w": hessian @ (params["w"] - target) + root @ now}

    subspace = adamr.make_subspace(params, {"w": basis})
    return Source(params, subspace, given, gradient, 1e-3)


def _loss(params: Any, graph: nnx.GraphDef, windows: jax.Array) -> jax.Array:
    windows = windows.astype(jnp.int32)
    logits = nnx.merge(graph, params)(windows[..., :-1])
    targets = windows[..., 1:]
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def language(
    old: Domain,
    new: Domain,
    preset: Preset,
    *,
    steps: int,
    seed: int,
    threshold: float,
    learning_rate: float = 1e-3,
) -> Source:
    """Gradients of a transformer's protected kernels on new text, after old text.

    Adam learns `old` for `preset.steps` steps; the old directions are those of its
    layer inputs that reach the energy share `threshold`. Then it learns `new` for
    `steps` steps, and the gradients on this way are the record.
    """
    check_lengths([old, new], preset.context)
    graph, params = create(preset, seed)

    def logits(params, tokens):
        return nnx.merge(graph, params)(tokens)

    tokens = jax.ShapeDtypeStruct((1, preset.context), np.int32)
    axes = kernel_axes(logits, params, tokens)
    empty = adamr.empty_subspace(params, axes=axes, unprotected=UNPROTECTED)
    tx, rng = optax.adam(learning_rate), np.random.default_rng(seed)

    def kernels(tree):
        pairs = zip(jax.tree.leaves(tree), empty.bases, strict=True)
        return tuple(x for x, basis in pairs if basis is not None)

    @jax.jit
    def train(params, state, batches):
        def step(carry, windows):
            params, state = carry
            g = jax.grad(_loss)(params, graph, windows)
            updates, state = tx.update(g, state, params)
            return (optax.apply_updates(params, updates), state), kernels(g)

        return jax.lax.scan(step, (params, state), batches)

    def batches(domain, steps):
        shape = (steps, preset.batch)
        return sample_windows(domain.train, shape, preset.context, rng)

    (params, state), before = train(params, tx.init(params), batches(old, preset.steps))
    seen = batches(old, 1 + CAPTURED // (preset.context * preset.batch))
    inputs = seen.reshape(-1, preset.context + 1)[:, :-1].astype(np.int32)
    samples = adamr.layer_inputs(logits, params, inputs, kind="rows", max_rows=CAPTURED)
    full = adamr.grow_subspace(empty, samples, threshold=threshold)
    subspace = adamr.Subspace(
        *(tuple(x for x in part if x is not None) for part in full)
    )
    room = max(int(r) for r in rank(subspace) if r is not None)
    subspace = adamr.subspaces.truncate_subspace(subspace, room)
    _, record = train(params, state, batches(new, steps))
    return Source(
        kernels(params), subspace, record, lambda params, now: now, 0.0, before
    )
