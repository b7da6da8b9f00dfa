"""The report page: what it shows is what the results say, and it needs nothing else."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

pytest.importorskip("tyro")
pytest.importorskip("rich")

from benchmarks.report import Config, main, read

VOID = {"meta"}


class Balanced(HTMLParser):
    """Raises unless every element that opens closes, in order."""

    def __init__(self):
        super().__init__()
        self.open, self.text = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def vision_results(seeds=3):
    rng, runs = np.random.default_rng(0), []
    for method, level in (("good <one>", 0.9), ("bad", 0.5)):
        for seed in range(seeds):
            tensor = level + 0.01 * rng.normal(size=(3, 2, 3))
            runs.append(
                {
                    "method": method,
                    "about": "a & b",
                    "seed": seed,
                    "learning_rate": 0.001,
                    "seconds": 12.0,
                    "metrics": {"ACC": tensor[-1, -1].mean(), "BWT": None},
                    "matrix": tensor[:, -1].tolist(),
                    "anytime": tensor.tolist(),
                }
            )
    return {
        "runs": runs,
        "tasks": ["a", "b", "c"],
        "stream": {"name": "permuted-digits", "scenario": "domain"},
        "config": {"steps": 10},
        "versions": {"git_commit": "0123456789abcdef"},
    }


def lm_results():
    matrix = [[1.0, 3.0], [2.0, 0.5]]
    row = {
        "method": "alias",
        "about": "the alias",
        "seed": 0,
        "learning_rate": 0.001,
        "seconds": 3.0,
        "final_loss": 1.25,
        "learned_loss": 0.75,
        "forgetting": 1.0,
        "final_accuracy": 0.4,
        "loss_matrix": matrix,
        "curves": {"loss": [3.0, 2.0, None, 1.0]},
    }
    domains = [{"name": "x"}, {"name": "y"}]
    return {"methods": [row], "domains": domains, "versions": {"git_commit": None}}


def written(folder, results):
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(results))
    return folder


@pytest.mark.smoke
def test_the_page_shows_the_results_and_stands_alone(tmp_path):
    folders = (
        written(tmp_path / "vision", vision_results()),
        written(tmp_path / "lm", lm_results()),
    )
    assert main(Config(folders, tmp_path / "page.html")) == 0
    page = (tmp_path / "page.html").read_text()
    parser = Balanced()
    parser.feed(page)
    assert not parser.open
    assert not re.search(r"(src|href)=|https?://|<script", page)
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page
    text = " ".join(parser.text)
    assert "permuted-digits" in text and "0123456789ab" in text and "no commit" in text
    accuracy = [r["metrics"]["ACC"] for r in vision_results()["runs"][:3]]
    assert f"{np.mean(accuracy):.3f}" in text and "1.250" in text
    assert text.index("good <one>") < text.index("bad")  # the best first
    assert page.count("<polygon") == 2  # bands of the method with three seeds


@pytest.mark.parametrize("where", ["loss", "metrics"])
@pytest.mark.parametrize("seeds", [1, 3])
def test_runs_that_diverged_are_not_ranked(tmp_path, where, seeds):
    results = vision_results()
    for row in results["runs"]:
        if row["method"] == "good <one>" and row["seed"] < seeds:
            row["metrics"]["ACC"] = 0.99
            if where == "loss":
                row["loss"] = [[[0.1, None]]]
            else:
                row["metrics"]["ACC"] = None
    folder = written(tmp_path / "run", results)
    assert main(Config((folder,), tmp_path / "page.html")) == 0
    page = (tmp_path / "page.html").read_text()
    told = "diverged" if seeds == 3 else "1 of 3 diverged"
    assert f"<td>{told}</td><td>–</td>" in page and "0.99" not in page
    assert page.index("bad") < page.index("good &lt;one&gt;")
    assert "nan" not in page.split("<h3>")[0]


def test_a_page_of_nothing_but_losses_that_diverged(tmp_path):
    results = lm_results()
    (row,) = results["methods"]
    row |= {"final_loss": None, "loss_matrix": [[None] * 2] * 2}
    row["curves"] = {"loss": [None] * 4}
    folder = written(tmp_path / "run", results)
    assert main(Config((folder,), tmp_path / "page.html")) == 0
    assert "<td>diverged</td>" in (tmp_path / "page.html").read_text()


def test_two_seeds_have_no_band(tmp_path):
    folder = written(tmp_path / "run", vision_results(seeds=2))
    assert main(Config((folder,), tmp_path / "page.html")) == 0
    assert "<polygon" not in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("content", [None, "{", '{"other": 1}'])
def test_folders_without_results_are_named(tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    assert main(Config((tmp_path,), tmp_path / "page.html")) == 2
    assert str(tmp_path / "results.json") in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"results\.json"):
        read(tmp_path)
