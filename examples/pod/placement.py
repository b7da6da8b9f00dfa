"""Where the parameters of the text stream's model lie on a mesh.

A kernel's spec names a mesh axis per axis of the kernel. `adamr.state_shardings` puts
the optimizer's state where the parameters are.
"""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from examples.harness.meshes import PlacementError

# Part of a kernel's name -> spec of its last two axes (in, out); the first that fits.
RULES = {
    "qkv": P("fsdp", "tensor"),
    "attention/out": P("tensor", "fsdp"),
    "up/": P("fsdp", "tensor"),
    "down/": P("tensor", "fsdp"),
    "head": P("fsdp", "tensor"),
    "embedding": P(None, "fsdp"),
}


def spec_of(name: str, shape: tuple[int, ...]) -> P:
    """The spec of a parameter: by rule for kernels, whole for the rest.

    Axes before the last two stack layers and stay whole.
    """
    found = [spec for part, spec in RULES.items() if part in name]
    whole = [None] * len(shape)
    return P(*whole[:-2], *found[0]) if found and len(shape) > 1 else P(*whole)


def param_specs(params: Any) -> Any:
    """A tree like `params` of specs."""

    def leaf(path, x):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return spec_of(name, x.shape)

    return jax.tree_util.tree_map_with_path(leaf, params)


def check_fit(params: Any, specs: Any, mesh: Mesh) -> None:
    """Raises a PlacementError for a parameter that its axes do not divide."""
    for (path, x), spec in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(specs), strict=True
    ):
        for size, axis in zip(x.shape, spec, strict=True):
            if axis is not None and size % mesh.shape[axis]:
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                raise PlacementError(
                    f"--mesh: {axis}={mesh.shape[axis]} does not divide an axis of "
                    f"{name}, whose shape is {x.shape}."
                )


def shardings(mesh: Mesh, specs: Any) -> Any:
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def gathered(specs: Any) -> Any:
    """The specs while the parameters are in use: whole along `fsdp`."""

    def leaf(spec):
        return P(*(None if axis == "fsdp" else axis for axis in spec))

    return jax.tree.map(leaf, specs)
