"""State, operations and promises of every method, measured on the model of `probes`.

A promise is measured three times: for the modifier under shared routing, under
element-wise decoupled routing with its guard, and for the recipe.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import adamr
from benchmarks._pages.methods.families import METHODS
from benchmarks._pages.methods.method import RATE, Method, nothing
from benchmarks._pages.methods.probes import SHAPES, STABLE, gradient, params
from examples.harness.report import commit

__all__ = ["Measured", "measure", "measured", "read", "routes", "state", "write"]

RESULTS = Path(__file__).parents[2] / "results" / "methods.json"
TOTAL = int(sum(np.prod(shape) for shape in SHAPES.values()))


class Measured(NamedTuple):
    """What is known of one method.

    Attributes:
      state: numbers of the optimizer's state per parameter, by field.
      operations: floating-point operations of an update, per parameter.
      gradients: how many further gradients a step needs.
      routes: the number of its promise by "shared", "decoupled", "recipe".
      passed: the tests that it names and that pass.
      commit: at which all this was measured.
    """

    state: dict[str, float]
    operations: int
    gradients: int
    routes: dict[str, float]
    passed: list[str]
    commit: str


def state(tx: optax.GradientTransformation) -> dict[str, float]:
    """Numbers of the state per parameter, by field; small fields are left out."""
    counts: dict[str, float] = {}
    leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(tx.init, params()))
    for path, leaf in leaves:
        fields = [k.name for k in path if isinstance(k, jax.tree_util.GetAttrKey)]
        if fields and np.prod(leaf.shape) >= 8:
            counts[fields[-1]] = counts.get(fields[-1], 0) + np.prod(leaf.shape)
    return {name: rounded(n / TOTAL) for name, n in counts.items()}


def cost(tx: optax.GradientTransformation, evidence: Callable) -> tuple[int, int]:
    """Operations of an update per parameter, and further gradients."""
    g = gradient(0)
    extra = evidence(g)
    update = jax.jit(lambda g, s, p, extra: tx.update(g, s, p, **extra))
    compiled = update.lower(g, tx.init(params()), params(), extra).compile()
    shapes = [np.shape(x) for x in jax.tree.leaves(extra)]
    further = sum(np.prod(s) for s in shapes) / TOTAL
    return round(compiled.cost_analysis()["flops"] / TOTAL), round(further)


def optimizers(method: Method) -> dict[str, optax.GradientTransformation]:
    """By route; steps have the sign of the gradient, except where penalties pull."""
    pulls = method.promise is STABLE
    found = {}
    if method.modifier is not None:
        for name, route in (
            ("shared", adamr.route_both_moments),
            ("decoupled", adamr.route_first_moment),
        ):
            found[name] = optax.chain(
                route(method.modifier()),
                adamr.faithful_second_moment(),
                optax.scale(-RATE) if pulls else optax.identity(),
            )
    recipe = method.recipe()
    found["recipe"] = recipe if pulls else optax.chain(recipe, optax.scale(-1.0))
    return found


def routes(method: Method) -> dict[str, float]:
    """How far the worst step is from the promise, by route."""
    promise = method.promise
    if promise is None:
        return {}
    return {
        name: rounded(promise.violation(tx, method.evidence))
        for name, tx in optimizers(method).items()
    }


def rounded(number: float) -> float:
    return float(f"{number:.2g}")


def measure(method: Method, passed: Iterable[str]) -> Measured:
    operations, gradients = cost(method.recipe(), method.evidence)
    return Measured(
        state(method.recipe()),
        operations,
        gradients,
        routes(method),
        sorted(passed),
        commit(),
    )


def adam_operations() -> int:
    return cost(optax.adam(RATE), nothing)[0]


def read() -> dict[str, Any]:
    """The committed results: operations of Adam, and one entry per method."""
    if not RESULTS.exists():
        return {"methods": {}}
    return json.loads(RESULTS.read_text())


def measured() -> dict[str, Measured]:
    return {name: Measured(**row) for name, row in read()["methods"].items()}


def write(new: dict[str, Measured]) -> None:
    """Adds the new measurements to the committed ones, in the order of the pages."""
    rows = {name: Measured(**row) for name, row in read()["methods"].items()} | new
    results = {
        "command": "python -m benchmarks._pages.methods",
        "adam_operations": adam_operations(),
        "methods": {name: rows[name]._asdict() for name in METHODS if name in rows},
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
