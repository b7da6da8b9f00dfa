"""docs/methods/ says what the code, the tests and the measurements say."""

import re

import jax
import numpy as np
import pytest

from benchmarks._pages.methods import docstrings, measure, verified, writing
from benchmarks._pages.methods.families import FAMILIES, METHODS
from benchmarks._pages.methods.setting import run

GLOSSARY = writing.FOLDER.parent / "glossary.md"
MEASURED = measure.measured()


@pytest.mark.smoke
def test_the_pages_are_what_the_command_writes():
    pages = writing.pages(MEASURED)
    committed = {p.name: p.read_text() for p in writing.FOLDER.glob("*.md")}
    assert committed == pages, "run python -m benchmarks._pages.methods none"


def test_every_method_has_one_family_and_was_measured():
    assert sum(len(family.methods) for family in FAMILIES.values()) == len(METHODS)
    assert list(MEASURED) == list(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_claims_what_its_tests_back_today(name):
    """What was recorded as passed exists, is all that it names, and its state is so."""
    method, found = METHODS[name], MEASURED[name]
    named = {t for tests in verified.tests_of(method).values() for t in tests}
    assert found.passed == sorted(named)
    assert found.state == measure.state(method.recipe())
    assert set(found.routes) == (
        set(measure.optimizers(method)) if method.promise else set()
    )


@pytest.mark.parametrize("name", METHODS)
def test_the_lines_of_a_method_run(name):
    method = METHODS[name]
    lines = [line for line in method.lines.splitlines() if line.strip()]
    assert 3 <= len(lines) <= 11
    assert docstrings.call(name).rpartition(".")[2] in method.lines
    after = run(method.lines)
    trees = [after[k] for k in ("params", "pairs", "base", "grads")]
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(trees))


def test_a_test_that_fails_verifies_nothing():
    method = METHODS["gpm"]
    names = {t for tests in verified.tests_of(method).values() for t in tests}
    failed = next(n for n in names if n.startswith("test_t3"))
    assert list(verified.verified(method, names - {failed})) == ["the authors' code"]
    assert verified.verified(method, set()) == {}


@pytest.mark.parametrize("name", ["gpm", "agem", "mudman", "ewc"])
def test_promises_are_measured(name):
    """What the pages say is measured again; the probes can fail."""
    method, recorded = METHODS[name], MEASURED[name].routes
    found = measure.routes(method)
    assert found.keys() == recorded.keys()
    for route, number in found.items():
        kept = writing.kept(method, recorded[route])
        assert writing.kept(method, number) == kept
        assert kept or number == pytest.approx(recorded[route], rel=0.2)
    assert writing.kept(method, found["recipe"])
    if name != "ewc":
        assert not writing.kept(method, found["shared"])


def test_links_lead_somewhere():
    headings = {p.name: set() for p in [*writing.FOLDER.glob("*.md"), GLOSSARY]}
    for path in [*writing.FOLDER.glob("*.md"), GLOSSARY]:
        found = re.findall(r"^#+ (.+)$", path.read_text(), flags=re.MULTILINE)
        headings[path.name] = {writing.slug(h) for h in found}
    for path in writing.FOLDER.glob("*.md"):
        for target in re.findall(r"\]\(([^)]+)\)", path.read_text()):
            if target.startswith("https://"):
                continue
            file, _, anchor = target.partition("#")
            where = path.parent / file if file else path
            assert where.exists(), f"{path.name}: {target}"
            assert not anchor or anchor in headings[where.name], (
                f"{path.name}: {target}"
            )


def test_a_method_without_measurements_is_named():
    with pytest.raises(ValueError, match="gpm.* is not measured"):
        writing.pages({})


def test_equations_are_those_of_the_docstring():
    assert docstrings.equations("pcgrad").startswith("g_i <- g_i − min(0, ⟨g_i, g_j⟩")
    assert (
        docstrings.equations("osft").splitlines()[-1].startswith("Δ = (I − P) [m̂ / (√")
    )
    with pytest.raises(ValueError, match="no equations"):
        docstrings.equations("adamp")
