"""How the processes of one run agree; in a single process the functions do nothing.

The first process reads the disk and the clock, and the others take its values. Values
travel over the devices, so only the main thread may call these functions, and every
process must call them in the same order. A writer in the background waits at barriers
of the coordination service (`made_by_first`), which does not use the devices.
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

_PATIENCE = 1200  # seconds in which the other processes must write their parts


def first() -> bool:
    """Whether this is the first process."""
    return jax.process_index() == 0


def agreed(value: Any) -> Any:
    """The value of the first process, in all of them; anything that JSON can hold."""
    if jax.process_count() == 1:
        return value
    from jax.experimental.multihost_utils import broadcast_one_to_all

    data = np.frombuffer(json.dumps(value if first() else None).encode(), np.uint8)
    size = int(broadcast_one_to_all(np.int32(data.size)))
    data = np.resize(data, size)
    return json.loads(bytes(np.asarray(broadcast_one_to_all(data), np.uint8)))


def agreed_arrays(arrays: list[np.ndarray]) -> list[np.ndarray]:
    """The arrays of the first process, in all of them."""
    if jax.process_count() == 1:
        return arrays
    from jax.experimental.multihost_utils import broadcast_one_to_all

    return [np.asarray(x) for x in broadcast_one_to_all(arrays)]


def by_first(function: Callable[[], Any]) -> Any:
    """Runs `function` in the first process; all get its result, or an error."""
    failure, value = None, None
    if first():
        try:
            value = function()
        except Exception as error:
            failure = error
    result, problem = agreed([value, None if failure is None else str(failure)])
    if failure is not None:
        raise failure
    if problem is not None:
        raise RuntimeError(f"the first process failed: {problem}")
    return result


def made_by_first(function: Callable[[], Any], path: Path) -> None:
    """Like `by_first` for a thread: all wait, then look for `path` on the disk."""
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
    """Raises unless all processes pass the same digest of `what`."""
    if jax.process_count() == 1:
        return
    from jax.experimental.multihost_utils import process_allgather

    all_of_them = process_allgather(np.frombuffer(digest[:8], np.uint32))
    if np.any(all_of_them != all_of_them[0]):
        raise ValueError(
            f"{what} differs between processes, expected the same in all of them, "
            "except in jax.Arrays that lie over all of them."
        )


def told_to_stop(call: int) -> bool:
    """Whether a process got SIGTERM; the same answer everywhere at the same call."""
    from jax.experimental.multihost_utils import reached_preemption_sync_point

    return reached_preemption_sync_point(call)
