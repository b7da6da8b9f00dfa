"""Layer inputs of Flax linen modules; `adamr.capture` says which layers and rows."""

from typing import Any

import jax

from adamr.capture import _layers
from adamr.capture._layers import Kernel, Samples, flax

__all__ = ["capture_linen_inputs", "linen_kernel_axes"]


def _kernel(layer: Any, name: str, options: dict) -> tuple[str, Kernel] | None:
    """(name of its leaf, `Kernel`) of a bound layer with a fan-in, else None."""
    nn = flax("linen")

    def shape(leaf):
        return nn.meta.unbox(layer.get_variable("params", leaf)).shape

    if isinstance(layer, nn.Embed):
        return "embedding", _layers.embed(shape("embedding"), name)
    if isinstance(layer, nn.Dense):
        return "kernel", _layers.dense(shape("kernel"), -1, 0)
    if isinstance(layer, nn.DenseGeneral):
        batch = layer.batch_dims
        count = 1 if isinstance(batch, int) else len(batch)
        return "kernel", _layers.dense(shape("kernel"), layer.axis, count)
    if isinstance(layer, nn.Conv):
        return "kernel", _layers.conv(shape("kernel"), layer, name)
    if isinstance(layer, nn.Einsum):
        equation = options.get("einsum_str") or layer.einsum_str
        return "kernel", _layers.einsum(shape("kernel"), equation, name)
    return None


def _leaves(params: Any) -> dict[tuple[str, ...], Any]:
    params = flax("linen").meta.unbox(params)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {tuple(key.key for key in path): leaf for path, leaf in leaves}


def _like_params(params: Any, values: dict[tuple[str, ...], Any]) -> Any:
    params = flax("linen").meta.unbox(params)
    return jax.tree_util.tree_map_with_path(
        lambda path, _: values.get(tuple(key.key for key in path)), params
    )


def _each_call(module: Any, variables: Any, args: Any, kwargs: Any, note: Any) -> Any:
    """`module.apply`, where `note(path, kernel, part, x)` sees every layer's call."""
    nn, known = flax("linen"), _leaves(variables["params"])

    def intercept(call, inputs, options, context):
        result = call(*inputs, **options)
        layer = context.module
        given = dict(zip(("inputs", "einsum_str"), inputs, strict=False)) | options
        if context.method_name == "__call__" and "inputs" in given:
            found = _kernel(layer, "/".join(layer.path), given)
            if found is not None and (*layer.path, found[0]) in known:
                leaf, kernel = found
                part = nn.meta.unbox(layer.get_variable("params", leaf))
                note((*layer.path, leaf), kernel, part, given["inputs"])
        return result

    with nn.intercept_methods(intercept):
        return module.apply(variables, *args, **kwargs)


def capture_linen_inputs(
    module: Any,
    variables: Any,
    *args: Any,
    max_samples: int | None = None,
    **kwargs: Any,
) -> Any:
    """Inputs of every layer of a Flax linen module, from one eager `module.apply`.

    Args:
      module: an `nn.Module`.
      variables: as for `module.apply`; must have `"params"`.
      *args: of the module.
      max_samples: at most this many rows per layer, evenly spread; None: all.
      **kwargs: of `module.apply`, such as `deterministic=True`.

    Returns:
      A tree like `variables["params"]`, as for `capture_inputs`: Dense, DenseGeneral
      (attention projections too), Einsum, Conv and Embed; with a leading axis for
      layers that `nn.scan` stacks.

    Raises:
      ImportError, ValueError: as for `capture_inputs`.

    >>> import jax.numpy as jnp
    >>> from flax import linen as nn
    >>> layer = nn.Dense(2)
    >>> variables = layer.init(jax.random.key(0), jnp.ones((4, 3)))
    >>> capture_linen_inputs(layer, variables, jnp.ones((4, 3)))["kernel"].shape
    (4, 3)
    """
    params, samples = variables["params"], Samples()
    whole, stacks = _leaves(params), {}

    def note(path, kernel, part, x):
        name, shape = "/".join(path), whole[path].shape
        _layers.stacked_axes(kernel, shape, name)
        stacks[path] = shape[: len(shape) - len(kernel.shape)]
        samples.note(path, kernel, name, whole[path], part, x)

    with jax.disable_jit():
        _each_call(module, variables, args, kwargs, note)
    return _like_params(
        params, {p: samples.collect(p, s, max_samples) for p, s in stacks.items()}
    )


def linen_kernel_axes(module: Any, variables: Any, *args: Any, **kwargs: Any) -> Any:
    """Which axes of each kernel of a Flax linen module meet the layer's input.

    Args:
      module, variables, *args, **kwargs: as for `capture_linen_inputs`; nothing is
        computed.

    Returns:
      A tree like `variables["params"]` of `Axes` or None (None, too, for a layer that
      the call does not reach), for `empty_subspace(params, axes=...)`.

    >>> import jax.numpy as jnp
    >>> from flax import linen as nn
    >>> layer = nn.Dense(2)
    >>> variables = layer.init(jax.random.key(0), jnp.ones((4, 3)))
    >>> linen_kernel_axes(layer, variables, jnp.ones((4, 3)))["kernel"]
    Axes(protected=(0,), batch=())
    """
    params, axes = variables["params"], {}
    whole = _leaves(params)

    def note(path, kernel, part, x):
        del part, x
        axes[path] = _layers.stacked_axes(kernel, whole[path].shape, "/".join(path))

    jax.eval_shape(lambda: _each_call(module, variables, args, kwargs, note))
    return _like_params(params, axes)
