"""Equations and papers of a method, from its docstring."""

import importlib
import inspect
import re
from typing import Any

import adamr

__all__ = ["call", "equations", "linked", "named", "papers", "references"]

ARXIV, ADDRESS = r"arXiv:(\d{4}\.\d{4,5})", r"https://[^\s,;)]*[^\s,;).]"
SECTIONS = r"^(Args|Extra arguments? of `update`|Returns|Raises|References)\b|^>>>"


def named(name: str) -> Any:
    """The public function: dotted, or at the top level, in a room or in a recipe."""
    if "." in name:
        module, _, last = name.rpartition(".")
        return getattr(importlib.import_module(module), last)
    rooms = {**vars(adamr), **vars(adamr.recipes)}
    modules = [x for k, x in rooms.items() if inspect.ismodule(x) and k[0] != "_"]
    return next(getattr(m, name) for m in (adamr, *modules) if hasattr(m, name))


def call(name: str) -> str:
    """How users write the name of the function."""
    if hasattr(adamr, name):
        return f"adamr.{name}"
    rooms = {
        **vars(adamr),
        **{f"recipes.{k}": x for k, x in vars(adamr.recipes).items()},
    }
    found = [k for k, x in rooms.items() if inspect.ismodule(x) and hasattr(x, name)]
    return f"adamr.{next(k for k in found if not k.startswith('_'))}.{name}"


def equations(name: str) -> str:
    """The first indented block before Args, Returns and what else has a heading."""
    text = inspect.getdoc(named(name)) or ""
    head = re.split(SECTIONS, text, maxsplit=1, flags=re.MULTILINE)[0]
    for block in head.split("\n\n"):
        lines = block.strip("\n").split("\n")
        if all(line.startswith("    ") for line in lines):
            return "\n".join(line[4:] for line in lines)
    raise ValueError(f"the docstring of {name} has no equations")


def references(name: str) -> str:
    """What the docstring lists under References, as one paragraph."""
    text = inspect.getdoc(named(name)) or ""
    found = re.search(r"^References:(.*)\Z", text, flags=re.MULTILINE | re.DOTALL)
    if found is None:
        raise ValueError(f"the docstring of {name} has no references")
    return re.sub(r"\s+", " ", found[1]).strip()


def linked(text: str) -> str:
    """Markdown with links for arXiv numbers and addresses."""
    text = re.sub(ADDRESS, r"<\g<0>>", text)
    return re.sub(ARXIV, r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def papers(name: str) -> list[str]:
    """Links to the papers, the arXiv number as text; or to where it was published."""
    text = references(name)
    numbers = re.findall(ARXIV, text)
    if numbers:
        return [f"[{n}](https://arxiv.org/abs/{n})" for n in numbers]
    return [f"[web page]({a})" for a in re.findall(ADDRESS, text)[:1]]
