"""The stream on a mesh: learn a domain, protect its layer inputs, learn the next one.

Four programs are compiled once each and serve every task: what a boundary changes are
values, never shapes or placements.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import adamr
from adamr.checkpoint.checkpoints import Checkpoints, Restored
from examples.harness import meshes
from examples.harness.setting import kernel_axes
from examples.lm.model import Preset, Transformer
from examples.lm.problem import UNPROTECTED
from examples.pod import placement
from examples.streams.domains import Domain, sample_windows, spaced_windows

CAPTURED = 4096  # layer inputs per kernel from which a domain's subspace is found


class State(NamedTuple):
    params: Any
    opt_state: Any


class Programs(NamedTuple):
    """What runs on the mesh.

    Attributes:
      init: `() -> State`.
      train: `(state, windows) -> (state, loss)`; donates the state.
      protect: `(state, windows) -> state` with the windows' layer inputs protected;
        donates the state.
      evaluate: `(params, windows (domains, count, context + 1)) -> losses (domains,)`.
      like: shapes and placements of the state.
    """

    init: Callable
    train: Callable
    protect: Callable
    evaluate: Callable
    like: State


def _split(windows: jax.Array) -> tuple[jax.Array, jax.Array]:
    windows = windows.astype(jnp.int32)
    return windows[..., :-1], windows[..., 1:]


def optimizer(learning_rate: float, subspace: adamr.Subspace):
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        adamr.adamr(learning_rate, adamr.project_out(subspace)),
    )


def programs(
    preset: Preset,
    mesh: Mesh,
    *,
    seed: int,
    learning_rate: float,
    max_rank: int,
    threshold: float,
) -> Programs:
    """Builds and places everything; nothing is computed yet.

    Args:
      preset: sizes.
      mesh: see `placement`.
      seed: of the initial parameters.
      learning_rate: constant over the stream.
      max_rank: directions that a kernel can protect.
      threshold: energy share of a domain's layer inputs that is protected.
    """
    abstract = nnx.eval_shape(lambda: Transformer(preset, nnx.Rngs(seed)))
    graph, params = nnx.split(abstract, nnx.Param)

    def logits(params, tokens):
        return nnx.merge(graph, params)(tokens)

    tokens = jax.ShapeDtypeStruct((1, preset.context), jnp.int32)
    axes = kernel_axes(logits, params, tokens)

    def empty(params):
        return adamr.empty_subspace(
            params, axes=axes, max_rank=max_rank, unprotected=UNPROTECTED
        )

    def begin(params):
        return optimizer(learning_rate, empty(params)).init(params)

    def init():
        params = nnx.state(Transformer(preset, nnx.Rngs(seed)), nnx.Param)
        return State(params, begin(params))

    # `update` reads the subspace from the state: shapes are enough to build it.
    tx = optimizer(learning_rate, jax.eval_shape(empty, params))
    specs = placement.param_specs(params)
    placement.check_fit(params, specs, mesh)
    params = meshes.structs(params, placement.shardings(mesh, specs))
    state = adamr.state_shardings(
        optax.GradientTransformation(begin, tx.update), params
    )
    placed = State(jax.tree.map(lambda x: x.sharding, params), state)
    in_use = placement.shardings(mesh, placement.gathered(specs))
    whole = NamedSharding(mesh, P())
    rows = NamedSharding(mesh, P(meshes.BATCH))

    def loss_fn(params, windows):
        params = jax.lax.with_sharding_constraint(params, in_use)
        inputs, targets = _split(windows)
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits(params, inputs), targets
        )
        return losses.mean()

    def train(state, windows):
        loss, grads = jax.value_and_grad(loss_fn)(state.params, windows)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        return State(optax.apply_updates(state.params, updates), opt_state), loss

    def protect(state, windows):
        inputs, _ = _split(windows)
        params = jax.lax.with_sharding_constraint(state.params, in_use)
        subspace = adamr.get_subspace(state.opt_state)
        samples = adamr.layer_inputs(
            logits, params, inputs, kind="rows", leaves=subspace
        )
        # Rows stay where they are and bases, which are small, come to them: what is
        # summed over the devices is a Gram matrix per kernel.
        samples = jax.lax.with_sharding_constraint(samples, rows)
        subspace = jax.lax.with_sharding_constraint(subspace, whole)
        subspace = adamr.grow_subspace(subspace, samples, threshold=threshold)
        return State(state.params, adamr.set_subspace(state.opt_state, subspace))

    def evaluate(params, windows):
        return jax.lax.map(lambda domain: loss_fn(params, domain), windows)

    return Programs(
        init=jax.jit(init, out_shardings=placed),
        train=jax.jit(train, donate_argnums=0, out_shardings=(placed, whole)),
        protect=jax.jit(protect, donate_argnums=0, out_shardings=placed),
        evaluate=jax.jit(evaluate, out_shardings=whole),
        like=meshes.structs(jax.eval_shape(init), placed),
    )


def _rounded_up(count: int, parts: int) -> int:
    return parts * -(-count // parts)


def learn_stream(
    made: Programs,
    domains: Sequence[Domain],
    preset: Preset,
    mesh: Mesh,
    checkpoints: Checkpoints,
    *,
    seed: int,
    report: Callable[[int, float, float], None],
) -> dict[str, Any]:
    """Trains on the domains, one after the other, from the newest checkpoint on.

    Args:
      made: from `programs`.
      domains: the stream; batches are a function of seed and step.
      preset: sizes.
      mesh: see `placement`.
      checkpoints: open; saves when it is due.
      seed: of the order of windows.
      report: called after every step with the steps done, loss and seconds.

    Returns:
      `losses`: one per step; `matrix`: L[i, j], nats per byte on domain j's held-out
      text after learning domain i; `state`: the final one.
    """
    parts = meshes.batch_parts(mesh)
    count = _rounded_up(preset.eval_windows, parts)
    held_out = [spaced_windows(d.valid, count, preset.context) for d in domains]
    held_out = meshes.put_batch(np.stack(held_out), mesh, axis=1)

    def windows(task, count, *key):
        rng = np.random.default_rng([seed, *key])
        text = domains[task].train
        drawn = sample_windows(text, (count,), preset.context, rng)
        return meshes.put_batch(drawn, mesh)

    restored = checkpoints.restore(made.like)
    empty = {"losses": [], "matrix": []}
    step, state, seen = restored or Restored(0, made.init(), empty)
    while step < len(domains) * preset.steps and not checkpoints.stopping:
        start, task = time.perf_counter(), step // preset.steps
        state, loss = made.train(state, windows(task, preset.batch, step))
        step += 1
        seen["losses"].append(float(loss))
        report(step, seen["losses"][-1], time.perf_counter() - start)
        if step % preset.steps == 0:
            losses = made.evaluate(state.params, held_out)
            seen["matrix"].append(np.asarray(losses).tolist())
            rows = _rounded_up(-(-CAPTURED // preset.context), parts)
            state = made.protect(state, windows(task, rows, step, 1))
        checkpoints.save(step, state, seen)
    return {**seen, "step": step, "state": state}
