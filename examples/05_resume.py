# %% [markdown]
# # Resume: the same bits after a crash
#
# A run that is stopped and started again should end exactly like one that was never
# stopped: the same bits, not about the same loss. Continual learning makes that harder,
# because the protected subspace and the position in the stream of tasks are state as
# well. This lesson crashes a run, preempts it, continues it, and compares the bits. It
# takes 10 seconds of one CPU core.

# %%
import signal
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import adamr
from adamr.checkpoint import Checkpoints, Restored

images, labels = load_digits(return_X_y=True)
images = jnp.asarray(images.reshape(-1, 8, 8) / 16, jnp.float32)
labels = jnp.asarray(labels)
tasks = [
    images.reshape(-1, 64),
    jnp.rot90(images, axes=(1, 2)).reshape(-1, 64),
]


def forward(params, x):
    return jax.nn.relu(x @ params["hidden"]) @ params["head"]


def loss(params, x, y):
    entropy = optax.softmax_cross_entropy_with_integer_labels
    return entropy(forward(params, x), y).mean()


first, second = jax.random.split(jax.random.key(0))
initial = {
    "hidden": jax.random.normal(first, (64, 128)) / 8,
    "head": jax.random.normal(second, (128, 10)) / 16,
}
axes = adamr.contracted_axes(forward, initial, tasks[0])
tx = adamr.gpm(3e-3, adamr.empty_subspace(initial, axes=axes))

# %% [markdown]
# ## A step that depends on its state alone
#
# The rows of a batch are drawn with the seed and the number of the step, so a resumed
# run draws the same ones. The parameters, the optimizer's state (moments and protected
# subspace) and the key are in `state`. The task follows from the number of the step.

# %%
STEPS, TASK = 200, 100  # in all, and per task


@jax.jit
def train_step(state, x, number):
    params, opt_state, key = state
    rows = jax.random.randint(jax.random.fold_in(key, number), (64,), 0, len(x))
    value, grads = jax.value_and_grad(loss)(params, x[rows], labels[rows])
    updates, opt_state = tx.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state, key), value


@jax.jit
def end_task(state, x):
    params, opt_state, key = state
    inputs = adamr.layer_inputs(forward, params, x)
    return params, adamr.protect_inputs(opt_state, inputs), key


# %% [markdown]
# ## The loop
#
# `Checkpoints` saves every 30 steps. When SIGTERM comes, as it does before a machine is
# taken away, it saves at the next step and says so in `stopping`. `accident` is what
# this lesson does to the run.


# %%
def train(folder, accident=lambda step: None):
    """The first step, and what there is at the end: None if it was stopped."""
    state = initial, tx.init(initial), jax.random.key(1)
    config = {"steps": STEPS, "task": TASK}
    with Checkpoints(folder, config=config, every=30) as checkpoints:
        begin = checkpoints.restore(state) or Restored(0, state, [])
        step, state, losses = begin
        while step < STEPS:
            x = tasks[step // TASK]
            state, value = train_step(state, x, step)
            step += 1
            if step % TASK == 0:
                state = end_task(state, x)
            losses.append(float(value))
            accident(step)
            checkpoints.save(step, state, losses)
            if checkpoints.stopping:
                return begin.step, None
    return begin.step, (state, losses)


# %% [markdown]
# ## Three starts
#
# The first start crashes at step 70: what was after the last checkpoint is lost. The
# second is told to stop at step 105, right after the boundary. The third runs to the
# end.


# %%
class Crash(Exception):
    pass


def crash(step):
    if step == 70:
        raise Crash


def preempt(step):
    if step == 105:
        signal.raise_signal(signal.SIGTERM)


with tempfile.TemporaryDirectory() as folder:
    try:
        train(folder, crash)
    except Crash:
        print("start 1: crashed at step 70")
    began, _ = train(folder, preempt)
    print(f"start 2: from step {began}, told to stop at step 105")
    again, resumed = train(folder)
    print(f"start 3: from step {again} to the end")
with tempfile.TemporaryDirectory() as folder:
    _, whole = train(folder)


# %%
def bits(run):
    (params, opt_state, _), losses = run
    arrays = jax.tree.leaves((params, opt_state))
    return [np.asarray(x).tobytes() for x in arrays], losses


# %% [markdown]
# [Exact resume](../resume.md) says what else a run must keep, and how this works in
# several processes.

# %%
assert (began, again) == (60, 105)
assert bits(resumed) == bits(whole)
ranks = [int(rank) for rank in adamr.get_subspace(resumed[0][1]).ranks()]
print(
    f"Seen: stopped twice, the run ended with the same bits in all "
    f"{len(bits(whole)[0])} arrays and all {STEPS} losses as the run that was left "
    f"alone; its layers protect {ranks} directions."
)
