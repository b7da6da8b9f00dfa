"""Default text: eight domains found in the Python installation itself.

Nothing is downloaded and no path is written down: files are found through the metadata
of the packages in the extras (and what they require) and through `sysconfig`. Within a
domain the files are ordered by a hash of their name; the first tenth is held out, the
rest is for training. A paragraph that was met before is dropped, so licences that many
packages repeat do not make held-out text a copy of training text.
"""

import ast
import hashlib
import importlib.metadata
import re
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from examples.streams.domains import HELD_OUT_SHARE, DataError, Domain, as_bytes, choose
from examples.streams.files import visible

PACKAGES = ("flax", "jax", "matplotlib", "optax", "orbax-checkpoint", "rich", "tyro")
DOCUMENTED = ("numpy", "scipy", "matplotlib", "jax")

TRAIN_BYTES = 1_000_000
VALID_BYTES = 100_000
FILE_BYTES = 150_000  # no single file dominates its domain
FEWEST_BYTES = 50_000  # a domain with less training text is skipped
SHORT_PARAGRAPH = 40  # such repeat by chance: `pass`, `</g>`, `#endif`

Files = dict[str, Path]


def packages() -> Iterator[importlib.metadata.Distribution]:
    """The installed packages among `PACKAGES` and all that they require."""
    todo, seen = list(PACKAGES), set()
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        yield found
        needed = [r for r in found.requires or () if "extra ==" not in r]
        todo += [re.match(r"[\w.-]+", r).group() for r in needed]


def package_files() -> dict[str, Path]:
    """Every file that came with the packages, by its path as the package names it."""
    return {
        str(PurePosixPath(file)): Path(package.locate_file(file))
        for package in packages()
        for file in package.files or ()
    }


def standard_library() -> Files:
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "site-packages", "dist-packages", "pydoc_data"}
    left_out |= {"encodings", "idle_test", "__pycache__"}
    return {
        path.relative_to(root).as_posix(): path
        for path in visible(root.rglob("*.py"), root)
        if not left_out & set(path.relative_to(root).parts)
    }


def python_headers() -> Files:
    root = Path(sysconfig.get_path("include"))
    files = visible(root.rglob("*.h"), root)
    return {f"include/{path.relative_to(root).as_posix()}": path for path in files}


