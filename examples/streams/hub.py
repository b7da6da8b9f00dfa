"""Hugging Face datasets, where the package `datasets` is installed."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from examples.streams.domains import DataError
from examples.streams.folders import TEST_NAMES, both_parts, decode, library
from examples.streams.readers import Images


def read_huggingface(
    source: Path | str, size: int | None = None, per_class: int | None = None
) -> Images:
    """A Hugging Face dataset: a folder of `save_to_disk`, or a name for `load_dataset`.

    Takes the columns `image` or `img`, and `label` or `fine_label`. Arguments as in
    `read_image_folder`.
    """
    splits = load_huggingface(source)

    def part(names, most):
        data = next((splits[name] for name in names if name in splits), None)
        if data is None:
            raise DataError(
                f"{source}: found splits {', '.join(splits)}, expected "
                f"{' or '.join(names)}."
            )
        columns = []
        for options in (("image", "img"), ("label", "fine_label")):
            column = next((c for c in options if c in data.column_names), None)
            if column is None:
                raise DataError(
                    f"{source}: found columns {', '.join(data.column_names)}, expected "
                    f"{' or '.join(options)}."
                )
            columns.append(column)
        x, y, taken = [], [], {}
        for index, label in enumerate(data[columns[1]]):
            taken[label] = taken.get(label, 0) + 1
            if taken[label] <= (most or math.inf):
                x.append(_pixels(data[index][columns[0]], f"{source}, {index}", size))
                y.append(label)
        names = getattr(data.features[columns[1]], "names", None)
        return (x, y), names

    train, names = part(["train"], per_class)
    test, _ = part(TEST_NAMES, None)
    return both_parts(source, train, test, names)


def _pixels(value: Any, where: str, size: int | None) -> np.ndarray:
    """A Pillow picture or nested lists of numbers, as `decode` returns it."""
    if hasattr(value, "save"):
        return decode(value, where, size)
    pixels = np.asarray(value)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def load_huggingface(source: Path | str) -> Any:
    """Its splits: a mapping of names to datasets."""
    datasets = library("datasets", "datasets", "to read Hugging Face datasets")
    try:
        if isinstance(source, Path):
            splits = datasets.load_from_disk(str(source))
        else:
            splits = datasets.load_dataset(source)
    except Exception as error:  # its errors are of many kinds
        raise DataError(
            f"{source}: found what `datasets` cannot load ({error}), expected a data "
            "set with the splits train and test."
        ) from error
    if not hasattr(splits, "keys"):
        raise DataError(
            f"{source}: found one split, expected the splits train and test."
        )
    return splits
