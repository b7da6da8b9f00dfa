"""Writes docs/methods.md from the code and the tests.

    python -m benchmarks._pages.methods

What a method keeps is counted in its optimizer state, its cost in the compiled update,
and its guarantee is measured under each routing, on random gradients of uneven scale.
A method counts as verified by the tests that are named in its row *and pass now*:
`test_t<n>_...` are closed forms, `test_parity_<name>` compare with the authors' code.
"""

import argparse
import ast
import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pytest

import adamr
from benchmarks._pages.probes import (
    RANK,
    SHAPES,
    TASKS,
    conflict,
    direction_leak,
    directions,
    disruption,
    gradient,
    leak,
    leak_of_both_sides,
    memories,
    one_memory,
    params,
    retained,
    stiffness,
    subspace,
    weight_sides,
)

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "methods.md"


class Method(NamedTuple):
    """One row.

    Attributes:
      paper: arXiv id, or where it was published.
      recipe: () -> optimizer of the reference model.
      modifier: () -> g̃ for the columns of shared and decoupled routing, or None.
      probe: (optimizer, sign) -> violation of what the method promises, or None.
      evidence: gradient -> extra arguments of a step.
      boundary: public names of what a finished task calls.
      closed_forms: numbers n of tests named `test_t<n>_...`, or whole names.
      parity: suffixes of tests named `test_parity_...`.
    """

    paper: str
    recipe: Callable[[], optax.GradientTransformation]
    modifier: Callable[[], optax.GradientTransformation] | None = None
    probe: Callable[..., float] | None = None
    evidence: Callable[[Any], dict] = lambda g: {}
    boundary: tuple[str, ...] = ()
    closed_forms: tuple[int | str, ...] = ()
    parity: tuple[str, ...] = ()


# The rows -----------------------------------------------------------------------

RATE = 1e-3


