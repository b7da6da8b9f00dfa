"""Projections of the whole gradient off gradients of old tasks."""

import optax

import adamr
from benchmarks._pages.methods.method import RATE, Family, Method
from benchmarks._pages.methods.probes import OFF_DIRECTIONS, directions

INTRO = """
These methods store gradients of old tasks, each as long as all parameters together. A
step that is orthogonal to the gradient of an old output leaves that output unchanged,
to first order. This covers every parameter, biases and embeddings included, but it
holds only near the parameters at which the gradients were taken, and each stored
gradient takes the memory of one copy of the model.

In the equations g is the gradient, m̂ and v̂ are Adam's moments with bias correction,
and Δ is the step. The stored directions are called u in OGD. In FOPNG the stored
gradients are the columns of G, F holds the Fisher information of the old tasks and F'
that of the new one, both diagonal.
"""

DIRECTIONS = Family(
    "Projections of the whole gradient",
    "Old outputs keep their value to first order.",
    INTRO,
    {
        "ogd": Method(
            "OGD",
            "Steps are orthogonal to the stored gradients of old outputs.",
            "The outputs of old tasks on the stored examples, to first order; exactly "
            "for a linear model. OGD+ and PCA-OGD differ in which gradients a boundary "
            "stores: `ogd_plus_directions` takes those of all tasks anew, "
            "`pca_ogd_directions` the leading directions of many.",
            """
            from adamr.recipes.ogd import ogd_directions

            tx = adamr.ogd(1e-3, adamr.empty_directions(params, capacity=64))
            state = tx.init(params)
            for task in tasks:
                state, params = train(tx, state, params, task)
                stored = adamr.get_subspace(state)
                stored = ogd_directions(stored, forward, params, task.x, task.y)
                state = adamr.set_subspace(state, stored)
            """,
            lambda: adamr.ogd(RATE, directions()),
            lambda: adamr.project_out(directions()),
            OFF_DIRECTIONS,
            closed_forms=(1, 2),
            parity=("ogd",),
        ),
        "fopng": Method(
            "FOPNG",
            "A natural-gradient step that old tasks do not feel, in Fisher geometry.",
            "Gᵀ F Δ = 0: in the geometry of the old tasks' Fisher matrix F, a step is "
            "orthogonal to their stored gradients G. It brings its own "
            "[preconditioner](../glossary.md#preconditioner), so Adam and its routes "
            "have no part in it, and no route is measured below. A step has length 1 "
            "however small the gradient is, so the learning rate must decay.",
            """
            from adamr.modifiers import set_fisher

            fopng = adamr.fopng(adamr.empty_directions(params, capacity=64))
            tx = optax.chain(fopng, optax.scale_by_learning_rate(1e-2))
            state = tx.init(params)
            state, params = train(tx, state, params, old)
            stored, one = adamr.get_subspace(state), jax.grad(loss)(params, old)
            stored = adamr.grow_directions(stored, jax.tree.map(lambda g: g[None], one))
            fisher = adamr.fisher_information(forward, params, old.x)
            state = set_fisher(adamr.set_subspace(state, stored), old=fisher)
            """,
            lambda: optax.chain(adamr.fopng(directions()), optax.scale(-RATE)),
            closed_forms=(9,),
            parity=("fopng",),
        ),
    },
)
