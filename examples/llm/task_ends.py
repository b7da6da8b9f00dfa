"""What methods do between two tasks.

    (learner, setting, run, rows, key) -> run

`rows` are some of the finished task's training rows, or general text before the first
task, or rows of the new task where a function starts it. They run between two steps,
most of them eagerly.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import adamr
from adamr import lora
from examples.llm import measures
from examples.llm.data import spread_rows
from examples.llm.learner import Learner, inputs_of
from examples.llm.placement import kept, places_of
from examples.llm.tokens import Encoded, take

__all__ = [
    "Run",
    "Setting",
    "a_from_inputs",
    "choose_a",
    "choose_a_by_gradient",
    "consolidate",
    "consolidate_si",
    "decompose",
    "grow",
    "grow_and_consolidate_si",
    "merge_and_redraw",
    "not_kernels",
    "start_block",
    "start_task",
]

GRADIENT_ROWS = 16  # rows of a new task whose gradient KeepLoRA looks at
FISHER_ROWS = 32  # rows from which a Fisher information is estimated
EMBEDDING = "embedder/"  # in all models of Tunix
KEEP = 0.5  # share of a kernel's singular directions that OSFT protects


class Run(NamedTuple):
    """What changes while a stream is learned: parameters and optimizer state."""

    trained: Any
    base: Any
    opt_state: Any


class Setting(NamedTuple):
    """What the command line says about protection.

    Attributes:
      threshold: share of the energy of a task's layer inputs that is protected.
      capacity: most directions per kernel; None: the fan-in.
      normalize: whether every input counts alike, whatever its length.
      captured: rows of a task whose inputs are looked at.
      rank: of a low-rank pair; of one block where finished pairs stay.
      skip: tokens at the start of each row whose inputs do not count.
    """

    threshold: float
    capacity: int | None
    normalize: bool
    captured: int
    rank: int
    skip: int = 0


def _inputs(learner: Learner, setting: Setting, run: Run, rows: Encoded) -> Any:
    return inputs_of(
        learner,
        run.trained,
        run.base,
        rows,
        jax.eval_shape(adamr.get_subspace, run.opt_state),
        normalize=setting.normalize,
        skip=setting.skip,
    )


def start_task(learner, setting, run, rows, key, *, threshold=None):
    """Pairs are merged, their inputs protected, new pairs drawn outside of those."""
    return _on_mesh(
        merge_and_redraw,
        learner,
        run,
        _inputs(learner, setting, run, rows),
        key,
        scaling=learner.scaling,
        threshold=setting.threshold if threshold is None else threshold,
    )


def _on_mesh(program, learner, run, *arguments, **options):
    """On a mesh one program, in float32; else eagerly, in float64 on the host."""
    places = places_of(run, learner.model.mesh)
    call = program.__wrapped__ if places is None else program
    return call(run, *arguments, places=places, **options)


@functools.partial(jax.jit, static_argnames=("scaling", "threshold", "places"))
def merge_and_redraw(run, inputs, key, *, scaling, threshold, places):
    base, pairs, opt_state = lora.start_task(
        run.base,
        run.trained,
        run.opt_state,
        inputs,
        key,
        scaling=scaling,
        threshold=threshold,
    )
    return kept(Run(pairs, base, opt_state), places)


def choose_a(learner, setting, run, rows, key):
    """A from the new task's inputs outside of those of old tasks."""
    del key
    inputs = _inputs(learner, setting, run, rows)
    return _on_mesh(a_from_inputs, learner, run, inputs)


@functools.partial(jax.jit, static_argnames="places")
def a_from_inputs(run, inputs, *, places):
    pairs = lora.inflora(run.trained, run.opt_state, inputs)
    return kept(run._replace(trained=pairs), places)


def choose_a_by_gradient(learner, setting, run, rows, key):
    """A from the gradient of the kernels on the new task, outside of old inputs."""
    del setting, key
    tokens, answer = take(spread_rows(rows, GRADIENT_ROWS), slice(None))
    gradient = _kernel_gradient(learner.forward, run.trained, run.base, tokens, answer)
    pairs = lora.keeplora(run.base, run.trained, run.opt_state, gradient)
    return run._replace(trained=pairs)


@functools.partial(jax.jit, static_argnames="forward")
def _kernel_gradient(forward, pairs, base, tokens, answer):
    def loss(base):
        return measures.answer_loss(forward(pairs, base, tokens), tokens, answer)

    return jax.grad(loss)(base)


def start_block(learner, setting, run, rows, key):
    """The next block of the pairs; nothing is protected except by O-LoRA's penalty."""
    del learner, setting, rows
    return run._replace(
        **dict(
            zip(
                ("trained", "opt_state"),
                lora.start_block(run.trained, run.opt_state, None, key),
                strict=True,
            )
        )
    )


def grow(learner, setting, run, rows, key):
    """The inputs of the finished task are protected."""
    del key
    inputs = _inputs(learner, setting, run, rows)
    state = adamr.protect_inputs(run.opt_state, inputs, threshold=setting.threshold)
    return run._replace(opt_state=state)


def decompose(learner, setting, run, rows, key):
    """The top singular directions of the weights as they are now are protected."""
    del setting, rows, key
    sides = kernel_sides(learner, run.trained)
    return run._replace(opt_state=adamr.set_subspace(run.opt_state, sides))


def kernel_sides(learner: Learner, params: Any) -> tuple[adamr.Subspace, ...]:
    """OSFT's protected directions of every kernel: on its fan-in, on its outputs."""
    axes = adamr.contracted_axes(*learner.traced())
    others = not_kernels(params, axes)
    return adamr.weight_subspaces(params, axes, keep=KEEP, unprotected=others)


def not_kernels(params: Any, axes: Any) -> tuple[str, ...]:
    """Names of leaves that no method protects: norms, biases and the embedding.

    An embedding that is not also the head has one input per word. To protect the words
    of an old task would be to freeze their rows.
    """
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    names = [jax.tree_util.keystr(p, simple=True, separator="/") for p in paths]
    embedding = [name for name in names if name.startswith(EMBEDDING)]
    return (*adamr.capture.unread_leaves(axes), *embedding)


def consolidate(learner, setting, run, rows, key):
    """A sampled Fisher information of the answers."""
    del setting
    tokens, answer = take(spread_rows(rows, FISHER_ROWS), slice(None))
    fisher = _fisher(learner.forward, run.trained, run.base, tokens, answer, key)
    state = adamr.consolidate(run.opt_state, run.trained, fisher)
    return run._replace(opt_state=state)


@functools.partial(jax.jit, static_argnames="forward")
def _fisher(forward, trained, base, tokens, answer, key):
    def logits(trained, row):
        tokens, answer = row
        found = forward(trained, base, tokens[None])[0, :-1]
        # A constant in place of logits that the loss does not see has no gradient.
        return jnp.where(answer[1:, None], found, 0.0)

    return adamr.fisher_information(
        logits, trained, (tokens, answer), kind="sampled", key=key, chunk_size=2
    )


def consolidate_si(learner, setting, run, rows, key):
    del learner, setting, rows, key
    return run._replace(opt_state=adamr.consolidate_si(run.opt_state, run.trained))


def grow_and_consolidate_si(learner, setting, run, rows, key):
    run = grow(learner, setting, run, rows, key)
    return consolidate_si(learner, setting, run, rows, key)
