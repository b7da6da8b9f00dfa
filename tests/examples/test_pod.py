"""examples.pod: a mesh changes where things lie, not what comes out."""

import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

pytest.importorskip("flax")
pytest.importorskip("orbax.checkpoint")
pytest.importorskip("tyro")

from adamr._nodes import find_nodes
from adamr.checkpoint.checkpoints import Checkpoints
from adamr.routing.merge import FaithfulSecondMomentState
from adamr.state import get_subspace
from adamr.subspaces.subspace import rank
from examples.harness import meshes
from examples.lm.model import PRESETS
from examples.pod.__main__ import main
from examples.pod.train import learn_stream, programs
from examples.streams.domains import load_folder

ROOT = Path(__file__).parents[2]
TINY = PRESETS["tiny"]
MESH = "data=2,fsdp=2,tensor=2"
NUMBERS = {"seed": 0, "learning_rate": 1e-2, "max_rank": 8, "threshold": 0.9}
LINES = {"abc": "abcdefgh\n", "digits": "0123456789\n", "words": "the quick fox\n"}


def domains(folder):
    for name, line in LINES.items():
        for part in ("train", "valid"):
            (folder / f"{name}.{part}.txt").write_text(60 * line)
    return load_folder(folder)


@functools.cache
def made(text):
    """Mesh and programs; one compilation for all tests."""
    mesh = meshes.parse_mesh(text, jax.devices()[: 8 if "," in text else 1])
    return mesh, programs(TINY, mesh, **NUMBERS)


