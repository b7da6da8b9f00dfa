"""What the kernels of Flax layers contract: axes, rows of samples, their collection.

Flax NNX and linen give the attributes of a layer the same names, so one description
serves both.
"""

import string
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adamr import _tree
from adamr.subspaces.axes import Axes

__all__ = [
    "Kernel",
    "Samples",
    "conv",
    "dense",
    "einsum",
    "embed",
    "flax",
    "stacked_axes",
]


def flax(part: str) -> Any:
    try:
        from flax import linen, nnx
    except ImportError as error:
        raise ImportError(
            "adamr.capture needs Flax: python -m pip install 'adamr-jax[flax]'."
        ) from error
    return {"nnx": nnx, "linen": linen}[part]


class Kernel(NamedTuple):
    """One kernel, without the axes that scanned or vmapped layers put before it.

    Attributes:
      shape: of the kernel.
      axes: which of its axes meet the input; None if none does.
      rows: input -> (*batch, num_rows, fan_in) float32, in the kernel's own order.
    """

    shape: tuple[int, ...]
    axes: Axes | None
    rows: Callable[[jax.Array], jax.Array]


def _rows(x: jax.Array, batch: Sequence[int], contracted: Sequence[int]) -> jax.Array:
    """(*batch, num_rows, fan_in): moves axes and flattens each group but the first."""
    kept = [d for d in range(x.ndim) if d not in (*batch, *contracted)]
    fan_in = int(np.prod([x.shape[d] for d in contracted]))
    x = x.astype(jnp.float32).transpose(*batch, *kept, *contracted)
    return x.reshape(*x.shape[: len(batch)], -1, fan_in)


def _near(x: Any) -> Any:
    """On the host, but for what lies in parts on several devices: that stays there."""
    spread = isinstance(x, jax.Array) and not x.sharding.is_fully_replicated
    return x if spread else np.asarray(x)


def _equal(a: Any, b: Any) -> bool:
    return bool((np if isinstance(a, np.ndarray) else jnp).array_equal(a, b))


def dense(shape: tuple[int, ...], axis: int | Sequence[int], num_batch: int) -> Kernel:
    """Kernel (*batch, *in, *out) on the input axes `axis`; batch axes lead in both."""
    axis = (axis,) if isinstance(axis, int) else tuple(axis)
    batch = tuple(range(num_batch))

    def rows(x):
        # Flax sorts the axes it is given before it contracts them.
        return _rows(x, batch, sorted(a % x.ndim for a in axis))

    protected = tuple(range(num_batch, num_batch + len(axis)))
    return Kernel(shape, Axes(protected, batch), rows)


def embed(shape: tuple[int, ...], name: str) -> Kernel:
    """An embedding is a kernel on one-hot rows."""
    count = shape[0]

    def rows(tokens):
        tokens = _near(tokens).reshape(-1)
        if tokens.size and not -count <= tokens.min() <= tokens.max() < count:
            raise ValueError(
                f"{name}: tokens range from {tokens.min()} to {tokens.max()}, expected "
                f"at least {-count} and less than {count}."
            )
        return jax.nn.one_hot(tokens % count, count, dtype=jnp.float32)

    return Kernel(shape, Axes((0,)), rows)


def _each(value: Any, length: int) -> tuple:
    value = 1 if value is None else value
    return (value,) * length if isinstance(value, int) else tuple(value)


