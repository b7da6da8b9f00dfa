"""examples.llm on a mesh: where things lie changes, not what comes out.

Needs the extra `llm`.
"""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

pytest.importorskip("tunix")
pytest.importorskip("qwix")

import adamr  # noqa: E402
from adamr._nodes import find_nodes  # noqa: E402
from examples.harness import meshes  # noqa: E402
from examples.llm import __main__ as command  # noqa: E402
from examples.llm import answers, dry_run, plans, stream, task_ends  # noqa: E402
from examples.llm.generate import generator  # noqa: E402
from examples.llm.methods import METHODS  # noqa: E402
from examples.llm.options import Config  # noqa: E402
from examples.llm.tiny import write_tiny  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("default::DeprecationWarning"),
    pytest.mark.usefixtures("rank_promotion"),
    # A capacity of 16 is full after the first task.
    pytest.mark.filterwarnings("ignore:the bases of .* are full:UserWarning"),
]

MESH = "data=2,fsdp=2,tensor=2"
SIZES = {
    "steps": 3,
    "batch": 4,
    "context": 40,
    "scored": 4,
    "captured": 4,
    "general": 4,
    "generated": 0,
    "capacity": 16,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny model; two tasks and general text."""
    data = tmp_path_factory.mktemp("data")
    for word in ("upper", "lower", "General"):
        (data / word).mkdir()
        rows = [
            {"prompt": f"{word} {i}?\n", "answer": f"{word[::-1]} {i % 3}"}
            for i in range(12)
        ]
        for part in ("train", "eval", "test"):
            (data / word / f"{part}.json").write_text(json.dumps(rows))
    return {"data": data, "model": write_tiny(tmp_path_factory.mktemp("model"))}


def learned(folders, method, mesh, rate=1e-2, **options):
    config = Config(**folders, **{**SIZES, **options}, mesh=mesh)
    loaded = plans.load_all(config, lambda _: None)
    plan = plans.planner(loaded, config)(method)
    *_, (_, run, history) = stream.learn(plan, rate=rate, coefficient=0.5, seed=0)
    return run, history


def assert_same_losses(one, other):
    for measured in ("train_loss", "general"):
        np.testing.assert_allclose(other[measured], one[measured], rtol=1e-4)
    matrices = [np.array(h["loss_matrix"], float) for h in (other, one)]
    np.testing.assert_allclose(*matrices, rtol=1e-4)


def test_losses_are_those_of_one_device(folders):
    _, one = learned(folders, "lora_complement", None)
    run, eight = learned(folders, "lora_complement", MESH)
    assert_same_losses(one, eight)
    queries = [tree["layers"][0]["attn"]["q_proj"] for tree in (run.base, run.trained)]
    assert queries[0]["w"][...].sharding.spec == P("fsdp", "tp")
    assert queries[1]["w_lora_a"][...].sharding.spec == P("fsdp")
    assert queries[1]["w_lora_b"][...].sharding.spec == P(None, "tp")
    bases = jax.tree.leaves(adamr.get_subspace(run.opt_state).bases)
    assert {x.sharding.spec[0] for x in bases} == {"fsdp", ("tp", "fsdp")}


ON_A_MESH = "adam,lora_restart,lora_complement,inflora,o_lora,er,osft".split(",")


@pytest.mark.slow
@pytest.mark.parametrize("method", ON_A_MESH)
def test_methods_that_answer_on_a_mesh(folders, method, monkeypatch):
    """As one device does: the losses, and the answers after each task."""
    said = []

    def recorded(*args, **kwargs):
        generate = generator(*args, **kwargs)

        def answer(*args):
            found = generate(*args)
            said[-1] += found
            return found

        return answer

    monkeypatch.setattr(answers, "generator", recorded)
    options = {
        "rate": METHODS[method].learning_rate,
        "generated": 2,
        "new_tokens": 4,
    }
    found = []
    for mesh in (None, MESH):
        said.append([])
        found.append(learned(folders, method, mesh, **options)[1])
    assert_same_losses(*found)
    for history in found:
        answered = np.isfinite(np.array(history["score_matrix"], float))
        np.testing.assert_array_equal(answered, np.tri(2, dtype=bool))
    assert len(said[0]) == 2 * (1 + 2)  # of two tasks, of the first one twice
    assert said[1] == said[0] and len({tuple(tokens) for tokens in said[0]}) > 1


def test_each_program_is_compiled_once(folders):
    """By the steps and boundaries of two tasks; what differs are values."""
    ends = task_ends.merge_and_redraw, task_ends.a_from_inputs
    programs = stream.train_step, *ends
    for program in programs:
        program.clear_cache()
    learned(folders, "lora_complement", MESH)
    for program in programs:
        assert program._cache_size() == 1


def test_a_dry_run_tells_the_bytes_of_a_run(folders, tmp_path, capsys):
    """From config.json alone, what a run on the mesh then holds."""
    shutil.copy(folders["model"] / "config.json", tmp_path)
    config = Config(**folders, **SIZES, mesh=MESH)
    shapes = dataclasses.replace(config, model=tmp_path)
    parts = list(dry_run.compile_all(shapes, "lora_complement", 0.0))
    held = parts[0].bytes
    loaded = plans.load_all(config, lambda _: None)
    plan = plans.planner(loaded, config)("lora_complement")
    run = stream.start(plan, 1e-3, 0.0)
    bases = meshes.bytes_per_device(adamr.get_subspace(run.opt_state))
    assert held["frozen base"] == meshes.bytes_per_device(run.base)
    assert held["trained"] == meshes.bytes_per_device(run.trained)
    assert held["bases U"] == bases
    rest = meshes.bytes_per_device(run.opt_state) - bases
    assert held["moments and the rest"] == rest
    # Token ids and the mask of a fourth of the rows.
    assert held["batch"] == 40 * (4 + 1)
    assert len(parts) == 5 and all(part.bytes["temporary"] > 0 for part in parts[1:])
    both = next(dry_run.compile_all(shapes, "osft", 0.0)).bytes["bases U"]
    plan = plans.planner(loaded, config)("osft")
    sides = find_nodes(stream.start(plan, 1e-3, 0.0).opt_state, adamr.Subspace)
    assert len(sides) == 2 and both == meshes.bytes_per_device(sides)
    flags = ["--dry-run", "--model", str(tmp_path), "--mesh", MESH, "--batch", "4"]
    assert command.main([*flags, "--context", "40", "--method", "adam"]) == 0
    out = capsys.readouterr().out
    assert "frozen base" in out and "bases U" not in out


# Tunix leaves a file open where the weights cannot be placed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "flags, told",
    [
        ("--mesh fsdp=3", "fsdp=3' needs 3 devices, but there are 8"),
        ("--mesh model=8", "axis out of data, fsdp"),
        ("--mesh fsdp=8 --batch 6", "--batch: got 6 rows, which data x fsdp = 8"),
        ("--mesh tensor=8", "sizes divide those of the model"),
        ("--mesh tensor=8 --dry-run", "does not divide"),
        ("--mesh fsdp=8 --dry-run --batch 8 --model nowhere", "nowhere"),
    ],
)
def test_what_does_not_fit_is_told(folders, tmp_path, capsys, flags, told):
    given = {**folders, "out": tmp_path, "batch": 4}
    known = [x for name, value in given.items() for x in (f"--{name}", str(value))]
    assert command.main([*known, *flags.split()]) == 2
    assert told in capsys.readouterr().err
