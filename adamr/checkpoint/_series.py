"""The checkpoints of one directory: their names, the newest, those that may go."""

import re
import warnings
from pathlib import Path

from adamr import _files

__all__ = ["found", "new_path", "newest", "retain"]

_NAME = re.compile(r"step-(\d{12,})(?:-(\d+))?")


def found(directory: Path) -> list[tuple[int, int, Path]]:
    """(step, attempt, path) of every checkpoint, good or damaged, newest first."""
    matches = [(_NAME.fullmatch(path.name), path) for path in directory.iterdir()]
    named = [(int(m[1]), int(m[2] or 1), path) for m, path in matches if m]
    return sorted(named, reverse=True)


def newest(directory: Path) -> str | None:
    """The newest that is not damaged; warns of those that are."""
    for _, _, path in found(directory):
        reason = _files.damage(path)
        if reason is None:
            return str(path)
        warnings.warn(f"{path} is damaged and skipped: {reason}.", stacklevel=5)
    return None


def new_path(directory: Path, step: int) -> str:
    """A name for a checkpoint of this step."""
    here = found(directory)
    later = [path for n, _, path in here if n > step and not _files.damage(path)]
    if later:
        raise ValueError(
            f"step is {step}, but there is {later[0]}: restore before saving, or "
            "take another directory."
        )
    attempts = [attempt for n, attempt, _ in here if n == step]
    suffix = f"-{attempts[0] + 1}" if attempts else ""
    return str(directory / f"step-{step:012d}{suffix}")


def retain(directory: Path, keep: int | None) -> None:
    """Removes undamaged checkpoints but for the `keep` newest."""
    here = [path for _, _, path in found(directory)]
    if keep is not None and len(here) > keep:
        good = [path for path in here if not _files.damage(path)]
        for path in good[keep:]:
            _files.remove(path)
