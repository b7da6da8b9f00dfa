"""README, recipes, examples and evidence recommend the same numbers, those measured.

A call that repeats a default, or departs from one without being named here, fails.
"""

import ast
import inspect
import re
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")
pytest.importorskip("tyro")

import adamr
from benchmarks._evidence import benches
from benchmarks._pages.evidence.pages import FOLDER, TEXTS
from benchmarks._pages.evidence.results import read, rows, streams_of
from examples.harness import methods, setting
from examples.lm import methods as lm_methods
from examples.lm import problem as lm_problem
from examples.lm.__main__ import Config as LmConfig
from examples.pod.__main__ import Config as PodConfig
from examples.vision.__main__ import Config as VisionConfig

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "methods").glob("*.md")),
    *(FOLDER / text.name for text in TEXTS),
]
CODE = [
    *sorted((ROOT / "examples").rglob("*.py")),
    *sorted((ROOT / "benchmarks" / "_evidence").rglob("*.py")),
]
# (function, parameter) -> the number that a page gives instead of the default, and why
DEPARTURES = {
    ("consolidate", "decay"): 0.9,  # online EWC; 1 never forgets an older task
    ("er", "weight"): 1 / 6,  # on text; one half is for images
}
DEPARTURES_OF = {  # what a page says of its own kind of model
    "pretrained.md": {("protect_inputs", "threshold"): 0.9},
}
TEXT_THAT_DIFFERS = ("text-low-8", "text-mixed-16", "text-installed")


def calls(source):
    """(name, function, {parameter: node}) of each call of a public function."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name, found = ast.unparse(node.func), None
        if re.fullmatch(r"adamr(\.\w+)+", name):
            found = adamr
            for part in name.split(".")[1:]:
                found = getattr(found, part)
        if not callable(found) or any(isinstance(a, ast.Starred) for a in node.args):
            continue
        named = {k.arg: k.value for k in node.keywords if k.arg is not None}
        bound = inspect.signature(found).bind_partial(*node.args, **named)
        yield name.split(".")[-1], found, bound.arguments


def number(node):
    """The number that a node is; None if it needs a name."""
    try:
        value = eval(compile(ast.Expression(node), "", "eval"), {"__builtins__": {}})
    except Exception:
        return None
    return value if type(value) in (int, float) else None


def numbers(source):
    """(function, parameter, number, default) wherever a default has been overruled."""
    for name, function, arguments in calls(source):
        parameters = inspect.signature(function).parameters
        for key, node in arguments.items():
            if not isinstance(node, ast.expr):  # what **kwargs collects
                continue
            value, default = number(node), parameters[key].default
            if value is not None and type(default) in (int, float):
                yield name, key, value, default


def snippets(page):
    """Code of a page that has calls of the library: blocks, and what is in the text."""
    text = page.read_text()
    blocks = re.findall(r"```(?:python|\{code-cell\})\n(.*?)```", text, re.DOTALL)
    rest = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return [*blocks, *re.findall(r"`(adamr\.\w+\([^`]*\))`", rest)]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_pages_recommend_the_defaults(page):
    expected = DEPARTURES | DEPARTURES_OF.get(page.name, {})
    for code in snippets(page):
        for name, key, value, default in numbers(code):
            assert value == expected.get((name, key), default), f"{name}({key}=)"


def test_the_pages_are_read():
    """The parser above finds what it must find."""
    page = "\n".join(snippets(FOLDER / "index.md"))
    assert ("er", "weight", 1 / 6, 0.5) in list(numbers(page))
    wrong = "adamr.consolidate_si(state, params, 0.1); adamr.si(1e-3, c=0.1)"
    assert [row[:3] for row in numbers(wrong)] == [
        ("consolidate_si", "damping", 0.1),
        ("si", "c", 0.1),
    ]


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_examples_and_evidence_take_the_defaults(path):
    """No example repeats a recipe's number, so none can depart from it unseen."""
    assert list(numbers(path.read_text())) == []


def own(recipe, name):
    return inspect.signature(recipe).parameters[name].default


@pytest.mark.parametrize(
    ("method", "recipe", "name"),
    [
        ("gpm_si", adamr.gpm_si, "c"),
        ("si", adamr.si, "c"),
        ("l2", adamr.l2_sp, "strength"),
        ("mas", adamr.mas, "strength"),
        ("rwalk", adamr.rwalk, "strength"),
        ("gem", adamr.gem, "memory_strength"),
        ("p_mgem", adamr.p_mgem, "memory_strength"),
        ("d_mgem", adamr.d_mgem, "memory_strength"),
        ("er", adamr.er, "weight"),
        ("mofo", adamr.mofo, "share"),
    ],
)
def test_methods_run_the_recipes_default(method, recipe, name):
    assert methods.METHODS[method].coefficient == (name, own(recipe, name))


