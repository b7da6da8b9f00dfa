"""Pretrained language models in Tunix, with LoRA from Qwix, as functions of trees."""

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.typing
from flax import nnx

from examples.llm.errors import ModelError
from examples.llm.families import family_of, need
from examples.llm.folders import end_tokens, mixes_dtypes, read_config
from examples.llm.placement import placed, recomputed, split_rows, tunix_mesh
from examples.llm.rotary import replace_rotary
from examples.streams.folders import library

__all__ = [
    "ADAPTED",
    "Model",
    "Parts",
    "cast",
    "full_forward",
    "load",
    "load_shapes",
    "logits",
    "lora_forward",
    "merge",
    "split",
    "with_lora",
]

# The kernels of attention and MLP in Tunix's Llama and Qwen, then in its Gemma.
ADAPTED = (
    r".*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
    r"|q_einsum|kv_einsum|qkv_einsum|attn_vec_einsum)"
)
DTYPES = ("float32", "bfloat16", "float16")


class Model(NamedTuple):
    """A pretrained model.

    Attributes:
      module: Tunix's.
      config: Tunix's, with num_layers, num_kv_heads, head_dim, embed_dim.
      vocabulary: number of tokens.
      context: the most tokens that it was made for.
      ends: tokens that end a text.
      dtype: of the weights and the computation.
      folder: where it was read.
      mesh: that the weights are on, with the axes that Tunix names; None: one device.
    """

    module: nnx.Module
    config: Any
    vocabulary: int
    context: int
    ends: tuple[int, ...]
    dtype: jnp.dtype
    folder: Path
    mesh: jax.sharding.Mesh | None


class Parts(NamedTuple):
    """A module as static graph and trees of arrays; see `split`."""

    graph: nnx.GraphDef
    lora: nnx.State
    base: nnx.State
    rest: nnx.State


def load(
    folder: Path | str,
    dtype: jax.typing.DTypeLike = jnp.float32,
    mesh: jax.sharding.Mesh | None = None,
) -> Model:
    """A model from a folder of Hugging Face files.

    Args:
      folder: with config.json and *.safetensors.
      dtype: float32, bfloat16 or float16; the weights are cast to it.
      mesh: devices to place the weights on. See `placement`.

    Returns:
      The model with its rotary base, its scaling and its tied or own output layer.

    Raises:
      ModelError: for a folder that is no such model, names a model that is not known,
        or lacks weights that config.json announces; for another dtype; for a mesh that
        does not divide the weights.
    """
    folder, dtype, mesh = Path(folder), _usable(dtype), tunix_mesh(mesh)
    config = read_config(folder)
    family, sizes, rotary = _described(config, dtype, mesh)
    mixed = mixes_dtypes(folder, family.tensors(config))
    loader = importlib.import_module(f"tunix.models.{family.package}.{family.loader}")
    try:
        module = loader.create_model_from_safe_tensors(
            str(folder),
            sizes,
            mesh=mesh,
            dtype=dtype,
            # The fast way reads a file as if all of it had the dtype of its first part.
            mode="original" if mixed else "auto",
        )
    except ValueError as error:
        raise ModelError(
            f"{folder}: the weights cannot be placed ({error}), expected axes of the "
            "mesh whose sizes divide those of the model."
        ) from error
    return _finished(module, sizes, rotary, config, folder, dtype, mesh)


