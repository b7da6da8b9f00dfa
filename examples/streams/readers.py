"""Image data sets in the formats people have them in, as arrays.

Every reader returns `Images` or raises a `DataError` that names the path, what was
found there and what was expected. CIFAR is read by cifar.py, pictures in folders by
folders.py, TFDS by tfds.py, Hugging Face datasets by hub.py; sources.py chooses among
them.
"""

import gzip
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from examples.streams.domains import DataError
from examples.streams.files import listing

MOST_CHANNELS = 4  # of pictures; a larger last axis may be the width
OTHER_RANGE = 10  # parts of one range differ less in their largest pixels


class Images(NamedTuple):
    """A data set as read.

    Attributes:
      x_train: (n, height, width, channels), uint8 or float32, unscaled, finite.
      y_train: int32 (n,), labels from 0, every class of `class_names` among them.
      x_test: as `x_train`, in the same range.
      y_test: as `y_train`.
      class_names: name of each label.
    """

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    class_names: tuple[str, ...]


def need_file(path: Path) -> Path:
    if not path.is_file():
        where = path.parent
        found = listing(where) if where.is_dir() else f"no folder {where}"
        raise DataError(f"{path}: found {found}, expected this file.")
    return path


def _pixels(where: Path | str, part: str, x: np.ndarray) -> np.ndarray:
    """Checked images (n, height, width, channels), uint8 or float32."""
    x = x[..., None] if x.ndim == 3 else x
    if x.ndim != 4 or not x.size or x.dtype.kind not in "buif":
        raise DataError(
            f"{where}: the {part} images have shape {x.shape} and type {x.dtype}, "
            "expected numbers (n, height, width) or (n, height, width, channels) and "
            "at least one image."
        )
    _, first, second, last = x.shape
    if last > MOST_CHANNELS and (first <= MOST_CHANNELS or first < second == last):
        raise DataError(
            f"{where}: the {part} images have shape {x.shape}, which looks like "
            "channels first, expected (n, height, width, channels): store "
            "np.moveaxis(images, 1, -1)."
        )
    if x.dtype == np.uint8:
        return x
    with np.errstate(over="ignore"):
        x = x.astype(np.float32)
    wrong = x.size - np.isfinite(x).sum()
    if wrong:
        images = np.flatnonzero(~np.isfinite(x).all((1, 2, 3)))
        raise DataError(
            f"{where}: {wrong} of the {x.size} pixels of the {part} images are NaN, "
            f"infinite or beyond float32 ({len(images)} images, the first is image "
            f"{images[0]}), expected finite numbers."
        )
    return x


def _labels(where: Path | str, part: str, y: np.ndarray, count: int) -> np.ndarray:
    """Checked labels (count,), int32."""
    y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y  # Keras' CIFAR
    if y.shape != (count,) or y.dtype.kind not in "iu" or y.min() < 0:
        raise DataError(
            f"{where}: the {part} labels have shape {y.shape} and type {y.dtype}, "
            f"expected {count} whole numbers from 0."
        )
    return y.astype(np.int32)


def _check_ranges(where: Path | str, train: np.ndarray, test: np.ndarray) -> None:
    """Raises where one part was scaled and the other was not."""
    ranges = [(float(x.min()), float(x.max())) for x in (train, test)]
    tops = sorted(max(-low, high) for low, high in ranges)
    signs = [low < -0.05 * max(-low, high) for low, high in ranges]
    if tops[1] > OTHER_RANGE * tops[0] or signs[0] != signs[1]:
        told = [f"{low:g} to {high:g}" for low, high in ranges]
        raise DataError(
            f"{where}: train images range from {told[0]} and test images from "
            f"{told[1]}, expected one range: scale both in the same way."
        )


def _check_classes(
    where: Path | str, train: np.ndarray, test: np.ndarray, names: Sequence[str]
) -> None:
    """Raises unless both parts have images of every class."""
    for part, y in (("train", train), ("test", test)):
        lacking = np.setdiff1d(np.arange(len(names)), y)
        if len(lacking):
            told = ", ".join(f"{label} ({names[label]})" for label in lacking[:5])
            more = f" and {len(lacking) - 5} more" * (len(lacking) > 5)
            raise DataError(
                f"{where}: the {part} part has no image of class {told}{more}, "
                f"expected at least one image of each of the {len(names)} classes in "
                "train and in test."
            )


