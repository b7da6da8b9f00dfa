"""TFDS data sets as prepared on disk, read without TensorFlow.

A TFRecord file is a row of (length, checksum, data, checksum); the data is a protocol
buffer, tf.train.Example, from which two features are taken.
"""

import math
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from examples.streams.domains import DataError
from examples.streams.files import listing, visible
from examples.streams.folders import TEST_NAMES, both_parts, decode
from examples.streams.readers import Images


def records(path: Path) -> Iterator[bytes]:
    """The records of a TFRecord file: length, checksum, data, checksum."""
    with path.open("rb") as file:
        while head := file.read(12):
            size, crc = struct.unpack("<QI", head) if len(head) == 12 else (0, None)
            if _masked_crc(head[:8]) != crc:
                raise DataError(
                    f"{path}: found a record whose length does not match its checksum, "
                    "expected a TFRecord file."
                )
            data = file.read(size)
            if len(data) < size or len(file.read(4)) < 4:
                raise DataError(
                    f"{path}: found {len(data)} bytes of a record, expected {size} and "
                    "a checksum: the file is truncated."
                )
            yield data


def _masked_crc(data: bytes) -> int:
    """CRC-32C as TFRecord masks it; used on the eight bytes of lengths only."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 * (crc & 1))
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a protocol buffer; values are bytes or varints."""
    place = 0

    def varint():
        nonlocal place
        value = shift = 0
        while True:
            byte = message[place]
            place += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while place < len(message):
        key = varint()
        number, kind = key >> 3, key & 7
        if kind == 0:
            yield number, varint()
            continue
        size = {1: 8, 2: None, 5: 4}[kind]
        size = varint() if size is None else size
        yield number, message[place : place + size]
        place += size


def parse_example(record: bytes) -> dict[str, Any]:
    """A tf.train.Example: feature name -> bytes, or the first of its integers."""
    out = {}
    for _, features in _fields(record):
        for _, entry in _fields(features):
            parts = dict(_fields(entry))
            for kind, values in _fields(parts[2]):
                if kind not in (1, 3):  # 2 is a list of floats
                    continue
                first = next((v for _, v in _fields(values)), None)
                if kind == 3 and isinstance(first, bytes):  # packed integers
                    first = next(_fields(b"\x08" + first))[1]
                out[parts[1].decode()] = first
    return out


def find_tfds(folder: Path) -> Path | None:
    """The version folder of a TFDS data set: `folder` or below it, the newest."""
    files = (p for d in ("", "*/", "*/*/") for p in folder.glob(f"{d}*.tfrecord-*"))
    found = {path.parent for path in visible(files, folder)}
    if not found:
        return None

    def version(path):
        return [int(n) for n in re.findall(r"\d+", path.name)], path.name

    return max(found, key=version)


def read_tfds(
    folder: Path, size: int | None = None, per_class: int | None = None
) -> Images:
    """Prepared TFDS files `<name>-<split>.tfrecord-00000-of-00001`, without TensorFlow.

    Takes the features `image` (an encoded picture) and `label`. Arguments as in
    `read_image_folder`.
    """
    where = find_tfds(folder)
    if where is None:
        raise DataError(
            f"{folder}: found {listing(folder)}, expected files "
            "<name>-train.tfrecord-00000-of-00001."
        )

    def part(splits, most):
        files = [
            path
            for split in splits
            for path in visible(where.glob(f"*-{split}.tfrecord-*-of-*"), where)
        ]
        if not files:
            raise DataError(
                f"{where}: found {listing(where)}, expected records of the split "
                f"{' or '.join(splits)}."
            )
        x, y, taken = [], [], {}
        for file in files:
            for number, record in enumerate(records(file)):
                try:
                    example = parse_example(record)
                    image, label = example["image"], int(example["label"])
                except (KeyError, IndexError, TypeError, ValueError) as error:
                    raise DataError(
                        f"{file}: found record {number} without an image or a label "
                        f"({error!r}), expected the features image and label."
                    ) from error
                taken[label] = taken.get(label, 0) + 1
                if taken[label] <= (most or math.inf):
                    x.append(decode(image, f"{file}, record {number}", size))
                    y.append(label)
        return x, y

    labels = where / "label.labels.txt"
    names = labels.read_text().split("\n") if labels.is_file() else None
    names = None if names is None else [name for name in names if name]
    return both_parts(where, part(["train"], per_class), part(TEST_NAMES, None), names)
