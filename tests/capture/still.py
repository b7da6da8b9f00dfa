"""The test that counts: what was captured is protected, whatever the model."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np

import adamr
from adamr import _tree


def grown(forward, params, *inputs, **options):
    """The axes of a model, and a subspace that protects all that it met."""
    axes = adamr.capture.contracted_axes(forward, params, *inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        subspace = adamr.empty_subspace(params, axes=axes)
    read = functools.partial(adamr.capture.layer_inputs, forward, **options)
    found = jax.jit(read)(params, *inputs)
    return axes, adamr.grow_subspace(subspace, found, threshold=1.0)


@jax.jit
def moved(params, subspace):
    """The parameters after random steps off the subspace; others are held."""
    leaves, treedef = _tree.flatten(params)
    keys, out = jax.random.split(jax.random.key(9), len(leaves)), []
    for key, x, basis, weights in zip(keys, leaves, *subspace, strict=True):
        if basis is None:
            out.append(x)
            continue
        noise = jax.random.normal(key, x.shape, x.dtype)
        noise = noise * jnp.linalg.norm(x.ravel()) / jnp.linalg.norm(noise.ravel())
        step = adamr.subspaces.subspace.project_leaf(basis, weights, noise)
        out.append(x + step)
    return jax.tree.unflatten(treedef, out)


def largest_change(before, after):
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    floats = [[jnp.asarray(x, jnp.float32) for x in pair] for pair in pairs]
    return jnp.max(jnp.stack([jnp.max(jnp.abs(a - b)) for a, b in floats]))


@functools.partial(jax.jit, static_argnums=0)
def change_of(forward, old, new, *inputs):
    return largest_change(forward(old, *inputs), forward(new, *inputs))


def drift(forward, params, *inputs, **options):
    """How far old outputs move, and how far the parameters do, per protected leaf."""
    axes, subspace = grown(forward, params, *inputs, **options)
    new = moved(params, subspace)
    change = float(change_of(forward, params, new, *inputs))
    old, now = map(np.asarray, _tree.flatten(params)[0]), _tree.flatten(new)[0]
    names = _tree.flatten_with_names(params)[0]
    moves = {
        name: float(
            np.linalg.norm(np.ravel(np.asarray(b) - a)) / np.linalg.norm(np.ravel(a))
        )
        for name, a, b, basis in zip(names, old, now, subspace.bases, strict=True)
        if basis is not None
    }
    return change, moves, axes


def assert_still(forward, params, *inputs, protected=None, tolerance=1e-5, **options):
    """Old outputs stay while every protected leaf moves (but those of full basis)."""
    change, moves, axes = drift(forward, params, *inputs, **options)
    print(f"drift {change:.1e}, {len(moves)} leaves move by {min(moves.values()):.2f}")
    assert change <= tolerance, (change, axes)
    assert min(moves.values()) > 0.01, moves
    if protected is not None:
        assert len(moves) == protected, (sorted(moves), axes)
    return axes