def test_the_numbers_to_set_are_the_defaults():
    page = (ROOT / "docs" / "which_method.md").read_text()
    rows = re.findall(r"^\| `adamr\.(\w+)` \| `(\w+)` \| (\S+) \|", page, re.MULTILINE)
    assert len(rows) >= 9
    for name, key, told in rows:
        default = own(getattr(adamr, name), key)
        none = default is inspect.Parameter.empty
        assert told == ("none" if none else f"{default:g}"), name


def test_every_coefficient_is_compared():
    """With the recipe's default, or, where it has none, with the guide."""
    ewc = {name for name in methods.METHODS if "ewc" in name}
    guide = (ROOT / "docs" / "which_method.md").read_text()
    (told,) = re.findall(r"adamr\.ewc\(1e-3, strength=([\d.]+)\)", guide)
    for name in ewc:
        assert methods.METHODS[name].coefficient == ("strength", float(told))
    assert own(adamr.ewc, "strength") is inspect.Parameter.empty
    has = {n for n, method in methods.METHODS.items() if method.coefficient}
    tested = "gpm_si si l2 mas rwalk gem p_mgem d_mgem er mofo".split()
    assert has == ewc | set(tested)
    c = lm_methods.METHODS["gpm_si"].coefficient
    assert c == ("c", own(adamr.gpm_si, "c"))
    share = lm_methods.METHODS["mofo"].coefficient
    assert share == ("share", own(adamr.mofo, "share"))


def test_thresholds():
    """One for images, the default of `grow_subspace`, and one for text."""
    assert setting.THRESHOLD == own(adamr.grow_subspace, "threshold") == 0.97
    assert setting.THRESHOLD == own(adamr.protect_inputs, "threshold")
    assert VisionConfig().threshold == setting.THRESHOLD
    assert LmConfig().threshold == PodConfig().threshold == lm_problem.THRESHOLD
    page = (FOLDER / "how.md").read_text()
    assert f"`threshold={lm_problem.THRESHOLD}`" in page
    for name, bench in benches.BENCHES.items():
        text = bench.measure == "loss"
        assert bench.threshold == (lm_problem.THRESHOLD if text else setting.THRESHOLD)
        if name in streams_of("forgetting"):
            measured = read(f"forgetting_{name}")["bench"]
            assert measured["threshold"] == bench.threshold
            assert measured["samples"] == bench.samples


def swept(stream, cell):
    """The coefficient that the sweep of a cell took."""
    return rows("forgetting", stream)[cell]["strength"]


@pytest.mark.parametrize("stream", TEXT_THAT_DIFFERS)
@pytest.mark.parametrize(
    ("cell", "recipe", "name"),
    [
        ("si", adamr.si, "c"),
        ("gpm_si", adamr.gpm_si, "c"),
        ("gem", adamr.gem, "memory_strength"),
        ("gem_mean", adamr.gem, "memory_strength"),
        ("p_mgem_mean", adamr.p_mgem, "memory_strength"),
        ("d_mgem_mean", adamr.d_mgem, "memory_strength"),
    ],
)
def test_defaults_are_what_the_sweeps_took(stream, cell, recipe, name):
    assert swept(stream, f"{cell}/own/adam") == own(recipe, name)


def test_weights_of_replay_are_what_the_sweeps_took():
    """A sweep says how often the memory's loss counts: k is a weight of k / (1 + k)."""
    cell = "replay_1_weighted/own/adam"
    k = swept("permuted-digits", cell)
    assert k / (1 + k) == own(adamr.er, "weight")
    for stream in ("text-low-8", "text-installed"):
        k = swept(stream, cell)
        assert k / (1 + k) == pytest.approx(DEPARTURES["er", "weight"])


def test_all_have_adams_moments():
    """b1, b2 and eps are Adam's in every recipe; MUDMAN's paper has another b2."""
    moments = {"b1": 0.9, "b2": 0.999, "eps": 1e-8}
    recipes = (
        "adamr gpm gpm_si sgp adam_nscl osft trgp rogo ogd ewc online_ewc l2_sp si "
        "mas rwalk er gem p_mgem agem hft"
    )
    for recipe in recipes.split():
        found = {key: own(getattr(adamr, recipe), key) for key in moments}
        assert found == moments, recipe
    assert own(adamr.mudman, "b2") == 0.99
