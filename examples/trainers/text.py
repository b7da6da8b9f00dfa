"""What the trainers learn: bytes of text that is installed with Python."""

from typing import NamedTuple

import numpy as np

from examples.streams.text import read_domains, windows

__all__ = ["CONTEXT", "SYMBOLS", "Text", "read_text", "show"]

SYMBOLS = 256
CONTEXT = 32
# The pretrained model knows prose; then it learns code, and after that tables.
NAMES = ("library_docs", "python", "font_metrics")


class Text(NamedTuple):
    """Windows of one kind of text, int32 (count, CONTEXT + 1).

    Attributes:
      name: as it is printed.
      train, held_out: windows to learn, and to measure with.
    """

    name: str
    train: np.ndarray
    held_out: np.ndarray

    def batches(self, steps: int, size: int = 16) -> np.ndarray:
        """The same draws for everybody: (steps, size, CONTEXT + 1)."""
        rng = np.random.default_rng(0)
        return self.train[rng.integers(0, len(self.train), (steps, size))]


def read_text() -> list[Text]:
    """Three texts: general, then two tasks."""
    return [
        Text(
            each.name,
            windows(each.train, CONTEXT).astype(np.int32),
            windows(each.valid, CONTEXT).astype(np.int32)[:128],
        )
        for each in read_domains(None, len(NAMES), NAMES)
    ]


def show(old: Text, new: Text, rows: dict[str, tuple[float, float, float]]) -> None:
    """Prints the old task's loss before and after the new one, and the new one's."""
    print(f"nats per byte      {old.name} before -> after {new.name}    {new.name}")
    for name, (before, after, learned) in rows.items():
        print(f"{name:18} {before:.3f} -> {after:.3f}    {learned:.3f}")
