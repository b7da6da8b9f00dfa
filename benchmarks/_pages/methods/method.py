"""What the pages say about a method that no measurement and no docstring says."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

from benchmarks._pages.methods.probes import Promise

__all__ = ["RATE", "Family", "Method"]

RATE = 1e-3


def nothing(gradient: Any) -> dict:
    del gradient
    return {}


class Method(NamedTuple):
    """One section of a page.

    Attributes:
      title: the name that its paper gave it.
      does: one line for the overview.
      keeps: what it keeps of old tasks, and what a user should know; Markdown.
      lines: how to build it, what a step needs, what a finished task calls; runs with
        the names of `setting`.
      recipe: () -> optimizer of the model in `probes`.
      modifier: () -> g̃ for shared and decoupled routing, or None.
      promise: what a step of the method must not do, or None if it promises nothing.
      evidence: gradient -> extra arguments of a step.
      closed_forms: numbers n of tests named `test_t<n>_...`, or whole names.
      parity: suffixes of tests named `test_parity_...`.
      equations: where the docstring with its equations is, if not in its own.
    """

    title: str
    does: str
    keeps: str
    lines: str
    recipe: Callable[[], optax.GradientTransformation]
    modifier: Callable[[], optax.GradientTransformation] | None = None
    promise: Promise | None = None
    evidence: Callable[[Any], dict] = nothing
    closed_forms: tuple[int | str, ...] = ()
    parity: tuple[str, ...] = ()
    equations: str | None = None


class Family(NamedTuple):
    """One page.

    Attributes:
      title: of the page.
      does: what its methods have in common, one line for the overview.
      intro: what a reader must know for all of them, letters included; Markdown.
      methods: by the name of the public function.
    """

    title: str
    does: str
    intro: str
    methods: dict[str, Method]