def read_docstrings(path: Path) -> str:
    """The docstrings of a module's public parts, as prose."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = ast.walk(ast.parse(path.read_bytes()))
    docs = [ast.get_docstring(n) for n in nodes if isinstance(n, documented)]
    return "\n\n".join(doc for doc in docs if doc and len(doc) > 200)


def read_text(path: Path) -> str:
    text = path.read_bytes().decode()[:FILE_BYTES]
    if "\0" in text:
        raise ValueError(f"{path} is not text")
    return text


class Source(NamedTuple):
    """One domain: what it is, which files belong to it, how and how far to read."""

    about: str
    belongs: Callable[[str], bool]
    read: Callable[[Path], str] = read_text
    more: Callable[[], Files] = dict
    most: int = TRAIN_BYTES + VALID_BYTES


def _ends(*suffixes: str) -> Callable[[str], bool]:
    return lambda name: name.endswith(suffixes)


def _is_documented(name: str) -> bool:
    parts = name.split("/")
    return parts[0] in DOCUMENTED and name.endswith(".py") and "tests" not in parts


def _is_licence(name: str) -> bool:
    last = name.split("/")[-1].upper()
    named = last.startswith(("LICEN", "COPYING", "NOTICE"))
    return ".dist-info/" in name and (named or "/licenses/" in name)


def _is_font_table(name: str) -> bool:
    # The folder `pdfcorefonts` beside it repeats these fonts.
    return "/fonts/afm/" in name and name.endswith(".afm")


def _is_markup(name: str) -> bool:
    endings = ("/METADATA", ".md", ".rst", ".html", ".svg", ".xml")
    return name.endswith(endings) and not _is_licence(name)


SOURCES = {
    "library_docs": Source(
        "docstrings of numpy, scipy, matplotlib and jax",
        _is_documented,
        read_docstrings,
    ),
    "c_headers": Source(
        "C and C++ headers of Python and packages", _ends(".h"), more=python_headers
    ),
    "font_metrics": Source("Adobe font metric tables", _is_font_table),
    "translations": Source("gettext catalogues in thirty languages", _ends(".po")),
    "python": Source(
        "modules of the standard library", lambda name: False, more=standard_library
    ),
    "number_tables": Source("CSV files and data tables", _ends(".csv", ".dat")),
    "licences": Source("licences of the installed packages", _is_licence),
    "markup": Source(
        "package pages in Markdown and reStructuredText, HTML, SVG, XML", _is_markup
    ),
}


def _unseen(text: str, seen: set[str]) -> str:
    """The text without the paragraphs in `seen`, to which its own are added."""
    kept = []
    for paragraph in re.split(r"\n\s*\n", text):
        key = " ".join(paragraph.split())
        if len(key) < SHORT_PARAGRAPH or key not in seen:
            kept.append(paragraph)
            seen.add(key)
    return "\n\n".join(kept) if any(len(p) >= SHORT_PARAGRAPH for p in kept) else ""


def read_files(
    files: Files,
    read: Callable[[Path], str] = read_text,
    most: int = TRAIN_BYTES + VALID_BYTES,
) -> dict[str, str]:
    """Name -> text, in the order of a hash of the names, without what is repeated.

    Unreadable files, and those with nothing new, are left out. Reading stops at `most`
    bytes.
    """
    texts, seen, size = {}, set(), 0
    for name in sorted(files, key=lambda n: hashlib.sha256(n.encode()).hexdigest()):
        try:
            text = _unseen(read(files[name]), seen)
        except (OSError, SyntaxError, ValueError):
            continue
        if text:
            texts[name] = text
            size += len(text.encode())
        if size >= most:
            break
    return texts


def split_texts(texts: dict[str, str]) -> dict[str, dict[str, str]]:
    """The first files up to a tenth of all bytes are held out, the rest is to train on.

    A file larger than what is left of that tenth is to train on.
    """
    sizes = {name: len(text.encode()) for name, text in texts.items()}
    left = min(VALID_BYTES, int(HELD_OUT_SHARE * sum(sizes.values())))
    parts = {"train": {}, "valid": {}}
    for name, text in texts.items():
        part = "valid" if sizes[name] <= left else "train"
        left -= sizes[name] if part == "valid" else 0
        parts[part][name] = text
    return parts


def load_installed(
    names: Sequence[str] | None = None, sources: dict[str, Source] = SOURCES
) -> tuple[list[Domain], list[str]]:
    """Finds the default domains.

    Args:
      names: domains to take, in the order to learn them; None: all.
      sources: what domains there are.

    Returns:
      The domains, and a message for each one this installation has too little text of.
    """
    installed, domains, messages = package_files(), [], []
    for name in choose(names, list(sources), "the default data"):
        source = sources[name]
        own = {file: path for file, path in installed.items() if source.belongs(file)}
        texts = read_files(own | source.more(), source.read, source.most)
        parts = split_texts(texts)
        text = {part: as_bytes("\n".join(parts[part].values())) for part in parts}
        if len(text["train"]) < FEWEST_BYTES or not len(text["valid"]):
            messages.append(
                f"skipped {name} ({source.about}): found {len(text['train'])} bytes to "
                f"train on, expected at least {FEWEST_BYTES}."
            )
            continue
        files = {part: list(parts[part]) for part in parts}
        domains.append(Domain(name, text["train"], text["valid"], source.about, files))
    if not domains:
        raise DataError(
            "--data: this installation has no text for the default domains, expected a "
            "folder of text with --data. " + " ".join(messages)
        )
    return domains, messages
