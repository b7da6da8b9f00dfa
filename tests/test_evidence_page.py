"""docs/evidence.md and the README carry the numbers of benchmarks/results."""

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")
pytest.importorskip("tyro")

from benchmarks._tables import written
from docs import evidence


@pytest.mark.parametrize("name", evidence.TABLES)
def test_tables_are_those_of_the_results(name):
    path, make = evidence.TABLES[name]
    page = path.read_text()
    assert written(page, name, make()) == page, "run python -m docs.evidence"


def test_pictures_exist():
    for line in evidence.PAGE.read_text().splitlines():
        if line.startswith("!["):
            path = line.split("(")[1].rstrip(")")
            assert (evidence.PAGE.parent / path).exists(), path
