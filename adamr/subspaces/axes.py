"""Which axes of a leaf are contracted with the layer's input, and which only stack."""

from typing import NamedTuple

__all__ = ["Axes", "default_axes"]


class Axes(NamedTuple):
    """How one leaf is protected.

    Attributes:
      protected: axes contracted with the layer's input; together they are the fan-in.
      batch: axes along which every slice has a basis of its own (scanned layers,
        experts).

    The remaining axes are outputs: all of them share the basis.
    """

    protected: tuple[int, ...]
    batch: tuple[int, ...] = ()

    def normalized(self, ndim: int) -> "Axes":
        """The same axes counted from the front, checked against `ndim`."""
        for axis in self.protected + self.batch:
            if not -ndim <= axis < ndim:
                raise ValueError(f"axes names axis {axis} of a leaf with {ndim} axes.")
        protected = tuple(sorted(axis % ndim for axis in self.protected))
        batch = tuple(sorted(axis % ndim for axis in self.batch))
        if len(set(protected + batch)) != len(protected + batch) or not protected:
            raise ValueError(
                "axes needs at least one protected axis and none named twice, "
                f"got {self}."
            )
        return Axes(protected, batch)


def default_axes(path: str, shape: tuple[int, ...]) -> Axes | None:
    """The rule for leaves that nothing else is said about (Flax's layouts).

    ====================================  =======================  ==============
    leaf                                  shape                    protected
    ====================================  =======================  ==============
    bias, scale                           (n,)                     none
    dense or embedding                    (in, out)                in
    attention `query`, `key`, `value`     (in, heads, head)        in
    attention `out`                       (heads, head, out)       heads and head
    `conv…` with three axes               (window, in, out)        window and in
    any other three axes: stacked dense   (layers, in, out)        in, per layer
    four axes and more: convolution       (*window, in, out)       window and in
    ====================================  =======================  ==============

    Layers stacked by a scan that are not plain dense need `axes=`.

    Args:
      path: the leaf's name, parts separated by `/`.
      shape: the leaf's shape.

    Returns:
      The axes, or None for a leaf that has no fan-in.

    >>> default_axes("block/mlp/kernel", (64, 256))
    Axes(protected=(0,), batch=())
    >>> default_axes("block/attention/out/kernel", (4, 16, 64))
    Axes(protected=(0, 1), batch=())
    """
    ndim = len(shape)
    if ndim < 2:
        return None
    if ndim == 2:
        return Axes((0,))
    if ndim == 3:
        parts = path.split("/")
        if any(part in ("query", "key", "value") for part in parts):
            return Axes((0,))
        if "out" in parts or any(p.lower().startswith("conv") for p in parts):
            return Axes((0, 1))
        return Axes((1,), (0,))
    return Axes(tuple(range(ndim - 1)))
