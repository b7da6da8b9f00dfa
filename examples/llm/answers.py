"""Generated answers of a task's test rows, scored by its metric."""

import functools
from collections.abc import Callable
from typing import Any

from examples.llm.data import Part
from examples.llm.generate import generator, line_feeds, padded_length, room
from examples.llm.learner import Learner
from examples.llm.models import Model
from examples.llm.scores import score
from examples.llm.tasks import one_line
from examples.llm.tokens import Encoder, encode_prompts
from examples.streams.domains import DataError

__all__ = ["answerer", "check"]


def check(model: Model, encoder: Encoder, new_tokens: int, part: Part) -> str | None:
    """Checks that a task's prompts can be answered, and its answers be scored.

    Args:
      model: that answers.
      encoder: of it.
      new_tokens: most tokens of an answer.
      part: of which the prompts are looked at.

    Returns:
      How much of the prompts is not read, in one line; None if they are read whole.

    Raises:
      DataError: with the task and the row.
    """
    most, cut, shortened = room(model, new_tokens), 0, 0
    prompts = encode_prompts(part.prompts, encoder)
    # The rows to be answered are the first of those that are kept.
    for index, row, prompt in zip(part.test.kept, part.prompts, prompts, strict=False):
        try:
            score(part.task.metric, [row], [row.answer])
            padded_length(model, min(len(prompt), most), new_tokens)
        except DataError as error:
            raise DataError(f"{part.task.name}, test, row {index}: {error}") from error
        cut += max(len(prompt) - most, 0)
        shortened += len(prompt) > most
    if not shortened:
        return None
    return (
        f"{part.task.name}, answers: {cut:,} tokens at the front of {shortened:,} of "
        f"{len(prompts):,} prompts are not read: the model's context of "
        f"{model.context:,} also holds {new_tokens:,} new tokens."
    )


def answerer(
    learner: Learner, encoder: Encoder, new_tokens: int
) -> Callable[[Any, Any, Part], dict[str, float]]:
    """`answer(trained, base, part)` -> scores of a task's prompts, its metric first.

    Args:
      learner: whose `trained` and `base` these are.
      encoder: of its model.
      new_tokens: most tokens of an answer.
    """
    tokenizer = encoder.tokenizer

    @functools.cache
    def generate(stops_at_line: bool):
        stops = line_feeds(tokenizer) if stops_at_line else ()
        return generator(
            learner.model, learner.parts, new_tokens=new_tokens, stops=stops
        )

    def answer(trained, base, part):
        found = generate(one_line(part.task))(
            *learner.module_trees(trained, base), encode_prompts(part.prompts, encoder)
        )
        texts = [tokenizer.decode(tokens) for tokens in found]
        return score(part.task.metric, part.prompts, texts)

    return answer
