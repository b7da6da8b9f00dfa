"""A stream of images and a network, in the terms of the shared loop."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

import adamr
from examples import streams
from examples.harness.problem import Data, Feed, Problem
from examples.harness.setting import kernel_axes
from examples.vision.models import MODELS, LinenMLP

__all__ = ["feed", "problem", "union"]


@functools.cache
def problem(
    model: str, shape: tuple[int, ...], outputs: int, **options: Any
) -> tuple[Problem, Any]:
    """The loop's view of a network, and the `Axes` of its kernels."""
    if model == "linen_mlp":
        return _linen(shape, outputs)

    def make(key):
        return MODELS[model](shape, outputs, nnx.Rngs(key), **options)

    graph = nnx.graphdef(make(0))
    made = Problem(
        init=lambda key: nnx.state(make(key), nnx.Param),
        logits=lambda params, x: nnx.merge(graph, params)(x),
        batch=_batch,
        capture=_capture(lambda params, x: nnx.merge(graph, params)(x)),
        convolves=model != "mlp",
    )
    return made, _axes(made, shape)


def _linen(shape, outputs):
    module, one = LinenMLP(outputs), np.zeros((1, *shape), np.float32)

    def init(key):
        return module.init(key, one)["params"]

    def logits(params, x):
        return module.apply({"params": params}, x)

    made = Problem(init=init, logits=logits, batch=_batch, capture=_capture(logits))
    return made, _axes(made, shape)


def _capture(logits):
    return functools.partial(adamr.layer_inputs, logits, kind="rows")


def _axes(made: Problem, shape: tuple[int, ...]) -> Any:
    params = jax.eval_shape(made.init, jax.random.key(0))
    return kernel_axes(
        made.logits, params, jax.ShapeDtypeStruct((1, *shape), np.float32)
    )


def _batch(data: Data, index: jax.Array) -> Data:
    classes = data.classes if data.classes.ndim == 1 else data.classes[index]
    return Data(data.inputs[index], data.labels[index], classes)


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
        part = streams.task(stream, task).train
        rng = np.random.default_rng([seed, task])
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


def union(stream: streams.Stream, batch: int, tasks: Sequence[int]) -> Feed:
    """Some tasks' training images as one task, tested on the last one of them.

    Arrays hold all tasks for any union, so that one program serves them all.
    """
    last, n = tasks[-1], stream.train.weight.shape[1]
    every = range(len(stream.task_names))
    masks = [streams.output_mask(stream, last, task) for task in every]
    chosen = np.isin(every, tasks)
    flat = [x.reshape(-1, *x.shape[2:]) for x in stream.train]
    part = streams.Part(*flat)
    part = part._replace(weight=part.weight * np.repeat(chosen, n))
    data = Data(part.x, part.y, np.repeat(masks, n, axis=0))

    def batches(task, seed, first, steps):
        rng = np.random.default_rng([seed, *tasks])
        return streams.batch_indices(part, first + steps, batch, rng)[first:]

    own = slice(last, last + 1)
    return Feed(
        names=[" + ".join(stream.task_names[t] for t in tasks)],
        batches=batches,
        train=lambda task: data,
        samples=lambda task: data,
        test=Data(stream.test.x[own], stream.test.y[own], masks[last][None]),
        weight=stream.test.weight[own],
        masks=lambda task: masks[last][None],
    )
