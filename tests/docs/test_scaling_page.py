"""docs/scaling.md carries the tables that `python -m benchmarks.memory` prints."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tyro")

import tyro

from benchmarks import memory
from benchmarks._pages import dry_run
from benchmarks._speed import finetuning

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / memory.PAGE).read_text()


@pytest.mark.smoke
@pytest.mark.parametrize("make", memory.FROM_SHAPES)
def test_tables_from_shapes(make):
    assert memory.written(PAGE, make.__name__, make()) == PAGE


def test_a_page_without_its_marks_is_refused():
    with pytest.raises(ValueError, match="0 tables sizes"):
        memory.written(PAGE.replace("<!-- sizes -->", ""), "sizes", "")


def test_commands_for_trace_are_those_that_the_example_takes():
    pytest.importorskip("tokenizers")
    from examples.llm.options import Config
    from examples.llm.tasks import KNOWN

    found = dry_run.commands(PAGE)
    assert set(found) == {"fsdp=8", "fsdp=4,tensor=2"}
    for mesh, arguments in found.items():
        config = tyro.cli(Config, args=arguments)
        assert config.mesh == mesh and config.epochs
        assert config.tasks.split(",") == list(KNOWN)[:8]
        assert f"<!-- dry run of {mesh} -->\n\n```\nlora_complement" in PAGE


def test_llama_2_is_that_of_the_dry_run():
    pytest.importorskip("tokenizers")
    from examples.llm.dry_run import NAMED

    for size, config in zip(finetuning.LLAMA2.values(), NAMED.values(), strict=True):
        heads, width = config["num_attention_heads"], config["hidden_size"]
        keys = config.get("num_key_value_heads", heads) * width // heads
        layers, hidden = config["num_hidden_layers"], config["intermediate_size"]
        assert size == (layers, width, hidden, keys)
        assert finetuning.VOCABULARY == config["vocab_size"]


def _agree(printed, there):
    """Labels agree, and numbers to 5 %: another XLA may order a program otherwise."""
    number = re.compile(r"(?<= )[\d,]*\d\.\d+")
    for mine, its in zip(printed, there, strict=True):
        assert number.sub("", mine).split() == number.sub("", its).split()
        found, wanted = (
            [float(x.replace(",", "")) for x in number.findall(row)]
            for row in (mine, its)
        )
        np.testing.assert_allclose(found, wanted, rtol=0.05, atol=0.01)


def _lines(name):
    return PAGE.split(f"<!-- {name} -->")[1].split("<!-- end")[0].strip().splitlines()


@pytest.mark.slow
def test_table_from_compiled_programs():
    command = [sys.executable, "-m", "benchmarks.memory"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    printed = done.stdout.split("\ndevices: ")[1].strip().splitlines()[1:]
    _agree(printed, _lines("devices"))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", dry_run.commands(PAGE))
def test_dry_runs_of_the_commands_for_trace(mesh):
    pytest.importorskip("tunix")
    printed = dry_run.output(dry_run.commands(PAGE)[mesh]).splitlines()
    _agree(printed, _lines(f"dry run of {mesh}")[1:-1])
