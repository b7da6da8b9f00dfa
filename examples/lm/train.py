"""The stream: learn a domain, protect its layer inputs, learn the next one."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import adamr
from adamr import capture, diagnostics
from adamr.subspace import rank
from examples.lm.data import Domain, sample_windows, spaced_windows
from examples.lm.methods import METHODS, UNPROTECTED, Method
from examples.lm.model import Preset, create

CHUNK = 20  # steps in one scan: the progress bar moves, and Ctrl-C is heard, that often
CAPTURED = 4096  # layer inputs per kernel from which a domain's subspace is found


class Trace(NamedTuple):
    """What a step reports.

    Attributes:
      loss: nats per byte.
      overlap: share of the clipped gradient's energy in the protected subspace.
      strength: share of the projection that the optimizer applied.
      leak: share of the update's length that lies in the protected subspace.
    """

    loss: jax.Array
    overlap: jax.Array
    strength: jax.Array
    leak: jax.Array


@dataclasses.dataclass
class Run:
    """What one method did on the stream, filled as it goes.

    Attributes:
      loss: L[i, j], nats per byte on domain j's held-out text after learning domain i.
      accuracy: the same for the share of bytes predicted right.
      used: share of the protected kernels' input directions in use after each domain.
      curves: `Trace` means over chunks of steps, and under "step" where a chunk ends.
      seconds: wall time, compilation included.
    """

    loss: list[list[float]] = dataclasses.field(default_factory=list)
    accuracy: list[list[float]] = dataclasses.field(default_factory=list)
    used: list[float] = dataclasses.field(default_factory=list)
    curves: dict[str, list[float]] = dataclasses.field(
        default_factory=lambda: {name: [] for name in ("step", *Trace._fields)}
    )
    seconds: float = 0.0


def _split(windows: jax.Array) -> tuple[jax.Array, jax.Array]:
    windows = windows.astype(jnp.int32)
    return windows[..., :-1], windows[..., 1:]


def loss_fn(params: Any, graph: nnx.GraphDef, windows: jax.Array) -> jax.Array:
    """Mean negative log likelihood of the next byte, in nats."""
    inputs, targets = _split(windows)
    logits = nnx.merge(graph, params)(inputs)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return losses.mean()


def _overlap(grads: Any, subspace: adamr.Subspace) -> jax.Array:
    kept = adamr.project(subspace, grads)
    removed = optax.tree.norm(optax.tree.sub(grads, kept), squared=True)
    total = optax.tree.norm(grads, squared=True)
    return removed / jnp.where(total > 0, total, 1.0)


@functools.partial(
    jax.jit,
    static_argnames=("graph", "tx", "strength"),
    donate_argnames=("params", "opt_state"),
)
def train_chunk(graph, tx, strength, params, opt_state, subspace, batches):
    """One optimizer step per batch.

    Args:
      graph: from `create`.
      tx: the optimizer.
      strength: see `Method`.
      params: parameters.
      opt_state: the optimizer's state.
      subspace: what to measure overlap and leak against.
      batches: uint8 (steps, batch, context + 1).

    Returns:
      Parameters, optimizer state, and a `Trace` of means over the steps.
    """

    def step(carry, windows):
        params, opt_state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, graph, windows)
        updates, opt_state = tx.update(grads, opt_state, params)
        trace = Trace(
            loss=loss,
            overlap=_overlap(grads, subspace),
            strength=jnp.asarray(
                optax.tree.get(opt_state, "strength") if strength is None else strength
            ),
            leak=diagnostics.update_leak(updates, subspace).total,
        )
        return (optax.apply_updates(params, updates), opt_state), trace

    (params, opt_state), traces = jax.lax.scan(step, (params, opt_state), batches)
    return params, opt_state, jax.tree.map(jnp.mean, traces)


@functools.partial(jax.jit, static_argnames="graph")
def evaluate(graph: nnx.GraphDef, params: Any, windows: jax.Array):
    """Mean loss and accuracy per domain on windows (domains, count, context + 1)."""

    def domain(windows):
        inputs, targets = _split(windows)
        logits = nnx.merge(graph, params)(inputs)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return losses.mean(), (logits.argmax(-1) == targets).mean()

    return jax.lax.map(domain, windows)


def grow(graph, params, subspace, windows, threshold: float) -> adamr.Subspace:
    """The subspace with the finished domain's layer inputs added."""
    inputs, _ = _split(windows)
    model = nnx.merge(graph, params)
    samples = capture.capture_inputs(model, inputs, max_samples=CAPTURED)
    return adamr.grow_subspace(subspace, samples, threshold=threshold)


def _used_share(subspace: adamr.Subspace) -> float:
    pairs = zip(rank(subspace), subspace.bases, strict=True)
    shares = [int(r) / b.shape[-1] for r, b in pairs if b is not None]
    return float(np.mean(shares))


@functools.cache
def optimizer(method: Method, learning_rate: float, preset: Preset):
    """The optimizer and its empty subspace; cached, so seeds share a compilation."""
    graph, params = create(preset, 0)
    axes = capture.kernel_axes(nnx.merge(graph, params))
    subspace = adamr.empty_subspace(params, axes=axes, unprotected=UNPROTECTED)
    return method.build(learning_rate, subspace), subspace


def learn_stream(
    name: str,
    domains: Sequence[Domain],
    preset: Preset,
    *,
    seed: int,
    learning_rate: float,
    threshold: float,
    report: Callable[[int, int, Trace], None],
) -> Run:
    """Trains one method on the domains, one after the other.

    Args:
      name: key of `METHODS`.
      domains: the stream.
      preset: sizes.
      seed: of the initial parameters and of the order of windows, the same for every
        method.
      learning_rate: constant over the stream.
      threshold: energy share of a domain's layer inputs that is protected.
      report: called after every chunk with domain index, steps done, and `Trace`.
    """
    method, run, start = METHODS[name], Run(), time.perf_counter()
    tx, subspace = optimizer(method, learning_rate, preset)
    graph, params = create(preset, seed)
    opt_state = tx.init(params)
    held_out = np.stack(
        [spaced_windows(d.valid, preset.eval_windows, preset.context) for d in domains]
    )
    for task, domain in enumerate(domains):
        rng = np.random.default_rng([seed, task])
        for done in range(0, preset.steps, CHUNK):
            steps = min(CHUNK, preset.steps - done)
            shape = (steps, preset.batch)
            batches = sample_windows(domain.train, shape, preset.context, rng)
            params, opt_state, trace = train_chunk(
                graph, tx, method.strength, params, opt_state, subspace, batches
            )
            trace = Trace(*map(float, trace))
            run.curves["step"].append(task * preset.steps + done + steps)
            for field, value in trace._asdict().items():
                run.curves[field].append(value)
            report(task, steps, trace)
        loss, accuracy = evaluate(graph, params, held_out)
        run.loss.append(loss.tolist())
        run.accuracy.append(accuracy.tolist())
        count = -(-CAPTURED // preset.context)
        seen = sample_windows(domain.train, (count,), preset.context, rng)
        subspace = grow(graph, params, subspace, seen, threshold)
        run.used.append(_used_share(subspace))
        if method.protects:
            opt_state = adamr.set_subspace(opt_state, subspace)
    run.seconds = time.perf_counter() - start
    return run
