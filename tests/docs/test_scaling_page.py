"""docs/scaling.md carries the tables that `python -m benchmarks.memory` prints."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tyro")

from benchmarks import memory

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / memory.PAGE).read_text()


@pytest.mark.smoke
@pytest.mark.parametrize("make", [memory.recipes, memory.sizes])
def test_tables_from_shapes(make):
    assert memory.written(PAGE, make.__name__, make()) == PAGE


def test_a_page_without_its_marks_is_refused():
    with pytest.raises(ValueError, match="0 tables sizes"):
        memory.written(PAGE.replace("<!-- sizes -->", ""), "sizes", "")


@pytest.mark.slow
def test_table_from_compiled_programs():
    """Labels agree, and numbers to 5 %: another XLA may order a program otherwise."""
    command = [sys.executable, "-m", "benchmarks.memory"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    printed = done.stdout.split("\ndevices: ")[1].strip().splitlines()[1:]
    there = PAGE.split("<!-- devices -->")[1].split("<!-- end")[0].strip().splitlines()
    number = re.compile(r"(?<=\| )\d+\.\d+")
    for mine, its in zip(printed, there, strict=True):
        assert number.sub("", mine) == number.sub("", its)
        found, wanted = ([*map(float, number.findall(row))] for row in (mine, its))
        np.testing.assert_allclose(found, wanted, rtol=0.05, atol=0.01)