def blocks(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """As `adamr.lora.train_block` trains them: the first columns of each kernel."""
    return adamr.lora.in_blocks(tx, RANK, lambda tree: [None, 1, 1])


METHODS: dict[str, Method] = {
    "gpm": Method(
        "2103.09762", lambda: adamr.gpm(RATE, subspace()),
        lambda: adamr.project_out(subspace()), leak,
        boundary=("grow_subspace", "set_subspace"), closed_forms=(3, 4),
        parity=("gpm", "gpm_rl"),
    ),
    "sgp": Method(
        "2302.01386", lambda: adamr.sgp(RATE, subspace()),
        lambda: adamr.project_out(subspace()), leak,
        boundary=("grow_subspace", "set_subspace"), closed_forms=(5,), parity=("sgp",),
    ),
    "gpm_si": Method(
        "2103.09762, 1703.04200", lambda: adamr.gpm_si(RATE, subspace()),
        lambda: adamr.project_out(subspace()), leak,
        boundary=("grow_subspace", "set_subspace", "consolidate_si"),
        closed_forms=(
            "test_gpm_si_keeps_the_protected_response_and_holds_what_is_open",
            "test_gpm_si_is_stable_at_any_strength",
            "test_gpm_si_never_ascends_at_its_anchor",
            "test_gpm_si_equals_its_float64_twin",
        ),
    ),
    "adam_nscl": Method(
        "2103.07113", lambda: adamr.adam_nscl(RATE, subspace()),
        lambda: adamr.project_out(subspace()), leak,
        boundary=("update_covariance", "null_space_complement", "set_subspace"),
        closed_forms=(8,), parity=("adam_nscl",),
    ),
    "trgp": Method(
        "2202.02931", lambda: adamr.gpm(RATE, subspace()),
        lambda: adamr.project_out(subspace()), leak,
        boundary=("grow_task_subspace", "trust_region", "init_scales"),
        closed_forms=(6,), parity=("trgp", "trgp_task_subspaces"),
    ),
    "rogo": Method(
        "2301.12131", lambda: adamr.gpm(RATE, subspace()),
        lambda: adamr.project_out(subspace()), leak,
        boundary=("relaxing_subspace", "fold_scales", "grow_subspace"),
        closed_forms=(7,),
    ),
    "osft": Method(
        "2504.07097, 2510.13003", lambda: adamr.osft(RATE, *weight_sides()),
        lambda: optax.chain(*map(adamr.project_out, weight_sides())),
        leak_of_both_sides,
        boundary=("weight_subspaces", "layer_budget", "set_subspace"),
        closed_forms=(
            "test_osft_leaves_the_protected_directions_alone",
            "test_osft_keeps_the_leading_singular_triples",
            "test_osft_equals_its_float64_twin",
            "test_projected_gradients_under_adamw_leak",
        ),
        parity=("osft_hook", "osft_under_adamw_leaks"),
    ),
    "muon": Method(
        "2502.16982", lambda: adamr.muon(RATE, adamr.project_out(subspace())),
        lambda: adamr.project_out(subspace()), leak,
        boundary=("grow_subspace", "set_subspace"),
        closed_forms=(
            "test_muon_is_the_polar_factor_of_the_projected_momentum",
            "test_muon_never_moves_the_response_to_a_protected_input",
            "test_muon_keeps_both_sides_at_once",
            "test_muon_equals_its_float64_twin",
        ),
        parity=("muon",),
    ),
    "ogd": Method(
        "1910.07104", lambda: adamr.ogd(RATE, directions()),
        lambda: adamr.project_out(directions()), direction_leak,
        boundary=("ogd_directions", "ogd_plus_directions", "pca_ogd_directions"),
        closed_forms=(1, 2), parity=("ogd",),
    ),
    "fopng": Method(
        "2601.12816",
        lambda: optax.chain(adamr.fopng(directions()), optax.scale(-RATE)),
        boundary=("set_fisher", "average_fisher", "set_subspace"), closed_forms=(9,),
        parity=("fopng",),
    ),
    "gem": Method(
        "1706.08840", lambda: adamr.gem(RATE, 0.0),
        lambda: adamr.gem_constraint(0.0), conflict, memories,
        closed_forms=(10,), parity=("gem",),
    ),
    "agem": Method(
        "1812.00420", lambda: adamr.agem(RATE), adamr.agem_constraint, conflict,
        one_memory, closed_forms=(11,), parity=("agem",),
    ),
    "p_mgem": Method(
        "2410.00868", lambda: adamr.p_mgem(RATE, 0.0),
        lambda: adamr.gem_constraint(0.0, partition="leaf"), conflict, memories,
        closed_forms=(12,),
    ),
    "pcgrad": Method(
        "2001.06782", lambda: optax.chain(adamr.pcgrad(), optax.adam(RATE)),
        evidence=lambda g: {"task_gradients": memories(g)["memory_gradients"]},
        closed_forms=(13,), parity=("pcgrad",),
    ),
    "cagrad": Method(
        "2110.14048", lambda: optax.chain(adamr.cagrad(), optax.adam(RATE)),
        evidence=lambda g: {"task_gradients": memories(g)["memory_gradients"]},
        closed_forms=("test_cagrad_with_c_0_is_the_mean_gradient",),
        parity=("cagrad",),
    ),
    "l2_sp": Method(
        "1802.01483", lambda: adamr.l2_sp(RATE, 1.0), adamr.quadratic_penalty,
        stiffness, closed_forms=("test_t14_gradient_is_that_of_the_penalty",),
    ),
    "ewc": Method(
        "1612.00796", lambda: adamr.ewc(RATE, 1.0), adamr.quadratic_penalty, stiffness,
        boundary=("fisher_information", "consolidate"), closed_forms=(14,),
        parity=("ewc",),
    ),
    "online_ewc": Method(
        "1805.06370", lambda: adamr.online_ewc(RATE, 1.0), adamr.quadratic_penalty,
        stiffness, boundary=("fisher_information", "consolidate"), closed_forms=(15,),
        parity=("online_ewc",),
    ),
    "si": Method(
        "1703.04200", lambda: adamr.si(RATE, 0.5), adamr.quadratic_penalty, stiffness,
        boundary=("consolidate_si",), closed_forms=(16,), parity=("si",),
    ),
    "mas": Method(
        "1711.09601", lambda: adamr.mas(RATE, 1.0), adamr.quadratic_penalty, stiffness,
        boundary=("memory_aware_importance", "consolidate"), closed_forms=(17,),
        parity=("mas",),
    ),
    "rwalk": Method(
        "1801.10112", lambda: adamr.rwalk(RATE, 1.0), adamr.quadratic_penalty,
        stiffness, boundary=("consolidate_rwalk",), closed_forms=(18,),
    ),
    "er": Method(
        "1902.10486", lambda: adamr.er(RATE), evidence=one_memory, closed_forms=(19,),
        parity=("reservoir",),
    ),
    "dark_experience_loss": Method(
        "2004.07211", lambda: optax.adam(RATE),
        closed_forms=("test_dark_experience_closed_form",), parity=("derpp",),
    ),
    "mudman": Method(
        "2506.12484", lambda: adamr.mudman(RATE), adamr.modifiers.disruption_mask,
        disruption, retained, closed_forms=(20,), parity=("mudman",),
    ),
    "mofo": Method(
        "2407.20999", lambda: adamr.mofo(RATE),
        closed_forms=(
            "test_mofo_equals_its_float64_twin", "test_the_largest_entries",
        ),
        parity=("mofo",),
    ),
    "hft": Method(
        "2404.18466", lambda: adamr.hft(RATE, jax.random.key(0)),
        boundary=("redraw_half", "reset_moments"),
        closed_forms=(
            "test_frozen_half_is_bit_identical_after_a_round",
            "test_exactly_half_of_every_category_in_every_round",
        ),
    ),
    "classp": Method("2405.09637", lambda: adamr.classp(RATE),
        closed_forms=("test_classp_closed_form",), parity=("classp",),
    ),
    "normalize_and_project": Method(
        "2407.01800",
        lambda: optax.chain(
            optax.adam(RATE), adamr.recipes.norms.normalize_and_project()
        ),
        closed_forms=("test_norms_stay_to_1e_6_after_every_kth_step",),
    ),
    "adamp": Method("2006.08217", lambda: adamr.adamp(RATE), parity=("adamp",)),
    "start_task": Method(
        "2103.09762, 2106.09685", lambda: adamr.gpm(RATE, subspace()),
        lambda: adamr.project_out(subspace()), leak,
        boundary=("start_task", "room"),
        closed_forms=(
            "test_one_layer_moves_as_its_float64_twin",
            "test_what_each_way_of_projecting_forgets_and_learns",
            "test_boundary_equals_its_float64_twin",
            "test_old_responses_do_not_move",
        ),
    ),
    "start_block": Method(
        "2103.09762, 2106.09685", lambda: blocks(adamr.gpm(RATE, subspace())),
        probe=leak, boundary=("start_block", "room"),
        closed_forms=("test_three_tasks_beside_an_int8_kernel",),
    ),
    "inflora": Method(
        "2404.00228", lambda: adamr.gpm(RATE, subspace()), probe=leak,
        boundary=("start_task", "inflora"),
        closed_forms=(
            "test_inflora_equals_its_float64_twin",
            "test_inflora_trains_b_alone_and_keeps_old_responses",
        ),
    ),
    "keeplora": Method(
        "2601.19659", lambda: adamr.gpm(RATE, subspace()), probe=leak,
        boundary=("start_task", "keeplora"),
        closed_forms=("test_keeplora_equals_its_float64_twin",),
    ),
    "orthogonality": Method(
        "2310.14152", lambda: blocks(optax.adam(RATE)), boundary=("start_block",),
        closed_forms=("test_o_lora_equals_its_float64_twin",),
    ),
}  # fmt: skip


# What is measured ---------------------------------------------------------------


def kept(tx: optax.GradientTransformation) -> str:
    """Numbers of the state per parameter, by the field that holds them."""
    total = sum(np.prod(s) for s in SHAPES.values())
    counts: dict[str, float] = {}
    leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(tx.init, params()))
    for path, leaf in leaves:
        fields = [k.name for k in path if isinstance(k, jax.tree_util.GetAttrKey)]
        if fields and np.prod(leaf.shape) >= 8:
            counts[fields[-1]] = counts.get(fields[-1], 0) + np.prod(leaf.shape)
    parts = [f"{name} {n / total:.2g}" for name, n in counts.items()]
    return ", ".join(parts) or "nothing"


