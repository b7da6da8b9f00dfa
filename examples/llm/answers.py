"""Generated answers of a task's test rows, scored by its metric."""

import functools
from collections.abc import Callable
from typing import Any

from examples.llm.data import Part
from examples.llm.generate import generator, line_feeds
from examples.llm.learner import Learner
from examples.llm.scores import score
from examples.llm.tasks import one_line
from examples.llm.tokens import Encoder

__all__ = ["answerer"]


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

    def ids(text):
        return tokenizer.encode(text, add_special_tokens=False).ids

    @functools.cache
    def generate(stops_at_line: bool):
        stops = line_feeds(tokenizer) if stops_at_line else ()
        return generator(
            learner.model, learner.parts, new_tokens=new_tokens, stops=stops
        )

    def answer(trained, base, part):
        prompts = [
            [
                *encoder.begin,
                *tokenizer.encode(row.prompt, add_special_tokens=False).ids,
            ]
            for row in part.prompts
        ]
        found = generate(one_line(part.task))(
            *learner.module_trees(trained, base), prompts
        )
        texts = [tokenizer.decode(tokens) for tokens in found.tokens]
        return score(part.task.metric, part.prompts, texts)

    return answer
