"""Several real processes: one is killed, all start again, the bits are the same."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

PROGRAM = Path(__file__).with_name("processes_run.py")
STEPS = 36


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Run:
    """The program on one directory, in as many processes as told."""

    def __init__(self, folder, environment):
        self.folder, self.environment = folder, environment
        self.errors = folder / "errors"
        folder.mkdir()

    def start(self, count, devices, *more):
        port = str(free_port())

        def command(index):
            return [
                *(sys.executable, str(PROGRAM), str(index), str(count), port),
                *(str(self.folder / "checkpoints"), str(self.folder / "result")),
                *("--devices", str(devices), *more),
            ]

        with self.errors.open("w") as errors:
            how = dict(env=self.environment, stdout=subprocess.PIPE, stderr=errors)
            return [
                subprocess.Popen(command(index), text=True, **how)
                for index in range(count)
            ]

    def finish(self, count, devices):
        """To the end; where it began, and the result."""
        processes = self.start(count, devices)
        outputs = ended(processes)
        failed = any(process.returncode for process in processes)
        assert not failed, self.errors.read_text()
        began = int(outputs[0].split("from ")[1].split()[0])
        with np.load(self.folder / "result.npz") as result:
            return began, {name: result[name] for name in result.files}


def stop(processes):
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


def ended(processes):
    """What each printed."""
    try:
        return [process.communicate(timeout=900)[0] for process in processes]
    finally:
        stop(processes)


def until(process, step):
    for line in process.stdout:
        if line == f"step {step}\n":
            return
    raise AssertionError(f"ended before step {step}")


def kill_one(run, count, devices, seed):
    """Kills a process at a random moment, then the others, which cannot go on."""
    draw = random.Random(seed)
    processes = run.start(count, devices)
    # The save at step 6 has waited for the one at step 3.
    until(processes[0], draw.randint(7, STEPS - 8))
    time.sleep(draw.uniform(0, 0.1))
    processes[draw.randrange(count)].kill()
    time.sleep(draw.uniform(0, 0.5))
    stop(processes)
    assert not (run.folder / "result.npz").exists()


def assert_same(found, expected, atol=0.0):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=atol, err_msg=name)


@pytest.fixture(scope="session")
def new_run(tmp_path_factory):
    base = tmp_path_factory.mktemp("processes")
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(base / "compiled"),  # starting costs seconds
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    return lambda name: Run(base / name, environment)


@pytest.fixture(scope="session")
def references(new_run):
    """Results of runs that are left alone, by (count, devices)."""
    results = {}

    def result(count, devices):
        if (count, devices) not in results:
            run = new_run(f"reference-{count}-{devices}")
            began, results[count, devices] = run.finish(count, devices)
            assert began == 0
        return results[count, devices]

    return result


@pytest.mark.parametrize(
    "count, devices, seed",
    [
        (2, 1, 0),
        *[pytest.param(2, 2, seed, marks=pytest.mark.slow) for seed in range(4)],
        *[pytest.param(4, 1, seed, marks=pytest.mark.slow) for seed in range(4)],
    ],
)
def test_one_process_killed(new_run, references, count, devices, seed):
    run = new_run(f"killed-{count}-{devices}-{seed}")
    kill_one(run, count, devices, seed)
    began, result = run.finish(count, devices)
    assert began > 0
    assert_same(result, references(count, devices))


@pytest.mark.slow
@pytest.mark.parametrize("count, devices", [(1, 4), (4, 1), (1, 2), (2, 1)])
def test_goes_on_with_other_numbers(new_run, references, count, devices):
    """Sums over the batch in another order, then 20 steps of Adam on them."""
    run = new_run(f"other-{count}-{devices}")
    kill_one(run, 2, 2, seed=7)
    began, result = run.finish(count, devices)
    assert began > 0
    assert_same(result, references(2, 2), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_sigterm_to_one_ends_all_at_the_same_step(new_run, references, index):
    run = new_run(f"sigterm-{index}")
    processes = run.start(2, 1)
    until(processes[0], 5)
    processes[index].send_signal(signal.SIGTERM)
    outputs = ended(processes)
    assert [process.returncode for process in processes] == [0, 0], (
        run.errors.read_text()
    )
    last = [output.split("step ")[-1] for output in outputs]
    assert last[0] == last[1] and last[0].endswith("stopped\n")
    began, result = run.finish(2, 1)
    assert f"{began}\nstopped\n" == last[0]
    assert_same(result, references(2, 1))


@pytest.mark.slow
def test_what_differs_between_processes_is_refused(new_run):
    run = new_run("differs")
    processes = run.start(2, 1, "--differ")
    ended(processes)
    assert all(process.returncode for process in processes)
    assert "state differs between processes" in run.errors.read_text()
