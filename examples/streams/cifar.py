"""CIFAR's python pickles, without running what a pickle asks for."""

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from examples.streams.domains import DataError
from examples.streams.readers import Images, as_images, need_file

BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))

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


def _dtype(code: Any, align: Any, copy: Any) -> np.dtype:
    """CIFAR's files hold dtype("u1", 0, 1), at which NumPy 2.4.0 to 2.4.4 warn."""
    return np.dtype(code, bool(align), bool(copy))


def _scalar(dtype: np.dtype, raw: bytes) -> Any:
    return np.frombuffer(raw, dtype)[0]


def _from_buffer(raw: Any, dtype: np.dtype, shape: Any, order: str) -> np.ndarray:
    """How protocol 5 stores an array."""
    return np.frombuffer(raw, dtype).reshape(shape, order=order)


_ALLOWED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _dtype,
    ("multiarray", "_reconstruct"): np._core.multiarray._reconstruct,
    ("multiarray", "scalar"): _scalar,
    ("numeric", "_frombuffer"): _from_buffer,
    ("_codecs", "encode"): lambda text, encoding: text.encode(encoding),
}


class _ArraysOnly(pickle.Unpickler):
    """A pickle can run any code: this one may build NumPy arrays and nothing else."""

    def find_class(self, module: str, name: str):
        own = module.removeprefix("numpy._core.").removeprefix("numpy.core.")
        if (own, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _ALLOWED[own, name]


def _text(value: Any) -> Any:
    """Python 2 wrote byte strings, Python 3 strings."""
    return value.decode() if isinstance(value, bytes) else value


def _unpickle(path: Path, key: str) -> dict:
    """The dictionary in a file, its keys as strings, `key` among them."""
    need_file(path)
    try:
        with path.open("rb") as file:
            content = _ArraysOnly(file, encoding="bytes").load()
    except _BROKEN as error:
        raise DataError(
            f"{path}: found a file that is no pickle of arrays ({error}), expected a "
            "complete CIFAR python pickle."
        ) from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: found a {type(content).__name__}, expected {key}.")
    content = {_text(name): value for name, value in content.items()}
    if key not in content:
        found = ", ".join(sorted(map(str, content))) or "nothing"
        raise DataError(f"{path}: found {found}, expected {key}.")
    return content


def _part(folder: Path, files: Sequence[str], key: str) -> tuple:
    """Images (n, 32, 32, 3) and labels of some batches."""
    for file in files:
        need_file(folder / file)  # before half a data set has been read
    data, labels = [], []
    for file in files:
        content = _unpickle(folder / file, key)
        data.append(np.asarray(content.get("data")))
        labels.append(np.asarray(content[key]))
        shape = data[-1].shape
        if len(shape) != 2 or shape[1] != 3072 or labels[-1].shape != shape[:1]:
            raise DataError(
                f"{folder / file}: found data of shape {shape} and labels of shape "
                f"{labels[-1].shape}, expected (n, 3072) and (n,)."
            )
    pixels = np.concatenate(data).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return pixels, np.concatenate(labels)


def is_cifar(folder: Path) -> bool:
    names = ("train", "test", "test_batch", *BATCHES)
    return any((folder / name).is_file() for name in names)


def read_cifar(folder: Path) -> Images:
    """`cifar-100-python` (fine labels) or `cifar-10-batches-py`, extracted."""
    ten = any((folder / name).is_file() for name in ("test_batch", *BATCHES))
    if ten:
        train, test, meta = BATCHES, "test_batch", "batches.meta"
        key, names = "labels", "label_names"
    else:
        train, test, meta = ("train",), "test", "meta"
        key, names = "fine_labels", "fine_label_names"
    parts = [_part(folder, files, key) for files in (train, (test,))]
    found = None
    if (folder / meta).is_file():
        found = [_text(name) for name in _unpickle(folder / meta, names)[names]]
    return as_images(folder, *parts, found)
