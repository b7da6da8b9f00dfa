"""Layer inputs of Flax models, in the shape that `grow_subspace` takes.

Users need not write hooks: the model runs once, eagerly, and every layer with a kernel
notes what it was given. Needs Flax (`pip install 'adamr-jax[flax]'`).

    layer                              rows of the samples
    Linear, LinearGeneral, attention   the contracted axes of the input, flattened
    Einsum                             likewise, in the kernel's order
    Conv                               patches in the kernel's own order (*window, in)
    Embed                              one-hot rows (a tied `attend` is not captured)

Layers stacked by a scan have one set of rows per layer.
"""

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import jax

from adamr.capture import _layers
from adamr.capture._layers import Samples, flax
from adamr.subspaces.axes import Axes

__all__ = ["capture_inputs", "kernel_axes"]

_ONE_CAPTURE = threading.RLock()
_TAG = "adamr_capture"


@contextlib.contextmanager
def _calls_noted(types: tuple[type, ...], note: Callable[..., None]):
    """Replaces `__call__` of the layer types for the length of the block.

    Other threads pass through; a second capture waits, or it would restore the wrong
    method.
    """
    here = threading.get_ident()

    def noting(original):
        def call(self, inputs, *args, **kwargs):
            if threading.get_ident() == here:
                note(self, inputs, *args, **kwargs)
            return original(self, inputs, *args, **kwargs)

        return call

    with _ONE_CAPTURE:
        originals = {kind: kind.__call__ for kind in types}
        try:
            for kind, original in originals.items():
                kind.__call__ = noting(original)
            yield
        finally:
            for kind, original in originals.items():
                kind.__call__ = original


def _nnx_kernel(layer: Any, name: str, equation: str | None = None) -> Any:
    """(its Variable, `Kernel`) of a layer with a fan-in, else None."""
    nnx = flax("nnx")
    if isinstance(layer, nnx.Embed):
        shape = (layer.num_embeddings, layer.features)
        return layer.embedding, _layers.embed(shape, name)
    if isinstance(layer, nnx.Linear):
        shape = (layer.in_features, layer.out_features)
        return layer.kernel, _layers.dense(shape, -1, 0)
    if isinstance(layer, nnx.LinearGeneral):
        batch = tuple(layer.batch_axis.values())
        shape = (*batch, *layer.in_features, *layer.out_features)
        return layer.kernel, _layers.dense(shape, layer.axis, len(batch))
    if isinstance(layer, nnx.Conv):
        return layer.kernel, _layers.conv(tuple(layer.kernel_shape), layer, name)
    if isinstance(layer, nnx.Einsum):
        shape = tuple(layer.kernel_shape)
        return layer.kernel, _layers.einsum(shape, equation or layer.einsum_str, name)
    return None


def _nnx_params(model: Any) -> dict[tuple, Any]:
    """The Param Variables by path."""
    nnx = flax("nnx")
    return {p: v for p, v in nnx.iter_graph(model) if isinstance(v, nnx.Param)}


def _like_params(model: Any, values: Callable[[Any], Any]) -> Any:
    """A tree like `nnx.state(model, nnx.Param)` of `values(variable)`."""
    nnx = flax("nnx")
    by_path = _nnx_params(model)
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    return nnx.from_flat_state({path: values(by_path[path]) for path in paths})


def capture_inputs(
    model: Any, *args: Any, max_samples: int | None = None, **kwargs: Any
) -> Any:
    """Inputs of every layer of a Flax NNX model, from one eager call.

    Args:
      model: an `nnx.Module`; put it into evaluation mode first (`model.eval()`), or
        dropout drops. A copy of it runs, with jit switched off; the model itself, its
        batch statistics and random streams stay as they are.
      *args: what the model is called with, arrays with a leading batch axis.
      max_samples: at most this many rows per layer, evenly spread; None: all.
      **kwargs: of the model.

    Returns:
      A tree like `nnx.state(model, nnx.Param)`: a float32 array (num_samples, n) for
      the kernel of each Linear, LinearGeneral (attention projections too), Einsum, Conv
      and Embed, None elsewhere; (layers, num_samples, n) for layers that `nnx.scan`
      stacks. A layer called several times has all its inputs.

    Raises:
      ImportError: without Flax.
      ValueError: for a layer that runs under vmap, remat or grad inside the model, a
        masked convolution, or tokens outside the embedding.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> layer = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    >>> capture_inputs(layer, jnp.ones((4, 3)))["kernel"].shape
    (4, 3)
    """
    nnx = flax("nnx")
    copy, samples = nnx.clone(model), Samples()
    # Transforms inside the model rebuild its layers: metadata follows, identity not.
    names = {id(v): "/".join(map(str, path)) for path, v in _nnx_params(copy).items()}
    whole = {}
    for variable in _nnx_params(copy).values():
        name = names[id(variable)]
        variable.set_metadata(**{_TAG: name})
        whole[name] = variable[...]
    stacks: dict[str, tuple[int, ...]] = {}

    def note(layer, x, einsum_str=None, *_, **__):
        found = _nnx_kernel(layer, type(layer).__name__, einsum_str)
        if found is None:
            return
        variable, kernel = found
        name = variable.get_metadata().get(_TAG)
        if name is None:
            raise ValueError(
                f"{type(layer).__name__} is no part of the model: it was made inside "
                "the call, or a function that holds it was."
            )
        full = whole[name]
        _layers.stacked_axes(kernel, full.shape, name)
        stacks[name] = full.shape[: full.ndim - len(kernel.shape)]
        samples.note(name, kernel, name, full, variable[...], x)

    kinds = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum, nnx.Conv, nnx.Embed)
    with _calls_noted(kinds, note), jax.disable_jit():
        copy(*args, **kwargs)

    def leaf(variable):
        name = names[id(variable)]
        return samples.collect(name, stacks.get(name, ()), max_samples)

    return _like_params(copy, leaf)


def kernel_axes(model: Any) -> Any:
    """Which axes of each kernel of a Flax NNX model meet the layer's input.

    Returns:
      A tree like `nnx.state(model, nnx.Param)` of `Axes` or None, from the layers'
      types rather than their names, for `empty_subspace(params, axes=...)`.

    Raises:
      ImportError: without Flax.
      ValueError: for layers stacked along another axis than the first.

    >>> from flax import nnx
    >>> kernel_axes(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))["kernel"]
    Axes(protected=(0,), batch=())
    """
    axes: dict[int, Axes | None] = {}
    for path, layer in flax("nnx").iter_graph(model):
        name = "/".join(map(str, path)) or type(layer).__name__
        found = _nnx_kernel(layer, name)
        if found is not None:
            variable, kernel = found
            shape = variable.shape
            axes[id(variable)] = _layers.stacked_axes(kernel, shape, name)
    return _like_params(model, lambda variable: axes.get(id(variable)))
