"""Folders on disk that are complete or absent, and whose damage is detected.

A folder is written under a temporary name, gets a list of SHA-256 sums of its files, is
flushed to disk, and only then gets its name by one rename. A crash leaves only folders
with temporary names, which the next process that holds the lock removes.
"""

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # not a Unix system
    fcntl = None

__all__ = [
    "commit",
    "damage",
    "found",
    "locked",
    "new_path",
    "newest",
    "remove",
    "retain",
    "temporary",
    "unused",
]

_NAME = re.compile(r"step-(\d{12,})(?:-(\d+))?")
SUMS = "SHA256SUMS"  # in the format of `sha256sum -c`
_TEMPORARY = ".adamr-partial-"


def _sum(path: Path) -> str:
    """The SHA-256 sum of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sealed(lines: list[str]) -> str:
    """The lines and a last one with their sum, so that a cut is detected."""
    text = "".join(f"{line}\n" for line in lines)
    return f"{text}# sum of the above {hashlib.sha256(text.encode()).hexdigest()}\n"


def damage(folder: Path) -> str | None:
    """How the folder differs from what was committed; None if every bit is the same.

    Files added after the commit are not read.
    """
    try:
        written = (folder / SUMS).read_bytes().decode()
        lines = written.split("\n")[:-2]
        if written != _sealed(lines):
            return f"{SUMS} is damaged"
        for line in lines:
            digest, name = line.split("  ", 1)
            if _sum(folder / name) != digest:
                return f"{name} does not match its checksum"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(folder)} is missing"
    except (OSError, UnicodeDecodeError) as error:
        return f"cannot be read ({error})"
    return None


def _flush(path: Path) -> None:
    """Writes a file, or the entries of a directory, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def unused(directory: Path) -> Path:
    """A temporary name that nothing in the directory has."""
    return directory / f"{_TEMPORARY}{secrets.token_hex(8)}"


def temporary(directory: Path) -> Path:
    """A new empty folder in the directory, to be committed or removed."""
    folder = unused(directory)
    folder.mkdir()
    return folder


def commit(folder: Path, final: Path) -> None:
    """Gives a temporary folder its sums and, by one rename, its name.

    Args:
      folder: from `temporary`, with all its files.
      final: a path in the same directory that does not exist.
    """
    inside = sorted(folder.rglob("*"))
    files = [path for path in inside if path.is_file()]
    lines = [f"{_sum(path)}  {path.relative_to(folder).as_posix()}" for path in files]
    (folder / SUMS).write_bytes(_sealed(lines).encode())
    for path in [*inside, folder / SUMS, folder]:
        _flush(path)
    os.rename(folder, final)
    _flush(final.parent)


def remove(folder: Path) -> None:
    """Removes a folder, under a temporary name in case of a crash half-way."""
    grave = unused(folder.parent)
    os.rename(folder, grave)
    shutil.rmtree(grave, ignore_errors=True)


def _lock(file: IO[str]) -> bool:
    """Takes the lock until the process ends; whether the system has such locks.

    Record locks, unlike flock, are not inherited by forked workers that live longer.
    """
    if fcntl is None:
        return False
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise RuntimeError(
            f"{Path(file.name).parent} is in use: another process saves there. Wait "
            "for it to end, or use another directory."
        ) from error
    except OSError:  # a file system without locks
        return False
    return True


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Makes the directory and keeps other processes out during the block.

    Raises:
      OSError: if the directory cannot be made or written.
      RuntimeError: if another process uses it.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = open(directory / ".adamr-lock", "a")
    except FileExistsError as error:
        raise NotADirectoryError(f"{directory} is a file, not a directory.") from error
    except OSError as error:
        raise type(error)(
            error.errno, f"cannot write into the directory: {error.strerror}", directory
        ) from error
    with file:
        if _lock(file):
            for left in directory.glob(f"{_TEMPORARY}*"):
                shutil.rmtree(left, ignore_errors=True)
        yield


def found(directory: Path) -> list[tuple[int, int, Path]]:
    """(step, attempt, path) of every checkpoint, damaged or not, newest first."""
    matches = [(_NAME.fullmatch(path.name), path) for path in directory.iterdir()]
    named = [(int(m[1]), int(m[2] or 1), path) for m, path in matches if m]
    return sorted(named, reverse=True)


def newest(directory: Path) -> str | None:
    """The newest checkpoint that is not damaged; warns of newer ones that are."""
    for _, _, path in found(directory):
        reason = damage(path)
        if reason is None:
            return str(path)
        warnings.warn(f"{path} is damaged and skipped: {reason}.", stacklevel=5)
    return None


def new_path(directory: Path, step: int) -> str:
    """A name for a checkpoint of this step."""
    here = found(directory)
    later = [path for n, _, path in here if n > step and not damage(path)]
    if later:
        raise ValueError(
            f"step is {step}, expected at least that of {later[0]}: restore before "
            "saving, or use another directory."
        )
    attempts = [attempt for n, attempt, _ in here if n == step]
    suffix = f"-{attempts[0] + 1}" if attempts else ""
    return str(directory / f"step-{step:012d}{suffix}")


def retain(directory: Path, keep: int | None) -> None:
    """Removes all undamaged checkpoints except the `keep` newest; None keeps all."""
    here = [path for _, _, path in found(directory)]
    if keep is not None and len(here) > keep:
        good = [path for path in here if not damage(path)]
        for path in good[keep:]:
            remove(path)
