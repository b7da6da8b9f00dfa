"""A stream of images and a network, in the terms of the shared loop."""

import functools
from typing import Any

import jax
import numpy as np
from flax import nnx

from adamr import capture
from examples import streams
from examples.loop import Data, Feed, Problem
from examples.vision.models import MODELS, LinenMLP

__all__ = ["feed", "problem"]


@functools.cache
def problem(model: str, shape: tuple[int, ...], outputs: int) -> tuple[Problem, Any]:
    """The loop's view of a network, and the `Axes` of its kernels."""
    if model == "linen_mlp":
        return _linen(shape, outputs)

    def make(key):
        return MODELS[model](shape, outputs, nnx.Rngs(key))

    graph = nnx.graphdef(make(0))
    return (
        Problem(
            init=lambda key: nnx.state(make(key), nnx.Param),
            logits=lambda params, x: nnx.merge(graph, params)(x),
            batch=_batch,
            capture=lambda params, x: capture.capture_inputs(
                nnx.merge(graph, params), x
            ),
        ),
        capture.kernel_axes(make(0)),
    )


def _linen(shape, outputs):
    module, one = LinenMLP(outputs), np.zeros((1, *shape), np.float32)

    def init(key):
        return module.init(key, one)["params"]

    made = Problem(
        init=init,
        logits=lambda params, x: module.apply({"params": params}, x),
        batch=_batch,
        capture=lambda params, x: capture.capture_linen_inputs(
            module, {"params": params}, x
        ),
    )
    variables = {"params": init(jax.random.key(0))}
    return made, capture.linen_kernel_axes(module, variables, one)


def _batch(data: Data, index: jax.Array) -> Data:
    return Data(data.inputs[index], data.labels[index], data.classes)


def feed(stream: streams.Stream, batch: int) -> Feed:
    """The stream as the loop takes it: rows of a task's arrays, shuffled by epochs."""

    def data(task: int) -> Data:
        part = streams.task(stream, task).train
        return Data(part.x, part.y, streams.output_mask(stream, task, task))

    def samples(task: int) -> Data:
        whole = data(task)
        rows = np.flatnonzero(stream.train.weight[task])
        return Data(whole.inputs[rows], whole.labels[rows], whole.classes)

    def batches(task, seed, first, steps):
        part, rng = (
            streams.task(stream, task).train,
            np.random.default_rng([seed, task]),
        )
        return streams.batch_indices(part, first + steps, batch, rng)[first:]

    tasks = range(len(stream.task_names))
    return Feed(
        names=list(stream.task_names),
        batches=batches,
        train=data,
        samples=samples,
        test=Data(stream.test.x, stream.test.y, stream.class_mask),
        weight=stream.test.weight,
        masks=lambda task: np.stack(
            [streams.output_mask(stream, task, other) for other in tasks]
        ),
    )
