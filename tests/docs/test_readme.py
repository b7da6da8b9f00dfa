"""The README's lines run, and do what they are there for."""

import re
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

import adamr

README = Path(__file__).parents[2] / "README.md"


def blocks():
    return re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)


def forward(params, x):
    hidden = jax.nn.relu(x @ params["in"])
    return jax.nn.relu(hidden @ params["middle"]) @ params["out"]


def loss(params, batch):
    x, y = batch
    entropy = optax.softmax_cross_entropy_with_integer_labels
    return entropy(forward(params, x), y).mean()


class Task(list):
    """Batches of one permutation of the digits, and some of its inputs."""

    def __init__(self, seed):
        images, labels = load_digits(return_X_y=True)
        rng = np.random.default_rng(seed)
        x = jnp.asarray(images[:, rng.permutation(64)] / 16, jnp.float32)
        y = jnp.asarray(labels)
        self.all, self.some_inputs = (x, y), x[:300]
        draws = rng.integers(0, len(x), (400, 32))
        super().__init__((x[i], y[i]) for i in draws)


def params():
    sizes = {"in": (64, 100), "middle": (100, 100), "out": (100, 10)}
    keys = jax.random.split(jax.random.key(0), len(sizes))
    return {
        name: jax.random.normal(k, shape) * (2 / shape[0]) ** 0.5
        for k, (name, shape) in zip(keys, sizes.items(), strict=True)
    }


def after(code, tasks):
    """The parameters that the README's lines end with."""
    names = {"forward": forward, "loss": jax.jit(loss), "params": params()}
    exec(code, names | {"tasks": tasks, "x": tasks[0].some_inputs}, names)
    return names["params"]


def test_the_first_lines_keep_what_was_learnt():
    """They protect the network that learns: without, task 1 is lost."""
    code, tasks = blocks()[0], [Task(1), Task(2)]
    assert "protect_inputs" in code
    learnt = loss(after(code, tasks[:1]), tasks[0].all)
    kept = loss(after(code, tasks), tasks[0].all)
    unprotected = code.replace(
        "opt_state = adamr.protect_inputs", "_ = adamr.protect_inputs"
    )
    lost = loss(after(unprotected, tasks), tasks[0].all)
    assert learnt < 0.15 < 0.5 < lost
    assert kept < learnt + 0.1 * (lost - learnt)


def test_every_other_line_makes_an_optimizer_that_steps():
    p = params()
    names = {"adamr": adamr, "jax": jax, "optax": optax}
    names["subspace"] = adamr.empty_subspace(p)
    g = jax.tree.map(jnp.ones_like, p)
    for block in blocks()[1:]:
        for statement in re.findall(r"^tx = .*?(?=^tx|\Z)", block, flags=re.S | re.M):
            exec(statement, names)
            tx = names["tx"]
            step, _ = tx.update(g, tx.init(p), p, memory_gradient=g)
            assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(step)), statement


def test_the_read_me_names_what_exists():
    """Every `adamr.name` in README and docs is there."""
    docs = README.parent / "docs"
    pages = [README, *docs.glob("*.md"), *docs.glob("*/*.md")]
    for page in pages:
        for dotted in set(
            re.findall(r"\badamr\.([a-z_]+(?:\.[a-z_]+)*)\b", page.read_text())
        ):
            found = adamr
            for part in dotted.split("."):
                if part == "py":
                    break
                assert hasattr(found, part), f"{page.name}: adamr.{dotted}"
                found = getattr(found, part)


@pytest.mark.smoke
def test_nothing_is_left_unread_without_a_word():
    biased = params() | {"bias": jnp.zeros(10)}

    def with_bias(p, x):
        return forward(p, x) + p["bias"][None]

    axes = adamr.contracted_axes(with_bias, biased, jnp.ones((2, 64)))
    with pytest.warns(UserWarning, match="bias"):
        adamr.empty_subspace(biased, axes=axes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adamr.empty_subspace(biased, axes=axes, unprotected=("bias",))


def test_the_boundary_that_the_evidence_recommends():
    page = (README.parent / "docs" / "evidence" / "index.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    first, rest = code.split("\n", 1)
    p = params()
    names = {"adamr": adamr, "rate": 1e-3, "params": p}
    names["subspace"] = adamr.empty_subspace(p)
    exec(first, names)
    names["state"] = names["tx"].init(p)
    inputs = Task(1).some_inputs
    names["inputs"] = adamr.layer_inputs(forward, p, inputs)
    exec(rest, names)
    g = jax.tree.map(jnp.ones_like, p)
    step, _ = names["tx"].update(g, names["state"], p)
    response = jnp.linalg.norm(inputs @ step["in"]) / jnp.linalg.norm(step["in"])
    assert response < 0.2 * jnp.linalg.norm(inputs) / 8
    covered = adamr.coverage(adamr.get_subspace(names["state"]), p)
    assert all(leaf.reason is None for leaf in covered)
