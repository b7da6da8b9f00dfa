"""Streams of text domains, with a knob for how much the domains have in common.

Text is bytes; a window is `context` bytes and the byte after each of them. Windows are
cut one after the other, so that every byte is predicted once.

The knob, `overlap` = rho in [0, 1]: a pool is set aside that has equally many windows
of every domain. In each domain round(rho n) of its n windows are the first ones of the
pool (the same in every domain) and the others are the domain's own (in no other
domain). So two domains have exactly the share round(rho n) / n of their windows in
common: at 0 none, at 1 all domains are one and the same mixture. n does not depend on
rho, and training, validation and test windows are mixed alike, each from its own text.
What domains share by nature (words, spaces) comes on top.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from examples.streams import hub
from examples.streams.domains import DataError, Domain, as_bytes, load_folder
from examples.streams.files import visible
from examples.streams.installed import SOURCES, load_installed
from examples.streams.more_text import MORE_SOURCES
from examples.streams.stream import Part, Stream

VALID_SHARE = 0.1
SYMBOLS = 256


def read_domains(
    data: Path | str | None, count: int, names: Sequence[str] | None = None
) -> list[Domain]:
    """`count` domains of text.

    Args:
      data: a folder of `<domain>.train.txt` and `<domain>.valid.txt`, or of
        `<domain>.txt`, or of Hugging Face datasets `<domain>/` with a column `text`;
        None: text that is installed with Python and the packages.
      count: how many.
      names: which, in the order to learn them; None: the first by name, or as the
        installed ones are listed.

    Raises:
      DataError: if there are fewer.
    """
    if count < 1:
        raise DataError(f"tasks: got {count}, expected at least 1.")
    if names is not None and len(names) != count:
        raise DataError(f"domains: got {len(names)} names, expected {count}.")
    if data is None:
        wanted = list(SOURCES)[:count] if names is None else names
        found, messages = load_installed(wanted, SOURCES | MORE_SOURCES)
        if names is None and len(found) < count:
            more, told = load_installed(None, MORE_SOURCES)
            found, messages = found + more, messages + told
        where = " ".join(["in the installed packages.", *messages])
    elif _saved(Path(data)):
        found, where = _read_saved(Path(data), names), f"in {data}."
    else:
        found, where = load_folder(Path(data), names), f"in {data}."
    if len(found) < count:
        raise DataError(f"found {len(found)} domains of text, expected {count} {where}")
    return found[:count]


def _saved(folder: Path) -> list[Path]:
    found = visible(folder.glob("*/dataset_dict.json"), folder)
    return [path.parent for path in found]


def _read_saved(folder: Path, names: Sequence[str] | None) -> list[Domain]:
    """Hugging Face datasets: splits train, and test or validation; column text."""
    found = {path.name: path for path in _saved(folder)}
    domains = []
    for name in found if names is None else names:
        if name not in found:
            raise DataError(
                f"{folder}: found {', '.join(found)}, expected also domain {name!r}."
            )
        splits = hub.load_huggingface(found[name])
        held = next((s for s in ("test", "validation", "valid") if s in splits), None)
        if held is None or "train" not in splits:
            raise DataError(
                f"{found[name]}: found splits {', '.join(splits)}, expected train and "
                "test."
            )
        for part in ("train", held):
            if "text" not in splits[part].column_names:
                columns = ", ".join(splits[part].column_names)
                raise DataError(
                    f"{found[name]}: found columns {columns}, expected text."
                )
        train, test = (
            as_bytes("\n\n".join(splits[part]["text"])) for part in ("train", held)
        )
        files = {"train": [f"{name}/train"], "valid": [f"{name}/{held}"]}
        domains.append(Domain(name, train, test, "Hugging Face dataset", files))
    return domains


def windows(text: np.ndarray, context: int) -> np.ndarray:
    """Consecutive windows of `context + 1` bytes that overlap in one byte."""
    count = max(0, (len(text) - 1) // context)
    return text[np.arange(count)[:, None] * context + np.arange(context + 1)]


def mix(
    cut: Sequence[np.ndarray], overlap: float, most: int | None, seed: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Windows of every domain, mixed as the module's docstring says.

    Args:
      cut: the windows of each domain (count, context + 1).
      overlap: rho.
      most: at most so many windows a domain; None: as many as the smallest one gives.
      seed: of the choice.

    Returns:
      Windows (domains, n, context + 1) and the domain each was cut from (domains, n).
    """
    tasks, smallest = len(cut), min(map(len, cut))
    n = smallest * tasks // (tasks + 1)  # n own ones and n / tasks for the pool
    n = n if most is None else min(n, most)
    while n + -(-n // tasks) > smallest:
        n -= 1
    if n < 1:
        raise DataError(
            f"context: the smallest domain has {smallest} windows, expected at least "
            "2: more text or a smaller context."
        )
    given, rng = -(-n // tasks), np.random.default_rng([*seed, tasks])
    orders = [
        np.random.default_rng([*seed, t]).permutation(len(c)) for t, c in enumerate(cut)
    ]
    pool = np.concatenate([c[o[:given]] for c, o in zip(cut, orders, strict=True)])
    origin = np.repeat(np.arange(tasks), given)
    # Round-robin over the domains: every beginning of the pool is evenly mixed.
    turn = np.arange(tasks * given).reshape(tasks, given)
    turn = rng.permuted(turn, axis=0).T.ravel()[:n]
    shared = round(overlap * n)
    out, source = [], []
    for t, (own, order) in enumerate(zip(cut, orders, strict=True)):
        kept = own[order[given : given + n - shared]]
        shuffle = np.random.default_rng([*seed, tasks + 1 + t]).permutation(n)
        out.append(np.concatenate([pool[turn[:shared]], kept])[shuffle])
        source.append(
            np.concatenate([origin[turn[:shared]], np.full(n - shared, t)])[shuffle]
        )
    return np.stack(out), np.stack(source)


def text_stream(
    domains: Sequence[Domain],
    *,
    name: str,
    seed: int = 0,
    overlap: float = 0.0,
    context: int = 64,
    limit: int | None = None,
) -> Stream:
    """Next-byte prediction on one domain after the other; domain-incremental.

    Args:
      domains: the text. The last tenth of a training text is for validation; the
        held-out text is the test.
      name: of the stream.
      seed: of which windows are taken, and their order.
      overlap: share of windows that all domains have in common, in [0, 1].
      context: bytes a window.
      limit: most training windows a domain (and a tenth as many for validation and for
        test, at least one); None: as many as the smallest domain gives.

    Returns:
      The stream; `facts`: overlap as rounded to whole windows of the training part, and
      origin (tasks, n), the domain each training window was cut from.
    """
    if not 0 <= overlap <= 1:
        raise ValueError(f"overlap: got {overlap}, expected a share from 0 to 1.")
    for argument, value in (("context", context), ("limit", limit)):
        if value is not None and value < 1:
            raise ValueError(f"{argument}: got {value}, expected at least 1.")
    cuts = {"train": [], "valid": [], "test": []}
    for domain in domains:
        at = len(domain.train) - int(len(domain.train) * VALID_SHARE)
        texts = (domain.train[:at], domain.train[at:], domain.valid)
        for part, text in zip(cuts, texts, strict=True):
            cuts[part].append(windows(text, context))
            if len(cuts[part][-1]) < 2:
                raise DataError(
                    f"{domain.name}: the {part} text ({domain.source}) has {len(text)} "
                    f"bytes, expected at least {2 * context + 1}: two windows."
                )
    parts, facts = {}, {}
    for index, (part, cut) in enumerate(cuts.items()):
        most = limit if limit is None or part == "train" else max(1, limit // 10)
        drawn, origin = mix(cut, overlap, most, [seed, index])
        drawn = drawn.astype(np.int32)
        weight = np.ones(drawn.shape[:2], np.float32)
        parts[part] = Part(drawn[..., :-1], drawn[..., 1:], weight)
        if part == "train":
            count = origin.shape[1]
            facts = {"overlap": round(overlap * count) / count, "origin": origin}
    tasks = len(domains)
    return Stream(
        name=name,
        scenario="domain",
        about=f"{tasks} domains of text as bytes, share in common "
        f"{facts['overlap']:.4g}",
        task_names=tuple(domain.name for domain in domains),
        classes=np.tile(np.arange(SYMBOLS, dtype=np.int32), (tasks, 1)),
        class_mask=np.ones((tasks, SYMBOLS), bool),
        facts=facts,
        **parts,
    )
