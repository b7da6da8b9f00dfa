"""What an installed wheel must do, away from the source tree, with jax and optax only.

Run as a script: `python installed.py`.
"""

import importlib.metadata
import importlib.util
import pathlib
import sys

import jax
import jax.numpy as jnp
import optax

import adamr

package = pathlib.Path(adamr.__file__).parent
assert "site-packages" in package.parts, package
assert (package / "py.typed").exists()
assert importlib.metadata.version("adamr-jax") == adamr.__version__
assert not {"flax", "matplotlib", "orbax"} & set(sys.modules)
assert not any(map(importlib.util.find_spec, ("benchmarks", "examples", "tests")))

params = {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}
subspace = adamr.empty_subspace(params)
samples = {"kernel": jnp.eye(4)[:2], "bias": None}
subspace = adamr.grow_subspace(subspace, samples)
tx = adamr.adamr(1e-2, adamr.project_out(subspace), weight_decay=1e-2)
state = tx.init(params)
gradient = jax.tree.map(jnp.ones_like, params)
step, state = jax.jit(tx.update)(gradient, state, params)
params = optax.apply_updates(params, step)
assert not jnp.any(step["kernel"][:2]) and jnp.all(step["kernel"][2:] < 0)
print(f"adamr {adamr.__version__}: works from the wheel")
