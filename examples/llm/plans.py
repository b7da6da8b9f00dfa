"""From the options to what a method needs: model, tasks as arrays, optimizer."""

import functools
import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from examples.harness import cli, meshes
from examples.harness.example import UsageError
from examples.llm import runs
from examples.llm.answers import answerer, check
from examples.llm.data import Part, Stream, prepare
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

__all__ = [
    "Loaded",
    "identity",
    "learner_of",
    "load_all",
    "mesh_of",
    "planner",
    "setting_of",
]

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
      steps: of each task.
    """

    model: Model
    encoder: Encoder
    tasks: Tasks
    context: int
    stream: Stream
    tuning: Stream
    steps: tuple[int, ...]


def _context(config: Config, tasks: Tasks, model: Model) -> int:
    text = all(task.kind == "text" for task in tasks.tasks)
    asked = config.context or (TEXT_CONTEXT if text else ROWS_CONTEXT)
    if asked < 2:
        raise UsageError(f"--context: got {asked} tokens, expected at least 2.")
    if asked > model.context:
        raise UsageError(
            f"--context: got {asked} tokens, expected at most the {model.context} that "
            f"{model.folder.name} was made for."
        )
    return asked


def mesh_of(config: Config) -> Mesh | None:
    """The mesh that --mesh names, checked against devices and batch."""
    if config.mesh is None:
        return None
    mesh = meshes.parse_mesh(config.mesh, jax.devices())
    meshes.check_batch(config.batch, mesh, "rows")
    return mesh


def _steps(config: Config, part: Part) -> int:
    if not config.epochs:
        return config.steps
    if part.task.epochs is None:
        raise UsageError(
            f"--epochs: no number of epochs is known for {part.task.name}, expected "
            "tasks of TRACE: give --steps instead."
        )
    return -(-part.task.epochs * len(part.train.tokens) // config.batch)


def _check_answers(
    config: Config, model: Model, encoder: Encoder, stream: Stream, say: Say
) -> None:
    """What cannot be generated or scored is found before anything is trained."""
    answered = [part for part in stream.parts if part.prompts]
    if answered and config.new_tokens >= model.context:
        raise UsageError(
            f"--new-tokens: got {config.new_tokens}, expected fewer than the "
            f"{model.context} that {model.folder.name} was made for."
        )
    for part in answered:
        if told := check(model, encoder, config.new_tokens, part):
            say(told)


def load_all(config: Config, say: Say) -> Loaded:
    """Reads the tasks and the model, and says what a user should know of them.

    Raises:
      UsageError, DataError: for what could not be learned, answered or scored.
    """
    say = functools.cache(say)  # no line twice
    names = None if config.tasks is None else cli.listed(config.tasks)
    tasks = load_tasks(config.data, names)
    for note in tasks.notes:
        say(note)
    mesh = mesh_of(config)
    folder = model_folder(config.model, say)
    model = load(folder, jnp.dtype(config.dtype), mesh)
    end = model.ends[0] if model.ends else None
    encoder = encoder_for(read_tokenizer(folder), model.vocabulary, end)
    sizes = {"context": _context(config, tasks, model), "scored": config.scored}
    first = tasks._replace(tasks=tasks.tasks[: runs.TUNING_TASKS])
    stream = prepare(tasks, encoder, generated=config.generated, say=say, **sizes)
    _check_answers(config, model, encoder, stream, say)
    told = {"say": say} if config.lr_grid else {}  # otherwise nothing is tuned
    tuning = prepare(first, encoder, held_out="valid", **told, **sizes)
    return Loaded(
        model,
        encoder,
        tasks,
        sizes["context"],
        stream,
        tuning,
        tuple(_steps(config, part) for part in stream.parts),
    )


def identity(loaded: Loaded, config: Config, name: str) -> dict[str, Any]:
    """What a run depends on besides its numbers."""
    tasks = (*loaded.tasks.tasks, loaded.tasks.general)
    content = repr([(t.name, t.train, t.valid, t.test) for t in tasks])
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


def setting_of(config: Config) -> Setting:
    return Setting(
        config.threshold, config.capacity, NORMALIZE, config.captured, config.lora_rank
    )


def learner_of(model: Model, trains: str, rank: int, tasks: int) -> Learner:
    """What a method trains of a model: see `Method.trains`."""
    if trains == "all":
        return full_learner(model)
    rank *= tasks if trains == "blocks" else 1
    return lora_learner(model, rank, ALPHA * rank)


def planner(loaded: Loaded, config: Config) -> Callable[..., Plan]:
    """`plan(name of a method, tuning=False)`; methods share programs where they can."""
    setting = setting_of(config)
    sizes = Sizes(loaded.steps, config.batch, config.general, config.memory)

    @functools.lru_cache(maxsize=1)  # another kind of learner frees the last one
    def learner(trains: str) -> Learner:
        tasks = len(loaded.stream.parts)
        return learner_of(loaded.model, trains, config.lora_rank, tasks)

    @functools.lru_cache(maxsize=1)  # its step is compiled once for all its runs
    def built(name: str) -> tuple[Learner, Callable[..., Any]]:
        method = METHODS[name]
        own = learner(method.trains)
        return own, lambda rate, k: method.build(rate, k, own, setting)

    def plan(name: str, tuning: bool = False) -> Plan:
        own, build = built(name)
        stream = loaded.tuning if tuning else loaded.stream
        return Plan(
            own,
            METHODS[name],
            setting,
            sizes._replace(steps=loaded.steps[: len(stream.parts)]),
            stream,
            base_logits(own, stream.general.test),
            answerer(own, loaded.encoder, config.new_tokens),
            build,
        )

    return plan
