"""Relative links that lead to other things than pages of Markdown.

[a test](../tests/test_rooms.py)    out of docs/: to the repository on the forge
[all cells](cells.html)             a page that is HTML already: copied as it is
"""

import shutil
from pathlib import Path
from urllib.parse import urldefrag

from docutils import nodes
from sphinx import addnodes
from sphinx.transforms import SphinxTransform


def address(target: str, page: Path, docs: Path, root: str, branch: str) -> str | None:
    """Where a relative link of a page leads; None if Sphinx knows better.

    Raises:
      FileNotFoundError: for a link out of docs/ to what does not exist.
    """
    path, fragment = urldefrag(target)
    if not path or "://" in path:
        return None
    found = (page.parent / path).resolve()
    if found.is_relative_to(docs):
        return target if found.suffix == ".html" and found.is_file() else None
    if not found.exists():
        raise FileNotFoundError(f"{page}: {target}")
    kind = "tree" if found.is_dir() else "blob"
    url = f"{root}/{kind}/{branch}/{found.relative_to(docs.parent)}"
    return f"{url}#{fragment}" if fragment else url


class ForgeLinks(SphinxTransform):
    default_priority = 5  # before anything looks for the file among the pages

    def apply(self):
        page, docs = Path(self.document["source"]), Path(self.app.srcdir)
        config = self.config.forge_root, self.config.forge_branch
        links = (addnodes.pending_xref, addnodes.download_reference)
        for link in list(self.document.findall(lambda node: isinstance(node, links))):
            if link.get("reftype") != "myst":
                continue
            target = link["reftarget"]
            if link.get("refdomain") == "doc":  # MyST has taken the suffix off
                target = str((docs / target).with_suffix(".md"))
            url = address(target, page, docs, *config)
            if url:
                text = [child.deepcopy() for child in link.children]
                new = nodes.reference("", "", *text, refuri=url, internal=False)
                link.replace_self(new)


def copy_pages(app, error):
    """Pages of HTML go where they are linked to."""
    docs, out = Path(app.srcdir), Path(app.outdir)
    if error or app.builder.format != "html":
        return
    for page in docs.rglob("[!_]*.html"):
        place = page.relative_to(docs)
        if not place.parts[0].startswith("_"):
            (out / place.parent).mkdir(parents=True, exist_ok=True)
            shutil.copy(page, out / place)


def setup(app):
    app.add_config_value("forge_root", None, "env", str)
    app.add_config_value("forge_branch", "main", "env", str)
    app.add_transform(ForgeLinks)
    app.connect("build-finished", copy_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
