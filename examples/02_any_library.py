# %% [markdown]
# # Flax NNX, Flax linen, Equinox
#
# adamr knows no neural network library. It reads the equations of a function
# `forward(params, x)`, whatever wrote them. This lesson builds one network in three
# libraries, protects each with the same lines, and sees the same in all three. It takes
# 20 seconds of one CPU core.

# %%
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import adamr

images, labels = load_digits(return_X_y=True)
images = jnp.asarray(images.reshape(-1, 8, 8) / 16, jnp.float32)
labels = jnp.asarray(labels)
upright = images.reshape(-1, 64)
turned = jnp.rot90(images, axes=(1, 2)).reshape(-1, 64)
learn, test = slice(0, 1500), slice(1500, None)

# %% [markdown]
# ## The network, three times
#
# Each function returns `forward` and its parameters as a tree of arrays. A projection
# protects kernels, not biases, so the networks have none.


# %%
def in_nnx():
    class Network(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(64, 128, use_bias=False, rngs=rngs)
            self.head = nnx.Linear(128, 10, use_bias=False, rngs=rngs)

        def __call__(self, x):
            return self.head(nnx.relu(self.hidden(x)))

    graph, params = nnx.split(Network(nnx.Rngs(0)), nnx.Param)
    return lambda params, x: nnx.merge(graph, params)(x), params


def in_linen():
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(128, use_bias=False, name="hidden")(x))
            return nn.Dense(10, use_bias=False, name="head")(x)

    network = Network()
    params = network.init(jax.random.key(0), upright[:1])["params"]
    return lambda params, x: network.apply({"params": params}, x), params


def in_equinox():
    sizes = {"in_size": 64, "out_size": 10, "width_size": 128, "depth": 1}
    network = eqx.nn.MLP(
        **sizes, use_bias=False, use_final_bias=False, key=jax.random.key(0)
    )
    params, static = eqx.partition(network, eqx.is_inexact_array)
    return lambda params, x: jax.vmap(eqx.combine(params, static))(x), params


networks = {"Flax NNX": in_nnx(), "Flax linen": in_linen(), "Equinox": in_equinox()}

# %% [markdown]
# ## What is protected
#
# `contracted_axes` finds each kernel and the axis along which it meets its input: the
# first of a Flax kernel (inputs, outputs), the second of an Equinox kernel (outputs,
# inputs). `coverage` tells leaf by leaf what is protected, and why a leaf is not.

# %%
subspaces = {}
for name, (forward, params) in networks.items():
    axes = adamr.contracted_axes(forward, params, upright)
    subspaces[name] = adamr.empty_subspace(params, axes=axes)
    print(f"{name}\n{adamr.coverage(subspaces[name], params)}\n")

# %% [markdown]
# ## The same lines for each


# %%
def run(forward, params, tx, protect):
    def loss(params, x, y):
        entropy = optax.softmax_cross_entropy_with_integer_labels
        return entropy(forward(params, x), y).mean()

    @jax.jit
    def step(params, opt_state, x, y):
        grads = jax.grad(loss)(params, x, y)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state, draws, found = tx.init(params), np.random.default_rng(0), []
    for x in (upright, turned):
        for _ in range(300):
            rows = draws.integers(0, 1500, 64)
            params, opt_state = step(params, opt_state, x[rows], labels[rows])
        if protect:
            inputs = adamr.layer_inputs(forward, params, x[learn])
            opt_state = adamr.protect_inputs(opt_state, inputs)
        answers = forward(params, upright[test]).argmax(-1)
        found.append(float((answers == labels[test]).mean()))
    return found


results = {}
for name, (forward, params) in networks.items():
    plain = run(forward, params, optax.adam(3e-3), protect=False)
    kept = run(forward, params, adamr.gpm(3e-3, subspaces[name]), protect=True)
    results[name] = plain, kept

# %%
print("accuracy on upright digits, when learned -> after the turned ones")
for name, ((a, b), (c, d)) in results.items():
    print(f"{name:12}Adam {a:.3f} -> {b:.3f}    adamr.gpm {c:.3f} -> {d:.3f}")

# %% [markdown]
# In an `nnx.Optimizer`, a linen `TrainState`, Tunix, Levanter or MaxText, the lines go
# where [trainers](../trainers.md) says.

# %%
for (a, b), (c, d) in results.values():
    assert c - d < 0.05 < 0.15 < a - b
worst = max(c - d for _, (c, d) in results.values())
least = min(a - b for (a, b), _ in results.values())
print(
    f"Seen: in all three libraries adamr.gpm lost at most {worst:.3f} and Adam at "
    f"least {least:.3f} of its accuracy on upright digits."
)
