"""Masks: some parameters do not move."""

import jax

import adamr
from benchmarks._pages.methods.method import RATE, Family, Method
from benchmarks._pages.methods.probes import STILL, retained

INTRO = """
These methods choose, again and again, which parameters may move
([mask](../glossary.md#mask)). A mask on the gradient is not enough: Adam's first moment
keeps moving a masked parameter for about ten more steps, and weight decay moves it
always. In these recipes the step is exactly 0 where the mask says so.
"""

MASKS = Family(
    "Masks",
    "Some parameters do not move, and which ones changes during training.",
    INTRO,
    {
        "mudman": Method(
            "MUDMAN",
            "Only parameters move whose step also lowers the loss to be retained.",
            "Every single coordinate of a step agrees in sign with the gradient of the "
            "loss to be retained. It was proposed for unlearning. The moments of a "
            "masked coordinate stay as they are.",
            """
            tx = adamr.mudman(1e-3)
            state = tx.init(params)
            retain = jax.grad(loss)(params, old)  # on a batch of old examples
            step, state = tx.update(grads, state, params, retain_gradient=retain)
            params = optax.apply_updates(params, step)
            """,
            lambda: adamr.mudman(RATE),
            adamr.modifiers.disruption_mask,
            STILL,
            retained,
            closed_forms=(20,),
            parity=("mudman",),
        ),
        "mofo": Method(
            "MoFO",
            "Only the entries with the largest momentum move.",
            "Closeness to the weights that training started from: of every matrix only "
            "a share of the entries moves in a step. Nothing is promised about old "
            "tasks, and no data of them is needed.",
            """
            tx = adamr.mofo(1e-3)
            state = tx.init(params)
            for task in tasks:
                state, params = train(tx, state, params, task)
            """,
            lambda: adamr.mofo(RATE),
            closed_forms=(
                "test_mofo_equals_its_float64_twin",
                "test_the_largest_entries",
            ),
            parity=("mofo",),
        ),
        "hft": Method(
            "HFT",
            "In each round a random half of the parameter arrays is frozen.",
            "At the end of a round the frozen half is what it was, bit for bit, weight "
            "decay included. A new task starts a new round.",
            """
            tx = adamr.hft(1e-3, key)
            state = tx.init(params)
            for task in tasks:
                state, params = train(tx, state, params, task)
                state = adamr.reset_moments(adamr.redraw_half(state))
            """,
            lambda: adamr.hft(RATE, jax.random.key(0)),
            closed_forms=(
                "test_frozen_half_is_bit_identical_after_a_round",
                "test_exactly_half_of_every_category_in_every_round",
            ),
        ),
    },
)
