"""The leaves of a state in the form that files hold: arrays and plain JSON.

Arrays over several processes stay `jax.Array`s in host memory, of which each process
has its shards; all others become NumPy arrays.

A leaf is stored under its name, so the order of fields may change. Bits, dtypes, weak
types and the implementation of PRNG keys are restored as they were saved; the placement
comes from `like`.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adamr.sharding import offload

__all__ = [
    "Stored",
    "described",
    "digest",
    "placeholders",
    "restored",
    "signature",
    "stored",
]

_PLAIN = (bool, int, float, str)
_NUMBERS = frozenset(
    "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 bfloat16 float16 float32 "
    "float64 complex64 complex128".split()
)


def _unique(names: Iterable[str]) -> list[str]:
    """Names made unique: `a/b` may be one key or two, and the second gets a number."""
    seen: dict[str, int] = {}
    unique = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        unique.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return unique


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by their unique names."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree)
    names = [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in pairs]
    return dict(zip(_unique(names), [leaf for _, leaf in pairs], strict=True))


def _is_key(leaf: Any) -> bool:
    """Whether a leaf is a typed PRNG key."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _holds_numbers(dtype: np.dtype) -> bool:
    """Whether a dtype is one of numbers or bools that can be stored."""
    # NumPy gives numbers of less than a byte, and other floats of one, a byte each.
    small = dtype.itemsize == 1 and jnp.issubdtype(dtype, np.number)
    return dtype.isnative and (dtype.name in _NUMBERS or small)


def _as_bytes(value: np.ndarray) -> np.ndarray:
    """The bits of types that orbax does not know; other arrays unchanged."""
    return value if value.dtype.name in _NUMBERS else value.view(np.uint8)


def _text(leaf: Any, name: str) -> str:
    """The type of a leaf, such as `float32[3,2]` or `int`."""
    array = jax.Array | jax.ShapeDtypeStruct | np.generic
    if isinstance(leaf, array) or type(leaf) is np.ndarray:  # a mask would be lost
        if _is_key(leaf) or _holds_numbers(leaf.dtype):
            return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
    elif type(leaf) in _PLAIN:
        return type(leaf).__name__
    what = f"{type(leaf).__name__} {getattr(leaf, 'dtype', '')}".strip()
    raise TypeError(
        f"state has a leaf of type {what} at {name!r}, expected arrays of numbers or "
        "bools, PRNG keys, bools, ints, floats or strings."
    )


def described(tree: Any) -> dict[str, str]:
    """The type of each leaf of a state, by name."""
    return {name: _text(leaf, name) for name, leaf in _named(tree).items()}


def signature(records: list[dict[str, Any]]) -> dict[str, str]:
    """The same for saved records."""
    return {record["name"]: record["type"] for record in records}


def _is_global(leaf: Any) -> bool:
    """Whether other processes hold parts of an array (of a placeholder: will hold)."""
    sharding = getattr(leaf, "sharding", None)
    return sharding is not None and not sharding.is_fully_addressable


class Stored(NamedTuple):
    """A state as files hold it.

    Attributes:
      records: one per leaf, for JSON.
      arrays: copies of the arrays, by position.
    """

    records: list[dict[str, Any]]
    arrays: dict[str, Any]


def _copied(leaf: Any, name: str) -> Any:
    """A copy of an array in host memory."""
    if not _is_global(leaf):
        return _as_bytes(np.array(leaf, copy=True))
    if leaf.dtype.name not in _NUMBERS:
        raise TypeError(
            f"state has {leaf.dtype} over several processes at {name!r}, expected a "
            f"dtype among {sorted(_NUMBERS)}."
        )
    return offload(leaf)


def digest(state: Stored) -> bytes:
    """The sum of all that must be the same in all processes: all but global arrays."""
    total = hashlib.sha256(json.dumps(state.records).encode())
    for array in state.arrays.values():
        if isinstance(array, np.ndarray):
            total.update(array.tobytes())
    return total.digest()


