"""Links out of docs/ lead to the repository: `[a test](../tests/test_rooms.py)`."""

from pathlib import Path
from urllib.parse import urldefrag

from docutils import nodes
from sphinx import addnodes
from sphinx.transforms import SphinxTransform


def address(target: str, page: Path, docs: Path, root: str, branch: str) -> str | None:
    """Where a relative link of a page leads on the forge; None within docs/.

    Raises:
      FileNotFoundError: if nothing is there.
    """
    path, fragment = urldefrag(target)
    if not path or "://" in path:
        return None
    found = (page.parent / path).resolve()
    if found.is_relative_to(docs):
        return None
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
            if link.get("refdomain"):
                continue
            url = address(link["reftarget"], page, docs, *config)
            if url:
                text = [child.deepcopy() for child in link.children]
                new = nodes.reference("", "", *text, refuri=url, internal=False)
                link.replace_self(new)


def setup(app):
    app.add_config_value("forge_root", None, "env", str)
    app.add_config_value("forge_branch", "main", "env", str)
    app.add_transform(ForgeLinks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
