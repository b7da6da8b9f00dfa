"""A newcomer finds everything, and what is private stays in its room.

The layers themselves are contracts of import-linter, in pyproject.toml.
"""

import ast
import json
import pkgutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

import adamr

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path.relative_to(ROOT)
    for package in ("adamr", "benchmarks", "examples")
    for path in (ROOT / package).rglob("*.py")
)


def module_name(path):
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path) for path in FILES}
PUBLIC = sorted(
    name
    for name in MODULES
    if name.startswith("adamr.") and not any(p[0] == "_" for p in name.split("."))
)


def imported(tree):
    """(name it has here, what it is) of each import, inside functions as well."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield (
                    (alias.asname, alias.name)
                    if alias.asname
                    else (
                        alias.name.split(".")[0],
                        alias.name,
                    )
                )
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def dotted(node):
    """`a.b.c` of an attribute, or None."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := dotted(node.value)):
        return f"{owner}.{node.attr}"
    return None


def is_private(name):
    return name.startswith("_") and not name.endswith("__")


def foreign_privates(importer, source):
    """Private names of another room that the module `importer` uses."""
    tree = ast.parse(source)
    names = list(imported(tree))
    used = {what for _, what in names}
    bound = dict(names) | {name: name for name in ("adamr", "benchmarks", "examples")}
    for node in ast.walk(tree):
        first, _, rest = (dotted(node) or "").partition(".")
        if rest and bound.get(first, first) in MODULES:
            used.add(f"{bound[first]}.{rest}")
    found = set()
    for what in used:
        parts = what.split(".")
        for i, part in enumerate(parts):
            owner = ".".join(parts[:i])
            # A private field of a value, `state._replace`, has no module as its owner.
            if is_private(part) and owner in MODULES:
                if not f"{importer}.".startswith(f"{owner}."):
                    found.add(what)
    return sorted(found)


def test_no_private_name_of_another_room_is_used():
    found = {p: foreign_privates(module_name(p), (ROOT / p).read_text()) for p in FILES}
    assert not {str(path): names for path, names in found.items() if names}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from adamr.checkpoint._leaves import read", "adamr.checkpoint._leaves.read"),
        ("from adamr.checkpoint import _leaves", "adamr.checkpoint._leaves"),
        ("def f():\n  from adamr._tree import _x", "adamr._tree._x"),
        ("import adamr.state\nadamr.state._shapes(1)", "adamr.state._shapes"),
        ("from adamr import state as s\ns._shapes(1)", "adamr.state._shapes"),
        ("from adamr import _tree\n_tree.flatten(1)", None),
        ("from adamr.trust import _own", None),
        ("from adamr import Routed\nRouted._fields", None),
    ],
)
def test_a_foreign_private_name_is_found(source, found):
    expected = [] if found is None else [found]
    assert foreign_privates("adamr.trust.region", source) == expected


@pytest.fixture(scope="module")
def alone():
    """What a fresh process sees after `import adamr`."""
    code = (
        "import adamr, functools, json, sys, types\n"
        "def is_module(name):\n"
        "    parts = name.split('.')[1:]\n"
        "    found = functools.reduce(lambda x, p: getattr(x, p, None), parts, adamr)\n"
        "    return isinstance(found, types.ModuleType) and found.__name__ == name\n"
        "lost = [name for name in sys.argv[1:] if not is_module(name)]\n"
        "print(json.dumps({'lost': lost, 'loaded': sorted(sys.modules)}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *PUBLIC],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout)


def test_every_public_module_is_an_attribute_and_none_is_hidden(alone):
    walked = {module.name for module in pkgutil.iter_modules(adamr.__path__, "adamr.")}
    assert walked <= MODULES and len(PUBLIC) > 50
    assert not alone["lost"]


def test_nothing_loads_before_it_is_used(alone):
    assert "jax" in alone["loaded"] and "optax" in alone["loaded"]
    assert not {"flax", "matplotlib", "orbax"} & set(alone["loaded"])


def outside(tree):
    """What a module loads from elsewhere when it is imported."""
    body = ast.Module([node for node in tree.body if "Import" in type(node).__name__])
    packages = {what.split(".")[0] for _, what in imported(body)}
    return packages - set(sys.stdlib_module_names) - {"adamr"}


def test_the_core_needs_jax_and_optax_alone():
    """NumPy comes with JAX."""
    core = [path for path in FILES if path.parts[0] == "adamr"]
    found = {path: outside(ast.parse((ROOT / path).read_text())) for path in core}
    assert set().union(*found.values()) == {"jax", "numpy", "optax"}, found


def test_few_files_lie_beside_the_rooms():
    files = [path.name for path in (ROOT / "adamr").iterdir() if path.is_file()]
    assert len(files) <= 14, files


def test_the_top_level_is_short_and_documented():
    names = {
        name: value
        for name, value in vars(adamr).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert 50 < len(names) <= 75
    for name, value in names.items():
        text = value.__doc__ or ""
        # A NamedTuple without a docstring describes itself as `Name(field, ...)`.
        assert len(text) > 40 and not text.startswith(f"{name}("), name