def cost(tx: optax.GradientTransformation, evidence: Callable) -> str:
    """Floating-point operations of an update per parameter, and further gradients."""
    g = gradient(0)
    extra = evidence(g)
    update = jax.jit(lambda g, s, p, extra: tx.update(g, s, p, **extra))
    compiled = update.lower(g, tx.init(params()), params(), extra).compile()
    total = sum(np.prod(s) for s in SHAPES.values())
    flops = f"{compiled.cost_analysis()['flops'] / total:.0f}"
    lead = [np.shape(x) for x in jax.tree.leaves(extra)]
    more = sum(np.prod(s) for s in lead) / total
    return f"{flops} + {more:.0f} gradients" if more else flops


def guarantee(method: Method, build: Callable | None) -> str:
    if method.probe is None:
        return "none claimed"
    if build is None:
        return "–"
    worst = method.probe(build(), method.evidence)
    limit = 1.001 if method.probe is stiffness else 1e-5
    if worst <= limit:
        return "holds"
    if not np.isfinite(worst):
        return "diverges"
    return f"broken: {10 ** round(np.log10(worst)):.0e}"


def routed(method: Method, route: Callable) -> Callable | None:
    if method.modifier is None:
        return None
    return lambda: optax.chain(
        route(method.modifier()),
        adamr.faithful_second_moment(),
        optax.scale(-RATE) if method.probe is stiffness else optax.identity(),
    )


def unsigned(method: Method) -> Callable:
    """The recipe, with its step in the sign of the gradient, as the probes want it."""
    if method.probe is stiffness:
        return method.recipe
    return lambda: optax.chain(method.recipe(), optax.scale(-1.0))


# What is verified ---------------------------------------------------------------


