"""docs/methods.md says what the code and the tests say."""

import inspect
import re

import pytest

import adamr
from benchmarks._pages import methods


def written():
    """Cells of each row of the page, by the method's name."""
    rows = {}
    for line in methods.PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if cells[0].startswith("`"):
            rows[cells[0].strip("`")] = dict(zip(methods.COLUMNS, cells, strict=True))
    return rows


@pytest.mark.smoke
def public(name):
    """The function of that name: at the top level, in a room, or in a recipe's file."""
    rooms = {**vars(adamr), **vars(adamr.recipes)}
    modules = [x for k, x in rooms.items() if inspect.ismodule(x) and k[0] != "_"]
    return next(getattr(m, name) for m in (adamr, *modules) if hasattr(m, name))


def test_every_method_has_its_row():
    assert list(written()) == list(methods.METHODS)


@pytest.mark.parametrize("name", methods.METHODS)
def test_what_a_row_claims_is_backed_by_tests_that_exist(name):
    row, method = written()[name], methods.METHODS[name]
    kinds, backing = methods.verified(method, set(methods.all_tests()))
    assert row["verified against"] == kinds, "run benchmarks._pages.methods"
    assert re.findall(r"test_\w+", row["tests"]) == backing
    assert row["keeps"] == methods.kept(method.recipe())
    for boundary in method.boundary:
        assert callable(public(boundary))
    assert callable(public(name))


def test_a_test_that_fails_verifies_nothing():
    method = methods.METHODS["gpm"]
    names = {t for tests in methods.tests_of(method).values() for t in tests}
    failed = next(n for n in names if n.startswith("test_t3"))
    kinds, _ = methods.verified(method, names - {failed})
    assert kinds == "authors' code"
    assert methods.verified(method, set()) == ("not verified", [])


@pytest.mark.parametrize("name", ["gpm", "agem", "mudman", "ewc"])
def test_guarantees_are_measured(name):
    """The recipe's column holds, and the probes can fail."""
    method = methods.METHODS[name]
    assert methods.guarantee(method, methods.unsigned(method)) == "holds"
    assert written()[name]["recipe"] == "holds"
    if name != "ewc":
        shared = methods.routed(method, adamr.route_both_moments)
        assert methods.guarantee(method, shared).startswith("broken")
