"""Streams of images: permuted, rotated, split, and one data set a domain.

All are deterministic in `seed`. A tenth of every class's training images is held out
for validation, the same tenth for every seed. Pixels are scaled by the largest training
value and standardised with the mean and deviation (per channel) of the first task's
training images: no number comes from a later task.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from examples.streams.pixels import permute, resize, rotate
from examples.streams.readers import Images, hold_out
from examples.streams.stream import Stream, number_outputs, stack

VALID_SHARE = 0.1


class _Rows(NamedTuple):
    """Images and labels of one part of one task, and what is done to the images."""

    x: np.ndarray
    y: np.ndarray
    rows: np.ndarray
    change: Callable[[np.ndarray], np.ndarray]


def _same(x: np.ndarray) -> np.ndarray:
    return x


def _unit(images: Images) -> Images:
    """Pixels as float32, the largest training value 1."""
    top = np.float32(max(images.x_train.max(), 1e-12))
    x_train, x_test = (x / top for x in (images.x_train, images.x_test))
    return images._replace(x_train=x_train, x_test=x_test)


def _count(tasks: int) -> None:
    if tasks < 1:
        raise ValueError(f"tasks: got {tasks}, expected at least 1.")


def _build(
    tasks: Sequence[Mapping[str, _Rows]],
    classes: np.ndarray,
    *,
    scenario: str,
    limit: int | None,
    flat: bool,
    seed: int,
    facts: dict[str, Any],
    **names: Any,
) -> Stream:
    """The stream from rows of each task; labels are positions in `classes[task]`."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit: got {limit}, expected at least 1, or None for all.")
    output, mask = number_outputs(scenario, classes)
    tasks = [dict(task) for task in tasks]
    for t, task in enumerate(tasks):
        if limit is not None:
            rng = np.random.default_rng([seed, 2, t])
            chosen = rng.permutation(task["train"].rows)[:limit]
            task["train"] = task["train"]._replace(rows=np.sort(chosen))
        empty = [part for part, rows in task.items() if not len(rows.rows)]
        if empty:
            raise ValueError(
                f"{names['name']}: task {t} has no {' and no '.join(empty)} images, "
                "expected two training images and a test image of each class."
            )
    first = tasks[0]["train"]
    pixels = first.change(first.x[first.rows])
    mean = pixels.mean((0, 1, 2), dtype=np.float64).astype(np.float32)
    sd = pixels.std((0, 1, 2), dtype=np.float64).astype(np.float32)
    sd = np.where(sd > 0, sd, np.float32(1))
    del pixels

    def examples(part):
        for t, task in enumerate(tasks):
            x, y, rows, change = task[part]
            z = change(x[rows]) - mean
            z /= sd
            yield z.reshape(len(z), -1) if flat else z, output(t, y[rows])

    parts = {
        part: stack(examples(part), [len(task[part].rows) for task in tasks])
        for part in ("train", "valid", "test")
    }
    return Stream(
        scenario=scenario,
        classes=classes.astype(np.int32),
        class_mask=mask,
        facts={**facts, "mean": mean, "sd": sd},
        **parts,
        **names,
    )


def _parts(images: Images, change: Callable[[np.ndarray], np.ndarray]) -> dict:
    train, valid = hold_out(images.y_train, VALID_SHARE)
    return {
        "train": _Rows(images.x_train, images.y_train, train, change),
        "valid": _Rows(images.x_train, images.y_train, valid, change),
        "test": _Rows(
            images.x_test, images.y_test, np.arange(len(images.y_test)), change
        ),
    }


def permuted(
    images: Images,
    *,
    name: str,
    tasks: int = 10,
    scenario: str = "domain",
    seed: int = 0,
    limit: int | None = None,
    flat: bool = True,
) -> Stream:
    """Every task shows the same images with the pixels in another fixed order.

    The first task keeps the order unchanged. That is one of the two conventions in use;
    the other permutes the first task too. The later orders are uniform and drawn from
    `seed` in turn, so a longer stream begins as a shorter one does.

    Args:
      images: the data set.
      name: of the stream.
      tasks: number of orders.
      scenario: "domain", or "task" and "class" with outputs of its own for each task.
      seed: of the orders and of the choice of `limit`.
      limit: most training images a task, chosen anew for each; None: all.
      flat: x is (pixels,) instead of (height, width, channels).

    Returns:
      The stream; `facts["permutations"]` has the orders (tasks, height width).
    """
    _count(tasks)
    images = _unit(images)
    count = int(np.prod(images.x_train.shape[1:3]))
    rng = np.random.default_rng([seed, 1])
    orders = [np.arange(count), *(rng.permutation(count) for _ in range(tasks - 1))]
    return _build(
        [_parts(images, lambda x, o=order: permute(x, o)) for order in orders],
        np.tile(np.arange(len(images.class_names)), (tasks, 1)),
        scenario=scenario,
        limit=limit,
        flat=flat,
        seed=seed,
        facts={"permutations": np.stack(orders)},
        name=name,
        about=f"{tasks} orders of the pixels, the first one unchanged, seed {seed}",
        task_names=tuple(f"permutation {t}" for t in range(tasks)),
    )


