"""Whether a program was compiled, as JAX reports it."""

import contextlib
from collections.abc import Iterator

import jax

_EVENTS: list[str] = []


def _note(event: str, duration_secs: float, **metadata: str | int) -> None:
    _EVENTS.append(event)


jax.monitoring.register_event_duration_secs_listener(_note)


@contextlib.contextmanager
def nothing_compiles() -> Iterator[None]:
    _EVENTS.clear()
    yield
    assert "/jax/core/compile/backend_compile_duration" not in _EVENTS
