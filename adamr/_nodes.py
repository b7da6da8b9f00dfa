"""Finding the nodes of given types inside any optimizer state, and replacing them."""

from collections.abc import Callable
from typing import Any

import jax

from adamr._tree import placed_like


def map_nodes(function: Callable[[Any], Any], tree: Any, *types: type) -> Any:
    """Maps `function` over the nodes of the given types; the rest is unchanged."""

    def found(node: Any) -> bool:
        return isinstance(node, types)

    return jax.tree.map(
        lambda node: function(node) if found(node) else node, tree, is_leaf=found
    )


def find_nodes(tree: Any, *types: type) -> list[Any]:
    """All nodes of the given types, in the order of the tree."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, types))
    return [node for node in leaves if isinstance(node, types)]


def replace_arrays(node: Any, arrays: list[jax.Array]) -> Any:
    """`node` with new values in its arrays, which keep their dtypes and placement."""
    old, treedef = jax.tree.flatten(node)
    pairs = zip(old, arrays, strict=True)
    return jax.tree.unflatten(treedef, [placed_like(o, n) for o, n in pairs])


def without_variables(node: Any) -> Any:
    """Nested tuples of arrays or None without the Variables that nnx.Optimizer adds."""
    return jax.tree.map(
        lambda x: None if x is None else jax.tree.leaves(x)[0],
        node,
        is_leaf=lambda x: not isinstance(x, tuple),
    )
