"""The networks of the interventions in the terms of the shared loop."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

import adamr
from examples.harness.problem import Data, Problem
from examples.harness.setting import kernel_axes
from examples.lm.model import Preset, Transformer
from examples.vision.models import MLP

__all__ = ["language_problem", "mlp_problem"]

CAPTURED = 4096  # layer inputs per kernel from which a boundary's basis is found


def _problem(make: Callable[[Any], nnx.Module], inputs: Any) -> tuple[Problem, Any]:
    """The loop's view of a network, and the `Axes` of its kernels."""
    graph, params = nnx.split(make(0), nnx.Param)

    def logits(params, x):
        return nnx.merge(graph, params)(x)

    made = Problem(
        init=lambda key: nnx.state(make(key), nnx.Param),
        logits=logits,
        batch=lambda data, at: Data(data.inputs[at], data.labels[at], data.classes),
        capture=lambda params, x: adamr.layer_inputs(
            logits, params, x, kind="rows", max_rows=CAPTURED
        ),
    )
    return made, kernel_axes(logits, params, inputs)


@functools.cache
def mlp_problem(
    inputs: int, outputs: int, hidden: tuple[int, ...]
) -> tuple[Problem, Any]:
    return _problem(
        lambda key: MLP([inputs], outputs, nnx.Rngs(key), hidden),
        jax.ShapeDtypeStruct((1, inputs), np.float32),
    )


@functools.cache
def language_problem(preset: Preset) -> tuple[Problem, Any]:
    return _problem(
        lambda key: Transformer(preset, nnx.Rngs(key)),
        jax.ShapeDtypeStruct((1, preset.context), np.int32),
    )
