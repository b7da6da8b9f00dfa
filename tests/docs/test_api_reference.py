"""No public name is missing from the reference, and none is there that does not exist.

Public is what a room exports: the names in its `__init__.py`, and the `__all__` of
modules that it exports or that lie beside the rooms. What else a room's files share
with other rooms is not promised to users.
"""

import ast
import importlib
import pkgutil
import re
import types
from pathlib import Path

import pytest

import adamr

API = Path(__file__).parents[2] / "docs" / "api"
MODULES = sorted(
    module.name
    for module in pkgutil.iter_modules(adamr.__path__)
    if not module.name.startswith("_")
)
TOP = {
    name: value
    for name, value in vars(adamr).items()
    if not name.startswith("_") and not isinstance(value, types.ModuleType)
}


def exported(module):
    """Name -> value of `from … import name as name` in a room's `__init__.py`."""
    tree = ast.parse(Path(module.__file__).read_text())
    imports = (node for node in tree.body if isinstance(node, ast.ImportFrom))
    names = [alias.asname for node in imports for alias in node.names]
    return {name: getattr(module, name) for name in names if name}


def public(name):
    """Full name -> value of all that a module of adamr promises."""
    module = importlib.import_module(name)
    if hasattr(module, "__all__"):
        return {f"{name}.{each}": getattr(module, each) for each in module.__all__}
    if not hasattr(module, "__path__"):
        return {}  # shared by the room's files
    found = {}
    for each, value in exported(module).items():
        if isinstance(value, types.ModuleType):
            found |= public(value.__name__)
        else:
            found[f"{name}.{each}"] = value
    return found


def documented(page):
    return re.findall(r"^\.\. auto(?:function|class|data):: (\S+)$", page, flags=re.M)


def resolved(name):
    """The value of `adamr.room.name`, where a function may be called as its module."""
    owner, _, last = name.rpartition(".")
    return getattr(importlib.import_module(owner), last)


@pytest.mark.smoke
@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_has_its_place(module):
    """Under its top-level name, if it has one."""
    promised = public(f"adamr.{module}")
    assert promised, module
    expected = set()
    for name, value in promised.items():
        last = name.rpartition(".")[2]
        expected.add(f"adamr.{last}" if TOP.get(last) is value else name)
    names = documented((API / f"{module}.md").read_text())
    assert len(names) == len(set(names))
    assert expected <= set(names), f"docs/api/{module}.md lacks {expected - set(names)}"


@pytest.mark.parametrize("module", MODULES)
def test_what_the_reference_names_exists(module):
    page = (API / f"{module}.md").read_text()
    assert page.startswith(f"# `adamr.{module}`\n")
    for name in documented(page):
        assert resolved(name) is not None
        last = name.rpartition(".")[2]
        assert name.startswith(f"adamr.{module}.") or name == f"adamr.{last}"
    for name in re.findall(r"^\.\. automodule:: (\S+)$", page, flags=re.M):
        assert importlib.import_module(name).__doc__


def groups(text, pattern):
    """Heading or comment -> the names below it."""
    found = {}
    for line in text.splitlines():
        if line.startswith(("# ", "## ")):
            found[line] = []
        elif found and (name := re.fullmatch(pattern, line)):
            found[list(found)[-1]].append(name[1])
    return {frozenset(names) for names in found.values() if names}


def test_the_index_has_the_top_level_in_the_groups_of_the_package():
    index = (API / "index.md").read_text()
    source = Path(adamr.__file__).read_text()
    listed = groups(index.split("## Modules")[0], r" {3}(\w+)")
    assert set().union(*listed) == set(TOP)
    assert sum(map(len, listed)) == len(TOP)
    imported = groups(source, r"from adamr\.[\w.]+ import (\w+) as \1")
    assert listed == imported


def test_the_index_leads_to_every_module():
    index = (API / "index.md").read_text()
    rows = re.findall(r"^\| \[`adamr\.(\w+)`\]\(\1\.md\) \| .+ \|$", index, flags=re.M)
    contents = index.split("```{toctree}\n:hidden:\n\n")[1].split("```")[0].split()
    assert sorted(rows) == sorted(contents) == MODULES
    assert {path.stem for path in API.glob("*.md")} == {*MODULES, "index"}


def test_a_missing_name_is_found():
    page = (API / "plateau.md").read_text()
    name = "adamr.plateau.plateau_detector"
    assert name in documented(page) and name in public("adamr.plateau")
    assert name not in documented(page.replace(f":: {name}\n", ":: other\n"))
