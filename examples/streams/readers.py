"""Image data sets in the formats people have them in, as arrays.

Every reader returns `Images` or raises a `DataError` that names the path, what was
found there and what was expected. Pictures in folders are read by folders.py, TFDS by
tfds.py, Hugging Face datasets by hub.py; sources.py chooses among them.
"""

import gzip
import pickle
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from examples.streams.domains import DataError


class Images(NamedTuple):
    """A data set as read.

    Attributes:
      x_train: (n, height, width, channels), uint8 or float32, unscaled.
      y_train: int32 (n,), labels from 0.
      x_test: as `x_train`.
      y_test: as `y_train`.
      class_names: name of each label.
    """

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    class_names: tuple[str, ...]


def listing(folder: Path) -> str:
    """What lies in a folder, for messages."""
    names = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir())
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (", ".join(names[:8]) or "nothing") + more


def need_file(path: Path) -> Path:
    if not path.is_file():
        where = path.parent
        found = listing(where) if where.is_dir() else f"no folder {where}"
        raise DataError(f"{path}: found {found}, expected this file.")
    return path


def as_images(
    where: Path | str,
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    class_names: Sequence[str] | None = None,
) -> Images:
    """Checks shapes and labels, and adds the channel axis that grey images lack."""
    arrays = []
    for part, (x, y) in (("train", train), ("test", test)):
        x, y = np.asarray(x), np.asarray(y)
        x = x[..., None] if x.ndim == 3 else x
        if x.ndim != 4 or not x.size:
            raise DataError(
                f"{where}: the {part} images have shape {x.shape}, expected (n, "
                "height, width) or (n, height, width, channels) and at least one image."
            )
        y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y  # Keras' CIFAR
        if y.shape != x.shape[:1] or y.dtype.kind not in "iu" or y.min() < 0:
            raise DataError(
                f"{where}: the {part} labels have shape {y.shape} and type {y.dtype}, "
                f"expected {len(x)} whole numbers from 0."
            )
        x = x if x.dtype == np.uint8 else x.astype(np.float32)
        arrays += [x, y.astype(np.int32)]
    if arrays[0].shape[1:] != arrays[2].shape[1:]:
        raise DataError(
            f"{where}: train images are {arrays[0].shape[1:]} and test images "
            f"{arrays[2].shape[1:]}, expected one size."
        )
    count = int(max(arrays[1].max(), arrays[3].max())) + 1
    names = tuple(map(str, range(count) if class_names is None else class_names))
    if len(names) < count:
        raise DataError(
            f"{where}: found label {count - 1} but {len(names)} class names, expected "
            "a name for every label."
        )
    return Images(*arrays, names)


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


_BROKEN = (
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    ImportError,
    IndexError,
    KeyError,
    TypeError,
    ValueError,
)


class _ArraysOnly(pickle.Unpickler):
    """A pickle can run any code: this one may build NumPy arrays and nothing else."""

    def find_class(self, module: str, name: str):
        core = {"numpy.core.multiarray", "numpy._core.multiarray"}
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            # CIFAR's files hold dtype("u1", 0, 1), at which NumPy 2.4.0 to 2.4.4 warn.
            return lambda code, align, copy: np.dtype(code, bool(align), bool(copy))
        if module in core and name == "_reconstruct":
            return np._core.multiarray._reconstruct
        if (module, name) == ("_codecs", "encode"):
            return lambda text, encoding: text.encode(encoding)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _unpickle(path: Path, keys: Sequence[bytes]) -> dict:
    try:
        with need_file(path).open("rb") as file:
            content = _ArraysOnly(file, encoding="bytes").load()
    except _BROKEN as error:
        raise DataError(
            f"{path}: found a file that is no pickle of arrays ({error}), expected a "
            "complete CIFAR python pickle."
        ) from error
    found = sorted(map(repr, content)) if isinstance(content, dict) else [type(content)]
    if not isinstance(content, dict) or not set(keys) & set(content):
        raise DataError(
            f"{path}: found {', '.join(map(str, found))}, expected "
            f"{' or '.join(k.decode() for k in keys)}."
        )
    return content


def read_cifar(folder: Path) -> Images:
    """`cifar-100-python` (fine labels) or `cifar-10-batches-py`, extracted."""
    fine = (folder / "train").exists() or not (folder / "data_batch_1").exists()
    batches = ["train"] if fine else [f"data_batch_{i}" for i in range(1, 6)]
    label, names = (
        (b"fine_labels", b"fine_label_names") if fine else (b"labels", b"label_names")
    )

    def part(files):
        parts = [_unpickle(folder / file, [label]) for file in files]
        for file, content in zip(files, parts, strict=True):
            shape = np.shape(content.get(b"data"))
            if len(shape) != 2 or shape[1] != 3072 or len(content[label]) != shape[0]:
                raise DataError(
                    f"{folder / file}: found data of shape {shape} and "
                    f"{len(content[label])} labels, expected (n, 3072) and n."
                )
        data = np.concatenate([content[b"data"] for content in parts])
        labels = np.concatenate([np.asarray(content[label]) for content in parts])
        return data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels

    train, test = part(batches), part(["test" if fine else "test_batch"])
    meta = folder / ("meta" if fine else "batches.meta")
    found = _unpickle(meta, [names])[names] if meta.exists() else None
    found = None if found is None else [name.decode() for name in found]
    return as_images(folder, train, test, found)


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
