"""Cells of wide tables that hold a phrase are marked, so that a phone keeps them wide.

A table of three columns or more scrolls on a phone anyway. Without a least width its
text would be set in columns of one word.
"""

from typing import Any

from docutils import nodes
from sphinx.transforms import SphinxTransform

COLUMNS, CHARACTERS = 3, 30


class MarkPhrases(SphinxTransform):
    default_priority = 900  # when links have their text

    def apply(self, **kwargs: Any) -> None:
        for body in self.document.findall(nodes.tbody):
            if body.parent["cols"] >= COLUMNS:
                for cell in body.findall(nodes.entry):
                    if len(cell.astext()) >= CHARACTERS:
                        cell["classes"].append("phrase")


def setup(app: Any) -> dict[str, bool]:
    app.add_transform(MarkPhrases)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
