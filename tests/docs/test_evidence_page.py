"""docs/evidence.md and the README carry the numbers of benchmarks/results."""

import json

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")
pytest.importorskip("tyro")

from benchmarks import forgetting
from benchmarks._evidence import benches
from benchmarks._pages import evidence
from benchmarks._pages.tables import written


@pytest.mark.parametrize("name", evidence.TABLES)
def test_tables_are_those_of_the_results(name):
    path, make = evidence.TABLES[name]
    page = path.read_text()
    assert written(page, name, make()) == page, "run benchmarks._pages.evidence"


@pytest.mark.parametrize("stream", benches.ON_TWO_CORES)
def test_every_main_cell_has_been_measured(stream):
    file = evidence.RESULTS / f"forgetting_{stream.replace('-', '_')}.json"
    seeds = {r["cell"]: len(r["runs"]) for r in json.loads(file.read_text())["rows"]}
    assert {c.name for c in forgetting.chosen(forgetting.MAIN)} <= seeds.keys()
    for cell in forgetting.chosen(forgetting.HEADLINE):
        assert seeds[cell.name] >= forgetting.HEADLINE_SEEDS


@pytest.mark.smoke
def test_pictures_exist():
    for line in evidence.PAGE.read_text().splitlines():
        if line.startswith("!["):
            path = line.split("(")[1].rstrip(")")
            assert (evidence.PAGE.parent / path).exists(), path
