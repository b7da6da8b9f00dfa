"""Examples that are killed, and started again with the same command.

    python example_kills.py MODULE file|boundary COUNT ARGUMENTS...

runs an example that kills itself: before its count-th operation on files of a
checkpoint, or at its count-th task boundary, which is computed but not yet saved.
"""

import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

PLACES = [("file", 3), ("file", 40), ("file", 101), ("boundary", 1), ("boundary", 4)]


class Example:
    """An example's command, with a saved state after every evaluation."""

    def __init__(self, module, arguments, folder):
        self.module, self.folder = module, folder
        self.arguments = [*map(str, arguments), "--save-every", "0.001"]
        self.environment = {
            **os.environ,
            "XLA_FLAGS": "",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),  # to start sooner
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }

    def start(self, out, *more, place=None):
        program = [__file__, self.module, *map(str, place)] if place else []
        return subprocess.Popen(
            [sys.executable, *(program or ["-m", self.module]), *self.arguments]
            + ["--out", str(out), *more],
            cwd=Path(__file__).parents[2],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    @functools.cached_property
    def whole(self):
        """What `finish` gives when it is left alone, and how long it takes then."""
        wanted, start = self.finish("whole"), time.monotonic()
        assert self.finish("twin") == wanted  # compiled already
        self.seconds = time.monotonic() - start
        return wanted

    def finish(self, name):
        """To the end: the runs but for their seconds, the events, the last states."""
        out = self.folder / name
        process = self.start(out)
        _, error = process.communicate(timeout=900)
        assert process.returncode == 0, error
        # Nothing that a kill leaves is a damaged checkpoint, or a warning at all.
        assert "Warning" not in error, error
        found = json.loads((out / "results.json").read_text())
        rows = found.get("runs") or found["methods"]
        rows = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
        events = {path.name: path.read_text() for path in (out / "events").iterdir()}
        return rows, events, last_states(out / "checkpoints")


def last_states(folder):
    """All arrays of each method's last checkpoint, as bytes."""
    from orbax import checkpoint as ocp

    states = {}
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
        for method in folder.iterdir():
            last = max(method.glob("step-*"))
            arrays = reader.restore(last.absolute() / "arrays")
            states[method.name] = {
                k: np.asarray(x).tobytes() for k, x in arrays.items()
            }
    assert all(states.values())
    return states


def wait_for(path, process, seconds=300):
    """Until the file is there; fails if the process ends before."""
    end = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < end:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def check_random_moments(example, how, kills):
    """Stopped at random moments, again and again; ends as if it never was."""
    wanted, name = example.whole, f"killed-{how}"
    rng, codes = np.random.default_rng(int(how)), []
    for _ in range(kills):
        process = example.start(example.folder / name)
        time.sleep(rng.uniform(0.1, 0.9) * example.seconds)
        process.send_signal(how)
        process.communicate(timeout=300)
        codes.append(process.returncode)
    # SIGTERM while Python still starts finds no handler: the process just dies.
    assert set(codes) <= ({0, 143, -how} if how == signal.SIGTERM else {0, -how})
    assert example.finish(name) == wanted


def check_place(example, where, count):
    """Killed at one place; ends as if it never was."""
    name = f"killed-{where}-{count}"
    process = example.start(example.folder / name, place=(where, count))
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    assert example.finish(name) == example.whole


def _kill_at(where, count, arguments):
    """Arms this process."""
    from tests.processes import kill_run

    if where == "file":
        out = Path(arguments[arguments.index("--out") + 1])
        kill_run.die_at(count, str((out / "checkpoints").absolute()))
        return
    from examples.harness import loop

    boundary, left = loop._boundary, count

    def last(*arguments):
        nonlocal left
        runs, left = boundary(*arguments), left - 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return runs

    loop._boundary = last


if __name__ == "__main__":
    module, where, count, *arguments = sys.argv[1:]
    sys.path.insert(0, str(Path(__file__).parents[2]))
    _kill_at(where, int(count), arguments)
    sys.exit(importlib.import_module(f"{module}.__main__").main(arguments))
