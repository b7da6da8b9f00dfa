"""Quadratic penalties that pull parameters towards those of old tasks."""

import adamr
from benchmarks._pages.methods.method import RATE, Family, Method
from benchmarks._pages.methods.probes import STABLE

INTRO = """
These methods store the parameters θ\\* at the end of a task (the
[anchor](../glossary.md#anchor)) and one number Ω ≥ 0 per parameter that says how much
it mattered (the [importance](../glossary.md#importance)). Then they pull θ back to
θ\\*, harder where Ω is large. No examples are kept, all parameters are covered, and
nothing is protected exactly: the pull is weighed against the new task.

The methods differ in where Ω comes from. The pull is applied as a proximal step in the
norm of Adam's [preconditioner](../glossary.md#preconditioner): θ ends between Adam's
point θ̂ and θ\\*, however large the weight of the [penalty](../glossary.md#penalty) is.
`form="additive"` adds the penalty to the loss instead, as the papers' code does. In the
equations η is the learning rate and D = 1 / (√v̂ + eps) what Adam multiplies m̂ by.
`gpm_si`, a projection together with SI, is on the page of
[projections](projections.md#gpm-and-si).

All three routes are stable in the test below, which runs decoupled routing with its
[guard](../glossary.md#guard) on. With `guard=False` decoupled routing can diverge as
soon as the new task is fitted. In both shared and guarded decoupled routing a large
penalty is stable but fills Adam's moments, so that little of the new task is learned.
"""

PENALTIES = Family(
    "Penalties",
    "Parameters that mattered to old tasks are pulled back.",
    INTRO,
    {
        "l2_sp": Method(
            "L2-SP",
            "Pulls every parameter back to where training started.",
            "Closeness to the parameters given to `init`, usually pretrained ones, "
            "with the same weight for all unless `importance` says otherwise.",
            """
            tx = adamr.l2_sp(1e-3)
            state = tx.init(params)  # the anchor
            for task in tasks:
                state, params = train(tx, state, params, task)
            """,
            lambda: adamr.l2_sp(RATE, 1.0),
            adamr.quadratic_penalty,
            STABLE,
            closed_forms=("test_t14_gradient_is_that_of_the_penalty",),
        ),
        "ewc": Method(
            "EWC",
            "Weighs the pull by the Fisher information of each old task.",
            "Parameters to which the predictions of an old task are sensitive. The "
            "penalties of all tasks are merged exactly, in the memory of one.",
            """
            tx = adamr.ewc(1e-3, strength=100.0)
            state = tx.init(params)
            for task in tasks:
                state, params = train(tx, state, params, task)
                fisher = adamr.fisher_information(forward, params, task.x)
                state = adamr.consolidate(state, params, fisher)
            """,
            lambda: adamr.ewc(RATE, 1.0),
            adamr.quadratic_penalty,
            STABLE,
            closed_forms=(14,),
            parity=("ewc",),
        ),
        "online_ewc": Method(
            "Online EWC",
            "EWC with one running Fisher information and the latest anchor.",
            "What [EWC](#ewc) keeps, with older tasks forgotten gradually: at each "
            "boundary the old importance is multiplied by `decay`, the paper's γ.",
            """
            tx = adamr.online_ewc(1e-3, strength=100.0)
            state = tx.init(params)
            for task in tasks:
                state, params = train(tx, state, params, task)
                f = adamr.fisher_information(forward, params, task.x)
                state = adamr.consolidate(state, params, f, rule="online", decay=0.9)
            """,
            lambda: adamr.online_ewc(RATE, 1.0),
            adamr.quadratic_penalty,
            STABLE,
            closed_forms=(15,),
            parity=("online_ewc",),
        ),
        "si": Method(
            "SI",
            "Weighs the pull by how much each parameter lowered the old losses.",
            "Parameters whose movement lowered the loss of old tasks. The importance "
            "is gathered while training, so a boundary needs no data.",
            """
            tx = adamr.si(1e-3)
            state = tx.init(params)
            for task in tasks:
                state, params = train(tx, state, params, task)
                state = adamr.consolidate_si(state, params)
            """,
            lambda: adamr.si(RATE, 0.5),
            adamr.quadratic_penalty,
            STABLE,
            closed_forms=(16,),
            parity=("si",),
        ),
        "mas": Method(
            "MAS",
            "Weighs the pull by how much each parameter changes the outputs.",
            "Parameters to which the length of the model's output is sensitive. It "
            "needs inputs of the finished task and no labels.",
            """
            from adamr.penalties import memory_aware_importance

            tx = adamr.mas(1e-3)
            state = tx.init(params)
            for task in tasks:
                state, params = train(tx, state, params, task)
                omega = memory_aware_importance(forward, params, task.x)
                state = adamr.consolidate(state, params, omega, rule="online")
            """,
            lambda: adamr.mas(RATE, 1.0),
            adamr.quadratic_penalty,
            STABLE,
            closed_forms=(17,),
            parity=("mas",),
        ),
        "rwalk": Method(
            "RWalk",
            "Adds EWC's importance to one like SI's, both gathered in training.",
            "Parameters that [EWC](#ewc) or [SI](#si) would keep. Both importances are "
            "scaled to [0, 1] and added; a boundary needs no data.",
            """
            tx = adamr.rwalk(1e-3)
            state = tx.init(params)
            for task in tasks:
                state, params = train(tx, state, params, task)
                state = adamr.consolidate_rwalk(state, params)
            """,
            lambda: adamr.rwalk(RATE, 1.0),
            adamr.quadratic_penalty,
            STABLE,
            closed_forms=(18,),
        ),
    },
)
