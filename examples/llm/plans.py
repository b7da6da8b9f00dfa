"""From the options to what a method needs: model, tasks as arrays, optimizer."""

import functools
import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from examples.harness import cli
from examples.harness.example import UsageError
from examples.llm import runs
from examples.llm.answers import answerer
from examples.llm.data import Stream, prepare
from examples.llm.learner import Learner, full_learner, lora_learner
from examples.llm.methods import METHODS
from examples.llm.models import Model, load
from examples.llm.options import Config
from examples.llm.smollm2 import model_folder
from examples.llm.stream import Plan, Sizes, base_logits
from examples.llm.task_ends import Setting
from examples.llm.tasks import Tasks
from examples.llm.tasks import load as load_tasks
from examples.llm.tokens import Encoder, encoder_for, read_tokenizer

__all__ = ["Loaded", "identity", "load_all", "planner"]

TEXT_CONTEXT, ROWS_CONTEXT = 64, 96
# The first token of a text has activations so large that in some layers they alone
# would reach the threshold. Scaled to one length, all inputs count alike.
NORMALIZE = True
ALPHA = 2.0  # α / rank of a pair
Say = Callable[[str], None]


class Loaded(NamedTuple):
    """A model and its tasks.

    Attributes:
      model: pretrained.
      encoder: its tokenizer.
      tasks: as text.
      context: tokens of a row.
      stream: the tasks as arrays, with test rows.
      tuning: the first of them, with validation rows in place of test rows.
    """

    model: Model
    encoder: Encoder
    tasks: Tasks
    context: int
    stream: Stream
    tuning: Stream


def _context(config: Config, tasks: Tasks, model: Model) -> int:
    text = all(task.kind == "text" for task in tasks.tasks)
    asked = config.context or (TEXT_CONTEXT if text else ROWS_CONTEXT)
    if asked > model.context:
        raise UsageError(
            f"--context: got {asked} tokens, expected at most the {model.context} that "
            f"{model.folder.name} was made for."
        )
    return asked


def load_all(config: Config, say: Say) -> Loaded:
    """Reads the tasks and the model, and says what a user should know of them."""
    names = None if config.tasks is None else cli.listed(config.tasks)
    tasks = load_tasks(config.data, names)
    for note in tasks.notes:
        say(note)
    folder = model_folder(config.model, say)
    model = load(folder, jnp.dtype(config.dtype))
    end = model.ends[0] if model.ends else None
    encoder = encoder_for(read_tokenizer(folder), model.vocabulary, end)
    sizes = {"context": _context(config, tasks, model), "scored": config.scored}
    first = tasks._replace(tasks=tasks.tasks[: runs.TUNING_TASKS])
    return Loaded(
        model,
        encoder,
        tasks,
        sizes["context"],
        prepare(tasks, encoder, generated=config.generated, say=say, **sizes),
        prepare(first, encoder, held_out="valid", **sizes),
    )


def identity(loaded: Loaded, config: Config, name: str) -> dict[str, Any]:
    """What a run depends on besides its numbers."""
    content = repr([(t.name, t.train, t.test) for t in loaded.tasks.tasks])
    return {
        "method": name,
        "model": str(loaded.model.folder),
        "dtype": config.dtype,
        "context": loaded.context,
        "scored": config.scored,
        "generated": config.generated,
        "new_tokens": config.new_tokens,
        "tasks": hashlib.sha256(content.encode()).hexdigest(),
    }


def planner(loaded: Loaded, config: Config) -> Callable[..., Plan]:
    """`plan(name of a method, tuning=False)`; methods share programs where they can."""
    setting = Setting(
        config.threshold, config.capacity, NORMALIZE, config.captured, config.lora_rank
    )
    sizes = Sizes(config.steps, config.batch, config.general, config.memory)

    @functools.lru_cache(maxsize=1)  # another kind of learner frees the last one
    def learner(trains: str) -> Learner:
        if trains == "all":
            return full_learner(loaded.model)
        blocks = len(loaded.stream.parts) if trains == "blocks" else 1
        rank = config.lora_rank * blocks
        return lora_learner(loaded.model, rank, ALPHA * rank)

    def plan(name: str, tuning: bool = False) -> Plan:
        method = METHODS[name]
        own = learner(method.trains)
        stream = loaded.tuning if tuning else loaded.stream

        def build(rate, coefficient):
            return method.build(rate, coefficient, own, setting)

        return Plan(
            own,
            method,
            setting,
            sizes,
            stream,
            base_logits(own, stream.general.test),
            answerer(own, loaded.encoder, config.new_tokens),
            build,
        )

    return plan
