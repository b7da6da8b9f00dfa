"""Formulas as MathML, which browsers show by themselves: no script, no fonts."""

import re
from xml.etree import ElementTree as Tree

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.errors import ExtensionError

SPACE = "http://www.w3.org/1998/Math/MathML"
Tree.register_namespace("", SPACE)


def accents_on_their_letter(mathml: str) -> str:
    r"""`\hat v_t` as v̂ with an index; docutils puts the index below the letter."""
    root = Tree.fromstring(mathml)
    name = {tag: f"{{{SPACE}}}{tag}" for tag in ("mo", "mover", "msub", "munderover")}
    for node in list(root.iter(name["munderover"])):
        letter, index, accent = node
        if letter.tag != name["mo"]:  # not a sum
            over = Tree.Element(name["mover"], {"accent": "true"})
            over.extend([letter, accent])
            node.tag, node[:] = name["msub"], [over, index]
    return Tree.tostring(root, encoding="unicode")


def rendered(tex: str, block: bool) -> str:
    """MathML of a formula in TeX; `align` and `equation` are allowed in blocks."""
    tex = re.sub(r"\\(begin|end)\{align\*?\}", r"\\\1{aligned}", tex)
    tex = re.sub(r"\\(begin|end)\{equation\*?\}", "", tex)
    try:
        return accents_on_their_letter(tex2mathml(tex.strip(), as_block=block))
    except MathError as error:
        raise ExtensionError(f"MathML cannot show {tex!r}: {error}") from error


def visit_math(translator, node):
    translator.body.append(rendered(node.astext(), block=False))
    raise nodes.SkipNode


def visit_math_block(translator, node):
    formula = rendered(node.astext(), block=True)
    translator.body.append(f'<div class="formula">\n{formula}\n</div>\n')
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
