# %% [markdown]
# # Sharding: parameters, moments and bases over eight devices
#
# A large model is split over devices. Its optimizer's state must lie where the
# parameters lie, and a protected subspace is state as well. This lesson simulates eight
# devices on one CPU, trains there and on one device, and compares. It takes 15 seconds
# of one CPU core.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits

import adamr

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)  # before JAX looks for its devices

images, labels = load_digits(return_X_y=True)
images = jnp.asarray(images.reshape(-1, 8, 8) / 16, jnp.float32)
labels = jnp.asarray(labels)
upright = images.reshape(-1, 64)
turned = jnp.rot90(images, axes=(1, 2)).reshape(-1, 64)


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

# %% [markdown]
# ## Where things lie
#
# The batch is split over `data`. The hidden kernel (inputs, outputs) is split over
# `model` along its outputs, and the head along its inputs, so that the activations
# between them stay split. `adamr.state_shardings` tells where the state belongs; it
# computes nothing, so it works for models that fit no single device.

# %%
kind = (jax.sharding.AxisType.Auto,) * 2
mesh = jax.make_mesh((2, 4), ("data", "model"), kind)
specs = {"hidden": P(None, "model"), "head": P("model", None)}
places = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}

axes = adamr.contracted_axes(forward, initial, upright)
tx = adamr.gpm(3e-3, adamr.empty_subspace(initial, axes=axes))
split = jax.device_put(initial, places)
state_places = adamr.state_shardings(tx, split)

# %%
for path, where in jax.tree_util.tree_leaves_with_path(state_places):
    name = jax.tree_util.keystr(path, simple=True, separator=" ")
    print(f"{name:40}{where.spec}")

# %% [markdown]
# The first moment `mu` lies like its kernel. The second, `nu`, has one number per
# output and is split along the outputs. A [basis](../glossary.md#basis) (inputs,
# directions) is split where the inputs of its kernel are.
#
# ## The loop, on one device and on eight
#
# Nothing in the step or in the boundary mentions a device. `jit` gets the placement of
# the initial state, and what it returns stays in place.


# %%
@jax.jit
def step(params, opt_state, x, y):
    grads = jax.grad(loss)(params, x, y)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


@jax.jit
def boundary(params, opt_state, x):
    inputs = adamr.layer_inputs(forward, params, x)
    return adamr.protect_inputs(opt_state, inputs)


def run(params, opt_state, batch_place):
    draws, old = np.random.default_rng(0), None
    for x in (upright, turned):
        for _ in range(100):
            rows = draws.integers(0, len(x), 64)
            batch = jax.device_put((x[rows], labels[rows]), batch_place)
            params, opt_state = step(params, opt_state, *batch)
        if x is upright:
            opt_state, old = boundary(params, opt_state, x), params
    return params, opt_state, optax.tree.sub(params, old)


one_device = jax.devices()[0]
alone, _, _ = run(initial, tx.init(initial), one_device)
split_state = jax.jit(tx.init, out_shardings=state_places)(split)
together, end, moved = run(split, split_state, NamedSharding(mesh, P("data")))


# %%
def bytes_of(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def bytes_on_one(tree):
    shards = [x.addressable_shards[0].data for x in jax.tree.leaves(tree)]
    return bytes_of(shards)


difference = max(
    float(jnp.abs(a - np.asarray(b)).max())
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True)
)
leak = adamr.update_leak(moved, adamr.get_subspace(end))
stayed = all(
    x.sharding.is_equivalent_to(where, x.ndim)
    for x, where in zip(
        jax.tree.leaves(end), jax.tree.leaves(state_places), strict=True
    )
)
print(f"state: {bytes_of(end):,} bytes, on each device {bytes_on_one(end):,}")
print(f"largest difference of a parameter to the run on one device: {difference:.1e}")
print(f"every array of the state is where it was put: {stayed}")
print(f"share of the second task's change in the protected space: {leak.total:.1e}")

# %% [markdown]
# In several processes the lines are the same. [Scaling](../scaling.md) says what lies
# where, what is sent, and how much memory each recipe takes.

# %%
assert stayed and difference < 1e-4 and leak.total < 1e-5
assert bytes_on_one(end) < 0.4 * bytes_of(end)
print(
    f"Seen: eight devices end where one ends, up to {difference:.1e}; each holds "
    f"{bytes_on_one(end) / bytes_of(end):.0%} of the state, and {leak.total:.1e} of "
    "the second task's change lies in the protected space."
)
