"""What the docs and the messages tell a newcomer to type works."""

import doctest
import re
import textwrap
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adamr

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()


def test_advice_to_install_names_this_distribution_and_its_extras():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    names = set()
    folders = ("adamr", "benchmarks", "docs", "examples", ".github")
    files = [*ROOT.glob("*.md"), *ROOT.glob("*.toml")]
    files += [path for f in folders for path in (ROOT / f).rglob("*.*")]
    for path in files:
        if path.suffix in {".py", ".md", ".toml", ".yml"}:
            names |= set(re.findall(r"(adamr[\w-]*)\[([a-z,]+)\]", path.read_text()))
    assert {name for name, _ in names} == {project["name"]}
    assert {e for _, some in names for e in some.split(",")} <= set(extras)
    assert {"orbax", "log"} <= {some for _, some in names}


def test_the_skeleton_of_a_modifier_runs():
    (block,) = re.findall(r" *```python\n(.*?)```", TEXT, re.DOTALL)
    names = {"__name__": "skeleton"}
    exec(textwrap.dedent(block), names)
    centre = names["centre"]
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    (example,) = finder.find(centre, "centre", module=False, globs=names)
    assert runner.run(example).attempted > 2 and not runner.failures

    params = {"kernel": jnp.ones((3, 2), jnp.bfloat16), "bias": jnp.zeros(2)}
    tx = optax.chain(adamr.route_first_moment(centre()), adamr.faithful_second_moment())

    def body(state, seed):
        g = jax.tree.map(
            lambda p: jax.random.normal(jax.random.key(seed), p.shape, p.dtype), params
        )
        step, state = tx.update(g, state, params)
        return state, step

    _, steps = jax.lax.scan(body, tx.init(params), jnp.arange(3))
    assert jax.tree.map(lambda x: (x.shape[1:], x.dtype), steps) == jax.tree.map(
        lambda p: (p.shape, p.dtype), params
    )
    assert all(np.all(np.isfinite(np.float32(x))) for x in jax.tree.leaves(steps))
