"""From rows of text to arrays of token ids, and from steps to batches.

    begin + prompt + answer + end, padded on the right

An empty prompt without a begin is the end token: a text follows the end of another.
Loss is taken on the answer and the end alone. A plain text is cut into windows, of
which every token counts.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from examples.llm.formats import Row
from examples.llm.tasks import Task
from examples.streams.domains import DataError
from examples.streams.files import listing

__all__ = [
    "Encoded",
    "Encoder",
    "batch_rows",
    "bucket",
    "cuts",
    "encode",
    "encode_prompts",
    "encode_rows",
    "encode_text",
    "encoder_for",
    "read_tokenizer",
    "take",
]

SHORTEST = 32  # tokens of the smallest bucket
# What the tokenizers of Llama, SmolLM, Qwen and Gemma call the end of a text.
ENDS = ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "<|im_end|>")


class Encoder(NamedTuple):
    """A tokenizer that fits a model.

    Attributes:
      tokenizer: adds no special tokens of its own, neither cuts nor pads.
      begin: ids that the tokenizer puts before every text, such as Llama's <s>.
      end: id of the end of a text, with which rows are padded.
    """

    tokenizer: Tokenizer
    begin: tuple[int, ...]
    end: int


class Encoded(NamedTuple):
    """Token ids of some rows.

    Attributes:
      tokens: (n, length) int32, padded on the right.
      answer: (n, length) bool, the tokens that the loss counts. The first token of a
        row is never predicted, whatever it says there.
      lengths: (n,) int32, tokens of each row without padding.
      kept: (n,) int32, which of the rows given these are.
      total: tokens of all rows given.
      cut: how many of them were beyond the length, or in rows that were dropped.
      shortened: rows that lost tokens, without those dropped.
      dropped: rows of whose answer nothing was left.
    """

    tokens: np.ndarray
    answer: np.ndarray
    lengths: np.ndarray
    kept: np.ndarray
    total: int
    cut: int
    shortened: int
    dropped: int


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a folder of Hugging Face files."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        found = listing(folder) if folder.is_dir() else "no folder"
        raise DataError(f"{folder}: found {found}, expected tokenizer.json.")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more special
        raise DataError(
            f"{file}: found a file that is no tokenizer ({error}), expected one of the "
            "library tokenizers."
        ) from error


def encoder_for(
    tokenizer: Tokenizer, vocabulary: int, end: int | str | None = None
) -> Encoder:
    """Checks that a tokenizer fits a model.

    Args:
      tokenizer: any of the library `tokenizers`; a copy of it is made.
      vocabulary: number of ids that the model embeds.
      end: id or token that ends a text; None: the first of `ENDS` that is there.

    Raises:
      DataError: if the tokenizer has ids that the model lacks, or no such end.
    """
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids = tokenizer.get_vocab()
    last = max(ids, key=lambda token: ids[token], default=None)
    if last is None or ids[last] >= vocabulary:
        found = "no tokens" if last is None else f"{last!r} with id {ids[last]}"
        raise DataError(
            f"tokenizer: found {found}, expected ids below {vocabulary}, which the "
            "model embeds: take the tokenizer that came with the model."
        )
    if end is None:
        end = next((ids[token] for token in ENDS if token in ids), None)
    elif isinstance(end, str):
        end = ids.get(end, end)
    if not isinstance(end, int) or tokenizer.id_to_token(end) is None:
        raise DataError(
            f"tokenizer: the end of a text is {end!r}, which it does not have, "
            f"expected an id or a token of it, or one of {', '.join(ENDS)} in it."
        )
    empty = tokenizer.encode("")
    added = zip(empty.ids, empty.special_tokens_mask, strict=True)
    begin = tuple(i for i, special in added if special and i != end)
    return Encoder(tokenizer, begin, end)


def _ids(encoder: Encoder, texts: Sequence[str]) -> list[list[int]]:
    found = encoder.tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return [one.ids for one in found]


def _prompts(rows: Sequence[Row], encoder: Encoder) -> list[list[int]]:
    prompts = _ids(encoder, [row.prompt for row in rows])
    return [[*encoder.begin, *prompt] for prompt in prompts]


def encode_prompts(rows: Sequence[Row], encoder: Encoder) -> list[list[int]]:
    """What comes before each answer, at least one token; also where it is generated."""
    return [prompt or [encoder.end] for prompt in _prompts(rows, encoder)]


def encode_rows(
    rows: Sequence[Row], encoder: Encoder, length: int, *, asked: bool = True
) -> Encoded:
    """Prompt, answer and end of every row in `length` tokens; the rest is cut.

    Prompt and answer are encoded apart, as they are when the answer is generated.

    Args:
      rows: of which `kept` names those that are in the result.
      encoder: from `encoder_for`.
      length: tokens of a row, at least 2.
      asked: whether answers may be generated, which takes a token before them; else the
        first token of a row without a prompt is read, and not predicted.

    Raises:
      DataError: if nothing of any answer is left.
    """
    if length < 2:
        raise ValueError(f"length: got {length}, expected at least 2 tokens.")
    prompts = (encode_prompts if asked else _prompts)(rows, encoder)
    answers = _ids(encoder, [row.answer for row in rows])
    tokens = np.full((len(rows), length), encoder.end, np.int32)
    answer = np.zeros((len(rows), length), bool)
    whole = np.zeros(len(rows), np.int32)
    for index, (first, then) in enumerate(zip(prompts, answers, strict=True)):
        ids = [*first, *then, encoder.end]
        whole[index] = len(ids)
        tokens[index, : len(ids)] = ids[:length]
        answer[index, len(first) : len(ids)] = True
    kept = np.flatnonzero(answer[:, 1:].any(axis=1))
    if not len(kept):
        raise DataError(
            f"nothing of the answers of {len(rows)} rows is within the first {length} "
            "tokens, expected a longer context (--context) than the prompts, which "
            f"have {min(map(len, prompts), default=0)} tokens and more."
        )
    lengths = np.minimum(whole, length)[kept]
    return Encoded(
        tokens=tokens[kept],
        answer=answer[kept],
        lengths=lengths,
        kept=kept.astype(np.int32),
        total=int(whole.sum()),
        cut=int(whole.sum() - lengths.sum()),
        shortened=int((whole[kept] > length).sum()),
        dropped=len(rows) - len(kept),
    )


def encode_text(text: str, encoder: Encoder, length: int) -> Encoded:
    """Windows of `length` + 1 tokens, each of which begins with the last one's end.

    So the model reads `length` tokens and predicts the one after each, and every token
    of the text is predicted once. Where the tokenizer has a token that begins a text,
    it is the first of every window, and is not predicted. What fills no window is cut.

    Raises:
      DataError: if the text does not fill one window.
    """
    begin = len(encoder.begin)
    new = length - begin  # tokens that a window predicts
    if new < 1:
        raise ValueError(f"length: got {length}, expected at least {1 + begin} tokens.")
    ids = np.array(_ids(encoder, [text])[0], np.int32)
    count = (len(ids) - 1) // new
    if count < 1:
        raise DataError(
            f"the text that begins {text[:40]!r} has {len(ids)} tokens, expected at "
            f"least {new + 1}, one window and the token after it: give more text, or "
            "a shorter context (--context)."
        )
    windows = ids[np.arange(count)[:, None] * new + np.arange(new + 1)]
    first = np.tile(np.array(encoder.begin, np.int32), (count, 1))
    tokens = np.concatenate([first, windows], axis=1)
    answer = np.ones(tokens.shape, bool)
    answer[:, : begin + 1] = False  # the window before has predicted its first token
    return Encoded(
        tokens=tokens,
        answer=answer,
        lengths=np.full(count, length + 1, np.int32),
        kept=np.arange(count, dtype=np.int32),
        total=len(ids),
        cut=len(ids) - (count * new + 1),
        shortened=0,
        dropped=0,
    )


def encode(task: Task, part: str, encoder: Encoder, length: int) -> Encoded:
    """One part of a task for a model that reads `length` tokens at a time.

    Args:
      task: rows, or a text.
      part: "train", "valid" or "test".
      encoder: from `encoder_for`.
      length: tokens of a row; windows of a text have one more, to predict.

    Raises:
      DataError: as `encode_rows` and `encode_text`, with the name of the task.
    """
    rows = getattr(task, part)
    try:
        if task.kind == "text":
            return encode_text("\n\n".join(r.answer for r in rows), encoder, length)
        return encode_rows(rows, encoder, length, asked=task.metric != "loss")
    except DataError as error:
        raise DataError(f"{task.name}, {part}: {error}") from error


def cuts(name: str, encoded: Encoded) -> str | None:
    """What did not fit into the context, in one line; None if all rows did."""
    if not encoded.shortened and not encoded.dropped:
        return None
    return (
        f"{name}: {encoded.cut:,} of {encoded.total:,} tokens are beyond the context "
        f"of {encoded.tokens.shape[1]:,}: {encoded.shortened:,} rows were shortened, "
        f"and {encoded.dropped:,}, of whose answer nothing was left, were dropped."
    )


def bucket(longest: int, length: int) -> int:
    """The smallest of 32, 64, 128, … that holds `longest` tokens, at most `length`.

    So few shapes are compiled.
    """
    size = SHORTEST
    while size < longest:
        size *= 2
    return min(size, length)


def take(encoded: Encoded, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and answer mask of some rows, as long as the bucket of the longest one."""
    size = bucket(int(encoded.lengths[rows].max()), encoded.tokens.shape[1])
    return encoded.tokens[rows, :size], encoded.answer[rows, :size]


def batch_rows(task: int, seed: int, step: int, batch: int, count: int) -> np.ndarray:
    """The rows of one step: epoch after epoch, each in an order of its own.

    They depend on the arguments alone, so a run resumes at any step.

    Args:
      task: index of the task in the stream.
      seed: of the run.
      step: of this task, from 0.
      batch: rows a step.
      count: rows that there are.

    Returns:
      (batch,) int32.
    """
    places = np.arange(step * batch, (step + 1) * batch)
    epochs, within = np.divmod(places, count)
    rows = np.empty(batch, np.int32)
    for epoch in np.unique(epochs):
        order = np.random.default_rng([seed, task, epoch]).permutation(count)
        rows[epochs == epoch] = order[within[epochs == epoch]]
    return rows
