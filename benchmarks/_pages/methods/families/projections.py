"""Projections of each layer's gradient off the inputs of old tasks."""

import adamr
from benchmarks._pages.methods.method import RATE, Family, Method
from benchmarks._pages.methods.probes import OUTSIDE, subspace

INTRO = """
These methods store, for each layer, a few [directions](../glossary.md#direction) that
span the layer's inputs on old tasks. A kernel that does not move along them keeps its
response to all those inputs. Nothing else of the old tasks is stored.

In the equations g is the gradient and the columns of U are the stored directions of one
kernel. m and v are Adam's moments, m̂ and v̂ the same with bias correction, and Δ is
the step. A projected gradient alone is not enough: Adam divides each entry by √v̂,
which turns part of the step back into the protected space. The recipes prevent this,
most of them by one v per output unit ([shared v](../glossary.md#shared-v)), which takes
less memory than Adam. Embeddings, biases and other [leaves](../glossary.md#leaf)
without stored directions get plain Adam.
"""


def projected():
    return adamr.project_out(subspace())


PROJECTIONS = Family(
    "Projections of layers",
    "Each layer keeps its response to the inputs of old tasks.",
    INTRO,
    {
        "gpm": Method(
            "GPM",
            "Steps leave out the directions of old inputs.",
            "Every protected kernel keeps its response to the stored inputs. Deeper "
            "layers keep theirs as far as their own inputs stay in the stored space. "
            "With the authors' plain SGD the gradient's projection is enough; the "
            "promise below is about Adam.",
            """
            tx = adamr.gpm(1e-3, adamr.empty_subspace(params, axes=axes))
            state = tx.init(params)
            for task in tasks:
                state, params = train(tx, state, params, task)
                inputs = adamr.layer_inputs(forward, params, task.x)
                state = adamr.protect_inputs(state, inputs)
            """,
            lambda: adamr.gpm(RATE, subspace()),
            projected,
            OUTSIDE,
            closed_forms=(3, 4),
            parity=("gpm", "gpm_rl"),
        ),
        "gpm_si": Method(
            "GPM and SI",
            "GPM, and SI's pull on everything that the projection leaves open.",
            "What [GPM](#gpm) keeps. In addition, a [penalty](../glossary.md#penalty) "
            "holds what no direction protects: embeddings, norms, heads and biases. "
            "The pull is stable at any weight `c`. It is what we recommend to start "
            "with.",
            """
            tx = adamr.gpm_si(1e-3, adamr.empty_subspace(params, axes=axes))
            state = tx.init(params)
            for task in tasks:
                state, params = train(tx, state, params, task)
                inputs = adamr.layer_inputs(forward, params, task.x)
                state = adamr.protect_inputs(state, inputs)
                state = adamr.consolidate_si(state, params)
            """,
            lambda: adamr.gpm_si(RATE, subspace()),
            projected,
            OUTSIDE,
            closed_forms=(
                "test_gpm_si_keeps_the_protected_response_and_holds_what_is_open",
                "test_gpm_si_is_stable_at_any_strength",
                "test_gpm_si_never_ascends_at_its_anchor",
                "test_gpm_si_equals_its_float64_twin",
            ),
        ),
        "sgp": Method(
            "SGP",
            "GPM that lets weak directions move a little.",
            "Direction i is slowed down to the share 1 − λ_i of a free step, with λ "
            "near 1 for directions along which old inputs were strong. The numbers "
            "below are for λ = 1, where it equals GPM.",
            """
            tx = adamr.sgp(1e-3, adamr.empty_subspace(params, axes=axes))
            state = tx.init(params)
            for task in tasks:
                state, params = train(tx, state, params, task)
                inputs = adamr.layer_inputs(forward, params, task.x)
                state = adamr.protect_inputs(state, inputs, scaling=10.0)
            """,
            lambda: adamr.sgp(RATE, subspace()),
            projected,
            OUTSIDE,
            closed_forms=(5,),
            parity=("sgp",),
        ),
        "adam_nscl": Method(
            "Adam-NSCL",
            "Plain Adam, its step projected onto inputs that hardly occur.",
            "Steps stay in the space in which the inputs of all old tasks have almost "
            "no energy. The moments are those of plain Adam. A step can point uphill, "
            "because it is projected after Adam's division. It stores one matrix of "
            "fan-in × fan-in per kernel at boundaries.",
            """
            from adamr import subspaces

            subspace = adamr.empty_subspace(params, axes=axes)
            tx = adamr.adam_nscl(1e-3, subspace)
            state, covariance = tx.init(params), subspaces.empty_covariance(subspace)
            for task in tasks:
                state, params = train(tx, state, params, task)
                inputs = adamr.layer_inputs(forward, params, task.x)
                covariance = subspaces.update_covariance(covariance, inputs)
                subspace = subspaces.null_space_complement(covariance, subspace)
                state = adamr.set_subspace(state, subspace)
            """,
            lambda: adamr.adam_nscl(RATE, subspace()),
            projected,
            OUTSIDE,
            closed_forms=(8,),
            parity=("adam_nscl",),
        ),
        "trgp": Method(
            "TRGP",
            "GPM that reuses the layers of related tasks through small matrices.",
            "A past task keeps its function on its own inputs, whatever the weights "
            "and the [scales](../glossary.md#scale) Q of other tasks do. The price: "
            "the task must be known at test time, and its scales are stored. The "
            "numbers are those of the part that trains the weights.",
            """
            memory = adamr.empty_subspace(params, axes=axes)
            inputs = adamr.layer_inputs(forward, params, old.x)
            first, memory = adamr.trust.grow_task_subspace(memory, inputs)
            region = adamr.trust.trust_region([first], grads)  # of the new task
            scales = adamr.trust.init_scales(region.subspaces)
            variables = {"params": params, "scales": scales}
            tx = adamr.trgp(1e-3, memory)  # for a loss on adamr.trust.scaled_params
            state = tx.init(variables)
            """,
            lambda: adamr.gpm(RATE, subspace()),
            projected,
            OUTSIDE,
            closed_forms=(6,),
            parity=("trgp", "trgp_task_subspaces"),
        ),
        "rogo": Method(
            "ROGO",
            "GPM that opens part of the frozen space, and folds what it learns.",
            "What [GPM](#gpm) keeps, except inside the [relaxing "
            "space](../glossary.md#relaxing-space). There old tasks change as far as "
            "the trained matrix Q differs from the identity, which a penalty keeps "
            "small. Nothing is stored per task. The numbers are those of the part "
            "that trains the weights.",
            """
            memory = adamr.empty_subspace(params, axes=axes)
            inputs = adamr.layer_inputs(forward, params, old.x)
            memory = adamr.grow_subspace(memory, inputs)
            relaxed = adamr.trust.relaxing_subspace(memory, grads)  # of the new task
            variables = {"params": params, "scales": adamr.trust.init_scales(relaxed)}
            tx = adamr.rogo(1e-3, memory)  # to the loss, add adamr.trust.scale_penalty
            state = tx.init(variables)  # ... train the new task, then fold:
            params, scales = variables["params"], variables["scales"]
            params, scales = adamr.trust.fold_scales(params, relaxed, scales)
            """,
            lambda: adamr.gpm(RATE, subspace()),
            projected,
            OUTSIDE,
            closed_forms=(7,),
        ),
        "muon": Method(
            "Muon",
            "GPM with Muon's orthogonalised momentum in place of Adam.",
            "Every protected kernel keeps its response to the stored inputs, as under "
            "[GPM](#gpm). Only full projections survive: Muon makes all singular "
            "values of a step alike, so it undoes a projection of part of the "
            "gradient.",
            """
            subspace = adamr.empty_subspace(params, axes=axes)
            tx = adamr.muon(3e-3, adamr.project_out(subspace))
            state = tx.init(params)
            for task in tasks:
                state, params = train(tx, state, params, task)
                inputs = adamr.layer_inputs(forward, params, task.x)
                state = adamr.protect_inputs(state, inputs)
            """,
            lambda: adamr.muon(RATE, projected()),
            projected,
            OUTSIDE,
            closed_forms=(
                "test_muon_is_the_polar_factor_of_the_projected_momentum",
                "test_muon_never_moves_the_response_to_a_protected_input",
                "test_muon_keeps_both_sides_at_once",
                "test_muon_equals_its_float64_twin",
            ),
            parity=("muon",),
        ),
    },
)
