"""Every relative link and anchor in README and docs leads somewhere."""

import re
from collections import Counter
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "examples" / "README.md",
    *sorted(p for p in DOCS.rglob("*.md") if "_build" not in p.parts),
]
LINK = re.compile(r"\]\(<?([^()\s>]+)")
ATTRIBUTE = re.compile(r"\b(?:href|src|srcset)=\"([^\"]+)\"")
INCLUDE = re.compile(r"```\{(?:literal)?include\} (\S+)\n((?::.*\n)*)```")


def prose(text):
    """Without code, neither fenced nor in line."""
    text = re.sub(r"^( *)(`{3,}|:{3,}\{).*?^\1\2?`*:* *$", "", text, flags=re.M | re.S)
    return re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "code", text, flags=re.S)


def links(text):
    text = prose(text)
    return [*LINK.findall(text), *ATTRIBUTE.findall(text)]


def anchors(text):
    """The names that the forge and MyST give to headings."""
    text = re.sub(r"^( *)```.*?^\1```", "", text, flags=re.M | re.S)
    seen, found = Counter(), set(re.findall(r"^\(([\w-]+)\)=$", text, flags=re.M))
    for title in re.findall(r"^#{1,6} +(.+?) *#*$", text, flags=re.M):
        title = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title)
        slug = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def broken(page, text):
    for link in links(text):
        path, _, anchor = unquote(link).partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        target = (page.parent / path).resolve() if path else page
        if target.parent == DOCS / "lessons" and target.suffix == ".ipynb":
            # Made of the lesson when the pages are built.
            target = ROOT / "examples" / f"{target.stem}.py"
        if not target.exists():
            yield link
        elif anchor and target.suffix == ".md":
            if anchor not in anchors(text if target == page else target.read_text()):
                yield link


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert not list(broken(page, page.read_text()))


@pytest.mark.smoke
def test_links_are_found_and_followed():
    text = """# One `two`, three

    ## One
    [a](glossary.md#basis) [b](#one-two-three) [![c](no.png)](../README.md)
    [gone](glossary.md#basics), [gone
    too](nowhere.md), `[code](never.md)`, [far](https://example.org/x#y)
    <img src="nothing.png">

    ```python
    [fenced](never.md)
    ```
    """.replace("\n    ", "\n")
    assert anchors(text) == {"one-two-three", "one"}
    found = ["no.png", "glossary.md#basics", "nowhere.md", "nothing.png"]
    assert list(broken(DOCS / "scaling.md", text)) == found


def test_what_pages_include_is_there():
    found = 0
    for page in PAGES:
        for path, options in INCLUDE.findall(page.read_text()):
            text = (page.parent / path).read_text()
            for mark in re.findall(r":(?:start-after|end-before): (.+)", options):
                mark = mark[1:-1] if mark[0] in "\"'" else mark
                before, found_mark, text = text.partition(mark)
                assert found_mark, f"{page.name}: {path} without {mark}"
                found += 1
    assert found >= 10
