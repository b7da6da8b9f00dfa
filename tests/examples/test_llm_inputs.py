"""examples.llm: what cannot be learned, answered or scored is told before training.

Needs the extra `llm`.
"""

import json

import numpy as np
import pytest

pytest.importorskip("tunix")
pytest.importorskip("qwix")

from examples.llm import __main__ as command  # noqa: E402
from examples.llm import plans, runs  # noqa: E402
from examples.llm.errors import ModelError  # noqa: E402
from examples.llm.folders import end_tokens, read_config  # noqa: E402
from examples.llm.options import Config  # noqa: E402
from examples.llm.tiny import write_tiny  # noqa: E402
from examples.streams.domains import DataError  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("default::DeprecationWarning"),
    pytest.mark.usefixtures("rank_promotion"),
]

SIZES = {
    "steps": 1,
    "batch": 2,
    "context": 40,
    "scored": 4,
    "captured": 4,
    "general": 4,
    "generated": 4,
    "new_tokens": 4,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("model"))


def write(folder, name, prompt="How many?", answer="12"):
    """A task of four rows; of row 2, prompt and answer are these."""
    rows = [{"prompt": f"{i} + {i} = ", "answer": str(2 * i)} for i in range(4)]
    rows[2] = {"prompt": prompt, "answer": answer}
    (folder / name).mkdir()
    for part in ("train", "eval", "test"):
        (folder / name / f"{part}.json").write_text(json.dumps(rows))


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder, "General")
    write(folder, "plain")
    return folder


def told(data, model, **options):
    """The lines that loading says."""
    lines = []
    config = Config(data=data, model=model, **{**SIZES, **options})
    plans.load_all(config, lines.append)
    return lines


def run(data, model, out, method):
    given = {**SIZES, "data": data, "model": model, "out": out, "method": method}
    flags = ((f"--{k.replace('_', '-')}", str(v)) for k, v in given.items())
    return command.main([part for flag in flags for part in flag])


def test_an_empty_prompt_is_learned_and_answered(data, model, tmp_path):
    write(data, "bare", prompt="")
    assert run(data, model, tmp_path / "out", "adam") == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    scores = np.array(found["methods"][0]["score_matrix"], float)
    assert found["tasks"][0]["answered_rows"] == 4 and np.isfinite(scores[-1]).all()


@pytest.mark.parametrize(
    ("task", "wanted"),
    [
        ("GSM8K-short", "a number"),
        ("ScienceQA", "a letter"),
        ("DSTC8-json", "a JSON object"),
    ],
)
def test_an_answer_that_cannot_be_scored(data, model, task, wanted):
    # The rows before it have answers that only a number's metric can score.
    write(data, task, answer="none")
    row = 2 if task == "GSM8K-short" else 0
    expected = rf"{task}, test, row {row}: metric: .* cannot be scored, .* {wanted}"
    with pytest.raises(DataError, match=expected):
        told(data, model, tasks=f"plain,{task}")
    # What no one answers need not be scored.
    told(data, model, tasks=f"plain,{task}", generated=0)


def test_more_new_tokens_than_the_model_has_room_for(data, model):
    for many in (256, 300):
        with pytest.raises(ValueError, match=f"--new-tokens: got {many}.*than the 256"):
            told(data, model, new_tokens=many)
    told(data, model, new_tokens=300, generated=0)
    assert not any("answers" in line for line in told(data, model, new_tokens=240))


def test_a_local_window_that_a_prompt_does_not_fit(data, tmp_path):
    write(data, "wide", prompt="x" * 33, answer="y")
    gemma = write_tiny(
        tmp_path / "gemma", model_type="gemma3_text", num_hidden_layers=6,
        hidden_act="gelu_pytorch_tanh", rms_norm_eps=1e-6, sliding_window=40,
        head_dim=16, query_pre_attn_scalar=16,
    )  # fmt: skip
    expected = "wide, test, row 2: a prompt of 33 tokens takes 64 .* window of 40"
    with pytest.raises(DataError, match=expected):
        told(data, gemma)
    told(data, gemma, tasks="plain")


def test_what_is_cut_is_told_once(data, tmp_path):
    write(data, "long", prompt="x" * 35, answer="yes, 12")
    small = write_tiny(tmp_path / "small", max_position_embeddings=40)
    lines = told(data, small, new_tokens=10)
    (line,) = (line for line in lines if line.startswith("long, answers"))
    assert "5 tokens at the front of 1 of 4 prompts" in line
    assert not any("valid" in line for line in lines)
    # The validation rows matter where a rate is chosen.
    lines = told(data, small, lr_grid="1e-3,1e-2")
    for part in ("train", "test", "valid"):
        (line,) = (line for line in lines if line.startswith(f"long, {part}"))
        assert "1 rows were shortened" in line
    assert len(set(lines)) == len(lines)


def test_finished_methods_are_shown_when_a_later_one_fails(
    data, model, tmp_path, capsys, monkeypatch
):
    learn = runs.learn

    def fails(folder, *args, **options):
        if "er" in folder.parts:
            raise DataError("er cannot go on")
        return learn(folder, *args, **options)

    monkeypatch.setattr(runs, "learn", fails)
    out = tmp_path / "out"
    assert run(data, model, out, "adam,er") == 2
    printed = capsys.readouterr()
    assert "Adam on the pairs" in printed.out and str(out / "curves.png") in printed.out
    assert printed.err == "error: er cannot go on\n"
    assert (out / "balance.png").is_file()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([1], r"found \[1\], expected a JSON object"),
        (None, "found None, expected a JSON object"),
        ({"model_type": "gemma3"}, "found text_config = None, expected an object"),
        ({"model_type": "gemma3", "text_config": []}, r"found text_config = \[\]"),
    ],
)
def test_a_config_that_is_no_object(tmp_path, content, expected):
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=rf"config\.json: {expected}"):
        read_config(tmp_path)


def test_generation_options_that_are_no_object(tmp_path):
    (tmp_path / "generation_config.json").write_text("[2]")
    with pytest.raises(ModelError, match=r"generation_config\.json: found \[2\]"):
        end_tokens(tmp_path, {})
