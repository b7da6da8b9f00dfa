"""The tests that back a method, by what they compare it with.

test_t<n>_...            closed forms
..._float64_twin...      the same equations again, in float64, without the library
test_parity_<name>       what the authors' own code computed
"""

import ast
import functools
import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from benchmarks._pages.methods.method import Method

__all__ = ["all_tests", "passing", "tests_of", "verified"]

ROOT = Path(__file__).parents[3]


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
    """What a method is compared with -> names of the tests."""
    names = all_tests()
    closed = [
        name
        for known in method.closed_forms
        for name in names
        if name == known or re.match(rf"test_t{known}_", name)
    ]
    kinds = {
        "closed forms": [name for name in closed if "float64_twin" not in name],
        "a twin in float64": [name for name in closed if "float64_twin" in name],
        "the authors' code": [
            name
            for name in (f"test_parity_{p}" for p in method.parity)
            if name in names
        ],
    }
    return {kind: tests for kind, tests in kinds.items() if tests}


def verified(method: Method, passed: Iterable[str]) -> dict[str, list[str]]:
    """What a page may claim, and the tests that back it: all of a kind must pass."""
    passed = set(passed)
    return {k: tests for k, tests in tests_of(method).items() if set(tests) <= passed}


class _Outcomes:
    """A pytest plugin that remembers which test functions passed in every case."""

    def __init__(self) -> None:
        self.passed: dict[str, bool] = {}

    def pytest_runtest_logreport(self, report) -> None:
        name = report.nodeid.split("::")[-1].split("[")[0]
        self.passed[name] = self.passed.get(name, True) and report.passed


def passing(methods: Iterable[Method]) -> set[str]:
    """Runs every test that the methods name; those that passed."""
    names = {t for m in methods for ts in tests_of(m).values() for t in ts}
    where = sorted({f"{all_tests()[n]}::{n}" for n in names})
    outcomes = _Outcomes()
    options = ["-q", "-p", "no:xdist", "-o", "addopts=--import-mode=importlib"]
    options += ["--rootdir", str(ROOT)]
    pytest.main([*options, *where], plugins=[outcomes])
    return {name for name, passed in outcomes.passed.items() if passed}
