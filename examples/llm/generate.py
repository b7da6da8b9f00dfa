"""Greedy answers to a batch of prompts, with the model's key-value cache."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from examples.llm.errors import ModelError
from examples.llm.models import Model, Parts, merge

__all__ = ["generator", "line_feeds", "padded_length", "room"]

PROMPT_STEP = 32  # prompts are padded to multiples, so few lengths are compiled


def line_feeds(tokenizer: Any) -> tuple[int, ...]:
    """The tokens whose text has a line feed."""
    tokens = range(tokenizer.get_vocab_size())
    return tuple(t for t in tokens if "\n" in tokenizer.decode([t]))


def room(model: Model, new_tokens: int) -> int:
    """Tokens that a prompt may have; of a longer one the last so many are read.

    Raises:
      ModelError: unless `new_tokens` leave at least one.
    """
    if not 1 <= new_tokens < model.context:
        raise ModelError(
            f"new_tokens: got {new_tokens}, expected 1 to {model.context - 1}, fewer "
            "than the context."
        )
    return model.context - new_tokens


def padded_length(model: Model, longest: int, new_tokens: int) -> int:
    """Tokens of each prompt with padding, where the longest has so many.

    Raises:
      ModelError: where local attention, which counts slots of the cache, would lose
        sight of a prompt that padding sets apart from its answer.
    """
    width = -(-longest // PROMPT_STEP) * PROMPT_STEP
    width = min(width, room(model, new_tokens))
    window = getattr(model.config, "sliding_window_size", None)
    if window is not None and width + new_tokens > window:
        raise ModelError(
            f"a prompt of {longest} tokens takes {width} with padding, its answer "
            f"{new_tokens}, expected at most the model's local window of {window} in "
            "all: take fewer new tokens (--new-tokens) or shorter rows (--context)."
        )
    return width


def generator(
    model: Model,
    parts: Parts,
    *,
    new_tokens: int,
    stops: Iterable[int] = (),
    batch: int = 8,
) -> Callable[[nnx.State, nnx.State, Sequence[Sequence[int]]], list[list[int]]]:
    """`generate(lora, base, prompts)`: the likeliest token, again and again.

    Args:
      model: for its sizes, context and end tokens.
      parts: of its module, with or without low-rank pairs.
      new_tokens: at most so many are generated; fewer than the context.
      stops: tokens after which an answer ends, such as `line_feeds(tokenizer)`.
      batch: prompts at a time; each distinct padded length is compiled once.

    Returns:
      The function. Prompts are lists of at least one token, of any lengths; see `room`
      and `padded_length`. An answer is what comes before an end token, or ends with the
      first of `stops`.

    Raises:
      ModelError: for counts that do not fit, and from the function for an empty prompt
        or tokens outside the vocabulary.
    """
    most = room(model, new_tokens)
    if batch < 1:
        raise ModelError(f"batch: got {batch}, expected at least 1.")
    ending = np.zeros(model.vocabulary, bool)
    ending[[*model.ends, *stops]] = True
    static = model._replace(module=None), parts._replace(lora=None, base=None)
    answer = jax.jit(functools.partial(_answer, *static, ending, new_tokens))

    def generate(lora, base, prompts):
        kept = [_checked(prompt, model.vocabulary)[-most:] for prompt in prompts]
        answers = []
        for first in range(0, len(kept), batch):
            rows = kept[first : first + batch]
            rows += [[]] * (batch - len(rows))
            width = padded_length(model, max(map(len, rows)), new_tokens)
            tokens = np.zeros((batch, width), np.int32)
            for row, prompt in zip(tokens, rows, strict=True):
                row[: len(prompt)] = prompt
            lengths = np.array([len(prompt) for prompt in rows], np.int32)
            answers += np.asarray(answer(lora, base, tokens, lengths)).tolist()
        ends = set(model.ends)
        return [_until(tokens, ending, ends) for tokens in answers[: len(kept)]]

    return generate


def _answer(
    model: Model,
    parts: Parts,
    ending: np.ndarray,
    count: int,
    lora: nnx.State,
    base: nnx.State,
    prompts: jax.Array,
    lengths: jax.Array,
) -> jax.Array:
    """The next `count` tokens of each row, (batch, count); after an end, anything.

    A row of length 0 fills the batch up and is not waited for.

    All rows write to the same slots of the cache: a prompt's padding keeps its slots,
    which the mask hides, and the answers follow after the longest prompt.
    """
    batch, width = prompts.shape
    slots = jnp.arange(width + count)[None, None, :]
    real = slots < lengths[:, None, None]

    def step(cache, tokens, positions, mask):
        # Qwix writes to the module that it runs, so each trace has its own.
        module = merge(parts, lora, base, model.dtype)
        logits, cache = module(tokens, positions, cache, mask)
        return cache, logits.astype(jnp.float32)

    positions = jnp.broadcast_to(jnp.arange(width), (batch, width))
    causal = real & (slots <= positions[:, :, None])
    cache = _cache(model, batch, width + count)
    cache, logits = step(cache, prompts, positions, causal)
    at = jnp.maximum(lengths, 1)[:, None, None] - 1
    first = jnp.argmax(jnp.take_along_axis(logits, at, axis=1)[:, 0], -1).astype(
        jnp.int32
    )
    done = jnp.asarray(ending)

    def unfinished(carry):
        i, _, token, finished, _ = carry
        return (i < count) & ~jnp.all(finished | done[token])

    def advance(carry):
        i, cache, token, finished, answers = carry
        finished = finished | done[token]
        here = (slots >= width) & (slots < width + i)
        cache, logits = step(
            cache, token[:, None], (lengths + i - 1)[:, None], real | here
        )
        token = jnp.argmax(logits[:, 0], -1).astype(jnp.int32)
        return i + 1, cache, token, finished, answers.at[:, i].set(token)

    answers = jnp.zeros((batch, count), jnp.int32).at[:, 0].set(first)
    start = (jnp.int32(1), cache, first, lengths == 0, answers)
    return jax.lax.while_loop(unfinished, advance, start)[-1]


def _cache(model: Model, batch: int, slots: int) -> dict[str, dict[str, jax.Array]]:
    """An empty cache as Tunix's models take it."""
    sizes = model.config
    shape = (batch, slots, sizes.num_kv_heads, sizes.head_dim)
    empty = jnp.zeros(shape, model.dtype)
    layer = {"k": empty, "v": empty, "end_index": jnp.zeros(batch, jnp.int32)}
    return {f"layer_{i}": dict(layer) for i in range(sizes.num_layers)}


def _checked(prompt: Sequence[int], vocabulary: int) -> list[int]:
    prompt = list(prompt)
    if not prompt or min(prompt) < 0 or max(prompt) >= vocabulary:
        raise ModelError(
            f"prompts: found {prompt[:8]}, expected at least one token, all below the "
            f"model's vocabulary of {vocabulary}."
        )
    return prompt


def _until(tokens: list[int], ending: np.ndarray, ends: set[int]) -> list[int]:
    for i, token in enumerate(tokens):
        if ending[token]:
            return tokens[: i if token in ends else i + 1]
    return tokens
