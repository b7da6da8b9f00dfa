"""Pretrained models: low-rank pairs, and the singular directions of weights."""

import optax

import adamr
from benchmarks._pages.methods.method import RATE, Family, Method
from benchmarks._pages.methods.probes import (
    OUTSIDE,
    OUTSIDE_BOTH,
    RANK,
    subspace,
    weight_sides,
)

INTRO = """
These methods fine-tune a pretrained model on one task after the other. The first one
trains full kernels. The others train [low-rank pairs](../glossary.md#low-rank-pair) A·B
(LoRA) beside a frozen kernel W: with h = x W + x A B, an old input x has x A = 0 as
long as A is orthogonal to it, and then B may do what it likes. [Fine-tuning a
pretrained model](../pretrained.md) shows the whole procedure, and what it keeps of a
real model.

In the equations G is the gradient of a kernel, P and Q project onto its protected
inputs and outputs, and U spans the protected inputs. The recipe of all methods that
protect pairs is `adamr.gpm` on the pairs; its numbers are those of two A's with a
fan-in of 64.
"""


def projected():
    return adamr.project_out(subspace())


def blocks(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """As `adamr.lora.train_block` trains them: the first columns of each kernel."""
    return adamr.lora.in_blocks(tx, RANK, lambda tree: [None, 1, 1])


PRETRAINED = Family(
    "Pretrained models and LoRA",
    "Fine-tuning moves neither old answers nor what pretraining learned.",
    INTRO,
    {
        "osft": Method(
            "OSFT",
            "Full fine-tuning outside the leading singular directions of the weights.",
            "The leading singular directions of every kernel, on the side of the "
            "inputs and on that of the outputs ([inside, "
            "outside](../glossary.md#inside-outside)), weight decay included. No data "
            "of old tasks is needed. The price: one projection more, of the step, and "
            "bases on both sides.",
            """
            sides = adamr.weight_subspaces(params, axes)
            tx = adamr.osft(1e-3, *sides)
            state = tx.init(params)
            for task in tasks:
                state, params = train(tx, state, params, task)
                sides = adamr.weight_subspaces(params, axes)
                state = adamr.set_subspace(state, sides)
            """,
            lambda: adamr.osft(RATE, *weight_sides()),
            lambda: optax.chain(*map(adamr.project_out, weight_sides())),
            OUTSIDE_BOTH,
            closed_forms=(
                "test_osft_leaves_the_protected_directions_alone",
                "test_osft_keeps_the_leading_singular_triples",
                "test_osft_equals_its_float64_twin",
                "test_projected_gradients_under_adamw_leak",
            ),
            parity=("osft_hook", "osft_under_adamw_leaks"),
        ),
        "start_task": Method(
            "GPM for merged LoRA pairs",
            "At a boundary: merge the pair, protect its inputs, draw a new A.",
            "The response of every layer to the inputs of finished tasks, whatever B "
            "does. The same call before the first task, with general text, protects "
            "what the pretrained model can do. Pairs must be float32.",
            """
            from adamr import lora

            a_only = lora.axes(adapted, pairs, base, old.x)
            tx = adamr.gpm(1e-3, adamr.empty_subspace(pairs, axes=a_only))
            state = tx.init(pairs)  # ... train on old, then:
            inputs = adamr.layer_inputs(adapted, pairs, base, old.x[:4])
            base, pairs, state = lora.start_task(base, pairs, state, inputs, key)
            left = lora.room(state, pairs)  # directions, by layer
            """,
            lambda: adamr.gpm(RATE, subspace()),
            projected,
            OUTSIDE,
            closed_forms=(
                "test_one_layer_moves_as_its_float64_twin",
                "test_what_each_way_of_projecting_forgets_and_learns",
                "test_boundary_equals_its_float64_twin",
                "test_old_responses_do_not_move",
            ),
        ),
        "start_block": Method(
            "GPM for kept LoRA pairs",
            "The same beside an int8 or nf4 kernel, which cannot take the merge.",
            "What `start_task` keeps. Finished pairs stay beside the kernel, frozen, "
            "so a pair needs room for all tasks from the start.",
            """
            from adamr import lora

            a_only = lora.axes(adapted, pairs, base, old.x)
            gpm = adamr.gpm(1e-3, adamr.empty_subspace(pairs, axes=a_only))
            tx = lora.train_block(gpm, rank=2)  # pairs with 4 columns: two tasks
            state = tx.init(pairs)  # ... train on old, then:
            inputs = adamr.layer_inputs(adapted, pairs, base, old.x[:4])
            pairs, state = lora.start_block(pairs, state, inputs, key)
            """,
            lambda: blocks(adamr.gpm(RATE, subspace())),
            promise=OUTSIDE,
            closed_forms=("test_three_tasks_beside_an_int8_kernel",),
        ),
        "inflora": Method(
            "InfLoRA",
            "Takes A from the new task's inputs outside the old ones'.",
            "What `start_task` keeps; it is called after it. The new A spans what the "
            "new task uses most and old tasks do not use. Where the learning rate is "
            "small, a task is learned faster than from a random A. The authors train B "
            "alone (`lora.train_b`).",
            """
            from adamr import lora

            a_only = lora.axes(adapted, pairs, base, old.x)
            tx = adamr.gpm(1e-3, adamr.empty_subspace(pairs, axes=a_only))
            state = tx.init(pairs)  # ... train on old, then:
            inputs = adamr.layer_inputs(adapted, pairs, base, old.x[:4])
            base, pairs, state = lora.start_task(base, pairs, state, inputs, key)
            inputs = adamr.layer_inputs(adapted, pairs, base, new.x)
            pairs = lora.inflora(pairs, state, inputs)
            """,
            lambda: adamr.gpm(RATE, subspace()),
            promise=OUTSIDE,
            closed_forms=(
                "test_inflora_equals_its_float64_twin",
                "test_inflora_trains_b_alone_and_keeps_old_responses",
            ),
        ),
        "keeplora": Method(
            "KeepLoRA",
            "Takes A from the new task's gradient outside the protected space.",
            "What `start_task` keeps; it is called after it. The authors protect the "
            "leading directions of the pretrained weights first, and train B alone.",
            """
            from adamr import lora

            a_only = lora.axes(adapted, pairs, base, old.x)
            tx = adamr.gpm(1e-3, adamr.empty_subspace(pairs, axes=a_only))
            state = tx.init(pairs)  # ... train on old, then:
            inputs = adamr.layer_inputs(adapted, pairs, base, old.x[:4])
            base, pairs, state = lora.start_task(base, pairs, state, inputs, key)
            of_base = jax.grad(lambda base: jnp.sum(adapted(pairs, base, new.x) ** 2))
            pairs = lora.keeplora(base, pairs, state, of_base(base))
            """,
            lambda: adamr.gpm(RATE, subspace()),
            promise=OUTSIDE,
            closed_forms=("test_keeplora_equals_its_float64_twin",),
        ),
        "orthogonality": Method(
            "O-LoRA",
            "A penalty that asks new A's to be orthogonal to old A's.",
            "Nothing exactly. Old inputs are safe only as far as old A's span them. It "
            "is here for comparison; `start_block` with inputs protects them exactly.",
            """
            from adamr import lora

            tx = lora.train_block(optax.adam(1e-3), rank=2)
            state = tx.init(pairs)
            pairs, state = lora.start_block(pairs, state, None, key)
            penalty = 0.5 * lora.orthogonality(pairs, state)  # add it to the loss
            """,
            lambda: blocks(optax.adam(RATE)),
            closed_forms=("test_o_lora_equals_its_float64_twin",),
        ),
    },
)