def stored(state: Any) -> Stored:
    """A copy of a state as files hold it; the state's buffers may be donated next."""
    records, arrays = [], {}
    leaves = _named(state)
    for leaf in leaves.values():
        local = isinstance(leaf, jax.Array) and not _is_global(leaf)
        if local and not _is_key(leaf):
            leaf.copy_to_host_async()
    for i, (name, leaf) in enumerate(leaves.items()):
        record: dict[str, Any] = {"name": name, "type": _text(leaf, name)}
        if isinstance(leaf, jax.Array):
            if _is_key(leaf):
                record["kind"] = "key"
                record["impl"] = str(jax.random.key_impl(leaf))
                leaf = jax.random.key_data(leaf)
            else:
                record["kind"], record["weak"] = "array", leaf.weak_type
        elif isinstance(leaf, np.ndarray | np.generic):
            record["kind"] = "numpy" if isinstance(leaf, np.ndarray) else "scalar"
        else:
            record["kind"], record["value"] = "plain", leaf
        if record["kind"] != "plain" and leaf.size:  # orbax stores no empty arrays
            record["array"] = f"{i:05d}"
            arrays[record["array"]] = _copied(leaf, name)
        records.append(record)
    return Stored(records, arrays)


def _host_type(leaf: Any) -> Any:
    """Shape and dtype of a leaf as NumPy holds it: a key is its data."""
    if _is_key(leaf):
        shape = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        return jax.eval_shape(jax.random.key_data, shape)
    return leaf


def placeholders(records: list[dict[str, Any]], like: Any) -> dict[str, Any]:
    """The arrays that orbax is asked to read: one of the right shape per stored one."""

    def placeholder(leaf):
        host = _host_type(leaf)
        if _is_global(leaf):
            where = leaf.sharding
            return jax.ShapeDtypeStruct(host.shape, host.dtype, sharding=where)
        return _as_bytes(np.empty(host.shape, host.dtype))

    leaves = _named(like)
    wanted = [record for record in records if "array" in record]
    return {r["array"]: placeholder(leaves[r["name"]]) for r in wanted}


def _placed(value: Any, like: Any) -> jax.Array:
    """`value` on the devices of `like`; uncommitted if `like` is uncommitted."""
    sharding = getattr(like, "sharding", None)
    if sharding is None or not getattr(like, "committed", True):
        return jnp.array(value)
    return jax.device_put(value, sharding, may_alias=False)


def _weak(value: Any) -> jax.Array:
    """`value` as an array of weak type."""
    zeros = jnp.full(value.shape, value.dtype.type(0).item())
    return zeros.at[...].set(value)


def _restored(record: dict[str, Any], arrays: dict[str, Any], like: Any) -> Any:
    """One leaf, from its record and the arrays that were read."""
    if record["kind"] == "plain":
        return record["value"]
    if "array" in record and _is_global(like):
        value = arrays[record["array"]]
        if record["kind"] == "key":
            value = jax.random.wrap_key_data(value, impl=record["impl"])
        elif record.get("weak"):
            value = jax.jit(_weak, out_shardings=like.sharding)(value)
        return value
    host = _host_type(like)
    if "array" in record:
        value = arrays[record["array"]].view(host.dtype)
    else:
        value = np.empty(host.shape, host.dtype)
    if record["kind"] == "numpy":
        return value
    if record["kind"] == "scalar":
        return value[()]
    if record["kind"] == "key":
        value = jax.random.wrap_key_data(jnp.array(value), impl=record["impl"])
    elif record["weak"]:
        value = _weak(value)
    return _placed(value, like)


def restored(records: list[dict[str, Any]], arrays: dict[str, Any], like: Any) -> Any:
    """The saved state, with the structure and placement of `like`."""
    saved = {record["name"]: record for record in records}
    leaves = [_restored(saved[n], arrays, leaf) for n, leaf in _named(like).items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)
