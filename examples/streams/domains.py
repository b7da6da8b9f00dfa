"""Domains of text: what one is, how a folder of them is read, how windows are drawn."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from examples.streams.files import visible

HELD_OUT_SHARE = 0.1


class DataError(ValueError):
    """Text that cannot be used; the message is meant for the user."""


@dataclasses.dataclass(frozen=True)
class Domain:
    """One domain's text.

    Attributes:
      name: as in tables and pictures.
      train: training bytes, uint8.
      valid: held-out bytes, uint8.
      source: where it comes from, one line.
      files: names of the files with each part, under the keys "train" and "valid".
    """

    name: str
    train: np.ndarray
    valid: np.ndarray
    source: str
    files: dict[str, list[str]]


def as_bytes(text: str | bytes) -> np.ndarray:
    raw = text.encode() if isinstance(text, str) else text
    return np.frombuffer(raw, np.uint8)


def choose(names: Sequence[str] | None, known: Sequence[str], where: str) -> list[str]:
    """The domains asked for, in that order; all known ones if none are named."""
    if names is None:
        return list(known)
    for name in names:
        if name not in known:
            raise DataError(
                f"--domains: {name!r} is not in {where}, expected some of "
                f"{', '.join(known)}."
            )
    if not names or len(set(names)) < len(names):
        raise DataError(
            f"--domains: got {', '.join(names) or 'nothing'!r}, expected at least one "
            "domain and none twice."
        )
    return list(names)


def load_folder(folder: Path, names: Sequence[str] | None = None) -> list[Domain]:
    """Reads `<domain>.train.txt` + `<domain>.valid.txt`, or `<domain>.txt`.

    The last tenth of a plain `<domain>.txt` is held out. Where both forms are there,
    the pair counts.

    Args:
      folder: holds the files; all others in it are ignored.
      names: domains to read, in the order to learn them; None: all, alphabetically.

    Raises:
      DataError: if the folder is missing or empty, a domain is unknown or incomplete.
    """
    if not folder.is_dir():
        raise DataError(f"--data: got {folder}, expected a folder that exists.")
    files = visible(folder.glob("*.txt"), folder)
    found = sorted({re.sub(r"(\.(train|valid))?\.txt$", "", p.name) for p in files})
    if not found:
        raise DataError(
            f"--data: {folder} has no text, expected files <domain>.train.txt and "
            "<domain>.valid.txt, or <domain>.txt."
        )
    return [_read(folder, name) for name in choose(names, found, f"--data {folder}")]


def _read(folder: Path, name: str) -> Domain:
    pair = {part: folder / f"{name}.{part}.txt" for part in ("train", "valid")}
    lacking = [path.name for path in pair.values() if not path.is_file()]
    plain = folder / f"{name}.txt"
    if lacking and plain.is_file():
        text = as_bytes(plain.read_bytes())
        cut = len(text) - int(len(text) * HELD_OUT_SHARE)
        train, valid = text[:cut], text[cut:]
        files = {"train": [plain.name], "valid": [plain.name]}
        source = f"{plain.name}, last tenth held out"
    elif lacking:
        raise DataError(
            f"--data: domain {name!r} in {folder} lacks {' and '.join(lacking)}, "
            f"expected {name}.train.txt and {name}.valid.txt, or {name}.txt."
        )
    else:
        train, valid = (as_bytes(path.read_bytes()) for path in pair.values())
        files = {part: [path.name] for part, path in pair.items()}
        source = " + ".join(path.name for path in pair.values())
    return Domain(name, train, valid, source, files)


def check_lengths(domains: Sequence[Domain], context: int) -> None:
    """Raises unless every part of every domain fills one window."""
    for domain in domains:
        for part, text in (("train", domain.train), ("valid", domain.valid)):
            if len(text) <= context:
                raise DataError(
                    f"--data: the {part} text of domain {domain.name!r} "
                    f"({', '.join(domain.files[part])}) has {len(text)} bytes, "
                    f"expected at least {context + 1}: one context window and the byte "
                    "after it."
                )


def sample_windows(
    text: np.ndarray, shape: tuple[int, ...], context: int, rng: np.random.Generator
) -> np.ndarray:
    """Windows of `context + 1` bytes at random places: uint8 (*shape, context + 1)."""
    starts = rng.integers(0, len(text) - context, size=shape)
    return text[starts[..., None] + np.arange(context + 1)]


def spaced_windows(text: np.ndarray, count: int, context: int) -> np.ndarray:
    """`count` windows spread evenly over the text, the same for every run."""
    starts = np.linspace(0, len(text) - context - 1, count).astype(int)
    return text[starts[:, None] + np.arange(context + 1)]