def as_images(
    where: Path | str,
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    class_names: Sequence[str] | None = None,
) -> Images:
    """Checks pixels and labels, and adds the channel axis that grey images lack.

    Raises:
      DataError: for shapes and types that do not fit, channels first, pixels that are
        not finite, parts in different ranges, labels that do not count from 0, and
        classes without images in one of the parts.
    """
    arrays = []
    for part, (x, y) in (("train", train), ("test", test)):
        x = _pixels(where, part, np.asarray(x))
        arrays += [x, _labels(where, part, np.asarray(y), len(x))]
    x_train, y_train, x_test, y_test = arrays
    if x_train.shape[1:] != x_test.shape[1:]:
        raise DataError(
            f"{where}: train images are {x_train.shape[1:]} and test images "
            f"{x_test.shape[1:]}, expected one size."
        )
    _check_ranges(where, x_train, x_test)
    count = int(max(y_train.max(), y_test.max())) + 1
    named = 0 if class_names is None else len(class_names)
    if min(y_train.min(), y_test.min()) == 1 and named < count:
        raise DataError(
            f"{where}: found labels from 1 to {count - 1}, expected labels from 0: "
            "subtract 1 in both parts."
        )
    names = tuple(map(str, range(count) if class_names is None else class_names))
    if len(names) < count:
        raise DataError(
            f"{where}: found label {count - 1} but {len(names)} class names, expected "
            "a name for every label."
        )
    _check_classes(where, y_train, y_test, names)
    return Images(x_train, y_train, x_test, y_test, names)


def read_npz(path: Path) -> Images:
    """`x_train`, `y_train`, `x_test`, `y_test`, and if there `class_names`."""
    keys = ("x_train", "y_train", "x_test", "y_test")
    try:
        # Opened here: NumPy leaves a damaged archive open. Pickles are not allowed.
        with need_file(path).open("rb") as raw, np.load(raw) as file:
            lacking = [key for key in keys if key not in file]
            if lacking:
                raise DataError(
                    f"{path}: found arrays {', '.join(file.files)}, expected also "
                    f"{', '.join(lacking)}."
                )
            x_train, y_train, x_test, y_test = (file[key] for key in keys)
            names = file["class_names"] if "class_names" in file else None
    except DataError:
        raise
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{path}: found a file that NumPy cannot read ({error}), expected an .npz "
            "archive without pickles."
        ) from error
    return as_images(path, (x_train, y_train), (x_test, y_test), names)


def read_idx(path: Path, axes: int) -> np.ndarray:
    """One idx file of unsigned bytes, gzipped or not: uint8 with `axes` axes."""
    raw = need_file(path).read_bytes()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(
                f"{path}: found a damaged or truncated gzip file ({error}), expected a "
                "complete one."
            ) from error
    magic = bytes([0, 0, 8, axes])
    if raw[:4] != magic:
        raise DataError(
            f"{path}: found magic number 0x{raw[:4].hex()}, expected 0x{magic.hex()} "
            f"(an idx file of bytes with {axes} axes)."
        )
    header = 4 + 4 * axes
    if len(raw) < header:
        raise DataError(f"{path}: found {len(raw)} bytes, expected {header} of header.")
    shape = struct.unpack(f">{axes}I", raw[4:header])
    count = int(np.prod(shape, dtype=object))
    if len(raw) - header != count:
        raise DataError(
            f"{path}: found {len(raw) - header} bytes of data, expected {count} for "
            f"the shape {shape} in its header."
        )
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def _idx_path(folder: Path, part: str, what: str) -> Path:
    kind = {"images": "idx3", "labels": "idx1"}[what]
    names = [
        f"{part}-{what}{dot}{kind}-ubyte{end}" for end in (".gz", "") for dot in "-."
    ]
    return next(
        (folder / n for n in names if (folder / n).is_file()), folder / names[0]
    )


def read_idx_folder(folder: Path) -> Images:
    """The four files of MNIST, Fashion-MNIST, KMNIST."""
    train, test = (
        (
            read_idx(_idx_path(folder, part, "images"), 3),
            read_idx(_idx_path(folder, part, "labels"), 1),
        )
        for part in ("train", "t10k")
    )
    return as_images(folder, train, test)


def read_svhn(folder: Path) -> Images:
    """`train_32x32.mat` and `test_32x32.mat`; their label 10 is digit 0."""
    import scipy.io  # comes with JAX

    parts = []
    for part in ("train", "test"):
        path = need_file(folder / f"{part}_32x32.mat")
        try:
            content = scipy.io.loadmat(path)
            x, y = content["X"], content["y"]
        except (KeyError, ValueError, TypeError, OSError, zlib.error) as error:
            raise DataError(
                f"{path}: found a file without readable X and y ({error}), expected "
                "SVHN's cropped digits."
            ) from error
        parts.append((x.transpose(3, 0, 1, 2), y.ravel().astype(np.int32) % 10))
    return as_images(folder, *parts)


def read_digits() -> Images:
    """scikit-learn's 8x8 digits: 1797, of which a fixed fifth of each class is test."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "scikit-learn is not installed, expected it for the embedded digits: "
            "pip install 'adamr-jax[examples]'."
        ) from error
    found = load_digits()
    x, y = found.images.astype(np.uint8), found.target
    train, test = hold_out(y, 0.2)
    return as_images("scikit-learn digits", (x[train], y[train]), (x[test], y[test]))


def hold_out(y: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows to keep and rows to hold out: `share` of every class, the same every time.

    Every class keeps at least one row; a class of one row has none held out.
    """
    rng, held = np.random.default_rng(0), np.zeros(len(y), bool)
    for label in np.unique(y):
        rows = rng.permutation(np.flatnonzero(y == label))
        held[rows[: min(max(1, round(share * len(rows))), len(rows) - 1)]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)
