"""The networks of the interventions in the terms of the shared loop."""

import functools
from collections.abc import Callable
from typing import Any

from flax import nnx

from adamr import capture
from examples.harness.problem import Data, Problem
from examples.lm.model import Preset, Transformer
from examples.vision.models import MLP

__all__ = ["language_problem", "mlp_problem"]

CAPTURED = 4096  # layer inputs per kernel from which a boundary's basis is found


def _problem(make: Callable[[Any], nnx.Module]) -> tuple[Problem, Any]:
    """The loop's view of a network, and the `Axes` of its kernels."""
    model = make(0)
    graph = nnx.graphdef(model)
    made = Problem(
        init=lambda key: nnx.state(make(key), nnx.Param),
        logits=lambda params, x: nnx.merge(graph, params)(x),
        batch=lambda data, at: Data(data.inputs[at], data.labels[at], data.classes),
        capture=lambda params, x: capture.capture_inputs(
            nnx.merge(graph, params), x, max_samples=CAPTURED
        ),
    )
    return made, capture.kernel_axes(model)


@functools.cache
def mlp_problem(
    inputs: int, outputs: int, hidden: tuple[int, ...]
) -> tuple[Problem, Any]:
    return _problem(lambda key: MLP([inputs], outputs, nnx.Rngs(key), hidden))


@functools.cache
def language_problem(preset: Preset) -> tuple[Problem, Any]:
    return _problem(lambda key: Transformer(preset, nnx.Rngs(key)))
