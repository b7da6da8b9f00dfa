"""What docs/_ext makes of docstrings, formulas and links."""

import importlib.util
import re
from pathlib import Path

import pytest

import adamr

ROOT = Path(__file__).parents[2]


def extension(name):
    path = ROOT / "docs" / "_ext" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"docs_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


docstrings = extension("docstrings")

DOC = """The step, `modifier`(g), of *any* one *shape.

With `alpha` times:

    f_t = g − α (g − g̃)

    m_t = f_t

and in code:

    tx = adamr()

Args:
  alpha: in [0, 1]; see
    `Routed`.

Extra argument of `update`:
  memory: a tree.

Returns:
  A link: it keeps
  `params`.

>>> alpha
1

Guarantee: it holds (docs/evidence/how.md; docs/evidence/ has more).

References: Author, Title, arXiv:2103.09762."""

RST = r"""The step, ``modifier``\ (g), of *any* one \*shape.

With ``alpha`` times:

.. code-block:: text

   f_t = g − α (g − g̃)

   m_t = f_t

and in code:

.. code-block:: python

   tx = adamr()

Args:
  alpha: in [0, 1]; see
    :py:obj:`Routed <adamr.Routed>`.

Extra arguments:
  memory: a tree.

:returns: A link: it keeps
   ``params``.

>>> alpha
1

**Guarantee:** it holds (:doc:`/evidence/how`; :doc:`/evidence/index` has more).

:references: Author, Title, `arXiv:2103.09762 <https://arxiv.org/abs/2103.09762>`__.
"""


def test_docstrings_become_rst():
    find = {"Routed": "adamr.Routed"}.get
    assert "\n".join(docstrings.as_rst(DOC.split("\n"), find)) == RST


@pytest.mark.parametrize(
    ("text", "module", "name"),
    [
        ("Routed", "adamr.recipes.gpm", "adamr.Routed"),
        ("adamr.Routed", "adamr.recipes.gpm", "adamr.Routed"),
        ("metrics.forgetting", "adamr.state", "adamr.metrics.forgetting"),
        ("adamr.modifiers", "adamr.state", "adamr.modifiers"),
        (
            "recipes.ogd.ogd_directions",
            "adamr.state",
            "adamr.recipes.ogd.ogd_directions",
        ),
        ("modifiers.project_out", "adamr.state", "adamr.project_out"),
        ("set_fisher", "adamr.modifiers.natural", "adamr.modifiers.set_fisher"),
        ("set_fisher", "adamr.routing.merge", None),
        ("rank", "adamr.subspaces.subspace", None),
        ("optax.adam", "adamr.state", None),
        ("jax", "adamr.state", None),
    ],
)
def test_names_are_found_where_the_reference_has_them(text, module, name):
    assert docstrings.full_name(text, module) == name


def test_defaults_that_are_functions_have_their_name():
    start = adamr.lora.start_task
    shown = "(key, init=<function variance_scaling.<locals>.init>, scaling=1.0)"
    told = "(key, init=he_uniform, scaling=1.0)"
    assert docstrings.with_names(shown, start) == told
    assert docstrings.with_names(told, start) == told


def test_formulas_are_mathml():
    pytest.importorskip("sphinx")
    mathml = extension("mathml")
    block = r"\begin{align*} f &= g \\ m &= \beta m \end{align*}"
    assert mathml.rendered(block, block=True).count("<mtr>") == 2
    assert "<msqrt>" in mathml.rendered(r"\sqrt{v}", block=False)
    hat = re.sub(r">\s+<", "><", mathml.rendered(r"\hat v_t + \sum_i^n x", block=False))
    assert '<msub><mover accent="true"><mi>v</mi>' in hat
    assert '<munderover><mo movablelimits="true">∑</mo><mi>i</mi>' in hat
    with pytest.raises(mathml.ExtensionError, match="nonsense"):
        mathml.rendered(r"\nonsense", block=False)


def test_cells_with_a_phrase_are_marked_in_wide_tables():
    core = pytest.importorskip("docutils.core")
    pytest.importorskip("sphinx")
    phrase = "words enough to fill more than thirty characters"
    rule = f"=====  =====  {'=' * len(phrase)}\n"
    wide = (
        f"{rule}head   two    {phrase.upper()}\n{rule}one    two    {phrase}\n{rule}\n"
    )
    narrow = (
        f"=====  {'=' * len(phrase)}\none    {phrase}\n=====  {'=' * len(phrase)}\n"
    )
    tables = extension("tables")
    tree = core.publish_doctree(wide + narrow)
    tables.MarkPhrases(tree).apply()
    marked = [node for node in tree.findall(tables.nodes.entry) if node["classes"]]
    assert [node.astext() for node in marked] == [phrase]


def test_links_out_of_the_docs_lead_to_the_forge(tmp_path):
    pytest.importorskip("sphinx")
    address = extension("forge").address
    docs = tmp_path / "docs"
    (docs / "evidence").mkdir(parents=True)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "a.py").touch()
    (docs / "evidence" / "cells.html").touch()

    def lead(target):
        page = docs / "evidence" / "index.md"
        return address(target, page, docs, "https://forge/it", "main")

    assert lead("../../tests/a.py#L3") == "https://forge/it/blob/main/tests/a.py#L3"
    assert lead("../../tests") == "https://forge/it/tree/main/tests"
    assert lead("cells.html") == "cells.html"
    assert lead("../glossary.md#basis") is None
    assert lead("https://example.org") is None
    with pytest.raises(FileNotFoundError, match="b.py"):
        lead("../../tests/b.py")
