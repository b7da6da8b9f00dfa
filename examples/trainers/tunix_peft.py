"""Low-rank pairs in Tunix's `PeftTrainer`: task boundaries in its hooks.

    python -m examples.trainers.tunix_peft

A random Llama of two layers learns prose, as a stand-in for a pretrained model. Then
its low-rank pairs, from Qwix, learn code and after that tables, with plain Adam and
protected. What protection adds is all between `protected` and `Boundaries`.

Finished pairs stay beside the kernels (`lora.start_block`) and are not merged into
them: Tunix's checkpoints hold the pairs and the optimizer's state and nothing else, so
a merge would be lost with the process. The model is made with tasks × r columns.
"""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding
from tunix.sft.hooks import TrainingHooks
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig

import adamr
from examples.llm.models import logits, with_lora
from examples.llm.tiny import tiny
from examples.trainers.pretrain import pretrain
from examples.trainers.text import CONTEXT, read_text, show

TASKS, RANK, RATE = 2, 4, 3e-3


def loss(model: nnx.Module, windows: jax.Array) -> jax.Array:
    cost = optax.softmax_cross_entropy_with_integer_labels
    return cost(logits(model, windows[:, :-1]), windows[:, 1:]).mean()


def forward(pairs: nnx.State, rest: nnx.State, graph: nnx.GraphDef, tokens: jax.Array):
    return logits(nnx.merge(graph, pairs, rest), tokens)


def _halves_a(pairs: nnx.State) -> list[jax.Array]:
    named = jax.tree_util.tree_leaves_with_path(pairs)
    return [x for path, x in named if "_lora_a" in jax.tree_util.keystr(path)]


def protected(model: nnx.Module, rate: float = RATE) -> optax.GradientTransformation:
    """1. An optimizer of the pairs that has room for what it will protect.

    The pairs become float32: narrower ones are rounded back into the protected space.
    """
    nnx.update(model, adamr.lora.masters(nnx.state(model, nnx.LoRAParam)))
    graph, pairs, rest = nnx.split(model, nnx.LoRAParam, ...)
    columns = {a.shape[-1] for a in _halves_a(pairs)}
    if columns != {TASKS * RANK}:
        raise ValueError(
            f"the pairs have {sorted(columns)} columns, expected TASKS * RANK = "
            f"{TASKS * RANK}: later tasks would have none to train. Make the model "
            "with as many, and multiply alpha by TASKS."
        )
    one = jnp.zeros((1, CONTEXT), jnp.int32)
    axes = adamr.lora.axes(forward, pairs, rest, graph, one)
    subspace = adamr.empty_subspace(pairs, axes=axes)
    return adamr.lora.train_block(adamr.gpm(rate, subspace), RANK)


@partial(jax.jit, static_argnums=0)
def boundary(graph, pairs, rest, opt_state, tokens, mask, key):
    """2. What the layers see in the finished task.  3. It stays as it is from here."""
    subspace = adamr.get_subspace(opt_state)
    inputs = adamr.layer_inputs(
        forward, pairs, rest, graph, tokens, leaves=subspace, mask=mask
    )
    return adamr.lora.start_block(pairs, opt_state, inputs, key)


def trained(trainer: PeftTrainer) -> tuple[nnx.State, Any]:
    return nnx.state(trainer.model, nnx.LoRAParam), trainer.optimizer.opt_state


def put(trainer: PeftTrainer, values: Any, where: Any) -> None:
    """Pairs and state get these values, at these places."""
    arrays, structure = jax.tree.flatten(values)
    placed = jax.device_put(arrays, where)
    pairs, state = jax.tree.unflatten(structure, placed)
    nnx.update(trainer.model, pairs)
    nnx.update(trainer.optimizer.opt_state, nnx.state(state))


def end_task(trainer: PeftTrainer, tokens: np.ndarray, mask: np.ndarray) -> None:
    """New values where the old ones lay, so that the next step does not recompile."""
    graph, pairs, rest = nnx.split(trainer.model, nnx.LoRAParam, ...)
    state, key = trainer.optimizer.opt_state, jax.random.key(trainer.train_steps)
    where = [x.sharding for x in jax.tree.leaves((pairs, state))]
    put(trainer, boundary(graph, pairs, rest, state, tokens, mask, key), where)


def places(trainer: PeftTrainer) -> list[Any]:
    """Where pairs and state belong. On a mesh, Tunix copies bases and v to all devices;
    they belong beside their pairs."""
    pairs, state = trained(trainer)
    where = [x.sharding for x in jax.tree.leaves(pairs)]
    if all(isinstance(sharding, NamedSharding) for sharding in where):
        state = adamr.state_shardings(trainer.optimizer.tx, pairs)
        return where + jax.tree.leaves(state)
    return where + [x.sharding for x in jax.tree.leaves(state)]


class Boundaries(TrainingHooks):
    """Ends a task before the step that follows its last one.

    `on_train_step_end` would be too late: Tunix calls it one step behind.

    Args:
      tokens: number of steps -> tokens (batch, time) of the task that ends there, and a
        mask of the same shape that is false at padding; at 0 of text that the
        pretrained model should keep.
    """

    def __init__(self, tokens: dict[int, tuple[np.ndarray, np.ndarray]]):
        if sum(steps > 0 for steps in tokens) >= TASKS:
            raise ValueError(
                f"tokens ends tasks after {sorted(tokens)} steps, expected fewer than "
                f"TASKS = {TASKS} after the first step: the pairs have no block left."
            )
        self.tokens, self.losses = tokens, {}

    def on_train_start(self, trainer: PeftTrainer) -> None:
        self.where = places(trainer)

    def on_train_step_start(self, trainer: PeftTrainer) -> None:
        # A compiled step may return some elsewhere, and a resumed run would not.
        put(trainer, trained(trainer), self.where)
        steps = trainer.train_steps
        group = trainer.config.get_with_default("gradient_accumulation_steps", 1)
        if steps in self.tokens and trainer.iter_steps == steps * group:
            end_task(trainer, *self.tokens[steps])

    def on_eval_step_end(self, trainer: PeftTrainer, eval_loss: Any) -> None:
        self.losses[trainer.train_steps] = float(eval_loss)

    def _nothing(self, *args: Any) -> None:
        pass

    on_train_end = on_train_step_end = on_eval_step_start = _nothing


def main(steps: int = 150) -> dict[str, tuple[float, float, float]]:
    general, old, new = read_text()
    with tempfile.TemporaryDirectory() as folder:
        base = tiny(Path(folder), hidden_size=64, intermediate_size=128)
    pretrain(base.module, loss, general, 2 * steps)
    batches = [*old.batches(steps), *new.batches(steps)]
    tokens, rows = old.batches(1, size=128)[0, :, :-1], {}
    ended = {steps: (tokens, np.ones(tokens.shape, bool))}
    config = TrainingConfig(eval_every_n_steps=steps, max_steps=2 * steps)
    for name in ("Adam", "protected"):
        model = with_lora(base, TASKS * RANK, alpha=TASKS * RANK).module
        kept = name == "protected"
        optimizer = protected(model) if kept else optax.adam(RATE)
        trainer = PeftTrainer(model, optimizer, config).with_loss_fn(loss)
        hooks = Boundaries(ended if kept else {})
        trainer.with_training_hooks(hooks)
        measured = [{"windows": old.held_out}]
        trainer.train([{"windows": batch} for batch in batches], measured)
        learned = float(nnx.jit(loss)(model, new.held_out))
        rows[name] = hooks.losses[steps], hooks.losses[2 * steps], learned
    show(old, new, rows)
    return rows


if __name__ == "__main__":
    main()
