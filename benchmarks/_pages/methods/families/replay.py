"""Replay of stored examples."""

import optax

import adamr
from benchmarks._pages.methods.method import RATE, Family, Method
from benchmarks._pages.methods.probes import one_memory

INTRO = """
These methods train on stored examples of old tasks together with the new ones
([replay](../glossary.md#replay)). Nothing is guaranteed about a single step; the old
losses are simply part of what is minimised. `adamr.buffers` has a reservoir, which
holds a uniform sample of everything seen, and a ring per task, both as plain arrays
that live in a jitted step and in a checkpoint.
"""

REPLAY = Family(
    "Replay",
    "Stored examples of old tasks are learned along with the new one.",
    INTRO,
    {
        "er": Method(
            "Experience replay",
            "Mixes a gradient on stored examples into that of the new task.",
            "Whatever the stored examples show of old tasks. v is computed from both "
            "gradients, so steps stay bounded when the new task is fitted and its "
            "gradient vanishes.",
            """
            tx = adamr.er(1e-3, weight=1 / 6)
            state = tx.init(params)
            memory = jax.grad(loss)(params, old)  # on a batch of old examples
            step, state = tx.update(grads, state, params, memory_gradient=memory)
            params = optax.apply_updates(params, step)
            """,
            lambda: adamr.er(RATE),
            evidence=one_memory,
            closed_forms=(19,),
            parity=("reservoir",),
        ),
        "dark_experience_loss": Method(
            "DER++",
            "Replays stored examples with the outputs that the model once gave.",
            "The model's own answers at the time an example was stored, and its label. "
            "It is a loss, to be minimised by any optimizer; the numbers below are "
            "Adam's, and the loss evaluates the model on two more batches, both drawn "
            "from memory.",
            """
            kept = forward(params, old.x)  # stored with the examples


            def with_memory(params):
                logits = forward(params, old.x)
                draws = dict(distilled_logits=logits, stored_logits=kept)
                draws |= dict(replayed_logits=logits, replayed_labels=old.y)
                dark_experience_loss = adamr.modifiers.dark_experience_loss
                return dark_experience_loss(forward(params, new.x), new.y, **draws)


            grads = jax.grad(with_memory)(params)
            """,
            lambda: optax.adam(RATE),
            closed_forms=("test_dark_experience_closed_form",),
            parity=("derpp",),
        ),
    },
)
