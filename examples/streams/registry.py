"""Streams by name: `load(name, ...)`."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from examples.streams import images, readers, sources, synthetic, text
from examples.streams.domains import DataError
from examples.streams.files import listing
from examples.streams.stream import Stream

DIGIT_FIVE = ("mnist", "mnist_m", "usps", "svhn", "syn")


class Entry(NamedTuple):
    """How a named stream is made.

    Attributes:
      about: one line for lists.
      make: called with name, seed and options.
      read: (name, data, options) -> what `make` takes first, and may change options;
        None: the stream needs no data.
      tasks: default number of tasks; None: one for each domain named.
      defaults: of the options.
    """

    about: str
    make: Callable[..., Stream]
    read: Callable[[str, Any, dict], Any] | None
    tasks: int | None
    defaults: dict[str, Any]


def _read_data_set(data_set: str) -> Callable[[str, Any, dict], Any]:
    def read(name, data, options):
        if data_set == "digits" and data is None:
            return readers.read_digits()
        return sources.read_images(sources.need(data_set, data, name))

    return read


def _read_imagenet(name: str, data: Any, options: dict) -> readers.Images:
    """Pictures scaled to size x size, no more of a class than `limit` can use."""
    path = sources.need("imagenet", data, name)
    size, limit = options.pop("size"), options.get("limit")
    per_class = options.pop("per_class")
    if per_class is None and limit is not None:
        per_class = max(2, int(np.ceil(limit / (1 - images.VALID_SHARE))))
    return sources.read_images(path, size=size, per_class=per_class)


def _read_digit_five(name: str, data: Any, options: dict) -> dict:
    wanted = tuple(options.pop("domains") or DIGIT_FIVE)
    tasks = options.pop("tasks")
    tasks = len(wanted) if tasks is None else tasks
    if data is None or not Path(data).is_dir():
        found = "nothing" if data is None else data
        raise DataError(
            f"{name}: data (--data): got {found}, expected a folder with a data set "
            f"(an .npz file or a folder) for each of {', '.join(wanted)}."
        )
    if not 1 <= tasks <= len(wanted):
        raise DataError(f"tasks: got {tasks}, expected 1 to {len(wanted)}.")
    paths = {domain: sources.find(Path(data), domain) for domain in wanted[:tasks]}
    lacking = [domain for domain, path in paths.items() if path is None]
    if lacking:
        raise DataError(
            f"{data}: found {listing(Path(data))}, expected also a data set "
            f"for {', '.join(lacking)} (<name>.npz or a folder), or other names with "
            "domains=."
        )
    size = options.get("size")
    return {d: sources.read_images(path, size=size) for d, path in paths.items()}


def _read_text(name: str, data: Any, options: dict) -> list:
    count, wanted = options.pop("tasks"), options.pop("domains")
    return text.read_domains(data, count, wanted)


def _image_entries() -> dict[str, Entry]:
    makers = {
        "permuted": (images.permuted, 10, "pixels in another order in each task"),
        "rotated": (images.rotated, 10, "images turned further in each task"),
        "split": (images.split, 5, "two classes a task"),
    }
    return {
        f"{kind}-{data_set}": Entry(
            f"{data_set}, {about}", make, _read_data_set(data_set), tasks, {}
        )
        for data_set in ("digits", "mnist", "fashion-mnist")
        for kind, (make, tasks, about) in makers.items()
    }


STREAMS = {
    **_image_entries(),
    "split-cifar100": Entry(
        "CIFAR-100, its classes in 20 tasks (or tasks=10)",
        images.split,
        _read_data_set("cifar100"),
        20,
        {"flat": False},
    ),
    "split-imagenet": Entry(
        "ImageNet, its classes in 10 tasks; size= pixels, 64 by default",
        images.split,
        _read_imagenet,
        10,
        {"flat": False, "size": 64, "per_class": None, "limit": None},
    ),
    "digit-five": Entry(
        f"one digit data set a domain: {', '.join(DIGIT_FIVE)}, or domains=",
        images.domains,
        _read_digit_five,
        None,
        {"size": 32, "domains": None},
    ),
    "text-8": Entry(
        "8 domains of text, overlap= in [0, 1]",
        text.text_stream,
        _read_text,
        8,
        {"domains": None},
    ),
    "text-16": Entry(
        "16 domains of text, overlap= in [0, 1]",
        text.text_stream,
        _read_text,
        16,
        {"domains": None},
    ),
    "markov-text": Entry(
        "Markov chains with overlap= in [0, 1] and entropy= in nats, known exactly",
        synthetic.markov_text,
        None,
        8,
        {},
    ),
}


def names() -> tuple[str, ...]:
    """The streams `load` knows."""
    return tuple(STREAMS)


def load(
    name: str,
    *,
    seed: int = 0,
    data: Path | str | None = None,
    tasks: int | None = None,
    **options: Any,
) -> Stream:
    """A stream by its name, the same for the same arguments.

    All of it is in memory, images as float32 once for each task that shows them: ten
    tasks of permuted MNIST are 2.2 GB. `limit` makes it less.

    Args:
      name: one of `names()`.
      seed: of everything random: orders of pixels, classes dealt out, windows, chains.
        What is held out for validation and test does not depend on it.
      data: path of the data set or of a folder with it, or `hf:<name>`; None: what is
        embedded or installed (digits, text, Markov chains); other streams need it.
      tasks: number of tasks; None: the usual one.
      **options: of the stream's constructor in images.py, text.py, synthetic.py:
        scenario, limit, flat, angle, shuffle_classes, size, domains, overlap, ...

    Raises:
      DataError: if the name is unknown, or the data is missing or damaged.
      ValueError: for any other argument that cannot be used.
    """
    if name not in STREAMS:
        raise DataError(f"name: got {name!r}, expected one of {', '.join(STREAMS)}.")
    entry = STREAMS[name]
    made_of = set(inspect.signature(entry.make).parameters) | set(entry.defaults)
    known = sorted(made_of - {"name", "seed", "tasks", "images", "named"})
    for option in options:
        if option not in known:
            raise ValueError(
                f"{option}: {name} has no such option, expected some of "
                f"{', '.join(known)}."
            )
    options = {
        **entry.defaults,
        **options,
        "tasks": entry.tasks if tasks is None else tasks,
    }
    if entry.read is None:
        if data is not None:
            raise DataError(f"data: got {data}, expected none: {name} is generated.")
        return entry.make(name=name, seed=seed, **options)
    source = entry.read(name, data, options)
    return entry.make(source, name=name, seed=seed, **options)
