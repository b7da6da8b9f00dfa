"""What the processes of one run agree on; in a single process, nothing to it.

The first process looks at the disk and at the clock, the others take its word. Words
travel over the devices, so only the main thread may ask, and every process must ask in
the same order. A writer in the background waits at barriers of the coordination
service, which the devices do not notice.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

__all__ = [
    "agreed",
    "agreed_arrays",
    "by_first",
    "first",
    "made_by_first",
    "require_equal",
    "told_to_stop",
]

_PATIENCE = 1200  # seconds that the others may take to write what they have


def first() -> bool:
    return jax.process_index() == 0


def agreed(value: Any) -> Any:
    """What the first process passes, on all of them; anything JSON can hold."""
    if jax.process_count() == 1:
        return value
    from jax.experimental.multihost_utils import broadcast_one_to_all

    data = np.frombuffer(json.dumps(value if first() else None).encode(), np.uint8)
    size = int(broadcast_one_to_all(np.int32(data.size)))
    data = np.resize(data, size)
    return json.loads(bytes(np.asarray(broadcast_one_to_all(data), np.uint8)))


def agreed_arrays(arrays: list[np.ndarray]) -> list[np.ndarray]:
    """Those of the first process, on all of them."""
    if jax.process_count() == 1:
        return arrays
    from jax.experimental.multihost_utils import broadcast_one_to_all

    return [np.asarray(x) for x in broadcast_one_to_all(arrays)]


def by_first(function: Callable[[], Any]) -> Any:
    """Runs in the first process; its result, or that it failed, in all."""
    failure, value = None, None
    if first():
        try:
            value = function()
        except Exception as error:
            failure = error
    told = agreed([value, None if failure is None else str(failure)])
    if failure is not None:
        raise failure
    if told[1] is not None:
        raise RuntimeError(f"the first process failed: {told[1]}")
    return told[0]


def made_by_first(function: Callable[[], Any], path: Path) -> None:
    """The same at a barrier, for a thread: whether it worked shows on the disk."""
    try:
        if first():
            function()
    finally:
        if jax.process_count() > 1:
            import orbax.checkpoint as ocp

            everyone = set(range(jax.process_count()))
            wait = ocp.multihost.get_barrier_sync_fn(processes=everyone)
            wait(key=f"adamr {path}", timeout_ms=1000 * _PATIENCE)
    if not path.exists():
        raise FileNotFoundError(f"the first process could not make {path}")


def require_equal(digest: bytes, what: str) -> None:
    """Raises unless all processes pass the same."""
    if jax.process_count() == 1:
        return
    from jax.experimental.multihost_utils import process_allgather

    all_of_them = process_allgather(np.frombuffer(digest[:8], np.uint32))
    if np.any(all_of_them != all_of_them[0]):
        raise ValueError(
            f"{what} differs between processes: only jax.Arrays over all of them may."
        )


def told_to_stop(call: int) -> bool:
    """Whether a process got SIGTERM; the same answer everywhere at the same call."""
    from jax.experimental.multihost_utils import reached_preemption_sync_point

    return reached_preemption_sync_point(call)
