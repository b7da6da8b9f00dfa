"""docs/benchmarks.md carries the numbers of benchmarks/results, and every command."""

import re

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")
pytest.importorskip("tyro")

from benchmarks._pages import speed
from benchmarks._pages.tables import written

PAGE = speed.PAGE.read_text()
WORDS = re.sub(r"\s+", " ", PAGE)


@pytest.mark.parametrize("name", speed.TABLES)
def test_tables_are_those_of_the_results(name):
    made = speed.TABLES[name]()
    assert written(PAGE, name, made) == PAGE, "run benchmarks._pages.speed"


def test_every_benchmark_is_listed_with_results_that_exist():
    listed = speed.SPEED | speed.EVIDENCE
    files = (speed.ROOT / "benchmarks").glob("[a-z]*.py")
    assert set(listed) == {path.stem for path in files}
    for results in listed.values():
        for name in re.findall(r"`([\w*-]+\.json)`", results):
            missing = not list(speed.RESULTS.glob(name))
            assert missing == ("not measured yet" in results), name


@pytest.mark.parametrize(
    "name",
    [
        "step_time",
        "accelerator_cpu",
        "adapters",
        "boundary",
        "throughput",
        "throughput-nproc1",
        "avalanche",
    ],
)
def test_the_page_names_the_command_of_each_result(name):
    machine = speed.read(name)["machine"]
    assert f"`{machine['command']}`" in WORDS or f" {machine['command']}`" in WORDS
    assert (machine["cores"], machine["device"]) == (2, "cpu: cpu")
    assert machine["cpu"] in PAGE


def test_sizes_in_the_text_are_those_that_were_measured():
    training, adapters = speed.read("accelerator_cpu"), speed.read("adapters")
    config = training["config"]
    millions = f"{training['parameters'] / 1e6:.1f} million parameters"
    assert f"{millions}, {config['tokens']} tokens of text, rank {config['rank']}" in (
        WORDS
    )
    assert f"The {adapters['leaves']} small leaves of rank-8" in WORDS
    assert adapters["config"]["adapter_rank"] == 8
    assert f"have only {adapters['parameters'] * 4 / 1e6:.0f} MB" in WORDS


def test_what_the_text_says_of_a_step():
    """The alias beside the same projection in a chain, and half of Adam's moments."""
    groups = speed.read("step_time")["groups"]
    ranked = [g for g in groups if g["rank"] is not None]
    ratios = [g["ratios"]["alias / chain"]["median"] for g in ranked]
    assert 0.85 < min(ratios) and max(ratios) < 1.05
    assert {g["rank"] for g in ranked} == {8, 32, 64, 256}
    for group in groups:
        if group["rank"] is None:
            bytes_of = {k: v["state_bytes"] for k, v in group["rivals"].items()}
            assert abs(bytes_of["shared"] / bytes_of["adam"] - 0.5) < 0.01
    largest = [g for g in ranked if g["parameters"] > 5e6]
    adam = {
        g["parameters"]: g["rivals"]["adam"]["milliseconds"]
        for g in groups
        if g["rank"] is None
    }
    for group in largest:
        alias = group["rivals"]["alias"]["milliseconds"]
        assert alias > 2 * adam[group["parameters"]]
