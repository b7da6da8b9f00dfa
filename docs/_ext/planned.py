"""Until every page is written: the others are left out of contents and links."""

import re
from pathlib import Path

PLANNED = {"lessons/index"}


def without_what_is_missing(app, docname, source):
    docs = Path(app.srcdir)
    for page in PLANNED:
        if not (docs / f"{page}.md").is_file():
            link = rf"\[([^]]+)\]\((?:\.\./)?{page}\.md(?:#[\w-]+)?\)"
            source[0] = re.sub(link, r"\1", source[0])
            if docname == "index":
                source[0] = re.sub(rf"^{page}\n", "", source[0], flags=re.M)


def setup(app):
    if Path(__file__).with_name("lessons.py").is_file():
        app.setup_extension("lessons")
    app.connect("source-read", without_what_is_missing)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
