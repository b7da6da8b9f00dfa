"""examples.streams: tasks, masks, scenarios, and what is known exactly of them."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")

from examples import streams
from examples.streams import images, pixels, readers, registry, synthetic, text
from examples.streams.__main__ import main
from examples.streams.domains import Domain, as_bytes
from examples.streams.stream import number_outputs, stack


def tiny(classes=4, size=4, channels=1, rows=20):
    """Images whose first pixel tells the class; rows of a class differ in number."""
    rng = np.random.default_rng(0)
    parts = []
    for count in (rows, 5):
        y = np.repeat(np.arange(classes), count + np.arange(classes))
        x = rng.integers(0, 200, (len(y), size, size, channels)).astype(np.uint8)
        x[:, 0, 0, 0] = 10 * y
        x[0, -1, -1] = 255
        parts += [x, y]
    names = [f"class {c}" for c in range(classes)]
    return readers.as_images("tiny", tuple(parts[:2]), tuple(parts[2:]), names)


def same(a, b):
    arrays = [(getattr(a, part), getattr(b, part)) for part in ("train", "valid")]
    return all(
        np.array_equal(u, v) for p, q in arrays for u, v in zip(p, q, strict=True)
    )


def raw(stream, part):
    """Pixels before they were standardised."""
    return getattr(stream, part).x * stream.facts["sd"] + stream.facts["mean"]


# What every stream has


@pytest.mark.parametrize(
    "name",
    ["permuted-digits", "rotated-digits", "split-digits", "markov-text"],
)
def test_every_task_has_one_shape_and_the_seed_decides(name):
    options = {"windows": 50} if name == "markov-text" else {"limit": 40}
    stream = streams.load(name, seed=3, **options)
    assert same(stream, streams.load(name, seed=3, **options))
    assert not same(stream, streams.load(name, seed=4, **options))
    tasks = len(stream.task_names)
    assert stream.class_mask.shape[0] == len(stream.classes) == tasks
    for part in (stream.train, stream.valid, stream.test):
        assert part.x.shape[:2] == part.y.shape[:2] == part.weight.shape
        assert part.x.shape[0] == tasks and part.y.dtype == np.int32
        assert set(np.unique(part.weight)) <= {0.0, 1.0}
        assert 0 <= part.y.min() and part.y.max() < stream.class_mask.shape[1]
    one = streams.task(stream, tasks - 1)
    assert one.id == tasks - 1 and one.name == stream.task_names[-1]
    assert one.scenario == stream.scenario
    assert np.shares_memory(one.train.x, stream.train.x)
    np.testing.assert_array_equal(one.test.y, stream.test.y[-1])
    with pytest.raises(IndexError, match=f"index: got {tasks}"):
        streams.task(stream, tasks)


def test_what_is_held_out_does_not_depend_on_the_seed():
    first, other = (streams.load("split-digits", seed=seed) for seed in (0, 1))
    assert same(first, other)
    assert np.array_equal(first.test.x, other.test.x)


def test_train_validation_and_test_have_no_image_in_common():
    stream = streams.load("permuted-digits", tasks=1)
    kept = [
        {row.tobytes() for row in getattr(stream, part).x[0]}
        for part in ("train", "valid", "test")
    ]
    digits = readers.read_digits()
    x = np.concatenate([digits.x_train, digits.x_test]).reshape(-1, 64)
    assert sum(map(len, kept)) == len(np.unique(x, axis=0)) == 1797
    assert len(digits.y_test) == 359
    # a tenth of every class
    for part, share in (("train", 0.9), ("valid", 0.1)):
        counts = np.bincount(getattr(stream, part).y[0])
        np.testing.assert_allclose(counts, share * np.bincount(digits.y_train), atol=1)


def test_padding_repeats_a_task_s_own_examples():
    x = [np.arange(n)[:, None] + 10.0 * n for n in (5, 2)]
    part = stack(((v, v[:, 0]) for v in x), [5, 2])
    np.testing.assert_array_equal(part.x[1, :, 0], [20, 21, 20, 21, 20])
    np.testing.assert_array_equal(part.y[1], [20, 21, 20, 21, 20])
    np.testing.assert_array_equal(part.weight, [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])


def test_batches_are_epochs_without_padding():
    part = streams.Part(np.zeros((9, 1)), np.zeros(9), np.arange(9) < 7)
    drawn = streams.batch_indices(part, 6, 5, np.random.default_rng(0))
    assert drawn.shape == (6, 5) and drawn.dtype == np.int32
    epochs = drawn.ravel()[:28].reshape(4, 7)
    assert np.array_equal(np.sort(epochs, 1), np.tile(np.arange(7), (4, 1)))
    assert len({tuple(e) for e in epochs}) == 4


def test_standardised_by_the_first_task_alone():
    data = tiny(channels=3)
    stream = images.split(data, name="s", tasks=2, flat=False)
    first = stream.train.x[0][stream.train.weight[0] == 1]
    np.testing.assert_allclose(first.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(first.std((0, 1, 2)), 1, atol=1e-5)
    assert stream.train.x.dtype == np.float32
    assert stream.train.x.shape[2:] == (4, 4, 3)
    x_train = data.x_train.copy()
    x_train[data.y_train > 1] //= 2
    changed = images.split(data._replace(x_train=x_train), name="s", tasks=2)
    np.testing.assert_array_equal(changed.facts["mean"], stream.facts["mean"])


def test_limit_takes_fewer_and_other_images_for_each_task():
    stream = images.permuted(tiny(), name="p", tasks=3, limit=10)
    assert stream.train.x.shape[:2] == (3, 10) and stream.train.weight.all()
    assert stream.valid.x.shape[1] == 8
    rows = [np.sort(task.sum(1)) for task in raw(stream, "train")]  # order-free
    assert not np.allclose(rows[0], rows[1])
    with pytest.raises(ValueError, match="limit: got 0"):
        images.permuted(tiny(), name="p", limit=0)


def test_first_task_tuning_sees_no_test_and_no_later_task():
    stream = streams.load("permuted-digits", tasks=5)
    tuning = streams.for_tuning(stream, 2)
    assert tuning.task_names == stream.task_names[:2]
    assert tuning.test is tuning.valid
    np.testing.assert_array_equal(tuning.valid.x, stream.valid.x[:2])
    np.testing.assert_array_equal(tuning.train.y, stream.train.y[:2])
    assert tuning.class_mask.shape == (2, stream.class_mask.shape[1])
    assert tuning.facts is stream.facts
    with pytest.raises(ValueError, match="tasks: got 6, expected 1 to 5"):
        streams.for_tuning(stream, 6)


# Scenarios


@pytest.mark.parametrize("scenario", ["task", "class"])
def test_split_numbers_its_classes(scenario):
    stream = images.split(tiny(), name="s", tasks=2, scenario=scenario)
    np.testing.assert_array_equal(stream.classes, [[0, 1], [2, 3]])
    np.testing.assert_array_equal(stream.class_mask, [[1, 1, 0, 0], [0, 0, 1, 1]])
    assert [set(y) for y in stream.train.y] == [{0, 1}, {2, 3}]
    old = streams.output_mask(stream, 1, 0)
    assert old.tolist() == ([True] * 4 if scenario == "class" else [1, 1, 0, 0])
    assert streams.output_mask(stream, 0, 0).tolist() == [1, 1, 0, 0]
    later = streams.output_mask(stream, 0, 1)
    assert later.tolist() == ([True] * 4 if scenario == "class" else [0, 0, 1, 1])


def test_split_shares_outputs_between_domains():
    stream = images.split(tiny(), name="s", tasks=2, scenario="domain")
    assert stream.class_mask.shape == (2, 2) and stream.class_mask.all()
    assert [set(y) for y in stream.train.y] == [{0, 1}, {0, 1}]
    for t, pixel in enumerate(raw(stream, "train")[:, :, 0]):
        label = np.round(pixel * 255 / 10).astype(int)
        np.testing.assert_array_equal(stream.classes[t][stream.train.y[t]], label)


@pytest.mark.parametrize("scenario", ["task", "class"])
def test_permutations_get_outputs_of_their_own(scenario):
    stream = images.permuted(tiny(), name="p", tasks=3, scenario=scenario)
    assert stream.class_mask.shape == (3, 12)
    for t in range(3):
        assert set(stream.train.y[t]) == set(range(4 * t, 4 * t + 4))
        own = np.flatnonzero(stream.class_mask[t])
        np.testing.assert_array_equal(own, 4 * t + np.arange(4))
    width = streams.output_mask(stream, 1, 0).sum()
    assert width == (8 if scenario == "class" else 4)


def test_unknown_scenario():
    with pytest.raises(ValueError, match="'online', expected task or domain or class"):
        number_outputs("online", np.zeros((2, 2), int))


@pytest.mark.parametrize("scenario", streams.SCENARIOS)
def test_description_names_scenario_and_sizes(scenario):
    stream = streams.load("split-digits", scenario=scenario)
    told = streams.describe(stream)
    assert f"{scenario}-incremental" in told and "outputs: " in told
    assert "task 4: 8, 9 (255 train, 28 valid, 71 test)" in told


# Permuted, rotated, split


def test_first_permutation_is_the_identity_and_others_differ():
    data = tiny()
    stream = images.permuted(data, name="p", tasks=4)
    orders = stream.facts["permutations"]
    np.testing.assert_array_equal(orders[0], np.arange(16))
    assert len({tuple(order) for order in orders}) == 4
    assert all(set(order) == set(range(16)) for order in orders)
    plain = data.x_test.reshape(len(data.x_test), -1) / 255
    for t, order in enumerate(orders):
        np.testing.assert_allclose(raw(stream, "test")[t], plain[:, order], atol=1e-5)
        np.testing.assert_array_equal(stream.test.y[t], data.y_test)
    longer = images.permuted(data, name="p", tasks=6)
    np.testing.assert_array_equal(longer.facts["permutations"][:4], orders)


def test_permutation_moves_channels_together():
    x = np.arange(2 * 2 * 2 * 3).reshape(2, 2, 2, 3)
    out = pixels.permute(x, np.array([3, 0, 1, 2]))
    np.testing.assert_array_equal(out[:, 0, 0], x[:, 1, 1])
    np.testing.assert_array_equal(out[:, 0, 1], x[:, 0, 0])


def test_angles_and_quarter_turns():
    stream = streams.load("rotated-digits", tasks=4, flat=False, angle=360.0)
    np.testing.assert_array_equal(stream.facts["angles"], [0, 90, 180, 270])
    upright = raw(stream, "test")
    for t in range(4):
        turned = np.rot90(upright[0], t, axes=(1, 2))
        np.testing.assert_allclose(upright[t], turned, atol=1e-5)
    ten = streams.load("rotated-digits", limit=5).facts["angles"]
    np.testing.assert_allclose(ten, 18 * np.arange(10))


def test_rotation_against_scipy():
    ndimage = pytest.importorskip("scipy.ndimage")
    x = np.random.default_rng(0).random((2, 9, 9, 1)).astype(np.float32)
    for degrees in (17.0, 45.0, 133.0):
        # Padded: scipy drops what is less than a pixel outside, we fade it to zero.
        padded = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
        expected = ndimage.rotate(padded, degrees, (2, 1), reshape=False, order=1)
        ours = pixels.rotate(x, degrees)
        np.testing.assert_allclose(ours, expected[:, 2:-2, 2:-2], atol=1e-5)


def test_resize_keeps_constants_and_agrees_with_pillow():
    pillow = pytest.importorskip("PIL.Image")
    x = np.random.default_rng(0).random((1, 8, 8, 1)).astype(np.float32)
    ours = pixels.resize(x, 16)
    assert ours.shape == (1, 16, 16, 3)
    np.testing.assert_array_equal(ours[..., 0], ours[..., 2])
    with pillow.fromarray(x[0, :, :, 0]) as picture:
        theirs = np.asarray(picture.resize((16, 16), pillow.Resampling.BILINEAR))
    np.testing.assert_allclose(ours[0, :, :, 0], theirs, atol=1e-5)
    np.testing.assert_allclose(pixels.resize(np.ones_like(x), 5), 1)


@pytest.mark.smoke
def test_split_partitions_classes_and_images():
    data = tiny(classes=6)
    for shuffle in (False, True):
        stream = images.split(data, name="s", tasks=3, seed=1, shuffle_classes=shuffle)
        assert sorted(stream.classes.ravel()) == list(range(6))
        assert (stream.class_mask.sum(0) == 1).all()
        for t, group in enumerate(stream.classes):
            real = stream.test.weight[t] == 1
            assert real.sum() == np.isin(data.y_test, group).sum()
            label = np.round(raw(stream, "test")[t][:, 0] * 255 / 10).astype(int)
            np.testing.assert_array_equal(stream.test.y[t], label)
            assert set(label) == set(group)
    assert stream.classes.ravel().tolist() != list(range(6))
    other = images.split(data, name="s", tasks=3, seed=2, shuffle_classes=True)
    assert other.classes.tolist() != stream.classes.tolist()
    with pytest.raises(ValueError, match="tasks: got 4, expected a divisor of the 6"):
        images.split(data, name="s", tasks=4)


def test_domains_get_one_size_and_three_channels():
    named = {"grey": tiny(size=4), "coloured": tiny(size=6, channels=3, rows=11)}
    stream = images.domains(named, name="d", size=8)
    assert stream.train.x.shape[2:] == (8, 8, 3)
    assert stream.task_names == ("grey", "coloured")
    assert stream.train.weight.sum(1).tolist() == [78, 46]
    assert stream.class_mask.shape == (2, 4)
    with pytest.raises(ValueError, match=r"named: got classes .*'coloured': 3"):
        images.domains({**named, "coloured": tiny(classes=3)}, name="d")


def test_too_few_images_to_hold_out():
    x, y = np.ones((2, 4, 4)), np.arange(2)
    data = readers.as_images("two", (x, y), (x, y))
    with pytest.raises(ValueError, match="task 0 has no valid images"):
        images.split(data, name="two", tasks=2)


# Synthetic text


@pytest.mark.parametrize("overlap", [0.0, 0.5, 1.0])
def test_entropy_and_cross_entropy_against_samples(overlap):
    stream = synthetic.markov_text(
        tasks=3, overlap=overlap, entropy=1.2, symbols=12, windows=2000, context=32
    )
    facts, (x, y, _) = stream.facts, stream.train
    assert facts["overlap"] == overlap
    for t in range(3):
        for model in range(3):
            nats = -np.log(facts["transitions"][model][x[t], y[t]])
            # Windows are independent; the error is of their means.
            error = nats.mean(1).std() / np.sqrt(len(nats))
            expected = facts["cross_entropy"][model, t]
            assert abs(nats.mean() - expected) < 4 * error
            if model == t:
                assert expected == pytest.approx(1.2, abs=1e-9)
    best = facts["transitions"][0].argmax(1)
    hit = (best[x[0]] == y[0]).mean()
    assert abs(hit - facts["best_accuracy"]) < 0.01
    for t in range(3):
        seen = np.bincount(x[t, :, 0], minlength=12) / 2000  # first symbols
        np.testing.assert_allclose(seen, facts["stationary"][t], atol=0.05)
    np.testing.assert_array_equal(x[:, :, 1:], y[:, :, :-1])


def test_entropy_rate_does_not_depend_on_overlap():
    for overlap in (0.0, 0.3, 1.0):
        matrices = synthetic.transitions(4, 16, 1.7, overlap, seed=0)
        np.testing.assert_allclose(matrices.sum(2), 1)
        visited = np.stack([synthetic.stationary(p) for p in matrices])
        np.testing.assert_allclose(
            np.einsum("ti,tij->tj", visited, matrices), visited, atol=1e-12
        )
        rate = -np.einsum("ti,tij,tij->t", visited, matrices, np.log(matrices))
        np.testing.assert_allclose(rate, 1.7, atol=1e-9)


def test_overlap_is_the_share_of_rows_in_common():
    made = [synthetic.transitions(3, 20, 1.5, o, seed=2) for o in (0, 0.25, 0.5, 1)]
    shared = [(m[0] == m[1]).all(1) & (m[0] == m[2]).all(1) for m in made]
    assert [s.sum() for s in shared] == [0, 5, 10, 20]
    assert (shared[1] <= shared[2]).all()
    excess = [
        (synthetic.cross_entropy(m) - 1.5)[~np.eye(3, dtype=bool)].mean() for m in made
    ]
    assert excess[0] > excess[1] > excess[2] > excess[3]
    assert abs(excess[3]) < 1e-9
    np.testing.assert_array_equal(made[3][0], made[3][2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap": 1.1}, "overlap: got 1.1"),
        ({"entropy": 0.0}, "entropy: got 0.0"),
        ({"entropy": 9.0}, r"at most log\(symbols\) = 3.4657"),
        ({"entropy": 0.001, "symbols": 500}, "below the smallest float64"),
        ({"tasks": 0}, "tasks: got 0"),
        ({"windows": 4}, "windows: got 4, expected at least 5"),
    ],
)
def test_bad_synthetic_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        streams.load("markov-text", **options)


def test_entropy_limits():
    np.testing.assert_allclose(synthetic.row_distribution(8, np.log(8)), 1 / 8)
    assert synthetic.row_distribution(8, 0.01).max() > 0.99


# Text


def make_domains(count=3, lengths=(4000, 5000, 3300)):
    """Domain d holds bytes whose upper bits are d; no two windows are alike."""
    out = []
    for d in range(count):
        rng = np.random.default_rng(d)
        train, valid = (
            (rng.integers(0, 16, n) + 16 * d).astype(np.uint8)
            for n in (lengths[d], 900)
        )
        out.append(Domain(f"d{d}", train, valid, "made", {"train": [], "valid": []}))
    return out


@pytest.mark.parametrize("overlap", [0.0, 0.3, 1.0])
def test_overlap_of_text_windows(overlap):
    stream = text.text_stream(
        make_domains(), name="t", overlap=overlap, context=10, seed=5
    )
    origin, n = stream.facts["origin"], stream.train.x.shape[1]
    k = round(overlap * n)
    assert stream.facts["overlap"] == k / n
    assert n + -(-n // 3) <= 297 < (n + 1) + -(-(n + 1) // 3)
    # In each domain: k windows of the pool, even over domains, the others its own.
    for part in (stream.train, stream.valid, stream.test):
        rows = [[x.tobytes() for x in task] for task in part.x]
        assert all(len(set(r)) == len(r) for r in rows)
        shared = set(rows[0]) & set(rows[1])
        assert len(shared) == round(overlap * part.x.shape[1])
        assert shared <= set(rows[2])
    np.testing.assert_array_equal(origin, stream.train.x[:, :, 0] // 16)
    for t in range(3):
        counts = np.bincount(origin[t], minlength=3)
        others = np.delete(counts, t)
        assert others.sum() + counts[t] == n
        assert np.ptp(others) <= 1 and abs(others.sum() - 2 * k / 3) <= 1
    np.testing.assert_array_equal(stream.train.y[..., :-1], stream.train.x[..., 1:])


def test_text_size_does_not_depend_on_overlap_and_parts_are_apart():
    made = make_domains()
    sizes = set()
    for overlap in (0.0, 0.5, 1.0):
        stream = text.text_stream(made, name="t", overlap=overlap, context=10)
        sizes.add(stream.train.x.shape)
        rows = [
            {x.tobytes() for x in getattr(stream, part).x.reshape(-1, 10)}
            for part in ("train", "valid", "test")
        ]
        assert not rows[0] & rows[1] and not rows[0] & rows[2]
        tail = made[0].train[-400:].astype(np.int32).tobytes()
        if not overlap:
            assert all(x.tobytes() in tail for x in stream.valid.x[0])
    assert len(sizes) == 1
    fewer = text.text_stream(made, name="t", context=10, limit=30)
    assert fewer.train.x.shape == (3, 30, 10) and fewer.test.x.shape[1] == 3


def test_windows_predict_every_byte_once():
    cut = text.windows(np.arange(32, dtype=np.uint8), 10)
    assert cut.shape == (3, 11)
    assert cut[:, 1:].ravel().tolist() == list(range(1, 31))


def test_text_from_a_folder(tmp_path):
    for d in range(3):
        words = " ".join(str(n * (d + 3)) for n in range(400))
        (tmp_path / f"d{d}.txt").write_text(words)
    stream = streams.load("text-8", data=tmp_path, tasks=2, domains=["d2", "d0"])
    assert stream.task_names == ("d2", "d0") and stream.scenario == "domain"
    first = bytes(stream.train.x[0, 0].astype(np.uint8))
    assert first in (tmp_path / "d2.txt").read_bytes()
    with pytest.raises(streams.DataError, match="found 3 domains of text, expected 16"):
        streams.load("text-16", data=tmp_path)
    with pytest.raises(streams.DataError, match="'d7' is not in"):
        streams.load("text-8", data=tmp_path, tasks=1, domains=["d7"])
    with pytest.raises(streams.DataError, match="got 1 names, expected 8"):
        streams.load("text-8", data=tmp_path, domains=["d0"])
    with pytest.raises(streams.DataError, match="has .* bytes, expected at least 2001"):
        streams.load("text-8", data=tmp_path, tasks=2, context=1000)


def test_installed_text_has_sixteen_domains(monkeypatch):
    asked = []

    def load_installed(names, sources):
        asked.append(list(sources) if names is None else list(names))
        line = as_bytes("abcdefgh" * 100)
        return [Domain(n, line, line, "", {}) for n in asked[-1] if n != "python"], []

    monkeypatch.setattr(text, "load_installed", load_installed)
    stream = streams.load("text-8", context=8)
    assert len(stream.task_names) == 8 and "python" not in stream.task_names
    assert stream.task_names[-1] == "tests"  # fills the gap
    with pytest.raises(streams.DataError, match="found 15 domains"):
        streams.load("text-16", context=8)
    assert len(set(text.SOURCES) | set(text.MORE_SOURCES)) == 16


def test_bad_text_arguments():
    for options, message in (
        ({"overlap": -0.1}, "overlap: got -0.1"),
        ({"context": 0}, "context: got 0"),
        ({"limit": 0}, "limit: got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            text.text_stream(make_domains(), name="t", **options)


# Names


def test_names_cover_the_usual_streams():
    expected = {
        f"{kind}-{data}"
        for kind in ("permuted", "rotated", "split")
        for data in ("digits", "mnist", "fashion-mnist")
    }
    expected |= {"split-cifar100", "split-imagenet", "digit-five"}
    expected |= {"text-8", "text-16", "markov-text"}
    assert set(streams.names()) == expected


def test_unknown_name_option_and_lacking_data():
    with pytest.raises(streams.DataError, match="permutated-digits.*permuted-digits"):
        streams.load("permutated-digits")
    with pytest.raises(ValueError, match="overlap: split-digits has no such option"):
        streams.load("split-digits", overlap=0.5)
    with pytest.raises(ValueError, match="scenario: text-8 has no such option"):
        streams.load("text-8", scenario="task")
    with pytest.raises(ValueError, match="tasks: got 0"):
        streams.load("permuted-digits", tasks=0)
    for name in ("permuted-mnist", "split-cifar100", "split-imagenet", "digit-five"):
        with pytest.raises(streams.DataError, match=f"{name}.*data"):
            streams.load(name)
    with pytest.raises(streams.DataError, match="markov-text is generated"):
        streams.load("markov-text", data=Path("."))


def test_command_line(capsys):
    assert main([]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in registry.STREAMS)
    assert main(["split-digits"]) == 0
    assert "task-incremental" in capsys.readouterr().out
    assert main(["nonsense"]) == 2
    assert capsys.readouterr().err.startswith("error: name: got 'nonsense'")
