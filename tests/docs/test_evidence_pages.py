"""docs/evidence/ and the guide carry the numbers of benchmarks/results."""

import csv
import html.parser
import re
import shutil
import subprocess

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")
pytest.importorskip("tyro")

from benchmarks import forgetting
from benchmarks._evidence import benches, pareto
from benchmarks._pages.evidence import (
    cells,
    facts,
    pages,
    pretrained_tables,
    results,
    tables,
)
from benchmarks._pages.tables import written

LINES = cells.cells()
PAGES = [pages.FOLDER / text.name for text in pages.TEXTS]


@pytest.mark.smoke
@pytest.mark.parametrize("text", pages.TEXTS, ids=lambda path: path.stem)
def test_pages_are_those_of_the_results(text):
    made = pages.page(text)
    assert (pages.FOLDER / text.name).read_text() == made, (
        "run benchmarks._pages.evidence"
    )
    assert "{{" not in made
    assert len(made.splitlines()) < 250


def test_the_guide_to_the_methods_has_the_headlines():
    guide = pages.GUIDE.read_text()
    assert written(guide, "headlines", tables.headlines()) == guide


def test_the_guide_to_pretrained_models_has_what_was_measured():
    guide = pages.PRETRAINED.read_text()
    assert written(guide, "pairs", pretrained_tables.for_readers()) == guide
    rows = results.read("pretrained_instruct")["methods"]["adam"]["rows"]
    (line,) = (x for x in guide.splitlines() if x.startswith("| Adam on the pairs | 1"))
    told = [float(x.split(" ±")[0]) for x in line.strip("| ").split(" | ")[1:]]
    wanted = [
        [
            row["learned_loss"],
            row["final_loss"],
            row["forgetting"],
            row["general_loss_after"] - row["general_loss_before"],
            row["kl"],
            row["metrics"]["OP"],
        ]
        for row in rows
    ]
    assert told == pytest.approx(np.mean(wanted, axis=0), abs=6e-4)


def test_a_method_that_is_not_best_is_not_called_so():
    assert facts.fact("llm_below instruct final_loss lora_complement adam")
    with pytest.raises(ValueError, match="is not below lora_complement"):
        facts.fact("llm_below instruct final_loss adam lora_complement")
    with pytest.raises(ValueError, match="is not least with adam"):
        facts.fact("llm_least instruct final_loss adam")


@pytest.mark.parametrize("stream", benches.ON_TWO_CORES)
def test_every_main_cell_has_been_measured(stream):
    known = results.rows("forgetting", stream)
    seeds = {name: len(row["runs"]) for name, row in known.items()}
    assert {c.name for c in forgetting.chosen(forgetting.MAIN)} <= seeds.keys()
    for cell in forgetting.chosen(forgetting.HEADLINE):
        assert seeds[cell.name] >= forgetting.HEADLINE_SEEDS


@pytest.mark.smoke
@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_links_and_pictures_lead_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target
    for name in re.findall(r"^!\[.*\]\((.*)\)$", text, flags=re.MULTILINE):
        assert (page.parent / name).stat().st_size < 150_000, name


@pytest.mark.smoke
def test_csv_has_every_cell_and_its_numbers():
    text = (pages.FOLDER / "cells.csv").read_text()
    assert text == cells.as_csv(LINES), "run benchmarks._pages.evidence"
    found = list(csv.DictReader(text.splitlines()))
    measured = sum(
        len(results.rows(benchmark, stream))
        for benchmark in cells.DEFAULT
        for stream in results.streams_of(benchmark)
    )
    assert len(found) == measured
    (alias,) = (
        line for line in found
        if [line[k] for k in ("stream", "modifier", "route", "optimizer")]
        == ["permuted-digits", "gpm", "shared_v", "adam"] and not line["strength_rule"]
    )  # fmt: skip
    row = results.rows("forgetting", "permuted-digits")["gpm/shared_v/adam"]
    finals = [run["final"] for run in row["runs"]]
    assert float(alias["final"]) == pytest.approx(np.mean(finals), abs=1e-5)
    assert int(alias["seeds"]) == len(finals)


class Page(html.parser.HTMLParser):
    """What a browser would load, and how many rows there are."""

    def __init__(self):
        super().__init__()
        self.rows, self.loads = 0, []

    def handle_starttag(self, tag, attrs):
        self.rows += tag == "tr"
        self.loads += [value for name, value in attrs if name in ("src", "href")]


@pytest.mark.smoke
def test_the_table_of_cells_is_complete_and_loads_nothing():
    text = (pages.FOLDER / "cells.html").read_text()
    assert text == cells.as_html(LINES), "run benchmarks._pages.evidence"
    page = Page()
    page.feed(text)
    assert page.rows == len(LINES) + 1
    assert page.loads == []
    assert "http" not in text and "@import" not in text and "url(" not in text


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_the_table_of_cells_filters_in_a_browser():
    address = (pages.FOLDER / "cells.html").as_uri() + "#text-low-8"
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    done = subprocess.run([*command, address], capture_output=True, text=True)
    shown = sum(line["stream"] == "text-low-8" for line in LINES)
    assert f"{shown} of {len(LINES)} rows" in done.stdout
    assert done.stdout.count("<tr hidden") == len(LINES) - shown


def test_the_front_of_a_file_is_that_of_its_rows():
    for stream in results.streams_of("strength_rules"):
        content = results.read(f"strength_rules_{stream}")
        front = pareto.front(content["rows"], content["bench"]["measure"])
        assert content["pareto_front"] == front


def test_facts_are_what_the_results_say():
    row = results.rows("forgetting", "text-low-8")
    adam, alias = row["none/shared/adam"], row["gpm/shared_v/adam"]
    mean = np.mean([run["final"] for run in adam["runs"]])
    assert facts.fact("final text-low-8 none/shared") == f"{mean:.3f}"
    pairs = zip(adam["runs"], alias["runs"], strict=True)
    gain = np.mean([a["final"] - b["final"] for a, b in pairs])  # of a loss
    told = facts.fact("gains text-low-8 gpm/shared_v over none/shared")
    assert told == f"{gain:.2f}"
    spread = facts.fact("final text-low-8 none/shared,gpm/shared_v").split(" to ")
    assert spread == sorted(spread) and f"{mean:.3f}" in spread


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ("loses text-low-8 gpm/shared_v over none/shared", "over none/shared on"),
        ("final text-low-8 gpm/nowhere", "has no cell"),
        ("rate text-low-8 gpm/*", "has the rates"),
        ("final text-low-8 si/shared/sgd", "diverged"),
        ("nothing text-low-8", "nothing"),
    ],
)
def test_a_fact_that_is_not_true_is_refused(wrong, why):
    with pytest.raises(ValueError, match=why):
        facts.fact(wrong)


def test_paragraphs_are_wrapped_and_nothing_else():
    text = "a b\nc\n\n- d\n  e\n- f\n\n| g |\n| h |\n\n```\ni\nj\n```\n"
    assert pages.wrapped(text) == text.replace("b\nc", "b c").replace("d\n  e", "d e")
