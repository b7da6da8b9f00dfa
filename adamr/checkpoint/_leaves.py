"""The leaves of a state, as files can hold them: arrays and plain JSON.

Arrays over several processes stay jax.Arrays, of which each process has its shards, in
host memory; all others become NumPy arrays.

A leaf is kept under its name, so fields may change places. Bits, dtypes, weak types and
the implementation of PRNG keys come back as they were saved; placement comes from
`like`.
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
    """`a/b` may be one key or two; the second of a name gets a number."""
    seen: dict[str, int] = {}
    unique = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        unique.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return unique


def _named(tree: Any) -> dict[str, Any]:
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree)
    names = [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in pairs]
    return dict(zip(_unique(names), [leaf for _, leaf in pairs], strict=True))


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _holds_numbers(dtype: np.dtype) -> bool:
    # Those of less than a byte, or of other floats in one, have a byte each in NumPy.
    small = dtype.itemsize == 1 and jnp.issubdtype(dtype, np.number)
    return dtype.isnative and (dtype.name in _NUMBERS or small)


def _as_bytes(value: np.ndarray) -> np.ndarray:
    """Types that orbax does not know, as their bits."""
    return value if value.dtype.name in _NUMBERS else value.view(np.uint8)


def _text(leaf: Any, name: str) -> str:
    """Such as `float32[3,2]` or `int`."""
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
    """What each leaf of a state is, by name."""
    return {name: _text(leaf, name) for name, leaf in _named(tree).items()}


def signature(records: list[dict[str, Any]]) -> dict[str, str]:
    """The same, of saved records."""
    return {record["name"]: record["type"] for record in records}


def _is_global(leaf: Any) -> bool:
    """Whether other processes hold parts of it, or, of a like, will."""
    sharding = getattr(leaf, "sharding", None)
    return sharding is not None and not sharding.is_fully_addressable


class Stored(NamedTuple):
    records: list[dict[str, Any]]  # one per leaf, for JSON
    arrays: dict[str, Any]  # copies, by position


def _copied(leaf: Any, name: str) -> Any:
    if not _is_global(leaf):
        return _as_bytes(np.array(leaf, copy=True))
    if leaf.dtype.name not in _NUMBERS:
        raise TypeError(
            f"state has {leaf.dtype} over several processes at {name!r}, expected one "
            f"of {sorted(_NUMBERS)}."
        )
    return offload(leaf)


def digest(of: Stored) -> bytes:
    """What must be the same in all processes: all but global arrays."""
    total = hashlib.sha256(json.dumps(of.records).encode())
    for array in of.arrays.values():
        if isinstance(array, np.ndarray):
            total.update(array.tobytes())
    return total.digest()


def stored(state: Any) -> Stored:
    """What files hold of a state, copied: its buffers may be donated next."""
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
    if _is_key(leaf):
        shape = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        return jax.eval_shape(jax.random.key_data, shape)
    return leaf


def placeholders(records: list[dict[str, Any]], like: Any) -> dict[str, Any]:
    """What orbax is asked to read: an array of the right shape for each one stored."""

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
    """On the devices of `like`; where `like` follows its neighbours, so does this."""
    sharding = getattr(like, "sharding", None)
    if sharding is None or not getattr(like, "committed", True):
        return jnp.array(value)
    return jax.device_put(value, sharding, may_alias=False)


def _weak(value: Any) -> jax.Array:
    zeros = jnp.full(value.shape, value.dtype.type(0).item())
    return zeros.at[...].set(value)


def _restored(record: dict[str, Any], arrays: dict[str, Any], like: Any) -> Any:
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
    """The state: structure and placement from `like`, all else as it was saved."""
    saved = {record["name"]: record for record in records}
    leaves = [_restored(saved[n], arrays, leaf) for n, leaf in _named(like).items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)
