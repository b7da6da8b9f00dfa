"""The guides' code cells run, one page per test, and end in what the pages say."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

import adamr

DOCS = Path(__file__).parents[2] / "docs"
GUIDES = (
    "getting_started which_method boundaries own_modifier property_tests resume".split()
)
HEADINGS = re.findall(r"^## (.+)$", (DOCS / "glossary.md").read_text(), re.MULTILINE)
# Those that are seldom used in another meaning.
TERMS = (
    "anchor basis boundary capacity constraint coverage direction eigenbasis energy "
    "fan-in fan-out forgetting guard importance leaf leak mask modifier mutant overlap "
    "penalty preconditioner projection rank recipe replay route strength threshold "
    "two-sided"
).split() + [
    "decoupled routing", "gram matrix", "low-rank pair", "merging link",
    "proximal step", "protected subspace", "shared routing", "shared v",
    "update projection",
]  # fmt: skip


def text(page):
    return (DOCS / f"{page}.md").read_text()


def ran(page):
    """The names that a page's cells end with."""
    names = {"__name__": page}
    fence = re.compile(r"^```\{code-cell\}\n(.*?)^```", re.DOTALL | re.MULTILINE)
    for number, code in enumerate(fence.findall(text(page))):
        exec(compile(code, f"{page}.md, cell {number}", "exec"), names)
    return names


def test_getting_started(capsys):
    names = ran("getting_started")
    assert names["learned"] > 0.88
    assert names["lost"] < names["learned"] - 0.2
    assert names["kept"] > names["learned"] - 0.05
    assert names["accuracy"](names["params"], names["turned"]) > 0.8
    leaks = [float(x) for x in re.findall(r"leak (\S+)", capsys.readouterr().out)]
    assert leaks[0] > 0.1 and leaks[1] < 1e-5


def test_which_method():
    names = ran("which_method")
    forgotten, optimizers = names["forgotten"], names["optimizers"]
    assert forgotten["alike"] < 0.02 and forgotten["different"] > 0.2
    p = names["initial"]
    for name, tx in optimizers.items():
        extra = {"memory_gradient": p, "retain_gradient": p}
        extra["memory_gradients"] = jax.tree.map(lambda x: x[None], p)
        step, _ = tx.update(p, tx.init(p), p, **extra)
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(step)), name


def test_what_wraps_the_optimizer_keeps_the_projection():
    """Each line of the table makes an optimizer without a step in the subspace."""
    _, after = text("which_method").split("## Clipping, schedules", 1)
    table = after.split("\n## ", 1)[0]
    calls = re.findall(r"`((?:optax|adamr)\.\S+\(.*?\))`", table)
    assert len(calls) == 4
    params = {"w": jnp.ones((4, 3))}
    subspace = adamr.make_subspace(params, {"w": jnp.eye(4)[:, :1]})
    gradient = {"w": jnp.arange(1.0, 13.0).reshape(4, 3)}
    given = {"rate": 1e-2, "subspace": subspace, "decay": 1e-2}
    given |= {"adamr": adamr, "optax": optax}

    def trained(tx):
        state = tx.init(params)
        moved = params
        for _ in range(4):
            step, state = tx.update(gradient, state, moved)
            moved = optax.apply_updates(moved, step)
        return moved["w"] - params["w"]

    for call in calls:
        moved = trained(eval(call, given))
        assert jnp.abs(moved[1:]).min() > 1e-4, call
        assert jnp.abs(moved[0]).max() < 1e-6, call
    decay = optax.chain(adamr.gpm(1e-2, subspace), optax.add_decayed_weights(-1e-2))
    assert jnp.abs(trained(decay)[0]).min() > 1e-3


def test_boundaries(capsys):
    names = ran("boundaries")
    told = capsys.readouterr().out
    assert jnp.flatnonzero(names["fired"]).shape == (2,)
    first, second = jnp.flatnonzero(names["fired"])
    assert first < 100 < second
    leaks = names["leaks"]
    assert leaks["keep"] > 0.5 and leaks["project"] < 1e-5 and leaks["reset"] < 1e-5
    assert "with mask: True" in told and "without: False" in told
    assert "the same: True" in told
    by_leaf, whole = re.findall(r"^\[.*\]$", told, re.MULTILINE)
    assert by_leaf == whole
    assert "turned: rank 10 of 10" in told and names["held"] < 0.8
    rank = adamr.state.read_diagnostics(names["ogd_state"])["rank"]
    assert int(rank[0]) == 20
    anchor = adamr.get_anchor(names["ewc_state"])
    assert all(x.any() for x in jax.tree.leaves(anchor.importance))


def test_own_modifier():
    names = ran("own_modifier")
    ratios, leaks = names["ratios"], names["leaks"]
    assert ratios == pytest.approx(
        {"shared": 1, "decoupled": 0.1, "alias": 0.1, "reverse": 10, "SGD": 0.1},
        rel=0.05,
    )
    exact = set(leaks) - {"by hand, shared", "by hand, alias"}
    assert len(exact) == 3
    assert {name for name, leak in leaks.items() if leak < 1e-5} == exact
    assert all(leak > 0.1 for name, leak in leaks.items() if name not in exact)
    assert names["sizes"][True] < 10 < 1e4 < names["sizes"][False]


def test_property_tests(capsys):
    assert all(ran("property_tests")["caught"].values())
    assert "compiled again: 0" in capsys.readouterr().out


def test_resume(capsys):
    names = ran("resume")
    told = capsys.readouterr().out
    assert told.count("the same bits: True") == 2 and "the same losses: True" in told
    assert re.findall(r"120 .* (True|False)", told) == ["True", "True"]
    assert "killed/step-000000000120 is damaged and skipped" in told
    assert "config/learning_rate: 0.001, 0.003" in told
    assert len(names["resumed_metrics"]) == 120


def prose(page):
    """A page without code, headings, links' targets and front matter."""
    found = re.sub(
        r"```.*?```|\A---.*?---|`[^`]*`|<!--.*?-->", "", text(page), flags=re.S
    )
    found = re.sub(r"^#.*$", "", found, flags=re.MULTILINE)
    return re.sub(r"\]\([^)]*\)", "]", found).lower()


@pytest.mark.smoke
@pytest.mark.parametrize("page", GUIDES)
def test_a_guide_has_one_title_and_runs(page):
    assert text(page).startswith("---\nfile_format: mystnb\n")
    outside_code = re.sub(r"```.*?```", "", text(page), flags=re.DOTALL)
    assert len(re.findall(r"^# ", outside_code, re.MULTILINE)) == 1


@pytest.mark.parametrize("page", [*GUIDES, "pretrained"])
def test_terms_of_our_own_are_linked(page):
    links = set(re.findall(r"\]\(glossary\.md#([^)]+)\)", text(page)))
    anchors = {re.sub(r"[^\w\- ]", "", h).replace(" ", "-") for h in HEADINGS}
    assert links <= anchors
    words = re.sub(r"\s+", " ", prose(page))
    used = [t for t in TERMS if re.search(rf"(?<![\w-]){t}s?\b", words)]
    assert {term.replace(" ", "-") for term in used} <= links