@functools.cache
def all_tests() -> dict[str, str]:
    """Test function -> file, read from the sources."""
    found = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                found[node.name] = str(path.relative_to(ROOT))
    return found


def tests_of(method: Method) -> dict[str, list[str]]:
    """ "closed form" and "authors' code" -> names of the tests."""
    names = all_tests()
    closed = [
        name
        for known in method.closed_forms
        for name in names
        if name == known or re.match(rf"test_t{known}_", name)
    ]
    parity = [n for n in (f"test_parity_{p}" for p in method.parity) if n in names]
    kinds = {"closed form": closed, "authors' code": parity}
    return {kind: tests for kind, tests in kinds.items() if tests}


class _Outcomes:
    """A pytest plugin that remembers which test functions passed in every case."""

    def __init__(self) -> None:
        self.passed: dict[str, bool] = {}

    def pytest_runtest_logreport(self, report) -> None:
        name = report.nodeid.split("::")[-1].split("[")[0]
        self.passed[name] = self.passed.get(name, True) and report.passed


def run_tests() -> set[str]:
    """Runs every test that a row names; those that passed."""
    names = {t for m in METHODS.values() for ts in tests_of(m).values() for t in ts}
    where = sorted({f"{all_tests()[n]}::{n}" for n in names})
    outcomes = _Outcomes()
    options = ["-q", "-p", "no:xdist", "-o", "addopts=--import-mode=importlib"]
    options += ["--rootdir", str(ROOT)]
    pytest.main([*options, *where], plugins=[outcomes])
    return {name for name, passed in outcomes.passed.items() if passed}


# The page -----------------------------------------------------------------------

HEAD = """# Methods

Written by `python -m benchmarks._pages.methods` from code and tests; do not edit.

- **keeps**: numbers of the optimizer's state per parameter, by field (plain Adam: mu 1,
  nu 1), for a model with two kernels of fan-in 64, {rank} directions per kernel or for
  the whole vector, {tasks} tasks. Small fields are left out.
- **cost**: floating-point operations of one update per parameter (plain Adam:
  {adam}), and the gradients that the caller computes in addition to the task's.
- **shared / decoupled / recipe**: whether the method's promise survives the step, for
  the modifier under shared routing, under element-wise decoupled routing, and in the
  recipe. Projection: no step in the protected space; constraint: no memory loss grows
  along the step; penalty: stable at weight · importance 10³; mask: no step where
  masked. Decoupled routing has its guard on. "broken" has the order of magnitude of
  the worst of 40 steps on random gradients of uneven scale. `sgp` is shown at λ = 1,
  GEM and its kin at memory strength 0, of `trgp` and `rogo` the part that trains the
  weights. The methods of `adamr.lora` (`start_task` and after it) are counted as if the
  two kernels were A's: their promise is that no A moves into the protected space.
- **verified against**: from the tests in the last column, all of which passed when this
  page was written. Parity data and how it was made: `tests/parity/golden/README.md`.

"""
COLUMNS = (
    "name", "paper", "keeps", "cost", "shared", "decoupled", "recipe", "boundary",
    "verified against", "tests",
)  # fmt: skip


def verified(method: Method, passed: set[str]) -> tuple[str, list[str]]:
    """What a row may claim, and the tests that back it."""
    kinds, backing = [], []
    for kind, tests in tests_of(method).items():
        if set(tests) <= passed:
            kinds.append(kind)
            backing += tests
    return ", ".join(kinds) or "not verified", backing


def row(name: str, method: Method, passed: set[str]) -> str:
    kinds, backing = verified(method, passed)
    cells = [
        f"`{name}`",
        f"arXiv:{method.paper}",
        kept(method.recipe()),
        cost(method.recipe(), method.evidence),
        guarantee(method, routed(method, adamr.route_both_moments)),
        guarantee(method, routed(method, adamr.route_first_moment)),
        guarantee(method, unsigned(method)),
        ", ".join(f"`{b}`" for b in method.boundary) or "none",
        kinds,
        ", ".join(f"`{t}`" for t in backing) or "–",
    ]
    return "| " + " | ".join(cells) + " |"


def page(passed: set[str]) -> str:
    head = HEAD.format(
        rank=RANK, tasks=TASKS, adam=cost(optax.adam(RATE), lambda g: {})
    )
    lines = [" | ".join(COLUMNS), "|".join(["---"] * len(COLUMNS))]
    rows = [row(name, method, passed) for name, method in METHODS.items()]
    return head + "\n".join([f"| {x} |" for x in lines] + rows) + "\n"


def main() -> int:
    argparse.ArgumentParser(description=__doc__).parse_args()
    passed = run_tests()
    PAGE.write_text(page(passed))
    print(f"written: {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
