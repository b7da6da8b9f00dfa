"""A small continual run that can be killed: permuted digits, a projection, replay.

    python kill_run.py data.npz directory result [--die-at N]

Started again after a kill it goes on, and writes the same result, bit for bit.
"""

import argparse
import functools
import json
import os
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adamr
from adamr import buffers
from adamr.checkpoint.checkpoints import Checkpoints, Restored

CONFIG = {
    "sizes": [64, 32, 10],
    "tasks": 3,
    "steps": 30,
    "batch": 16,
    "rate": 3e-3,
    "seed": 0,
}


def forward(weights, x, key=None):
    inputs = [x]
    for w in weights[:-1]:
        hidden = jax.nn.relu(inputs[-1] @ w)
        if key is not None:
            hidden = hidden * jax.random.bernoulli(key, 0.9, hidden.shape)
        inputs.append(hidden)
    return inputs, inputs[-1] @ weights[-1]


def loss_fn(weights, x, y, old_x, old_y, share, key):
    entropy = optax.softmax_cross_entropy_with_integer_labels
    new = entropy(forward(weights, x, key)[1], y).mean()
    return new + jnp.sum(share * entropy(forward(weights, old_x)[1], old_y))


def optimizer(subspace):
    return adamr.adamr(CONFIG["rate"], adamr.project_out(subspace))


def initial():
    sizes, key = CONFIG["sizes"], jax.random.key(CONFIG["seed"])
    *keys, key, replay = jax.random.split(key, len(sizes) + 1)
    weights = [
        jax.random.normal(k, (a, b)) * (2.0 / a) ** 0.5
        for k, a, b in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]
    item = (jnp.zeros(64), jnp.zeros([], jnp.int32))
    rng = np.random.default_rng(CONFIG["seed"])
    return {
        "weights": weights,
        "opt_state": optimizer(adamr.empty_subspace(weights)).init(weights),
        "buffer": buffers.empty_reservoir(50, item, replay),
        "key": key,
        "shuffles": rng.bit_generator.state,
        "pixels": np.arange(64),
        "order": np.arange(1400),
        "position": 0,
    }


@functools.partial(jax.jit, donate_argnames=("weights", "opt_state", "buffer"))
def train_step(weights, opt_state, buffer, key, x, y):
    key, noise = jax.random.split(key)
    buffer, (old_x, old_y), share = buffers.sample(buffer, 16)
    loss, g = jax.value_and_grad(loss_fn)(weights, x, y, old_x, old_y, share, noise)
    tx = optimizer(adamr.empty_subspace(weights))
    updates, opt_state = tx.update(g, opt_state, weights)
    buffer = buffers.add_to_reservoir(buffer, (x, y))
    return optax.apply_updates(weights, updates), opt_state, buffer, key, loss


def boundary(state, x):
    """Protects the task's inputs, draws the next task."""
    inputs, _ = forward(state["weights"], x[:200][:, state["pixels"]])
    subspace = adamr.get_subspace(state["opt_state"])
    subspace = adamr.grow_subspace(subspace, inputs, threshold=0.5)
    opt_state = adamr.set_subspace(state["opt_state"], subspace)
    rng = np.random.default_rng()
    rng.bit_generator.state = state["shuffles"]
    pixels, order = rng.permutation(64), rng.permutation(1400)
    shuffles = rng.bit_generator.state
    new = {"opt_state": opt_state, "pixels": pixels, "order": order, "position": 0}
    return {**state, **new, "shuffles": shuffles}


def run(x, y, directory):
    """The final state and metrics; None if SIGTERM ended it."""
    state, total = initial(), CONFIG["tasks"] * CONFIG["steps"]
    with Checkpoints(directory, config=CONFIG, every=4, keep=2) as checkpoints:
        start = checkpoints.restore(state) or Restored(0, state, {"loss": []})
        step, state, metrics = start
        print(f"from {step}", flush=True)
        while step < total:
            rows = state["order"][state["position"] :][: CONFIG["batch"]]
            batch = x[rows][:, state["pixels"]], y[rows]
            names = ("weights", "opt_state", "buffer", "key")
            *new, loss = train_step(*[state[name] for name in names], *batch)
            state = {**state, **dict(zip(names, new, strict=True))}
            state["position"] += CONFIG["batch"]
            step += 1
            metrics["loss"].append(float(loss))
            ends = step % CONFIG["steps"] == 0
            if ends:
                state = boundary(state, x)
            checkpoints.save(step, state, metrics, force=ends)
            if checkpoints.stopping:
                return None
    return state, metrics


def write(path, state, metrics):
    parts = [json.dumps(metrics).encode()]
    for leaf in jax.tree.leaves(state):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(
            leaf.dtype, jax.dtypes.prng_key
        ):
            leaf = jax.random.key_data(leaf)
        numbers = isinstance(leaf, jax.Array | np.ndarray)
        parts.append(np.asarray(leaf).tobytes() if numbers else repr(leaf).encode())
    Path(f"{path}.new").write_bytes(b"\n".join(parts))
    os.replace(f"{path}.new", path)


def die_at(count, directory):
    """Kills this process before its count-th operation on files of the directory."""
    left = count

    def hook(event, args):
        nonlocal left
        here = event.startswith(("os.", "open", "shutil.")) and args
        if here and str(args[0]).startswith(directory):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("data")
    parser.add_argument("directory")
    parser.add_argument("result")
    parser.add_argument("--die-at", type=int)
    args = parser.parse_args()
    data = np.load(args.data)
    if args.die_at:
        die_at(args.die_at, args.directory)
    done = run(data["x"], data["y"], args.directory)
    if done is None:
        print("stopped", flush=True)
    else:
        write(args.result, *done)
