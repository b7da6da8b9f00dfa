"""--dry-run: a method's programs compiled for a mesh, and the bytes of each device.

Shapes alone: nothing is fetched, read or allocated, so that a laptop can tell what a
pod would need.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import adamr
from examples.harness import cli, meshes
from examples.llm import plans, task_ends
from examples.llm.errors import ModelError
from examples.llm.folders import read_config
from examples.llm.learner import Learner, capture, portion
from examples.llm.methods import METHODS, Method
from examples.llm.models import load_shapes
from examples.llm.options import Config
from examples.llm.placement import Places, places_of
from examples.llm.stream import train_step
from examples.llm.task_ends import Run

__all__ = ["NAMED", "Part", "compile_all", "run"]

MB = 1e6
TASKS = 8  # of a stream, where --tasks does not name them: TRACE's
CONTEXT = 2048
LLAMA2 = {
    "model_type": "llama",
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "vocab_size": 32_000,
}
# What --model names without a folder.
NAMED = {
    "llama-2-7b": {
        **LLAMA2,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "llama-2-70b": {
        **LLAMA2,
        "hidden_size": 8192,
        "intermediate_size": 28_672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
# The order that needs the least memory, as backends of accelerators take it; machine
# code that nobody runs is not optimized.
COMPILER = {
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    "xla_backend_optimization_level": 0,
    "xla_disable_hlo_passes": "cpu-all-reduce-combiner",
}


class Part(NamedTuple):
    """What each device holds, or a program needs on it besides its arguments.

    Attributes:
      name: what it is about.
      bytes: by what they are for.
      seconds: of compiling it; 0 for what is there all the time.
    """

    name: str
    bytes: dict[str, int]
    seconds: float


def _config_of(model: Path | None) -> dict[str, Any]:
    if model is None:
        raise ModelError(
            "--dry-run: got no --model, expected a folder with config.json, or one of "
            f"{', '.join(NAMED)}."
        )
    named = NAMED.get(str(model))
    return read_config(model) if named is None else named


def _rows(target: "_Target", count: int) -> tuple[Any, Any]:
    """Token ids and a mask."""
    where = NamedSharding(target.learner.model.mesh, P(meshes.BATCH))

    def array(dtype):
        return jax.ShapeDtypeStruct((count, target.length), dtype, sharding=where)

    return array(jnp.int32), array(bool)


def _compiled(name: str, result: str, lowered: Any) -> tuple[Part, Any]:
    """What it needs besides its arguments; its result as shapes with placements."""
    began = time.perf_counter()
    compiled = lowered.compile(compiler_options=COMPILER)
    seconds = time.perf_counter() - began
    found = compiled.memory_analysis()
    needs = {
        result: found.output_size_in_bytes - found.alias_size_in_bytes,
        "temporary": found.temp_size_in_bytes,
    }
    placed = meshes.structs(lowered.out_info, compiled.output_shardings)
    return Part(name, {k: v for k, v in needs.items() if v > 0}, seconds), placed


def _subspace(state: Any) -> Any:
    """`get_subspace` of shapes; None if the method has none."""
    leaves, treedef = jax.tree.flatten(state)
    numbered = jax.tree.unflatten(treedef, np.arange(len(leaves)))
    try:
        found = adamr.get_subspace(numbered)
    except ValueError:
        return None
    return jax.tree.map(lambda i: leaves[int(i)], found)


def _bases(state: Any) -> list[adamr.Subspace]:
    """All of them: OSFT has two, one for each side of a kernel."""

    def is_basis(x: Any) -> bool:
        return isinstance(x, adamr.Subspace)

    return [x for x in jax.tree.leaves(state, is_leaf=is_basis) if is_basis(x)]


class _Target(NamedTuple):
    """What is compiled: shapes with placements."""

    config: Config
    method: Method
    learner: Learner
    build: Callable[..., Any]
    run: Run
    length: int

    def places(self) -> tuple[Places | None, Places | None]:
        """Of what a step and a boundary change."""
        run, mesh = self.run, self.learner.model.mesh
        return places_of((run.trained, run.opt_state), mesh), places_of(run, mesh)


def _target(config: Config, name: str, coefficient: float) -> _Target:
    mesh = plans.mesh_of(config)
    model = load_shapes(_config_of(config.model), config.model, config.dtype, mesh)
    method, setting = METHODS[name], plans.setting_of(config)
    tasks = len(cli.listed(config.tasks)) if config.tasks else TASKS
    learner = plans.learner_of(model, method.trains, config.lora_rank, tasks)

    def build(rate, coefficient):
        return method.build(rate, coefficient, learner, setting)

    tx = build(method.learning_rate, coefficient)
    state = meshes.structs(
        jax.eval_shape(tx.init, learner.trained),
        adamr.state_shardings(tx, learner.trained),
    )
    run = Run(learner.trained, learner.base, state)
    length = config.context or min(CONTEXT, model.context)
    return _Target(config, method, learner, build, run, length)


def _held(target: _Target) -> Part:
    run = target.run
    bases = meshes.bytes_per_device(_bases(run.opt_state))
    found = {
        "frozen base": meshes.bytes_per_device(run.base),
        "trained": meshes.bytes_per_device(run.trained),
        "bases U": bases,
        "moments and the rest": meshes.bytes_per_device(run.opt_state) - bases,
        "batch": meshes.bytes_per_device(_rows(target, target.config.batch)),
    }
    return Part("held all the time", {k: v for k, v in found.items() if v}, 0.0)


def _step(target: _Target, coefficient: float) -> Part:
    method, run = target.method, target.run
    batch = _rows(target, target.config.batch)
    lowered = train_step.lower(
        target.learner.forward, method.penalty, target.build, target.places()[0],
        method.learning_rate, coefficient, *run, batch,
        batch if method.replays else None,
    )  # fmt: skip
    return _compiled("and for a training step", "loss", lowered)[0]


def _capture(target: _Target, rows: int) -> tuple[Part, Any]:
    run, learner = target.run, target.learner
    lowered = capture.lower(
        learner.forward, plans.NORMALIZE, learner.model.mesh, _subspace(run.opt_state),
        run.trained, run.base, *_rows(target, rows),
    )  # fmt: skip
    return _compiled(
        f"and for the inputs of {rows} rows at a boundary", "Gram matrices", lowered
    )


def _choice(target: _Target, inputs: Any) -> Part:
    run, (_, places) = target.run, target.places()
    lowered = task_ends.a_from_inputs.lower(run, inputs, places=places)
    name = "and to choose A from the new task's inputs"
    return _with_inputs(_compiled(name, "new values", lowered)[0], inputs)


def _with_inputs(part: Part, inputs: Any) -> Part:
    gram = {"Gram matrices": meshes.bytes_per_device(inputs)}
    return part._replace(bytes=gram | part.bytes)


def _merge(target: _Target, inputs: Any) -> Part:
    lowered = task_ends.merge_and_redraw.lower(
        target.run,
        inputs,
        jax.eval_shape(lambda: jax.random.key(0)),
        scaling=target.learner.scaling,
        threshold=target.config.threshold,
        places=target.places()[1],
    )
    part, _ = _compiled("and to merge, grow and redraw", "new values", lowered)
    return _with_inputs(part, inputs)


def compile_all(config: Config, name: str, coefficient: float) -> Iterator[Part]:
    """What a run holds, then the step and the boundary of a method, as far as compiled.

    Args:
      config: of which the mesh, the model and sizes count.
      name: of the method.
      coefficient: as in training.
    """
    target = _target(config, name, coefficient)
    yield _held(target)
    yield _step(target, coefficient)
    start, end = target.method.start, target.method.end
    end = getattr(end, "func", end)
    if end in (task_ends.start_task, task_ends.grow):
        part, inputs = _capture(target, portion(target.learner.model.mesh))
        yield part
        if end is task_ends.start_task:
            yield _merge(target, inputs)
            end = None
        if start is task_ends.choose_a:
            yield _choice(target, inputs)
            start = None
    for function in (start, end):
        if function is not None:
            name = f"{function.__name__} between tasks is not one program"
            yield Part(name, {}, 0.0)


def run(config: Config, name: str, coefficient: float, say: Callable) -> None:
    """Compiles, and prints bytes per device as they are found."""
    config = dataclasses.replace(config, mesh=config.mesh or "data=1")
    meshes.simulate(math.prod(meshes.read_mesh(config.mesh).values()))
    length = config.context or f"{CONTEXT:,} or the model's most"
    say(
        f"{name}, {config.model}, {config.dtype}, {config.mesh}, batch {config.batch}, "
        f"context {length}: MB per device"
    )
    held = 0
    for part in compile_all(config, name, coefficient):
        took = f" (compiled in {part.seconds:.0f} s)" if part.seconds else ""
        say(f"{part.name}{took}")
        rows = {label: size for label, size in part.bytes.items() if size >= MB / 200}
        total = held + sum(part.bytes.values())
        for label, size in [*rows.items(), *([("in all", total)] if rows else [])]:
            say(f"  {label:<22}{size / MB:12,.2f}")
        held = held or total
