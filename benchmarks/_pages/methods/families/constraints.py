"""Constraints from gradients of old tasks, and surgery on gradients of several."""

import optax

import adamr
from benchmarks._pages.methods.method import RATE, Family, Method
from benchmarks._pages.methods.probes import NO_CONFLICT, memories, one_memory, parts

INTRO = """
These methods compute, at every step, a gradient on stored examples of old tasks. Then
they look for the step nearest to the usual one that does not increase the old losses
([constraint](../glossary.md#constraint)). Nothing happens at a task boundary except
that examples are stored; `adamr.buffers` has the buffers.

In the equations g is the gradient of the new task, g_k that of old task k, M the matrix
with the rows g_k, m̂ and v̂ are Adam's moments with bias correction, and the parameters
change by −η Δ. Under the usual order, first the constraint and then Adam, Adam's
division breaks the constraint again. The recipes solve the problem in the norm of
Adam's [preconditioner](../glossary.md#preconditioner), so the step itself satisfies it.
"""


def task_gradients(gradient):
    return {"task_gradients": memories(gradient)["memory_gradients"]}


CONSTRAINTS = Family(
    "Constraints and gradient surgery",
    "No step increases the loss on stored examples of old tasks.",
    INTRO,
    {
        "gem": Method(
            "GEM",
            "One constraint per old task.",
            "No step increases the loss on the stored examples of any old task, to "
            "first order. Without a conflict the step is Adam's. `memory_strength` "
            "adds a pull of every memory once one is violated; the numbers are for 0.",
            """
            tx = adamr.gem(1e-3)
            state = tx.init(params)
            rows = [jax.grad(loss)(params, task) for task in tasks[:-1]]
            memory = jax.tree.map(lambda *g: jnp.stack(g), *rows)  # one per old task
            step, state = tx.update(grads, state, params, memory_gradients=memory)
            params = optax.apply_updates(params, step)
            """,
            lambda: adamr.gem(RATE, 0.0),
            lambda: adamr.gem_constraint(0.0),
            NO_CONFLICT,
            memories,
            closed_forms=(10,),
            parity=("gem",),
        ),
        "agem": Method(
            "A-GEM",
            "One constraint for all old tasks together.",
            "No step increases the average loss on the stored examples, to first "
            "order. The loss of a single task still may.",
            """
            tx = adamr.agem(1e-3)
            state = tx.init(params)
            memory = jax.grad(loss)(params, old)  # on a batch of old examples
            step, state = tx.update(grads, state, params, memory_gradient=memory)
            params = optax.apply_updates(params, step)
            """,
            lambda: adamr.agem(RATE),
            adamr.agem_constraint,
            NO_CONFLICT,
            one_memory,
            closed_forms=(11,),
            parity=("agem",),
        ),
        "p_mgem": Method(
            "p-mGEM",
            "GEM's constraints in every layer by itself.",
            "What [GEM](#gem) keeps, and in addition the same for each leaf's own part "
            "of the step. The equations are reconstructed from the paper's abstract.",
            """
            tx = adamr.p_mgem(1e-3)
            state = tx.init(params)
            rows = [jax.grad(loss)(params, task) for task in tasks[:-1]]
            memory = jax.tree.map(lambda *g: jnp.stack(g), *rows)  # one per old task
            step, state = tx.update(grads, state, params, memory_gradients=memory)
            params = optax.apply_updates(params, step)
            """,
            lambda: adamr.p_mgem(RATE, 0.0),
            lambda: adamr.gem_constraint(0.0, partition="leaf"),
            NO_CONFLICT,
            memories,
            closed_forms=(12,),
        ),
        "d_mgem": Method(
            "d-mGEM",
            "GEM with several constraints per old task, one per part of its memory.",
            "What [GEM](#gem) keeps, for each part of every task's stored examples by "
            "itself. The equations are reconstructed from the paper's abstract.",
            """
            tx = adamr.d_mgem(1e-3)
            state = tx.init(params)
            halves = [Task(old.x[::2], old.y[::2]), Task(old.x[1::2], old.y[1::2])]
            rows = [jax.grad(loss)(params, half) for half in halves]
            memory = jax.tree.map(lambda *g: jnp.stack(g)[None], *rows)  # (1, 2, …)
            step, state = tx.update(grads, state, params, memory_gradients=memory)
            params = optax.apply_updates(params, step)
            """,
            lambda: adamr.d_mgem(RATE, 0.0),
            lambda: adamr.gem_constraint(0.0),
            NO_CONFLICT,
            parts,
            closed_forms=("test_t12_reductions",),
        ),
        "pcgrad": Method(
            "PCGrad",
            "Removes from each task's gradient what conflicts with another's.",
            "Nothing of a finished task by itself. It was proposed for several tasks "
            "that are learned together: where two gradients point against each other, "
            "each loses its part along the other. It goes before any optimizer.",
            """
            tx = optax.chain(adamr.pcgrad(), optax.adam(1e-3))
            state = tx.init(params)
            rows = [jax.grad(loss)(params, task) for task in tasks]
            each = jax.tree.map(lambda *g: jnp.stack(g), *rows)
            total = jax.tree.map(lambda g: g.sum(0), each)
            step, state = tx.update(total, state, params, task_gradients=each)
            params = optax.apply_updates(params, step)
            """,
            lambda: optax.chain(adamr.pcgrad(), optax.adam(RATE)),
            evidence=task_gradients,
            closed_forms=(13,),
            parity=("pcgrad",),
        ),
        "cagrad": Method(
            "CAGrad",
            "Near the mean gradient, the direction best for the worst task.",
            "Nothing of a finished task by itself. Among all directions within a "
            "radius of the mean gradient it takes the one along which the task that "
            "gains least gains most. It goes before any optimizer.",
            """
            tx = optax.chain(adamr.cagrad(), optax.adam(1e-3))
            state = tx.init(params)
            rows = [jax.grad(loss)(params, task) for task in tasks]
            each = jax.tree.map(lambda *g: jnp.stack(g), *rows)
            mean = jax.tree.map(lambda g: g.mean(0), each)
            step, state = tx.update(mean, state, params, task_gradients=each)
            params = optax.apply_updates(params, step)
            """,
            lambda: optax.chain(adamr.cagrad(), optax.adam(RATE)),
            evidence=task_gradients,
            closed_forms=("test_cagrad_with_c_0_is_the_mean_gradient",),
            parity=("cagrad",),
        ),
    },
)
