"""examples.llm: tasks in every layout, token arrays with their masks, scores."""

import collections
import json
import os
from pathlib import Path

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from adamr import metrics
from examples.llm import formats, measures, scores, tasks, tokens
from examples.llm.formats import Row
from examples.llm.sari import sari_of
from examples.streams.domains import DataError

SHARED = Path(os.environ.get("ADAMR_SHARED", Path(__file__).parents[3] / "shared"))
INSTRUCT = SHARED / "data" / "instruct"
SENTENCES = [
    "Which city is the capital of France?\nAnswer:\n",
    "Paris is the capital of France, and 42 is a number.",
    "Übung macht den Meister; 한국어 설명을 영어로.",
]


def rows(count, start=0):
    return [
        {"prompt": f"Question {n}?\nAnswer:\n", "answer": f"answer {n}"}
        for n in range(start, start + count)
    ]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def write_trace(folder, *names):
    for name in names:
        for at, split in enumerate(("train", "eval", "test")):
            write(folder / name / f"{split}.json", rows(3 - at, 10 * at))
    return folder


def byte_tokenizer():
    """Merges of bytes, as the tokenizers of SmolLM2 and Qwen have them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


TOKENIZER = byte_tokenizer()
ENCODER = tokens.encoder_for(TOKENIZER, 300)


# Layouts.


@pytest.mark.smoke
def test_trace_folders(tmp_path):
    write_trace(tmp_path, "Zebra", "FOMC", "C-STANCE", "ScienceQA", "General")
    write(tmp_path / "dataset_examples.txt", "no task")
    write(tmp_path / "licenses" / "a.txt", "no task")
    found = tasks.load(tmp_path)
    assert found.layout == formats.TRACE
    names = [task.name for task in found.tasks]
    assert names == ["C-STANCE", "FOMC", "ScienceQA", "Zebra"]
    assert [task.epochs for task in found.tasks] == [5, 3, 3, None]
    wanted = ["exact_match", "exact_match", "first_letter", "exact_match"]
    assert [task.metric for task in found.tasks] == wanted
    assert found.general.name == "General" and found.general.metric == "loss"
    assert any("Zebra" in note and "exact_match" in note for note in found.notes)
    task = found.tasks[0]
    assert [len(task.train), len(task.valid), len(task.test)] == [3, 2, 1]
    assert task.train[1] == Row("Question 1?\nAnswer:\n", "answer 1")
    assert tasks.one_line(task)
    assert not tasks.one_line(task._replace(train=(Row("", "A\nBecause"),)))


def test_tasks_are_picked_and_ordered(tmp_path):
    write_trace(tmp_path, "a", "b", "c")
    found = tasks.load(tmp_path, ["c", " a"])
    assert [task.name for task in found.tasks] == ["c", "a"]
    assert found.general.kind == "text" and "English prose" in found.general.source
    assert any("General" in note for note in found.notes)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a", "d"], ["--tasks", "'d'", "a, b"]),
        (["a", "a"], ["--tasks", "a, a", "twice"]),
        ([], ["--tasks", "no task", "a, b"]),
        (["General"], ["--tasks", "General", "never trained on", "a, b"]),
    ],
)
def test_wrong_names_of_tasks(tmp_path, names, expected):
    write_trace(tmp_path, "a", "b", "General")
    with pytest.raises(DataError) as error:
        tasks.load(tmp_path, names)
    assert all(part in str(error.value) for part in expected), error.value


def test_a_folder_with_the_probe_alone_has_no_task(tmp_path):
    write_trace(tmp_path, "General")
    with pytest.raises(DataError, match="--tasks: got no task .* at least one task"):
        tasks.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[{", ["train.json", "not JSON"]),
        ("[" * 100_000, ["train.json", "not JSON"]),
        ("3", ["train.json", "found int", "list of rows"]),
        ({"rows": []}, ["train.json", "keys rows", "Instances"]),
        ([], ["train.json", "no rows"]),
        (["text"], ["row 0", "'text'", "'prompt'"]),
        ([*rows(1), {"prompt": "a"}], ["row 1", "keys prompt", "'answer'"]),
        ([{"prompt": "a", "answer": 3}], ["row 0", "answer = 3", "string"]),
        ([{"prompt": ["a"], "answer": "b"}], ["row 0", "prompt", "string"]),
        ([*rows(2), {"prompt": "a", "answer": " \n"}], ["row 2", "empty"]),
        ({"Instances": [{"input": "a", "output": []}]}, ["row 0", "output = []"]),
        ({"Instances": rows(1), "Definition": 3}, ["Definition is 3", "string"]),
    ],
)
def test_damaged_rows(tmp_path, content, expected):
    path = write(write_trace(tmp_path, "a") / "a" / "train.json", content)
    with pytest.raises(DataError) as error:
        tasks.load(tmp_path)
    for part in [*expected, str(path)]:
        assert part in str(error.value), error.value


def test_a_folder_without_a_split(tmp_path):
    (write_trace(tmp_path, "a", "b") / "b" / "eval.json").unlink()
    with pytest.raises(DataError, match=r"b: found test.json, train.json.*eval.json"):
        tasks.load(tmp_path)
    assert tasks.load(tmp_path, ["a"]).tasks[0].name == "a"


def test_what_was_left_out_is_told(tmp_path):
    write_trace(tmp_path, "a", "GROUP/b")
    assert not any("left out" in note for note in tasks.load(tmp_path).notes)
    write(tmp_path / "B" / "train.jsonl", "{}")
    write(tmp_path / "GROUP" / "c" / "data.csv", "")
    write(tmp_path / ".cache" / "x", "")
    write(tmp_path / "a" / "README", "no task")
    write(tmp_path / "LICENSE.txt", "no data")
    write(tmp_path / "rows.json", "[]")
    found = tasks.load(tmp_path)
    assert [task.name for task in found.tasks] == ["a", "b"]
    (told,) = (note for note in found.notes if "left out" in note)
    assert told.endswith(": B (train.jsonl), rows.json, GROUP/c (data.csv).")
    for n in range(9):
        (tmp_path / f"empty{n}").mkdir()
    (told,) = (note for note in tasks.load(tmp_path).notes if "left out" in note)
    assert "empty0 (nothing)" in told and told.endswith(" and 4 more.")


def test_folders_that_are_no_data(tmp_path):
    with pytest.raises(DataError, match="--data.*missing.*expected a folder"):
        tasks.load(tmp_path / "missing")
    with pytest.raises(DataError, match="--data.*nothing.*Natural Instructions"):
        tasks.load(tmp_path)
    write_trace(tmp_path, "a")
    with pytest.raises(DataError, match=r"is one task, .*--tasks a"):
        tasks.load(tmp_path / "a")


def test_cl_benchmark_folders(tmp_path):
    own = [{"sentence": f"Title {n}", "label": "World"} for n in range(2)]
    for split in ("train", "dev", "test"):
        write(tmp_path / "TC" / "agnews" / f"{split}.json", own)
        instances = [{"input": f"{split} text", "output": "positive"}]
        content = {"Definition": ["Say the mood."], "Instances": instances}
        write(tmp_path / "SC" / "yelp" / f"{split}.json", content)
    write(tmp_path / "TC" / "agnews" / "labels.json", ["World", "Sports"])
    found = tasks.load(tmp_path)
    assert found.layout == formats.CL_BENCHMARK
    agnews, yelp = found.tasks
    prompt = "Options: World, Sports\nTitle 1\nAnswer:\n"
    assert agnews.train[1] == Row(prompt, "World") and agnews.metric == "accuracy"
    prompt = "Say the mood.\nInput: test text\nOutput:\n"
    assert yelp.test == (Row(prompt, "positive"),) and yelp.metric == "exact_match"

    write(tmp_path / "TC" / "agnews" / "labels.json", {"World": 0})
    with pytest.raises(DataError, match=r"labels.json: found .*list of strings"):
        tasks.load(tmp_path, ["agnews"])
    write(tmp_path / "QQP" / "yelp" / "train.json", own)
    with pytest.raises(DataError, match="yelp twice.*QQP.*SC"):
        tasks.load(tmp_path)


def test_natural_instructions(tmp_path):
    instances = [{"input": f"{n} + 1", "output": [f"{n + 1}", "x"]} for n in range(99)]
    content = {"Definition": ["Add one."], "Instances": instances, "Source": "own"}
    write(tmp_path / "task1_add.json", content)
    (task,) = tasks.load(tmp_path).tasks
    assert task.name == "task1_add" and task.metric == "rouge_l"
    parts = [task.train, task.valid, task.test]
    assert sum(map(len, parts)) == 99 and len(task.train) > 60
    assert not set(task.train) & set(task.test) | set(task.valid) & set(task.test)
    assert tasks.load(tmp_path).tasks[0] == task
    first = Row("Add one.\nInput: 0 + 1\nOutput:\n", "1")
    assert first in set().union(*parts)
    write(tmp_path / "small.json", content | {"Instances": instances[:1]})
    with pytest.raises(DataError, match="part of its 1 instances is empty"):
        tasks.load(tmp_path, ["small"])


def test_plain_text(tmp_path):
    write(tmp_path / "a.txt", "é" * 55)  # the cut falls into a character
    write(tmp_path / "b.train.txt", "word " * 20)
    write(tmp_path / "b.valid.txt", "held out")
    found = tasks.load(tmp_path)
    assert found.layout == formats.TEXT
    a, b = found.tasks
    assert {a.kind, b.kind} == {"text"} and {a.metric, b.metric} == {"loss"}
    whole = "".join(part[0].answer for part in (a.train, a.valid, a.test))
    assert set(whole) == {"é"} and len(whole) == 54
    assert b.test == (Row("", "held out"),)
    assert len(b.train[0].answer) == 90 and len(b.valid[0].answer) == 10
    write(tmp_path / "General.txt", "general text " * 9)
    found = tasks.load(tmp_path, ["b"])
    assert [task.name for task in found.tasks] == ["b"]
    assert found.general.train[0].answer.startswith("general text general")
    (tmp_path / "b.valid.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="b.valid.txt is not UTF-8"):
        tasks.load(tmp_path)
    write(tmp_path / "b.valid.txt", " \n")
    with pytest.raises(DataError, match="valid text of b .* is empty"):
        tasks.load(tmp_path)
    (tmp_path / "b.valid.txt").unlink()
    with pytest.raises(DataError, match="lacks b.valid.txt"):
        tasks.load(tmp_path)


@pytest.fixture(scope="module")
def installed():
    return tasks.load(None)


def test_installed_text_and_its_probe(installed):
    names = [task.name for task in installed.tasks]
    skipped = [note for note in installed.notes if note.startswith("skipped")]
    assert [n for n in tasks.INSTALLED if n in names] == names
    assert len(names) + len(skipped) == len(tasks.INSTALLED) and len(names) >= 3
    prose = installed.general.test[0].answer
    letters = np.mean([c.isalpha() or c in " ,." for c in prose])
    assert letters > 0.9 and " the " in prose and ">>>" not in prose
    for task in installed.tasks:
        assert task.test[0].answer[:200] not in prose
    with pytest.raises(DataError, match="library_docs.*installed text"):
        tasks.load(None, ["library_docs"])


# Tokens.


def test_rows_are_prompt_answer_and_end():
    long = Row("Which city is the capital of France?\nAnswer:\n", "Paris")
    encoded = tokens.encode_rows([long, Row("", "42")], ENCODER, 40)
    assert encoded.tokens.shape == encoded.answer.shape == (2, 40)
    assert encoded.tokens.dtype == np.int32 and encoded.answer.dtype == bool
    for index, row in enumerate([long, Row("", "42")]):
        size = encoded.lengths[index]
        assert encoded.tokens[index, 0] == ENCODER.end or row.prompt
        text = TOKENIZER.decode(encoded.tokens[index, : size - 1].tolist())
        assert text == row.prompt + row.answer
        answer = encoded.tokens[index, encoded.answer[index]]
        assert TOKENIZER.decode(answer[:-1].tolist()) == row.answer
        assert answer[-1] == ENCODER.end
        assert set(encoded.tokens[index, size:]) <= {ENCODER.end}
        assert not encoded.answer[index, size:].any()
    assert (encoded.cut, encoded.shortened, encoded.dropped) == (0, 0, 0)
    assert tokens.cuts("a", encoded) is None


def test_an_empty_prompt_begins_after_the_end_of_a_text():
    empty, full = Row("", "42"), Row("6 x 7 is ", "42")
    asked = tokens.encode_prompts([empty, full], ENCODER)
    assert asked == [[ENCODER.end], TOKENIZER.encode(full.prompt).ids]
    begun = ENCODER._replace(begin=(1,))
    assert tokens.encode_prompts([empty], begun) == [[1]]
    # So the whole answer is learned, its first token among the rest.
    encoded = tokens.encode_rows([empty], ENCODER, 8)
    predicted = encoded.tokens[0, 1:][encoded.answer[0, 1:]]
    assert predicted.tolist() == [*TOKENIZER.encode("42").ids, ENCODER.end]


def test_text_without_a_prompt_begins_with_its_own_first_token():
    """Rows that are never generated, as general text: nothing that it lacks is read."""
    rows = (Row("", "42 43"),)
    known = tasks.Task("General", rows, rows, rows, "loss", "", "rows")
    encoded = tokens.encode(known, "test", ENCODER, 16)
    ids = TOKENIZER.encode("42 43").ids
    assert encoded.tokens[0, : len(ids)].tolist() == ids
    asked = tokens.encode(known._replace(metric="exact_match"), "test", ENCODER, 16)
    assert asked.tokens[0, : len(ids) + 1].tolist() == [ENCODER.end, *ids]


def test_what_is_beyond_the_context_is_counted():
    ids = [len(TOKENIZER.encode(row).ids) for row in ("QWXKVJ", "xyz")]
    assert ids == [6, 3]
    given_rows = [Row("QWXKVJ", "xyz"), Row("QWXKVJ" * 2, "xyz"), Row("x", "y")]
    encoded = tokens.encode_rows(given_rows, ENCODER, 8)
    np.testing.assert_array_equal(encoded.kept, [0, 2])
    assert (encoded.shortened, encoded.dropped) == (1, 1)
    assert (encoded.total, encoded.cut) == (10 + 16 + 3, 2 + 16)
    np.testing.assert_array_equal(encoded.lengths, [8, 3])
    np.testing.assert_array_equal(np.flatnonzero(encoded.answer[0]), [6, 7])
    told = tokens.cuts("a", encoded)
    assert told is not None and "18 of 29" in told and "1 rows were shortened" in told
    with pytest.raises(DataError, match=r"first 4 tokens.* 6 tokens and more"):
        tokens.encode_rows(given_rows[:2], ENCODER, 4)
    with pytest.raises(ValueError, match="length: got 1"):
        tokens.encode_rows(given_rows, ENCODER, 1)


TEXTS = st.text(st.characters(codec="utf-8"), max_size=20)
ANSWERS = TEXTS.filter(str.strip)
ROWS = st.lists(st.builds(Row, TEXTS, ANSWERS), min_size=1, max_size=5)


def prompt(row):
    return TOKENIZER.encode(row.prompt).ids or [ENCODER.end]


@given(ROWS, st.integers(2, 60))
@settings(max_examples=60)
def test_no_token_is_lost_uncounted(given_rows, length):
    try:
        encoded = tokens.encode_rows(given_rows, ENCODER, length)
    except DataError:
        ids = [len(prompt(row)) for row in given_rows]
        assert min(ids) >= length
        return
    assert encoded.lengths.sum() + encoded.cut == encoded.total
    assert len(encoded.kept) + encoded.dropped == len(given_rows)
    assert encoded.answer[:, 1:].any(axis=1).all()
    positions = np.arange(length)
    assert not encoded.answer[positions >= encoded.lengths[:, None]].any()
    for index, kept in enumerate(encoded.kept):
        row = given_rows[kept]
        first, then = prompt(row), TOKENIZER.encode(row.answer).ids
        whole = [*first, *then, ENCODER.end]
        size = min(len(whole), length)
        assert encoded.tokens[index, :size].tolist() == whole[:size]
        counted = np.flatnonzero(encoded.answer[index])
        np.testing.assert_array_equal(counted, np.arange(len(first), size))
    assert encoded.shortened == sum(
        len(prompt(given_rows[k])) + len(TOKENIZER.encode(given_rows[k].answer).ids) + 1
        > length
        for k in encoded.kept
    )


@given(st.integers(3, 9), st.integers(0, 40), st.sampled_from([(), (1,), (1, 2)]))
def test_every_token_of_a_text_is_predicted_once(length, extra, begin):
    text = "".join(chr(97 + n % 26) for n in range(length + 1 + extra))
    ids = TOKENIZER.encode(text).ids
    new = length - len(begin)
    if len(ids) <= new:
        return
    encoded = tokens.encode_text(text, ENCODER._replace(begin=begin), length)
    assert encoded.tokens.shape[1] == length + 1
    assert (encoded.tokens[:, : len(begin)] == np.array(begin, int)).all()
    predicted = encoded.tokens[:, 1:][encoded.answer[:, 1:]]
    assert predicted.tolist() == ids[1 : 1 + len(predicted)]
    assert encoded.cut == len(ids) - 1 - len(predicted) < new


def test_a_text_shorter_than_a_window_names_its_task():
    text = (Row("", "abc"),)
    task = tasks.Task("short", text, text, text, "loss", "text", "here")
    with pytest.raises(DataError, match=r"short, valid: .*3 tokens, .*at least 6"):
        tokens.encode(task, "valid", ENCODER, 5)
    assert tokens.encode(task, "valid", ENCODER, 2).tokens.shape == (1, 3)


def test_tokenizers_that_do_not_fit(tmp_path):
    with pytest.raises(DataError, match="tokenizer: found .* id .* below 100"):
        tokens.encoder_for(TOKENIZER, 100)
    with pytest.raises(DataError, match="tokenizer: the end of a text is '</s>'"):
        tokens.encoder_for(TOKENIZER, 300, "</s>")
    with pytest.raises(DataError, match="tokenizer: the end of a text is 299999"):
        tokens.encoder_for(TOKENIZER, 300, 299999)
    with pytest.raises(DataError, match="tokenizer: the end of a text is None"):
        tokens.encoder_for(Tokenizer(models.BPE({"a": 0}, [])), 300)
    with pytest.raises(DataError, match="tokenizer: found no tokens"):
        tokens.encoder_for(Tokenizer(models.BPE()), 300)
    with pytest.raises(DataError, match=r"found nothing, expected tokenizer.json"):
        tokens.read_tokenizer(tmp_path)
    write(tmp_path / "tokenizer.json", {})
    with pytest.raises(DataError, match=r"tokenizer.json: found a file that is no"):
        tokens.read_tokenizer(tmp_path)
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    same = tokens.read_tokenizer(tmp_path)
    assert tokens.encoder_for(same, 300, "<s>").end == same.token_to_id("<s>")


def test_the_tokenizers_own_cutting_is_off_and_its_beginning_is_kept():
    from tokenizers import processors

    tokenizer = Tokenizer.from_str(TOKENIZER.to_str())
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=16)
    begin = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", begin)]
    )
    encoder = tokens.encoder_for(tokenizer, 300)
    assert encoder.begin == (begin,)
    encoded = tokens.encode_rows([Row("QWXKVJ", "xyz")], encoder, 16)
    assert encoded.lengths[0] == 1 + 6 + 3 + 1 and encoded.tokens[0, 0] == begin
    assert np.flatnonzero(encoded.answer[0]).tolist() == [7, 8, 9, 10]
    assert tokenizer.truncation is not None  # the caller's is as it was


def test_shapes_stay_few():
    sizes = {tokens.bucket(n, 300) for n in range(1, 301)}
    assert sizes == {32, 64, 128, 256, 300}
    assert all(tokens.bucket(n, 300) >= n for n in range(301))
    mixed = [Row("a" * n, "xyz") for n in (3, 50, 4)]
    encoded = tokens.encode_rows(mixed, ENCODER, 100)
    short, mask = tokens.take(encoded, np.array([0, 2]))
    assert short.shape == mask.shape == (2, 32)
    assert tokens.take(encoded, np.array([0, 1]))[0].shape[1] == 64
    np.testing.assert_array_equal(short, encoded.tokens[[0, 2], :32])


def test_batches_depend_on_task_seed_and_step_alone():
    drawn = [tokens.batch_rows(1, 0, step, 4, 10) for step in range(5)]
    np.testing.assert_array_equal(np.sort(np.concatenate(drawn)[:10]), np.arange(10))
    np.testing.assert_array_equal(np.sort(np.concatenate(drawn)[10:]), np.arange(10))
    np.testing.assert_array_equal(tokens.batch_rows(1, 0, 3, 4, 10), drawn[3])
    others = [(0, 0), (1, 1)]
    for task, seed in others:
        again = [tokens.batch_rows(task, seed, step, 4, 10) for step in range(5)]
        assert (np.concatenate(again) != np.concatenate(drawn)).any()
    assert np.bincount(tokens.batch_rows(0, 0, 0, 9, 4)).tolist() in (
        [2, 2, 2, 3],
        [2, 2, 3, 2],
        [2, 3, 2, 2],
        [3, 2, 2, 2],
    )


# Scores.


def one(metric, answer, prediction, prompt=""):
    return scores.score(metric, [Row(prompt, answer)], [prediction])


@pytest.mark.parametrize(
    ("metric", "answer", "prediction", "expected"),
    [
        ("exact_match", "hawkish", " hawkish\n", 1),
        ("exact_match", "hawkish", "Hawkish", 0),
        ("number", "1900", "It is $1,900.00.", 1),
        ("number", "61", "61 - 1 = 60", 0),
        ("number", "-3", "-3", 1),
        ("number", "3", "none", 0),
        ("first_letter", "A", "Answer: A\nBecause 1 + 1 = 2", 1),
        ("first_letter", "Answer: B\nBecause", "(b) two", 1),
        ("first_letter", "B", "Because it is", 0),
        ("first_letter", "A", "", 0),
        # |LCS| = 6 of 7 and 6 words, 3 of 4 and 4, 2 of 4 and 4, as rouge-score.
        ("rouge_l", "the cat was found under the bed", "the cat was under the bed",
         12 / 13),
        ("rouge_l", "police killed the gunman", "Police kill the gunman.", 3 / 4),
        ("rouge_l", "police killed the gunman", "the gunman kill police", 1 / 2),
        ("rouge_l", "Die Prüfung", "die PRÜFUNG", 1),
        # kitten -> sitting takes 3 edits of 7.
        ("edit_similarity", "kitten", "sitting", 4 / 7),
        ("edit_similarity", "ls -a", "", 0),
        # 2 · 4 common characters of 6 + 7.
        ("code_similarity", "kitten", "sitting", 8 / 13),
        ("code_similarity", "x = <NUM_LIT:2> + <NUM_LIT>", "x = 2 + 0", 1),
        ("code_similarity", "f(<STR_LIT>, <STR_LIT:ab>)", "f(, ab)", 1),
        ("json", '{"intent": "A", "b": [1, "2"]}', '{"b": [1,"2"], "intent":"A"}', 1),
        ("json", '{"intent": "A"}', '{"intent": "A"', 0),
        ("json", '{"intent": "A"}', "[" * 100_000, 0),
        ("json", '{"a": true}', '{"a": 1}', 0),
        ("sql", 'SELECT a FROM t WHERE b = "X and Y" AND c > 3',
         'select a from t where c > 3 and b = "x AND y";', 1),
        ("sql", 'SELECT a FROM t WHERE b = "1"', 'SELECT a FROM t WHERE b = "2"', 0),
        ("sql", 'SELECT a FROM t WHERE b = "x and y"',
         'SELECT a FROM t WHERE y" and b = "x', 0),
    ],
)  # fmt: skip
def test_scores_of_one_row(metric, answer, prediction, expected):
    found = one(metric, answer, prediction)
    assert next(iter(found.values())) == pytest.approx(expected, abs=1e-12)


def test_accuracy_and_macro_f1():
    wanted = list("yyyyyyynnm")
    found = [*"yyyyynnyn", "garbage"]
    given_rows = [Row("", label) for label in wanted]
    numbers = scores.score("accuracy", given_rows, found)
    # yes: 5 hits of 6 predicted and 7 right; no: 1 of 3 and 2; maybe: 0 of 0 and 1.
    assert numbers["accuracy"] == pytest.approx(6 / 10)
    assert numbers["macro_f1"] == pytest.approx((10 / 13 + 2 / 5 + 0) / 3)


def test_json_intents_and_slots():
    wanted = ['{"intent": "A", "x": "1", "y": "2"}', '{"intent": "B"}']
    found = ['{"intent": "A", "x": "1", "z": "2"}', '{"intent": "C", "x": "1"}']
    numbers = scores.score("json", [Row("", a) for a in wanted], found)
    # Slots: one right of three predicted and two wanted.
    assert numbers == {
        "json_match": 0.0,
        "intent_accuracy": 0.5,
        "slot_f1": pytest.approx(2 / 5),
    }
    assert one("json", '{"intent": "B"}', '{"intent": "B"}')["slot_f1"] == 1.0
    for wanted in ('{"intent": "B"}', "{}"):
        for found in ("[1]", "", "{}]", '{"a": ' * 2000):
            numbers = one("json", wanted, found)
            assert numbers["json_match"] == numbers["intent_accuracy"] == 0.0


def test_sari_is_that_of_evaluate():
    """The example in its documentation and that of its README."""
    references = [
        "About 95 species are currently known.",
        "About 95 species are now accepted.",
        "95 species are now accepted.",
    ]
    source = "About 95 species are currently accepted."
    found = sari_of(source, "About 95 you now get in.", references)
    assert 100 * found == pytest.approx(26.953601953601954, abs=1e-12)
    assert sari_of(source, source, [source]) == 1.0
    # One word kept of two, one deleted as it should be, one added: by hand, n = 1, 2.
    # n = 1: kept {a}, right: 1; deleted {b}, right: 1; added {c}, right: 1.
    assert sari_of("a b", "a c", ["a c"]) == 1.0
    # n = 1: keep 1, delete 1, add 0 (d for c). n = 2: keep 0/0 = 1, delete 1, add 0.
    # n = 3, 4: nothing to keep, delete or add: all 1.
    wanted = np.mean([[1, 1, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1]])
    assert sari_of("a b", "a d", ["a c"]) == pytest.approx(wanted)


def _chrf(pairs, beta=2, most=6):
    """chrF of a corpus in NumPy: F of the mean precision and recall over orders."""
    hits, found, wanted = np.zeros((3, most))
    for prediction, answer in pairs:
        for n in range(1, most + 1):
            p, a = (
                collections.Counter(text[i : i + n] for i in range(len(text) - n + 1))
                for text in ("".join(x.split()) for x in (prediction, answer))
            )
            hits[n - 1] += (p & a).total()
            found[n - 1] += p.total()
            wanted[n - 1] += a.total()
    used = (found > 0) & (wanted > 0)
    precision, recall = (np.mean(hits[used] / total[used]) for total in (found, wanted))
    if not precision + recall:
        return 0.0
    return (1 + beta**2) * precision * recall / (beta**2 * precision + recall)


def test_chrf_is_sacrebleus():
    found = [
        "The relationship between cats and dogs is not exactly friendly.",
        "a good bookshop is just a genteel black hole that knows how to read.",
    ]
    wanted = [
        "The relationship between dogs and cats is not exactly friendly.",
        "A good bookshop is just a genteel Black Hole that knows how to read.",
    ]
    numbers = scores.score("chrf", [Row("", a) for a in wanted], found)
    # The example in the documentation of Hugging Face's chrf.
    assert 100 * numbers["chrf"] == pytest.approx(84.64214891738334, abs=1e-10)
    pairs = list(zip(found, wanted, strict=True))
    assert numbers["chrf"] == pytest.approx(_chrf(pairs), abs=1e-12)
    twin = _chrf([("Execute a Lua script", "Execute a Lua expression")])
    ours = one("chrf", "Execute a Lua expression", "Execute a Lua script")["chrf"]
    assert ours == pytest.approx(twin, abs=1e-12)


LINES = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "Zs")))
FREE = ["exact_match", "accuracy", "rouge_l", "edit_similarity", "code_similarity"]


@pytest.mark.parametrize("metric", [*FREE, "chrf", "sql", "sari"])
@given(answer=LINES.filter(str.strip), prediction=LINES, prompt=LINES)
@settings(max_examples=40)
def test_scores_are_bounded_and_1_where_equal(metric, answer, prediction, prompt):
    if metric == "sari":  # of a word that the prompt has twice it wants one deleted
        prompt = "".join(dict.fromkeys(prompt))
    found = one(metric, answer, prediction, prompt)
    assert all(0 <= value <= 1 + 1e-12 for value in found.values()), found
    same = one(metric, answer, f" {answer}\n", prompt)
    assert all(value == pytest.approx(1) for value in same.values()), same


SLOTS = st.dictionaries(st.sampled_from(["intent", "a", "b"]), st.text(max_size=3))


@given(SLOTS, SLOTS)
def test_json_scores_are_bounded_and_symmetric(wanted, found):
    both = json.dumps(wanted), json.dumps(found)
    there, back = one("json", *both), one("json", *both[::-1])
    assert there == pytest.approx(back)
    assert all(0 <= value <= 1 for value in there.values())
    assert (there["json_match"] == 1) == (wanted == found)


def test_scores_refuse_what_they_cannot_score():
    with pytest.raises(ValueError, match="metric: got 'loss', expected one of exact"):
        scores.score("loss", [Row("", "a")], ["a"])
    with pytest.raises(ValueError, match="predictions: got 2 for 1 rows"):
        scores.score("exact_match", [Row("", "a")], ["a", "b"])
    with pytest.raises(ValueError, match="predictions: got 0 for 0 rows"):
        scores.score("exact_match", [], [])
    for metric, expected in [
        ("number", "a number"),
        ("first_letter", "a letter"),
        ("json", "a JSON object"),
    ]:
        with pytest.raises(DataError, match=f"metric: the answer '...'.*{expected}"):
            one(metric, "...", "1")


# Numbers of a stream.


def test_op_bwt_and_forgetting():
    r = np.array([[0.8, np.nan, np.nan], [0.9, 0.6, np.nan], [0.5, 0.4, 0.7]])
    numbers = measures.of_scores(r)
    assert numbers == {
        "OP": pytest.approx((0.5 + 0.4 + 0.7) / 3),
        "BWT": pytest.approx(((0.5 - 0.8) + (0.4 - 0.6)) / 2),
        "BWT/T": pytest.approx(((0.5 - 0.8) + (0.4 - 0.6) + 0) / 3),
        "forgetting": pytest.approx(((0.9 - 0.5) + (0.6 - 0.4)) / 2),
    }
    assert set(measures.of_scores(r[:1, :1])) == {"OP"}
    losses = measures.of_losses(1 - r)
    assert losses["forgetting"] == pytest.approx(numbers["forgetting"], abs=1e-6)
    assert losses["final_loss"] == pytest.approx(1 - numbers["OP"])
    assert losses["learned_loss"] == pytest.approx(1 - (0.8 + 0.6 + 0.7) / 3)
    assert "forgetting" not in measures.of_losses(r[:1, :1])
    lost = np.array(losses["final_loss"] - losses["learned_loss"])
    assert -numbers["BWT/T"] == pytest.approx(lost, abs=1e-6)
    assert numbers["OP"] == pytest.approx(float(metrics.average_accuracy(r)))


def _log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_answer_loss_and_kl_in_float64():
    rng = np.random.default_rng(0)
    base, now = rng.normal(size=(2, 3, 5, 7))
    ids = rng.integers(0, 7, (3, 5))
    answer = rng.random((3, 5)) < 0.5
    answer[0], answer[1, 0] = False, True
    at = answer[:, 1:]
    log_p, log_q = (_log_softmax(x[:, :-1]) for x in (base, now))
    picked = np.take_along_axis(log_q, ids[:, 1:, None], -1)[..., 0]
    loss = jax.jit(measures.answer_loss)(jnp.array(now), jnp.array(ids), answer)
    np.testing.assert_allclose(loss, -picked[at].mean(), rtol=1e-5)
    kl = jax.jit(measures.kl_to_base)
    wanted = (np.exp(log_p) * (log_p - log_q)).sum(-1)[at].mean()
    np.testing.assert_allclose(kl(base, now, answer), wanted, rtol=1e-4)
    assert kl(now, now, answer) == 0
    assert np.isnan(kl(now, now, np.zeros_like(answer)))
    assert np.isnan(measures.answer_loss(now, ids, np.zeros_like(answer)))
    impossible = np.where(np.arange(7) == 0, -np.inf, base)
    assert np.isfinite(kl(impossible, now, answer))
    half = measures.answer_loss(jnp.bfloat16(now), jnp.array(ids), answer)
    assert half.dtype == jnp.float32


def test_peak_memory_counts_bytes():
    peak = measures.peak_memory()
    assert peak["resident"] is not None and 50e6 < peak["resident"] < 1e12
    assert peak["device"] is None or peak["device"] > 0
    now = Path("/proc/self/statm")
    if now.is_file():
        pages = int(now.read_text().split()[1])
        resident = pages * os.sysconf("SC_PAGE_SIZE")
        assert 0.9 * resident < measures.peak_memory()["resident"] < 100 * resident


# The small tasks of the shared data, where they are.

COUNTS = {  # train, eval, test, share of the most frequent train answer in test
    "GSM8K-short": (800, 100, 150, 0.053),
    "TLDR-shell": (1000, 100, 200, 0.0),
    "TLDR-ko": (1000, 100, 200, 0.0),
    "PubMedQA": (600, 100, 150, 0.56),
    "DSTC8-json": (1000, 100, 200, 0.025),
    "WikiSQL": (1000, 100, 200, 0.0),
    "Banking-intent": (960, 100, 160, 0.031),
    "General": (300, 97, 236, 0.0),
}
here = pytest.mark.skipif(not INSTRUCT.is_dir(), reason=f"{INSTRUCT} is not there")


@here
def test_the_small_tasks_are_as_their_manifest_says():
    found = tasks.load(INSTRUCT)
    order = "WikiSQL DSTC8-json TLDR-ko Banking-intent TLDR-shell PubMedQA GSM8K-short"
    assert [task.name for task in found.tasks] == order.split()
    assert found.notes == (f"{INSTRUCT}: {formats.TRACE}.",)
    for task in (*found.tasks, found.general):
        *counts, majority = COUNTS[task.name]
        assert [len(task.train), len(task.valid), len(task.test)] == counts
        assert tasks.one_line(task)
        answers = collections.Counter(row.answer for row in task.train)
        most = [answers.most_common(1)[0][0]] * len(task.test)
        exact = scores.score("exact_match", task.test, most)["exact_match"]
        assert exact == pytest.approx(majority, abs=5e-4), task.name
        if task.metric == "loss":
            continue
        gold = [row.answer for row in task.test]
        numbers = scores.score(task.metric, task.test, gold)
        assert set(numbers.values()) == {1.0}, task.name
        first = next(iter(scores.score(task.metric, task.test, most).values()))
        assert exact <= first + 1e-12 < 0.7
        if task.metric not in ("edit_similarity", "chrf"):
            assert first == pytest.approx(majority, abs=5e-4), task.name


@here
def test_the_small_tasks_as_tokens():
    task = tasks.load(INSTRUCT, ["WikiSQL"]).tasks[0]
    encoded = tokens.encode(task, "train", ENCODER, 512)
    assert len(encoded.kept) == 1000 and encoded.dropped == encoded.cut == 0
    ids, answer = tokens.take(encoded, tokens.batch_rows(0, 0, 0, 8, 1000))
    row = task.train[tokens.batch_rows(0, 0, 0, 8, 1000)[0]]
    assert TOKENIZER.decode(ids[0, answer[0]][:-1].tolist()) == row.answer