def _padded(x: jax.Array, padding: Any, reach: list[int]) -> tuple[jax.Array, Any]:
    """The input and the padding that is left for the patches."""
    if isinstance(padding, int):
        padding = [padding] * len(reach)
    if not isinstance(padding, str):
        return x, [(p, p) if isinstance(p, int) else tuple(p) for p in padding]
    modes = {"CIRCULAR": "wrap", "REFLECT": "reflect", "CAUSAL": "constant"}
    if padding not in modes:
        return x, padding
    before = reach if padding == "CAUSAL" else [r // 2 for r in reach]
    pads = [(b, r - b) for b, r in zip(before, reach, strict=True)]
    return jnp.pad(x, [(0, 0), *pads, (0, 0)], mode=modes[padding]), "VALID"


def conv(shape: tuple[int, ...], layer: Any, name: str) -> Kernel:
    """Kernel (*window, in, out) on patches; groups share one space of patches."""
    window, spatial = shape[:-2], len(shape) - 2
    groups = layer.feature_group_count
    if layer.mask is not None:
        raise ValueError(
            f"{name}: the kernel of a masked convolution meets another input at each "
            "output; pass samples for it by hand."
        )
    if _each(layer.input_dilation, spatial) != (1,) * spatial:
        raise ValueError(f"{name}: input_dilation is not supported; pass samples.")

    def rows(x):
        dilation = _each(layer.kernel_dilation, spatial)
        reach = [(k - 1) * d for k, d in zip(window, dilation, strict=True)]
        x = x.astype(jnp.float32).reshape(-1, *x.shape[-spatial - 1 :])
        x, padding = _padded(x, layer.padding, reach)
        patches = jax.lax.conv_general_dilated_patches(
            jnp.moveaxis(x, -1, 1),
            window,
            _each(layer.strides, spatial),
            padding,
            rhs_dilation=dilation,
            precision=jax.lax.Precision.HIGHEST,
        )  # (batch, in · window, *positions): channels outermost
        batch, positions = patches.shape[0], patches.shape[2:]
        patches = patches.reshape(batch, groups, -1, *window, *positions)
        return _rows(patches, (), (*range(3, 3 + spatial), 2))

    return Kernel(shape, Axes(tuple(range(spatial + 1))), rows)


def einsum(shape: tuple[int, ...], equation: str, name: str) -> Kernel:
    """Kernel of `einsum(equation, input, kernel)`, letters in the kernel's order."""
    inputs, output = equation.replace(" ", "").split("->")
    left, kernel = inputs.split(",")
    both = [c for c in kernel if c in left]
    lost = [c for c in kernel if c not in left and c not in output]
    if "..." in kernel or len(set(kernel)) < len(kernel) or lost:
        raise ValueError(
            f"{name}: the kernel of {equation!r} has an ellipsis, a repeated letter or "
            "one that meets neither input nor output; pass samples for it by hand."
        )
    batch = [c for c in both if c in output]
    contracted = [c for c in both if c not in output]
    axes = None
    if contracted:
        places = [tuple(map(kernel.index, group)) for group in (contracted, batch)]
        axes = Axes(*places)

    def rows(x):
        free = [c for c in string.ascii_letters if c not in equation]
        dots = "".join(free[: x.ndim - len(left.replace("...", ""))])
        here = left.replace("...", dots)
        # Letters that neither kernel nor output has are summed, as einsum would.
        kept = [c for c in here if c in dots or (c in output and c not in kernel)]
        order = "".join((*batch, *dict.fromkeys(kept), *contracted))
        x = jnp.einsum(f"{here}->{order}", x.astype(jnp.float32))
        first = len(batch)
        return _rows(x, range(first), range(x.ndim - len(contracted), x.ndim))

    return Kernel(shape, axes, rows)


def stacked_axes(kernel: Kernel, shape: tuple[int, ...], name: str) -> Axes | None:
    """The axes of a leaf of `shape`: layers stacked by a scan come first."""
    stacked = len(shape) - len(kernel.shape)
    if stacked < 0 or tuple(shape[stacked:]) != tuple(kernel.shape):
        raise ValueError(
            f"{name} has shape {shape}, which is no stack of kernels of shape "
            f"{kernel.shape} along leading axes: pass its Axes by hand."
        )
    if kernel.axes is None:
        return None
    protected, batch = ([a + stacked for a in axes] for axes in kernel.axes)
    return Axes(tuple(protected), (*range(stacked), *batch))


class Samples:
    """Rows per leaf and, for stacked layers, per slice of the leaf."""

    def __init__(self) -> None:
        self._rows: dict[Any, dict[tuple[int, ...], list[np.ndarray]]] = {}
        self._traced: dict[Any, str] = {}

    def note(
        self, key: Any, kernel: Kernel, name: str, whole: Any, part: Any, x: Any
    ) -> None:
        """Notes the input `x` of a layer whose kernel is `part`, a slice of `whole`."""
        if _tree.is_traced(x) or _tree.is_traced(part):
            self._traced[key] = name
            return
        whole, part = _near(whole), _near(part)
        slices = self._rows.setdefault(key, {})
        stack = whole.shape[: whole.ndim - len(kernel.shape)]
        same = [i for i in np.ndindex(stack) if _equal(whole[i], part)]
        if not same:
            raise ValueError(f"{name} runs on a kernel that is not the model's own.")
        # Equal slices are told apart by their turn.
        turn = min(same, key=lambda i: len(slices.get(i, [])))
        rows = _near(kernel.rows(jnp.asarray(x)))
        slices.setdefault(turn, []).append(rows)

    def collect(self, key: Any, stack: tuple[int, ...], most: int | None) -> Any:
        if key in self._traced and key not in self._rows:
            raise ValueError(
                f"{self._traced[key]} was called under vmap, remat or grad inside the "
                "model, where its input is not a value: call it directly, or pass "
                "samples by hand."
            )
        if key not in self._rows:
            return None
        found = self._rows[key]
        spread = any(isinstance(x, jax.Array) for each in found.values() for x in each)
        xp: Any = jnp if spread else np
        slices = {
            i: each[0] if len(each) == 1 else xp.concatenate(each, -2)
            for i, each in found.items()
        }
        shape = next(iter(slices.values())).shape
        count = max(x.shape[-2] for x in slices.values())

        def filled(i):
            if i not in slices:
                return xp.zeros((*shape[:-2], count, shape[-1]), np.float32)
            more = (0, count - slices[i].shape[-2])
            return xp.pad(slices[i], [*[(0, 0)] * (len(shape) - 2), more, (0, 0)])

        layers = xp.stack(list(map(filled, np.ndindex(stack))))
        rows = layers.reshape(*stack, *layers.shape[1:])
        if most is None or count <= most:
            return rows
        return rows[..., np.linspace(0, count - 1, most).round().astype(int), :]
