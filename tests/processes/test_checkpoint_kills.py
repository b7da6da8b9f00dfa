"""kill -9 and SIGTERM: a real run, started again, ends in the same bits."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

PROGRAM = Path(__file__).with_name("kill_run.py")


class Run:
    """The program on one directory, as a user would start it again and again."""

    def __init__(self, data, folder, environment):
        self.folder, self.result = folder, folder / "result"
        self.command = [
            *(sys.executable, str(PROGRAM)),
            *(str(data), str(folder / "checkpoints"), str(self.result)),
        ]
        self.environment = environment

    def start(self, *more):
        return subprocess.Popen(
            [*self.command, *more],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self):
        """To the end; where it began, and the result."""
        with self.start() as process:
            out, err = process.communicate(timeout=900)
        assert process.returncode == 0, err
        # Nothing a kill leaves is a damaged checkpoint, or a warning at all.
        assert "Warning" not in err, err
        return int(out.split()[1]), self.result.read_bytes()


@pytest.fixture(scope="session")
def new_run(tmp_path_factory):
    datasets = pytest.importorskip("sklearn.datasets")
    base = tmp_path_factory.mktemp("kills")
    digits = datasets.load_digits()
    x, y = digits.data.astype(np.float32) / 16, digits.target.astype(np.int32)
    np.savez(base / "data.npz", x=x, y=y)
    environment = {
        **os.environ,
        "XLA_FLAGS": "",
        "JAX_COMPILATION_CACHE_DIR": str(base / "compiled"),  # starting costs seconds
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

    def new(name):
        (base / name).mkdir()
        return Run(base / "data.npz", base / name, environment)

    return new


@pytest.fixture(scope="session")
def reference(new_run):
    """The result of a run that is left alone, and how long its training took."""
    run = new_run("reference")
    began, result = run.finish()
    assert began == 0
    twin = new_run("twin")
    with twin.start() as process:
        process.stdout.readline()
        begin = time.monotonic()
        assert process.wait(900) == 0
        duration = time.monotonic() - begin
    assert twin.result.read_bytes() == result
    return result, duration


def kill_at_random(run, duration, seed):
    """Kills the run once, at a moment drawn from its whole training."""
    moments = random.Random(seed)
    while True:
        with run.start() as process:
            process.stdout.readline()
            time.sleep(moments.uniform(0, duration))
            process.send_signal(signal.SIGKILL)
        if process.returncode == -signal.SIGKILL:
            return
        duration /= 2  # it was faster than the reference and had ended
        shutil.rmtree(run.folder / "checkpoints")
        run.result.unlink()


@pytest.mark.parametrize("seed", range(2))
def test_two_kills(new_run, reference, seed):
    result, duration = reference
    run = new_run(f"two-{seed}")
    kill_at_random(run, duration, seed)
    assert run.finish()[1] == result


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 150))
def test_fifty_kills(new_run, reference, seed):
    result, duration = reference
    run = new_run(f"fifty-{seed}")
    kill_at_random(run, duration, seed)
    assert run.finish()[1] == result


@pytest.mark.slow
@pytest.mark.parametrize("count", range(1, 400, 19))
def test_killed_before_an_operation_on_files(new_run, reference, count):
    """From the lock through saves, renames, the boundary's save and deletions."""
    run = new_run(f"operation-{count}")
    with run.start("--die-at", str(count)) as process:
        assert process.wait(900) == -signal.SIGKILL
    assert run.finish()[1] == reference[0]


@pytest.mark.slow
def test_killed_again_and_again(new_run, reference):
    run = new_run("again")
    for seed in range(6):
        kill_at_random(run, reference[1] / 4, seed)
    assert run.finish()[1] == reference[0]
    assert run.finish() == (90, reference[0])  # and once more after its end


def test_sigterm_ends_cleanly(new_run, reference):
    run = new_run("sigterm")
    with run.start() as process:
        process.stdout.readline()
        time.sleep(0.3 * reference[1])
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    assert out == "stopped\n"
    assert not run.result.exists()
    began, result = run.finish()
    assert began > 0
    assert result == reference[0]
