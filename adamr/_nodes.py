"""Finding the nodes of given types inside any optimizer state, and replacing them."""

import sys
from collections.abc import Callable
from typing import Any

import jax

from adamr._tree import placed_like


def map_nodes(function: Callable[[Any], Any], tree: Any, *types: type) -> Any:
    """Maps `function` over the nodes of the given types; the rest is unchanged.

    `function` sees plain arrays and returns a node of the same structure. What
    `nnx.Optimizer` had wrapped in Variables is wrapped again.
    """

    def found(node: Any) -> bool:
        return isinstance(node, types)

    def replace(node: Any) -> Any:
        if not found(node):
            return node
        arrays = jax.tree.leaves(function(without_variables(node)))
        return jax.tree.unflatten(jax.tree.structure(node), arrays)

    return jax.tree.map(replace, tree, is_leaf=found)


def find_nodes(tree: Any, *types: type) -> list[Any]:
    """All nodes of the given types, in the order of the tree, with plain arrays."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, types))
    return [without_variables(node) for node in leaves if isinstance(node, types)]


def replace_arrays(node: Any, arrays: list[jax.Array]) -> Any:
    """`node` with new values in its arrays, which keep their dtypes and placement."""
    old, treedef = jax.tree.flatten(node)
    pairs = zip(old, arrays, strict=True)
    return jax.tree.unflatten(treedef, [placed_like(o, n) for o, n in pairs])


def without_variables(node: Any) -> Any:
    """The node with plain arrays where `nnx.Optimizer` has put Variables."""
    nnx = sys.modules.get("flax.nnx")  # without it there are none
    if nnx is None:
        return node

    def is_variable(x: Any) -> bool:
        return isinstance(x, nnx.Variable)

    def plain(x: Any) -> Any:
        return jax.tree.leaves(x)[0] if is_variable(x) else x

    return jax.tree.map(plain, node, is_leaf=is_variable)