def load_shapes(
    config: Mapping[str, Any],
    folder: Path,
    dtype: jax.typing.DTypeLike = jnp.float32,
    mesh: jax.sharding.Mesh | None = None,
) -> Model:
    """The same model without weights: `jax.ShapeDtypeStruct`s, placed on the mesh.

    Args:
      config: as in config.json.
      folder: that the model is named by.
      dtype, mesh: as in `load`.

    Raises:
      ModelError: as `load`, for what can be read off config.json.
    """
    dtype, mesh = _usable(dtype), tunix_mesh(mesh)
    family, sizes, rotary = _described(config, dtype, mesh)
    package = importlib.import_module(f"tunix.models.{family.package}.model")
    kind = getattr(package, family.package.capitalize())
    module = nnx.eval_shape(lambda: kind(sizes, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(module)
    module = placed(nnx.merge(graph, cast(state, dtype)), mesh)
    return _finished(module, sizes, rotary, config, folder, dtype, mesh)


def _usable(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    library("tunix", "google-tunix", "for the models")
    dtype = jnp.dtype(dtype)
    if dtype not in DTYPES:
        raise ModelError(f"dtype: got {dtype}, expected one of {', '.join(DTYPES)}.")
    return dtype


def _described(config, dtype, mesh):
    """Tunix's family and sizes, and the rotary frequencies that it would not use."""
    family = family_of(config)
    sizes = family.config(config, dtype)
    rotary = family.rotary(config) if family.rotary is not None else None
    return family, sizes if mesh is None else recomputed(sizes), rotary


def _finished(module, sizes, rotary, config, folder, dtype, mesh) -> Model:
    if rotary is not None:
        replace_rotary(module, rotary)
    if mesh is not None:
        split_rows(module, mesh)
    return Model(
        module,
        sizes,
        vocabulary=config["vocab_size"],
        context=need(config, "max_position_embeddings"),
        ends=end_tokens(folder, config),
        dtype=dtype,
        folder=folder,
        mesh=mesh,
    )


def logits(module: nnx.Module, tokens: jax.Array) -> jax.Array:
    """The next token's logits at every position.

    A position sees itself and what is to its left, so padding on the right changes
    nothing but its own logits.

    Args:
      module: `Model.module`.
      tokens: integers (batch, time).

    Returns:
      (batch, time, vocabulary), float32.
    """
    batch, time = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(time), (batch, time))
    causal = jnp.tril(jnp.ones((time, time), bool))
    mask = jnp.broadcast_to(causal, (batch, time, time))
    return module(tokens, positions, None, mask)[0].astype(jnp.float32)


def with_lora(
    model: Model,
    rank: int = 8,
    alpha: float = 16.0,
    seed: int = 0,
    where: str = ADAPTED,
) -> Model:
    """The model with a low-rank pair beside each kernel: W + (alpha / rank) A B.

    Args:
      model: stays as it is.
      rank: columns of A, at least 1.
      alpha: the pair's weight is alpha / rank.
      seed: of A; B is zero, so the function is the same as before.
      where: regular expression of the modules' names.
    """
    qwix = library("qwix", "qwix", "for low-rank pairs")
    if rank < 1:
        raise ModelError(f"rank: got {rank}, expected at least 1.")

    def beside(module):
        provider = qwix.LoraProvider(module_path=where, rank=rank, alpha=alpha)
        one = jnp.zeros((1, 1), jnp.int32)
        return qwix.apply_lora_to_model(
            module, provider, one, one, None, jnp.ones((1, 1, 1), bool),
            rngs=nnx.Rngs(seed),
        )  # fmt: skip

    if _is_shapes(model.module):
        module = nnx.eval_shape(beside, model.module)
    else:
        module = beside(model.module)
    module = placed(module, model.mesh)
    if not nnx.state(module, nnx.LoRAParam):
        raise ModelError(f"where: no kernel of the model is in {where!r}.")
    return model._replace(module=module)


def _is_shapes(module: nnx.Module) -> bool:
    leaves = jax.tree.leaves(nnx.state(module, nnx.Param))
    return isinstance(leaves[0], jax.ShapeDtypeStruct)


def split(module: nnx.Module) -> Parts:
    """Static graph, low-rank pairs, other parameters, and what is no parameter.

    The pairs are float32 whatever the base: in bfloat16, in which Qwix makes them over
    such a base, their small steps are rounded away and leave the projected space.
    """
    graph, lora, base, rest = nnx.split(module, nnx.LoRAParam, nnx.Param, ...)
    return Parts(graph, cast(lora, jnp.float32), base, rest)


def cast(tree: Any, dtype: jax.typing.DTypeLike) -> Any:
    """Arrays or shapes with this dtype."""

    def leaf(x):
        shape = isinstance(x, jax.ShapeDtypeStruct)
        return x.update(dtype=dtype) if shape else x.astype(dtype)

    return jax.tree.map(leaf, tree)


def merge(
    parts: Parts, lora: nnx.State, base: nnx.State, dtype: jax.typing.DTypeLike
) -> nnx.Module:
    """The module with these arrays, computing in dtype; masters may be float32."""
    pairs, weights = cast(lora, dtype), cast(base, dtype)
    return nnx.merge(parts.graph, pairs, weights, parts.rest)


def lora_forward(
    parts: Parts, dtype: jax.typing.DTypeLike
) -> Callable[[nnx.State, nnx.State, jax.Array], jax.Array]:
    """`forward(lora, base, tokens)` -> logits, computed in dtype."""
    static = parts._replace(lora=None, base=None)  # keeps no arrays alive
    return lambda lora, base, tokens: logits(merge(static, lora, base, dtype), tokens)


def full_forward(
    parts: Parts, dtype: jax.typing.DTypeLike
) -> Callable[[nnx.State, jax.Array], jax.Array]:
    """`forward(params, tokens)` -> logits, computed in dtype.

    The parameters are like `base` of a model without low-rank pairs.
    """
    if jax.tree.leaves(parts.lora):
        raise ModelError("parts: found low-rank pairs, expected a model without them.")
    none, forward = parts.lora, lora_forward(parts, dtype)
    return lambda params, tokens: forward(none, params, tokens)
