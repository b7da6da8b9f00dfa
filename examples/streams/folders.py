"""Pictures: decoding, and folders of them sorted by class."""

import contextlib
import importlib
import io
from pathlib import Path
from typing import Any

import numpy as np

from examples.streams.domains import DataError
from examples.streams.files import listing, visible
from examples.streams.readers import Images, as_images

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm")
TEST_NAMES = ("test", "val", "valid", "validation")


def library(name: str, package: str, purpose: str) -> Any:
    """An optional package, or an error that says what it is needed for."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError(
            f"{package} is not installed, expected it {purpose}: pip install {package}."
        ) from error


def decode(source: Path | bytes | Any, where: str, size: int | None) -> np.ndarray:
    """A picture as uint8 (height, width, 1 or 3).

    Grey of 16 bits, which Pillow would clip at 255, is float32 in units of 8 bits: its
    white is 255. Pictures of floats keep their values.

    Args:
      source: a file, its content, or a Pillow picture.
      where: for messages.
      size: scale the largest centred square to size x size; None: unscaled.
    """
    pillow = library("PIL.Image", "pillow", "to read pictures")
    try:
        if isinstance(source, bytes):
            source = io.BytesIO(source)
        given = hasattr(source, "save")
        with contextlib.nullcontext(source) if given else pillow.open(source) as stored:
            picture = _in_units_of_8_bits(stored, pillow)
            if size is not None:
                width, height = picture.size
                side = min(width, height)
                left, top = (width - side) / 2, (height - side) / 2
                box = (left, top, left + side, top + side)
                scaling = pillow.Resampling.BILINEAR
                picture = picture.resize((size, size), scaling, box=box)
            pixels = np.asarray(picture)
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(
            f"{where}: found a picture that Pillow cannot read ({error}), expected a "
            "complete one."
        ) from error
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _in_units_of_8_bits(picture: Any, pillow: Any) -> Any:
    """The picture in one of the modes L, RGB and F."""
    if picture.mode.startswith("I"):
        return pillow.fromarray(np.asarray(picture, np.float32) / np.float32(257))
    if picture.mode == "F":
        return picture
    return picture.convert("L" if picture.mode in ("1", "L") else "RGB")


def _together(pictures: list[np.ndarray], where: object) -> np.ndarray:
    """One array; grey pictures among coloured ones get three equal channels."""
    if any(p.shape[-1] == 3 for p in pictures):
        pictures = [np.broadcast_to(p, (*p.shape[:2], 3)) for p in pictures]
    shapes = sorted({p.shape for p in pictures})
    if len(shapes) > 1:
        raise DataError(
            f"{where}: found pictures of {len(shapes)} shapes, such as {shapes[0]} and "
            f"{shapes[-1]}, expected one: pass size= to scale them."
        )
    return np.stack(pictures)


def both_parts(where: object, train: tuple, test: tuple, names: Any) -> Images:
    """`Images` from lists of pictures and labels; one coloured part colours both."""
    parts = [(_together(x, where), np.asarray(y, np.int32)) for x, y in (train, test)]
    channels = max(x.shape[-1] for x, _ in parts)
    parts = [
        (np.broadcast_to(x, (*x.shape[:-1], channels)) if x.shape[-1] == 1 else x, y)
        for x, y in parts
    ]
    return as_images(where, *parts, names)


def has_class_folders(folder: Path) -> bool:
    return (folder / "train").is_dir() and any(
        (folder / name).is_dir() for name in TEST_NAMES
    )


def read_image_folder(
    folder: Path, size: int | None = None, per_class: int | None = None
) -> Images:
    """`train/<class>/*.png` with `test/<class>/*.png` (or `val/`, as ImageNet has it).

    Args:
      folder: holds the two folders.
      size: scale to size x size; None: all pictures have one size.
      per_class: read at most so many training pictures of a class, the first by name.
    """
    found = next((n for n in TEST_NAMES if (folder / n).is_dir()), None)
    if found is None or not (folder / "train").is_dir():
        raise DataError(
            f"{folder}: found {listing(folder)}, expected folders train/ and test/ (or "
            "val/) with a folder for each class."
        )
    names, own = (
        [p.name for p in visible(part.iterdir(), part) if p.is_dir()]
        for part in (folder / "train", folder / found)
    )
    if not names or own != names:
        odd = sorted(set(names) ^ set(own))
        raise DataError(
            f"{folder}: found {len(names)} class folders in train/ and {len(own)} in "
            f"{found}/ (not in both: {', '.join(odd[:5]) or 'none'}), expected the "
            "same classes in both."
        )

    def part(name, most):
        x, y = [], []
        for label, class_name in enumerate(names):
            own = folder / name / class_name
            files = [
                path
                for path in visible(own.rglob("*"), own)
                if path.suffix.lower() in PICTURES
            ]
            if not files:
                raise DataError(
                    f"{own}: found no pictures, expected files ending in "
                    f"{', '.join(PICTURES)}."
                )
            x += [decode(file, str(file), size) for file in files[:most]]
            y += [label] * len(files[:most])
        return x, y

    return both_parts(folder, part("train", per_class), part(found, None), names)
