"""What the commands for TRACE in docs/scaling.md need on each device.

    python -m benchmarks._pages.dry_run [--write]

Runs each of them with `--dry-run`, for the shapes of Llama-2-7B; minutes on two cores.
Needs the extra `llm`.
"""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import tyro

from benchmarks._pages.tables import written

__all__ = ["PAGE", "commands", "output"]

PAGE = Path("docs/scaling.md")
MODEL = "llama-2-7b"


def commands(page: str) -> dict[str, list[str]]:
    """Mesh -> the arguments of `python -m examples.llm` in the page's commands."""
    found = re.findall(r"^python -m examples\.llm ((?:.*\\\n)*.*)$", page, flags=re.M)
    split = [text.replace("\\\n", " ").split() for text in found]
    return {words[words.index("--mesh") + 1]: words for words in split}


def output(arguments: list[str]) -> str:
    """What the command prints with --dry-run, without the times that it takes."""
    words = list(arguments)
    words[words.index("--model") + 1] = MODEL
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "examples.llm",
        *words,
        "--dry-run",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return re.sub(r" \(compiled in .* s\)", "", done.stdout).strip()


@dataclasses.dataclass
class Config:
    """Prints what docs/scaling.md says of the commands for TRACE."""

    write: bool = False
    """Also writes it there."""


def main(config: Config) -> None:
    page = PAGE.read_text()
    for mesh, arguments in commands(page).items():
        told = output(arguments)
        print(f"{told}\n")
        page = written(page, f"dry run of {mesh}", f"```\n{told}\n```")
    if config.write:
        PAGE.write_text(page)


if __name__ == "__main__":
    main(tyro.cli(Config))
