"""Markdown tables, and pages that carry them between two marks."""

import re

__all__ = ["table", "written"]


def table(heads: list[str], rows: list[list[str]]) -> str:
    """Markdown; all columns but the first are numbers."""
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (heads, rule, *rows))


def written(page: str, name: str, content: str) -> str:
    """The page with what is between the marks of this name replaced."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)"
    put = lambda marks: f"{marks[1]}\n{content}\n\n{marks[2]}"  # noqa: E731
    page, found = re.subn(pattern, put, page, flags=re.S)
    if found != 1:
        raise ValueError(f"the page has {found} tables {name}, expected one.")
    return page
