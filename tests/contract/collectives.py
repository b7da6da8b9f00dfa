"""What a compiled program sends between devices, read from its HLO text."""

import math
import re

import jax

_KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_LINE = re.compile(rf"= (.*?) ({'|'.join(_KINDS)})(?:-start)?\(")
_SHAPE = re.compile(r"[a-z]+\d*[a-z0-9]*\[([\d,]*)\]")


def collectives(compiled: jax.stages.Compiled) -> list[tuple[str | int, ...]]:
    """One entry per collective: its kind and how many numbers each device gets.

    XLA combines all-reduces that can go together: (`all-reduce`, 256, 64) is one
    message of 320 numbers.
    """
    text, found = compiled.as_text(), []
    assert text is not None
    for result, kind in _LINE.findall(text):
        sizes = [
            math.prod(map(int, filter(None, shape.split(","))))
            for shape in _SHAPE.findall(result)
        ]
        found.append((kind, *sorted(sizes, reverse=True)))
    return sorted(found)
