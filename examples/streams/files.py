"""What lies in a folder."""

from collections.abc import Iterable
from pathlib import Path


def visible(paths: Iterable[Path], below: Path) -> list[Path]:
    """Sorted paths without hidden files and folders, such as the `._*` of macOS."""
    return sorted(
        path
        for path in paths
        if not any(part.startswith(".") for part in path.relative_to(below).parts)
    )


def listing(folder: Path) -> str:
    """What lies in a folder, for messages."""
    names = [p.name + "/" * p.is_dir() for p in visible(folder.iterdir(), folder)]
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (", ".join(names[:8]) or "nothing") + more
