"""Low-rank pairs A, B found by name, and the kernel W that each of them adds to.

    library     W                      A                   B
    Qwix        w                      w_lora_a            w_lora_b
    Flax NNX    kernel                 lora/lora_a         lora/lora_b
    PEFT        base_layer.weight or   lora_A.weight or    lora_B.weight or
                weight                 lora_A.name.weight  lora_B.name.weight

A is (*in, r) and B (r, *out); in PEFT's order they are (r, in) and (out, r), and W is
(out, in). Stacked layers put their axes in front of all three. Qwix flattens several
inputs or outputs into one axis or keeps them apart; the shape of W says which.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from adamr import _tree
from adamr.lora.shapes import Factors, Meeting, factors, meeting

__all__ = ["Halves", "Located", "Pair", "find_pairs", "halves", "located"]


class Pair(NamedTuple):
    """Names of the leaves of one pair.

    Attributes:
      kernel: W, in the base.
      a, b: A and B, in the tree of the pairs.
      out_first: PEFT's order: W (out, in), A (r, in), B (out, r).
    """

    kernel: str
    a: str
    b: str
    out_first: bool = False


class Halves(NamedTuple):
    """A and B of one pair: names, positions in their tree, and axes."""

    pair: Pair
    a: int
    b: int
    factors: Factors


class Located(NamedTuple):
    """A pair with its kernel: names, positions in their trees, and how they meet."""

    pair: Pair
    a: int
    b: int
    kernel: int
    meeting: Meeting

    @property
    def halves(self) -> Halves:
        return Halves(self.pair, self.a, self.b, self.meeting.factors)


class _Owner(NamedTuple):
    """What the name of one half says: key and places are the same for the other."""

    key: tuple[str, ...]
    half: str
    places: tuple[str, ...]


_QWIX = re.compile(r"(?P<owner>.+)_lora_(?P<half>[ab])")
_NNX = re.compile(r"(?:(?P<owner>.+)/)?lora_(?P<half>[ab])")
_PEFT = re.compile(
    r"(?:(?P<owner>.+)[./])?lora_(?P<half>[AB])(?P<adapter>[./][^./]+)?[./]weight"
)
_NAMES = "w_lora_a and w_lora_b, lora_a and lora_b, lora_A.weight and lora_B.weight"


def _joined(*parts: str, by: str = "/") -> str:
    return by.join(part for part in parts if part)


def _owner(name: str) -> _Owner | None:
    if found := _QWIX.fullmatch(name):
        return _Owner(("qwix", found["owner"]), found["half"], (found["owner"],))
    if found := _NNX.fullmatch(name):
        owner = found["owner"] or ""
        inside = (_joined(owner, "base_module/kernel"), _joined(owner, "kernel"))
        beside = re.sub(r"(^|/)lora$", "", owner)
        places = (_joined(beside, "kernel"), *inside) if beside != owner else inside
        return _Owner(("nnx", owner), found["half"], places)
    if found := _PEFT.fullmatch(name):
        owner, adapter = found["owner"] or "", found["adapter"] or ""
        by = "/" if "/" in name else "."
        short = re.sub(r"^base_model[./]model[./]", "", owner)
        places = [
            _joined(module, end, by=by)
            for module in dict.fromkeys((owner, short))
            for end in (f"base_layer{by}weight", "weight")
        ]
        key = ("peft", owner, adapter)
        return _Owner(key, found["half"].lower(), tuple(places))
    return None


def _positions(tree: Any) -> dict[str, int]:
    """The leaves that are there; Flax NNX ends their names in `/value`."""
    named = enumerate(zip(*_tree.flatten_with_names(tree), strict=True))
    return {
        name.removesuffix("/value"): i for i, (name, x) in named if not _tree.is_hole(x)
    }


def _by_name(there: dict[str, int]) -> list[tuple[Pair, tuple[str, ...]]]:
    """The pairs among the leaves of `lora`, and where their kernels may be."""
    found: dict[tuple[str, ...], dict[str, str]] = {}
    places: dict[tuple[str, ...], tuple[str, ...]] = {}
    for name in there:
        owner = _owner(name)
        if owner is None:
            raise ValueError(
                f"lora has the leaf {name!r}, which belongs to no pair: expected names "
                f"that end in {_NAMES}; for other names pass pairs=[(kernel, A, B), "
                "...] with the names of the leaves."
            )
        found.setdefault(owner.key, {})[owner.half] = name
        places[owner.key] = owner.places
    for half in found.values():
        if len(half) == 1:
            ((which, name),) = half.items()
            other = "B" if which == "a" else "A"
            raise ValueError(
                f"lora has {name!r} and no {other} for it, expected both: {_NAMES}."
            )
    return [
        (Pair(places[key][0], half["a"], half["b"], key[0] == "peft"), places[key])
        for key, half in found.items()
    ]


def _as_given(
    there: dict[str, int], pairs: Sequence[Any]
) -> list[tuple[Pair, tuple[str, ...]]]:
    """The pairs that the user names, checked against the leaves of `lora`."""
    given = []
    for pair in pairs:
        kernel, a, b, *rest = pair
        names = [name.removesuffix("/value") for name in (kernel, a, b)]
        given.append((Pair(*names, *rest), (names[0],)))
    named = [name for pair, _ in given for name in (pair.a, pair.b)]
    if sorted(named) != sorted(there):
        raise ValueError(
            f"pairs names the leaves {sorted(named)} as A's and B's, expected each "
            f"leaf of lora once: {sorted(there)}."
        )
    return given


def _pairs(
    lora: Any, pairs: Sequence[Any] | None
) -> tuple[dict[str, int], list[tuple[Pair, tuple[str, ...]]]]:
    there = _positions(lora)
    if not there:
        raise ValueError(f"lora has no leaves, expected pairs: {_NAMES}.")
    return there, _by_name(there) if pairs is None else _as_given(there, pairs)


def halves(lora: Any, pairs: Sequence[Any] | None = None) -> list[Halves]:
    """The pairs of `lora`, read without their kernels."""
    there, named = _pairs(lora, pairs)
    leaves = _tree.flatten(lora)[0]
    found = []
    for pair, _ in named:
        a, b = leaves[there[pair.a]].shape, leaves[there[pair.b]].shape
        how = factors(a, b, pair.out_first)
        if how is None:
            raise ValueError(_mismatch(pair, a, b))
        found.append(Halves(pair, there[pair.a], there[pair.b], how))
    return found


def _mismatch(pair: Pair, a: tuple[int, ...], b: tuple[int, ...]) -> str:
    layout = "(…, r, in) and (…, out, r)" if pair.out_first else "(…, r) and (…, r, …)"
    return (
        f"lora has {pair.a!r} of shape {a} and {pair.b!r} of shape {b}, expected "
        f"{layout} with the same r."
    )


def _place_of(pair: Pair, places: Sequence[str], base: dict[str, int]) -> str:
    for name in places:
        if name in base:
            return name
    starts = tuple(f"{place}{by}" for place in places for by in "/.")
    parts = [name for name in base if name.startswith(starts)]
    if parts:
        raise ValueError(
            f"base has the kernel of {pair.a!r} in parts {parts}, as a quantized one: "
            "it cannot take A·B, expected one floating array. lora.start_block keeps "
            "finished pairs beside such a kernel."
        )
    raise ValueError(
        f"base has no kernel for {pair.a!r}: expected a leaf "
        f"{' or '.join(map(repr, places))}, got {_tree.listed(base)}."
    )


def _require_floating(name: str, dtype: jnp.dtype) -> None:
    """Before shapes are compared: a packed kernel has another one."""
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize < 2:
        raise ValueError(
            f"base has {dtype} at {name!r}, which cannot take A·B, expected a floating "
            "kernel of 16 bits or more. lora.start_block keeps finished pairs beside "
            "such a kernel."
        )


def located(base: Any, lora: Any, pairs: Sequence[Any] | None = None) -> list[Located]:
    """The pairs of `lora` with their kernels in `base`; all shapes are checked."""
    there, named = _pairs(lora, pairs)
    kernels = _positions(base)
    base_leaves, leaves = _tree.flatten(base)[0], _tree.flatten(lora)[0]
    found = []
    for pair, places in named:
        pair = pair._replace(kernel=_place_of(pair, places, kernels))
        at, i, j = kernels[pair.kernel], there[pair.a], there[pair.b]
        _require_floating(pair.kernel, base_leaves[at].dtype)
        kernel, a, b = base_leaves[at].shape, leaves[i].shape, leaves[j].shape
        how = meeting(tuple(kernel), tuple(a), tuple(b), pair.out_first)
        if how is None:
            raise ValueError(
                f"base has the kernel {pair.kernel!r} of shape {kernel}, which cannot "
                f"take A·B: {_mismatch(pair, a, b)}"
            )
        found.append(Located(pair, i, j, at, how))
    return found


def find_pairs(
    base: Any, lora: Any, *, pairs: Sequence[Any] | None = None
) -> tuple[Pair, ...]:
    """The pairs of `lora`, and the kernels of `base` that they add to, by name.

    Args:
      base: the frozen kernels: nested dicts, an `nnx.State`, or a flat dict with dots
        in its keys. It may hold other leaves, and holes (None).
      lora: the A's and B's, and nothing else; holes are left out.
      pairs: None: by the names of Qwix, Flax NNX and PEFT; or a sequence of `Pair`, or
        of (kernel, a, b), that names every leaf of `lora` once.

    Returns:
      A `Pair` for each A, in the order of `lora`.

    Raises:
      ValueError: for a leaf of `lora` in no pair, half a pair, a kernel that is missing
        or quantized, or one whose shape cannot take A·B. Where shapes leave a choice,
        the contracted axes of the kernel come first (in PEFT's order, last).

    >>> import jax.numpy as jnp
    >>> base = {"w": jnp.ones((4, 2, 3)), "norm": jnp.ones(4)}
    >>> lora = {"w_lora_a": jnp.ones((4, 1)), "w_lora_b": jnp.ones((1, 2, 3))}
    >>> find_pairs(base, lora)
    (Pair(kernel='w', a='w_lora_a', b='w_lora_b', out_first=False),)
    """
    return tuple(each.pair for each in located(base, lora, pairs))