def learn(text, folder, stop=None):
    mesh, ready = made(text)

    def report(step, loss, seconds):
        if step == stop:
            raise KeyboardInterrupt

    with Checkpoints(folder, config={}, every=5) as checkpoints:
        return learn_stream(
            ready, domains(folder), TINY, mesh, checkpoints, seed=0, report=report
        )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What one run on the mesh gives."""
    return learn(MESH, tmp_path_factory.mktemp("whole"))


def placed(array):
    return array.sharding.spec


def test_a_mesh_gives_what_one_device_gives(whole, tmp_path):
    one = learn("data=1", tmp_path)
    np.testing.assert_allclose(whole["losses"], one["losses"], rtol=1e-4)
    np.testing.assert_allclose(whole["matrix"], one["matrix"], rtol=1e-4)
    assert np.shape(whole["matrix"]) == (3, 3)
    ranks = [rank(get_subspace(done["state"].opt_state)) for done in (one, whole)]
    assert [r and int(r) for r in ranks[0]] == [r and int(r) for r in ranks[1]]
    assert max(int(r) for r in ranks[0] if r is not None) == 8


def test_three_tasks_compile_each_program_once(whole):
    _, ready = made(MESH)
    for program in (ready.init, ready.train, ready.protect, ready.evaluate):
        assert program._cache_size() == 1


def test_state_lies_where_its_parameters_do(whole):
    params, state = whole["state"]
    (moments,) = find_nodes(state, FaithfulSecondMomentState)
    subspace, block = get_subspace(state), params["blocks"][0]
    names = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    (down,) = (i for i, name in enumerate(names) if "down/kernel" in name)
    assert placed(block["down"]["kernel"][...]) == P("tensor", "fsdp")
    assert placed(moments.mu["blocks"][0]["down"]["kernel"][...]) == P("tensor", "fsdp")
    assert moments.nu[down].shape == (1, TINY.width)
    assert placed(moments.nu[down]) == P(None, "fsdp")
    assert placed(subspace.bases[down]) == P("tensor", None, None)
    assert placed(block["norm1"]["scale"][...]) in (P(), P(None))


def test_a_stopped_run_goes_on_here_and_on_another_mesh(whole, tmp_path):
    for name in ("same", "other"):
        with pytest.raises(KeyboardInterrupt):
            learn(MESH, tmp_path / name, stop=18)
    same = learn(MESH, tmp_path / "same")
    assert same["losses"] == whole["losses"] and same["matrix"] == whole["matrix"]
    other = learn("data=1", tmp_path / "other")
    assert other["losses"][:15] == whole["losses"][:15]
    np.testing.assert_allclose(other["losses"], whole["losses"], rtol=1e-4)


@pytest.mark.smoke
def test_command_line(whole, tmp_path, capsys, monkeypatch):
    ready = {}

    def programs(preset, mesh, **numbers):
        ready.update(preset=preset, mesh=mesh, numbers=numbers)
        return made(MESH)[1]

    monkeypatch.setattr("examples.pod.__main__.programs", programs)
    flags = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in {"preset": "tiny", "mesh": MESH, **NUMBERS}.items()
    ]
    out = tmp_path / "out"
    domains(tmp_path)
    assert main([*flags, "--data", str(tmp_path), "--out", str(out)]) == 0
    assert ready == {"preset": TINY, "mesh": made(MESH)[0], "numbers": NUMBERS}
    results = json.loads((out / "results.json").read_text())
    assert results["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2}
    assert results["losses"] == whole["losses"]
    assert results["loss_matrix"] == whole["matrix"]
    assert results["parameter_bytes_per_device"] < 4 * results["parameters"] / 2
    assert "loss when learnt" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--mesh data=3", "data=3' needs 3 devices, but there are 8"),
        ("--mesh model=8", "expected <axis>=<size> with an axis out of data, fsdp"),
        ("--mesh data=2,data=4", "each once"),
        ("--mesh data=0", "a size of at least 1"),
        ("--batch 3", "--batch: got 3 windows, which data x fsdp = 8"),
        ("--max-rank 0", "--max-rank: got 0"),
        ("--learning-rate -1", "--learning-rate: got -1"),
        ("--threshold 2", "--threshold: got 2"),
        ("--process 0", "need --coordinator"),
        ("--coordinator here --processes 2 --process 0", "expected host:port"),
        ("--coordinator here:1", "and both numbers"),
        ("--coordinator here:1 --processes 2 --process 2", "expected 0 to 1"),
        ("--data nowhere", "--data: got nowhere"),
    ],
)
def test_errors(arguments, words, capsys, tmp_path):
    command = ["--preset", "tiny", "--batch", "8", "--out", str(tmp_path)]
    assert main([*command, *arguments.split()]) == 2
    assert words in capsys.readouterr().err


def test_sizes_that_the_mesh_does_not_divide_are_named():
    mesh = meshes.parse_mesh("tensor=3", jax.devices()[:3])
    with pytest.raises(meshes.PlacementError, match=r"tensor=3 .* \(16, 16\)"):
        programs(TINY, mesh, **NUMBERS)


def in_processes(count, devices, folder, out):
    """Runs the command line in `count` processes of `devices` each, to the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "examples.pod", "--preset", "tiny", "--every", "5"]
    command += ["--mesh", "data=2,fsdp=2", "--data", str(folder), "--out", str(out)]
    command += ["--cpu-devices", str(devices)]
    if count > 1:
        command += ["--coordinator", f"127.0.0.1:{port}", "--processes", str(count)]
    started = [
        subprocess.Popen(
            [*command, *(["--process", str(i)] if count > 1 else [])],
            cwd=ROOT,
            env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(count)
    ]
    said = [process.communicate(timeout=300)[0] for process in started]
    assert not any(process.returncode for process in started), said
    return json.loads((out / "results.json").read_text()), said


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path):
    domains(tmp_path)
    one, _ = in_processes(1, 4, tmp_path, tmp_path / "one")
    two, said = in_processes(2, 2, tmp_path, tmp_path / "two")
    assert (one["processes"], two["processes"]) == (1, 2)
    np.testing.assert_allclose(two["losses"], one["losses"], rtol=1e-5)
    np.testing.assert_allclose(two["loss_matrix"], one["loss_matrix"], rtol=1e-5)
    assert "loss when learnt" in said[0] and "loss" not in said[1]
