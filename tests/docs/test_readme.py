"""The README's lines run, its table and picture are of results, and it stays short."""

import contextlib
import io
import json
import re
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from sklearn.datasets import load_digits

import adamr

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")


def code():
    (found,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.S)
    return found


def printed(source):
    """The accuracies that the lines print, and the names that they end with."""
    names, out = {}, io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(source, names)
    return [float(x) for x in out.getvalue().split()], names


@pytest.mark.smoke
def test_it_is_short():
    assert len(TEXT.splitlines()) <= 160
    assert len(TEXT.encode()) <= 9 * 1024
    assert len([line for line in code().splitlines() if line.strip()]) <= 25


def test_its_lines_keep_the_first_task():
    """They print what the page says; without the boundary the first task is lost."""
    (told,) = re.findall(r"^It prints .*?\n\n", TEXT, re.M | re.S)
    learned, kept, lost = (float(x) for x in re.findall(r"\b0\.\d{3}\b", told))
    before, after = printed(code())[0]
    assert (before, after) == pytest.approx((learned, kept), abs=0.02)
    assert code().count("    opt_state = adamr.protect_inputs") == 1
    unprotected = code().replace("opt_state = adamr.protect", "_ = adamr.protect")
    before, after = printed(unprotected)[0]
    assert before == pytest.approx(learned, abs=0.02)
    assert after == pytest.approx(lost, abs=0.1) and after < kept - 0.2


def test_nothing_recompiles():
    _, names = printed(code())
    assert names["update"]._cache_size() == names["gradient"]._cache_size() == 1


USED = re.findall(r"^\| [^|]+ \| ([^|]+) \| [^|]+ \|$", TEXT, re.M)[1:]
CALLS = [call for cell in USED for call in re.findall(r"`([^`]+)`", cell)]


def test_the_table_has_eight_rows():
    assert len(USED) == 8 and CALLS[0] == "optax.adam"
    assert any("muon" in cell for cell in USED) and any("lora" in cell for cell in USED)


@pytest.mark.parametrize("call", [call for call in CALLS if "(" in call])
def test_what_the_table_names_steps(call):
    """Each call makes an optimizer, or the last link of one."""
    params = {"w": jnp.full((4, 3), 0.5)}
    subspace = adamr.make_subspace(params, {"w": jnp.eye(4)[:, :1]})
    given = {"rate": 1e-2, "weight": 0.2, "strength": 1.0, "subspace": subspace}
    tx = eval(call, dict(vars(adamr)) | given)
    if call.startswith("protect_update"):
        tx = optax.chain(optax.adam(1e-2), tx)
    gradient = jax.tree.map(jnp.ones_like, params)
    evidence = {"memory_gradient": gradient}
    if call.startswith("gem"):
        stored = jax.tree.map(lambda g: g[None], gradient)
        evidence = {"memory_gradients": stored}
    tx = optax.with_extra_args_support(tx)
    step, _ = tx.update(gradient, tx.init(params), params, **evidence)
    assert (step["w"][1:] < 0).all()
    if "subspace" in call:
        assert jnp.abs(step["w"][0]).max() < 1e-6
    else:
        assert (step["w"][0] < 0).all()


def test_every_name_without_a_call_is_there():
    for name in (call for call in CALLS if "(" not in call and call != "optax.adam"):
        found = adamr
        for part in name.split("."):
            found = getattr(found, part)


def test_table_and_picture_are_those_of_the_results():
    pytest.importorskip("matplotlib")
    pytest.importorskip("tyro")
    from benchmarks._pages import first_result as page
    from benchmarks._pages.tables import written

    content = json.loads(page.RESULTS.read_text())
    table = page.first_result(content)
    assert written(TEXT, "first result", table) == TEXT, "run benchmarks._pages"
    picture = page.PICTURE.read_text(encoding="utf-8")
    assert page.checksum() in picture, "run benchmarks._pages.first_result"
    assert len(picture.encode()) < 80_000
    assert f"]({page.PICTURE.relative_to(ROOT)})" in TEXT


def test_the_results_are_of_the_command_that_the_page_names():
    """With its defaults of today: methods, rates, sizes and domains."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("tyro")
    import dataclasses

    from benchmarks._pages import first_result as page
    from examples.lm.__main__ import Config
    from examples.lm.methods import DEFAULT, METHODS
    from examples.lm.model import PRESETS
    from examples.streams.installed import SOURCES

    content = json.loads(page.RESULTS.read_text())
    assert f"&& {page.COMMAND}\n" in TEXT and page.COMMAND == content["command"]
    default, config = Config(), content["config"]
    for name in ("method", "seeds", "threshold", "evaluations", "learning_rate"):
        assert config[name] == getattr(default, name), name
    preset = {"name": default.preset, **dataclasses.asdict(PRESETS[default.preset])}
    assert config["preset"] == preset
    assert [domain["name"] for domain in content["domains"]] == list(SOURCES)
    rates = {row["method"]: row["learning_rate"] for row in content["methods"]}
    assert rates == {name: METHODS[name].learning_rate for name in DEFAULT}
    assert "compares eleven methods" in TEXT and len(METHODS) == 11


def test_it_names_what_exists():
    """Every `adamr.name` in README and docs is there."""
    for page in (README, *(ROOT / "docs").rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        for dotted in set(re.findall(r"\badamr\.([a-z_]+(?:\.[a-z_]+)*)\b", text)):
            found = adamr
            for part in dotted.split("."):
                if part == "py":
                    break
                assert hasattr(found, part), f"{page.name}: adamr.{dotted}"
                found = getattr(found, part)


def forward(params, x):
    hidden = jax.nn.relu(x @ params["in"])
    return jax.nn.relu(hidden @ params["middle"]) @ params["out"]


def some_params():
    sizes = {"in": (64, 100), "middle": (100, 100), "out": (100, 10)}
    keys = jax.random.split(jax.random.key(0), len(sizes))
    return {
        name: jax.random.normal(k, shape) * (2 / shape[0]) ** 0.5
        for k, (name, shape) in zip(keys, sizes.items(), strict=True)
    }


@pytest.mark.smoke
def test_nothing_is_left_unread_without_a_word():
    biased = some_params() | {"bias": jnp.zeros(10)}

    def with_bias(p, x):
        return forward(p, x) + p["bias"][None]

    axes = adamr.contracted_axes(with_bias, biased, jnp.ones((2, 64)))
    with pytest.warns(UserWarning, match="bias"):
        adamr.empty_subspace(biased, axes=axes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adamr.empty_subspace(biased, axes=axes, unprotected=("bias",))


def test_the_boundary_that_the_evidence_recommends():
    page = (ROOT / "docs" / "evidence" / "index.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    first, rest = code.split("\n", 1)
    p = some_params()
    names = {"adamr": adamr, "rate": 1e-3, "params": p}
    names["subspace"] = adamr.empty_subspace(p)
    exec(first, names)
    names["state"] = names["tx"].init(p)
    inputs = jnp.asarray(load_digits().data[:300] / 16, jnp.float32)
    names["inputs"] = adamr.layer_inputs(forward, p, inputs)
    exec(rest, names)
    g = jax.tree.map(jnp.ones_like, p)
    step, _ = names["tx"].update(g, names["state"], p)
    response = jnp.linalg.norm(inputs @ step["in"]) / jnp.linalg.norm(step["in"])
    assert response < 0.2 * jnp.linalg.norm(inputs) / 8
    covered = adamr.coverage(adamr.get_subspace(names["state"]), p)
    assert all(leaf.reason is None for leaf in covered)
