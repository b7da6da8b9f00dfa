"""A continual run over several processes that can be killed, sharded both ways.

    python processes_run.py INDEX COUNT PORT DIRECTORY RESULT [--devices N]

Every process is started with the same arguments but its index. The mesh is data x fsdp;
kernels, moments and bases are sharded along the fan-in, the batch along both axes.
"""

import argparse
import functools
import os
import sys
from pathlib import Path

CONFIG = {"sizes": [32, 16, 8], "tasks": 3, "steps": 12, "batch": 16, "seed": 0}


def main(args):
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from jax.experimental import multihost_utils
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    import adamr
    from adamr.checkpoint.checkpoints import Checkpoints, Restored
    from tests.mlp import forward, loss_fn

    if args.count > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            f"127.0.0.1:{args.port}",
            args.count,
            args.index,
            heartbeat_timeout_seconds=600,
        )
    fsdp = 2
    data = jax.device_count() // fsdp
    mesh = jax.make_mesh((data, fsdp), ("data", "fsdp"), (AxisType.Auto,) * 2)

    def on_mesh(*spec):
        return NamedSharding(mesh, PartitionSpec(*spec))

    def spread(values, *spec):
        return jax.make_array_from_callback(
            values.shape, on_mesh(*spec), lambda index: values[index]
        )

    sizes, rng = CONFIG["sizes"], np.random.default_rng(CONFIG["seed"])
    start = [
        rng.normal(size=(a, b)).astype(np.float32) / a**0.5
        for a, b in zip(sizes[:-1], sizes[1:], strict=True)
    ]
    weights = [spread(w, "fsdp") for w in start]
    tx = adamr.adamr(3e-3, adamr.project_out(adamr.empty_subspace(weights)))
    places = adamr.state_shardings(tx, weights)
    opt_state = jax.jit(tx.init, out_shardings=places)(weights)

    def examples(step):
        """A function of step alone, as are the tasks."""
        rng = np.random.default_rng([CONFIG["seed"], step])
        task = np.random.default_rng(step // CONFIG["steps"]).normal(
            size=(sizes[0], sizes[-1])
        )
        x = rng.normal(size=(CONFIG["batch"], sizes[0])).astype(np.float32)
        y = np.tanh(x @ task).astype(np.float32)
        return [spread(a, ("data", "fsdp")) for a in (x, y)]

    @functools.partial(jax.jit, out_shardings=on_mesh())
    def start_noise():
        return jax.random.key(CONFIG["seed"]), jnp.full((), 0.1)

    key, width = start_noise()
    where = [w.sharding for w in weights], places, on_mesh(), on_mesh()

    @functools.partial(jax.jit, out_shardings=where)
    def train_step(weights, opt_state, key, width, x, y):
        key, noise = jax.random.split(key)
        x = x + width * jax.random.normal(noise, x.shape)
        loss, g = jax.value_and_grad(loss_fn)(weights, x, y)
        updates, opt_state = tx.update(g, opt_state, weights)
        return optax.apply_updates(weights, updates), opt_state, key, loss

    def evidence(subspace, weights, x, last):
        """Samples as they lie; at the last boundary, sums of them per device."""
        inputs, _ = forward(weights, x)
        if not last:
            return inputs
        empty = functools.partial(
            adamr.subspaces.empty_covariance, parts=jax.device_count()
        )
        parts = jax.jit(empty, out_shardings=on_mesh(("data", "fsdp")))(subspace)
        parts = adamr.sharding.onload(
            adamr.sharding.offload(adamr.subspaces.update_covariance(parts, inputs))
        )
        return adamr.subspaces.merge_covariance(parts)

    state = {"weights": weights, "opt_state": opt_state, "key": key, "width": width}
    state["seen"] = np.zeros(2, int)
    if args.differ:
        state["seen"] += args.index
    total = CONFIG["tasks"] * CONFIG["steps"]
    with Checkpoints(args.directory, config=CONFIG, every=3, keep=3) as checkpoints:
        restored = checkpoints.restore(state)
        step, state, losses = restored or Restored(0, state, [])
        print(f"from {step}", flush=True)
        while step < total:
            x, y = examples(step)
            assert state["width"].weak_type
            names = ("weights", "opt_state", "key")
            rest = (state["width"], x, y)
            *new, loss = train_step(*(state[name] for name in names), *rest)
            state |= dict(zip(names, new, strict=True))
            state["seen"] = state["seen"] + [1, len(x)]
            step += 1
            losses.append(float(loss))
            ends = step % CONFIG["steps"] == 0
            if ends:
                subspace = adamr.get_subspace(state["opt_state"])
                found = evidence(subspace, state["weights"], x, step == total)
                subspace = adamr.grow_subspace(subspace, found, threshold=0.4)
                state["opt_state"] = adamr.set_subspace(state["opt_state"], subspace)
            checkpoints.save(step, state, losses, force=ends)
            print(f"step {step}", flush=True)
            if checkpoints.stopping:
                print("stopped", flush=True)
                return
    whole = [jax.jit(lambda x: x, out_shardings=on_mesh())(x) for x in state["weights"]]
    ranks = adamr.subspaces.rank(adamr.get_subspace(state["opt_state"]))
    if args.index == 0:
        arrays = {str(i): np.asarray(x) for i, x in enumerate((*whole, *ranks))}
        np.savez(f"{args.result}.npz", losses=losses, seen=state["seen"], **arrays)
    if args.count > 1:
        multihost_utils.sync_global_devices("the end")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("index", type=int)
    parser.add_argument("count", type=int)
    parser.add_argument("port", type=int)
    parser.add_argument("directory", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--differ", action="store_true")
    arguments = parser.parse_args()
    count = f"--xla_force_host_platform_device_count={arguments.devices}"
    os.environ["XLA_FLAGS"] = count
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main(arguments)