def rotated(
    images: Images,
    *,
    name: str,
    tasks: int = 10,
    scenario: str = "domain",
    seed: int = 0,
    limit: int | None = None,
    flat: bool = True,
    angle: float = 180.0,
) -> Stream:
    """Task t shows the same images turned by t angle / tasks degrees.

    Arguments as in `permuted`, and

    Args:
      angle: the turn that would follow the last task's, in degrees.

    Returns:
      The stream; `facts["angles"]` has the turns (tasks,), counter-clockwise.
    """
    _count(tasks)
    images = _unit(images)
    angles = angle * np.arange(tasks) / tasks
    return _build(
        [
            _parts(images, lambda x, a=a: rotate(x, a) if a else x)
            for a in angles.tolist()
        ],
        np.tile(np.arange(len(images.class_names)), (tasks, 1)),
        scenario=scenario,
        limit=limit,
        flat=flat,
        seed=seed,
        facts={"angles": angles},
        name=name,
        about=f"turned by 0 to {angles[-1]:g} degrees",
        task_names=tuple(f"{a:g} degrees" for a in angles),
    )


def split(
    images: Images,
    *,
    name: str,
    tasks: int = 5,
    scenario: str = "task",
    seed: int = 0,
    limit: int | None = None,
    flat: bool = True,
    shuffle_classes: bool = False,
) -> Stream:
    """The classes are dealt out: every class belongs to exactly one task.

    Arguments as in `permuted`, and

    Args:
      tasks: must divide the number of classes.
      scenario: "task" and "class": one output for each class; "domain": as many outputs
        as a task has classes, the label being the class's position in its task.
      shuffle_classes: deal the classes in an order drawn from `seed` instead of that of
        their labels.
    """
    _count(tasks)
    count = len(images.class_names)
    if count % tasks:
        raise ValueError(
            f"tasks: got {tasks}, expected a divisor of the {count} classes."
        )
    order = np.arange(count)
    if shuffle_classes:
        order = np.random.default_rng([seed, 3]).permutation(order)
    classes = order.reshape(tasks, -1)
    position = np.empty(count, int)
    position[classes] = np.arange(count // tasks)
    images = _unit(images)
    whole = _parts(images, _same)

    def own(rows: _Rows, group: np.ndarray) -> _Rows:
        kept = rows.rows[np.isin(rows.y[rows.rows], group)]
        return rows._replace(y=position[rows.y], rows=kept)

    made = [{part: own(whole[part], group) for part in whole} for group in classes]
    return _build(
        made,
        classes,
        scenario=scenario,
        limit=limit,
        flat=flat,
        seed=seed,
        facts={},
        name=name,
        about=f"{count} classes in {tasks} tasks of {count // tasks}",
        task_names=tuple(
            ", ".join(images.class_names[c] for c in group[:5])
            + f" and {len(group) - 5} more" * (len(group) > 5)
            for group in classes
        ),
    )


def domains(
    named: Mapping[str, Images],
    *,
    name: str,
    scenario: str = "domain",
    seed: int = 0,
    limit: int | None = None,
    flat: bool = False,
    size: int = 32,
) -> Stream:
    """One data set after the other, with the same classes: Digit-Five.

    Images become coloured and size x size (bilinear, without antialiasing: the data
    sets are of about one size).

    Arguments as in `permuted`, and

    Args:
      named: the data sets by name, in the order to learn them.
      size: height and width of all images.
    """
    counts = {key: len(images.class_names) for key, images in named.items()}
    if len(set(counts.values())) != 1:
        raise ValueError(
            f"named: got classes {counts}, expected the same number in all."
        )
    return _build(
        [_parts(_unit(one), lambda x: resize(x, size)) for one in named.values()],
        np.tile(np.arange(next(iter(counts.values()))), (len(named), 1)),
        scenario=scenario,
        limit=limit,
        flat=flat,
        seed=seed,
        facts={},
        name=name,
        about=f"one data set a domain, {size}x{size} in three channels",
        task_names=tuple(named),
    )
