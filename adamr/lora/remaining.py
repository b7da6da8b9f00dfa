"""What is left to learn in, and what is left unprotected, of every A."""

import warnings
from typing import Any, NamedTuple

import jax
import numpy as np

from adamr import _tree
from adamr.state import held_subspace
from adamr.subspaces.covariance import Covariance
from adamr.subspaces.subspace import Subspace, layout, rank

__all__ = ["Room", "held", "room", "warn_of_gaps"]


def held(opt_state: Any) -> Subspace:
    """The subspace in a state, per leaf."""
    found = held_subspace(opt_state)
    if not isinstance(found, Subspace):
        raise TypeError(
            "opt_state holds Directions of all parameters together, expected a "
            "Subspace of the A's: empty_subspace(lora, axes=lora.axes(...))."
        )
    return found


class Room(NamedTuple):
    """What is left of one A; int32, with the shape of stacked layers.

    Attributes:
      directions: n − rank(U), the dimensions in which A can still learn.
      capacity: how many more directions U has room for.
    """

    directions: jax.Array
    capacity: jax.Array


def room(opt_state: Any, lora: Any) -> dict[str, Room]:
    """How many directions are left for every A, by its name.

    Args:
      opt_state: as for `start_task`.
      lora: the A's and B's, for the names.

    Returns:
      A `Room` for each protected A. Without directions A = 0 and the layer learns no
      more; without capacity what comes next is not protected: a larger `max_rank`.

    Raises:
      ValueError: if the state holds no subspace, or one that does not fit `lora`.
      TypeError: if it holds `Directions`.

    >>> import jax.numpy as jnp
    >>> from adamr import empty_subspace, project_out, protect_inputs
    >>> lora = {"w_lora_a": jnp.ones((4, 1)), "w_lora_b": jnp.zeros((1, 3))}
    >>> s = empty_subspace(lora, max_rank=2, unprotected=["lora_b"])
    >>> state = project_out(s).init(lora)
    >>> state = protect_inputs(state, {"w_lora_a": jnp.eye(4)[:1], "w_lora_b": None})
    >>> {name: [int(x) for x in left] for name, left in room(state, lora).items()}
    {'w_lora_a': [3, 1]}
    """
    subspace = held(opt_state).at(lora, "the subspace in opt_state")
    names, leaves = _tree.flatten_with_names(lora)
    found = {}
    for name, x, count, basis, weights in zip(
        names, leaves, rank(subspace), *subspace, strict=True
    ):
        if _tree.is_hole(x) or basis is None or weights is None or count is None:
            continue
        how = layout(basis, weights)
        found[name] = Room(how.fan_in - count, how.capacity - count)
    return found


def warn_of_gaps(opt_state: Any, inputs: Any, lora: Any) -> None:
    """Warns, outside jit, of A's whose old inputs the next B may move, or that are 0.

    Args:
      opt_state: with the subspace of the A's, grown.
      inputs: from which it was grown.
      lora: for the names.
    """
    by_gram = isinstance(inputs, Covariance)
    entries = inputs.moments if by_gram else _tree.flatten_like(inputs, "inputs", lora)
    met = dict(zip(_tree.flatten_with_names(lora)[0], entries, strict=True))
    left = room(opt_state, lora)
    unmet = [name for name in left if _tree.is_hole(met[name])]
    known = {
        name: (np.asarray(each.directions), np.asarray(each.capacity))
        for name, each in left.items()
        if name not in unmet and not _tree.is_traced(each.capacity)
    }
    full = [name for name, (n, most) in known.items() if np.any((n > 0) & (most <= 0))]
    closed = [name for name, (n, _) in known.items() if np.any(n <= 0)]
    if unmet:
        warnings.warn(
            f"inputs has None at {_tree.listed(unmet)}: what the finished task fed to "
            "these layers is not protected. Collect them with layer_inputs(forward, "
            "lora, x).",
            stacklevel=3,
        )
    if full:
        warnings.warn(
            f"the bases of {_tree.listed(full)} are full: inputs of later tasks are "
            "not protected there, and of this one perhaps not all. Give empty_subspace "
            "a larger max_rank, or the boundary a smaller threshold.",
            stacklevel=3,
        )
    if closed:
        warnings.warn(
            f"all inputs of {_tree.listed(closed)} are protected: A is zero there, and "
            "these layers learn no more. Protect less, with a smaller threshold.",
            stacklevel=3,
        )
