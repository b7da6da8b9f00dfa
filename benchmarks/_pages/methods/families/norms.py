"""Optimizers that keep a network able to learn."""

import optax

import adamr
from benchmarks._pages.methods.method import RATE, Family, Method

INTRO = """
These methods protect nothing of an old task directly. They control how large the
weights or the steps become over a long life, because a network whose weights keep
growing learns more and more slowly.
"""

NORMS = Family(
    "Norms and step sizes",
    "Weights and steps keep a size with which a network still learns.",
    INTRO,
    {
        "classp": Method(
            "CLASSP",
            "Skips small gradients, and slows weights that have moved much.",
            "Weights that have moved much move less, in the manner of AdaGrad, and "
            "coordinates with a small gradient do not move. This is the method as the "
            "paper states it; the authors' code differs in two places.",
            """
            tx = adamr.classp(0.2)
            state = tx.init(params)
            for task in tasks:
                state, params = train(tx, state, params, task)
            """,
            lambda: adamr.classp(RATE),
            closed_forms=("test_classp_closed_form",),
            parity=("classp",),
        ),
        "normalize_and_project": Method(
            "NaP",
            "Kernels keep the norm that they started with.",
            "The Frobenius norm of every kernel, and with it the effective learning "
            "rate. The method asks for a LayerNorm before each nonlinearity, so that "
            "the rescaling does not change the function.",
            """
            nap = adamr.recipes.norms.normalize_and_project()
            tx = optax.chain(optax.adam(1e-3), nap)
            state = tx.init(params)
            for task in tasks:
                state, params = train(tx, state, params, task)
            """,
            lambda: optax.chain(
                optax.adam(RATE), adamr.recipes.norms.normalize_and_project()
            ),
            closed_forms=("test_norms_stay_to_1e_6_after_every_kth_step",),
        ),
        "adamp": Method(
            "AdamP",
            "Adam without the part of a step that only makes weights longer.",
            "The norm of weights before a normalisation layer does not grow by "
            "momentum. Nothing is promised about old tasks.",
            """
            tx = adamr.adamp(1e-3)
            state = tx.init(params)
            for task in tasks:
                state, params = train(tx, state, params, task)
            """,
            lambda: adamr.adamp(RATE),
            parity=("adamp",),
            equations="adamr.recipes.norms.remove_radial",
        ),
    },
)
