"""Which folders are tasks, and which of the others might have been meant as one."""

from pathlib import Path

from examples.streams.files import listing, visible

__all__ = ["CL_BENCHMARK", "FILES", "SPLITS", "TRACE", "left_out", "task_folders"]

TRACE = "TRACE folders"
CL_BENCHMARK = "CL_Benchmark folders"

SPLITS = {TRACE: ("train", "eval", "test"), CL_BENCHMARK: ("train", "dev", "test")}
FILES = {f"{split}.json" for splits in SPLITS.values() for split in splits}
DATA = {".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ""}


def task_folders(data: Path) -> list[Path]:
    """Folders with a split, directly in `data` or one level below."""
    inside = [p for p in visible(data.glob("*"), data) if p.is_dir()]
    below = [p for p in visible(data.glob("*/*"), data) if p.is_dir()]
    return [
        folder
        for folder in inside + below
        if any((folder / name).is_file() for name in FILES)
    ]


def _may_be_a_task(path: Path) -> bool:
    """A folder that is empty or has data, or a file of data; not licences."""
    if path.is_file():
        return path.suffix in DATA - {""}
    kinds = {p.suffix for p in path.glob("*")}
    return not kinds or not kinds.isdisjoint(DATA)


def _told(path: Path, data: Path) -> str:
    name = str(path.relative_to(data))
    return f"{name} ({listing(path)})" if path.is_dir() else name


def left_out(data: Path) -> str | None:
    """Files and folders that might have been meant as a task, in one line."""
    tasks = task_folders(data)
    groups = {folder.parent for folder in tasks}
    inside = [p for p in visible(data.glob("*"), data) if p not in groups]
    below = [p for p in visible(data.glob("*/*"), data) if p.parent in groups]
    others = [p for p in inside + below if p not in tasks and _may_be_a_task(p)]
    if not others:
        return None
    named = [_told(p, data) for p in others[:8]]
    more = f" and {len(others) - 8} more" if len(others) > 8 else ""
    return (
        f"{data}: left out, as a task is a folder with one of "
        f"{', '.join(sorted(FILES))}: {', '.join(named)}{more}."
    )
