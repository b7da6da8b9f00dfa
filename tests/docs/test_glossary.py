"""docs/glossary.md: sorted, without doubles, and complete for the words we use."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
HEADINGS = re.findall(r"^## (.+)$", PAGE, re.MULTILINE)

# The terms of our own that docstrings of public names use, as they occur there.
TERMS = {
    "anchor": "anchor",
    "batch axes": "batch axis",
    "bases": "basis",
    "boundary": "boundary",
    "capacity": "capacity",
    "complement": "complement",
    "coordinates": "coordinates",
    "decoupled routing": "decoupled routing",
    "direction": "direction",
    "eigenbasis": "eigenbasis",
    "energy": "energy",
    "fan-in": "fan-in",
    "frozen": "frozen space",
    "guard": "guard",
    "importance": "importance",
    "leaf order": "leaf order",
    "leak": "leak",
    "link": "link",
    "mask": "mask",
    "masters": "master",
    "merging link": "merging link",
    "modifier": "modifier",
    "msign": "msign",
    "overlap": "overlap",
    "pairs": "low-rank pair",
    "preconditioner": "preconditioner",
    "protected": "protected subspace",
    "rank": "rank",
    "raw": "first, second, raw",
    "relaxing": "relaxing space",
    "replay": "replay",
    "shared routing": "shared routing",
    "strength": "strength",
    "threshold": "threshold",
    "trusted": "trust region",
}


def public_docstrings():
    """Docstrings of modules, and of the functions and classes that users can import."""
    for path in sorted((ROOT / "adamr").rglob("*.py")):
        module = ast.parse(path.read_text(encoding="utf-8"))
        for node in [module, *module.body]:
            if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef):
                if not getattr(node, "name", "").startswith("_"):
                    yield ast.get_docstring(node) or ""


TEXT = re.sub(r"\s+", " ", " ".join(public_docstrings())).lower()


def test_headings_are_sorted_and_unique():
    assert HEADINGS == sorted(set(HEADINGS), key=str.casefold)


@pytest.mark.parametrize(("word", "heading"), TERMS.items())
def test_the_terms_of_docstrings_are_defined(word, heading):
    assert heading in HEADINGS
    assert re.search(rf"\b{re.escape(word)}\b", TEXT), "no docstring uses it any more"


def test_links_lead_to_headings_of_the_page():
    anchors = {re.sub(r"[^\w\- ]", "", h).replace(" ", "-") for h in HEADINGS}
    assert set(re.findall(r"\]\(#([^)]+)\)", PAGE)) <= anchors


def test_every_entry_has_a_definition():
    entries = re.split(r"^## .+$", PAGE, flags=re.MULTILINE)[1:]
    assert all(len(entry.split()) >= 5 for entry in entries)
