"""examples.streams readers: small files of every format, whole and damaged."""

import gzip
import importlib.util
import io
import pickle
import struct
import sys
import types

import numpy as np
import pytest

pytest.importorskip("PIL")

from PIL import Image as pillow

from examples import streams
from examples.streams import domains, folders, hub, readers, sources, tfds
from examples.streams.readers import DataError

rng = np.random.default_rng(0)
GREY = rng.integers(0, 256, (40, 6, 6), dtype=np.uint8)
COLOUR = rng.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
LABELS = np.arange(40, dtype=np.uint8) % 10


def write_npz(path, **changes):
    arrays = {"x_train": GREY, "y_train": LABELS, "x_test": GREY[:10]}
    np.savez(path, **{**arrays, "y_test": LABELS[:10], **changes})
    return path


def idx(array):
    head = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return head + array.tobytes()


def write_mnist(folder, end=".gz"):
    folder.mkdir(parents=True)
    for part, rows in (("train", 40), ("t10k", 10)):
        for what, array in (("images-idx3", GREY), ("labels-idx1", LABELS)):
            raw = idx(array[:rows])
            name = f"{part}-{what}-ubyte{end}"
            (folder / name).write_bytes(gzip.compress(raw) if end else raw)
    return folder


def old_string(raw):
    return b"T" + struct.pack("<I", len(raw)) + raw


def old_array(array):
    """uint8 (n, m) as Python 2 pickled it, old module names and integer flags."""
    n, m = array.shape
    return b"".join(
        [
            b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR",
            b"(K\x01(J" + struct.pack("<i", n) + b"J" + struct.pack("<i", m) + b"t",
            b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xff",
            b"J\xff\xff\xff\xffK\x00tb\x89",
            old_string(array.tobytes()) + b"tb",
        ]
    )


def old_list(items):
    return b"](" + b"".join(items) + b"e"


def old_pickle(**entries):
    """A dictionary with byte strings for keys, as in the CIFAR archives."""
    body = b"".join(old_string(k.encode()) + v for k, v in entries.items())
    return b"\x80\x02}(" + body + b"u."


def cifar_batch(label, rows=slice(0, 40)):
    data = COLOUR[rows].transpose(0, 3, 1, 2).reshape(-1, 3072)
    numbers = [b"K" + bytes([y]) for y in LABELS[rows]]
    return old_pickle(data=old_array(data), **{label: old_list(numbers)})


def write_cifar100(folder):
    folder.mkdir()
    (folder / "train").write_bytes(cifar_batch("fine_labels"))
    (folder / "test").write_bytes(cifar_batch("fine_labels", slice(0, 10)))
    names = [old_string(f"thing {c}".encode()) for c in range(10)]
    (folder / "meta").write_bytes(old_pickle(fine_label_names=old_list(names)))
    return folder


def write_pictures(folder, test="test", suffix=".png"):
    for part, rows in (("train", 40), (test, 10)):
        for i in range(rows):
            own = folder / part / f"n{LABELS[i]:02d}"
            own.mkdir(parents=True, exist_ok=True)
            pillow.fromarray(COLOUR[i]).save(own / f"{i:03d}{suffix}")
    return folder


def png(pixels):
    out = io.BytesIO()
    pillow.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def varint(n):
    out = b""
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def field(number, raw):
    return varint(number << 3 | 2) + varint(len(raw)) + raw


def example(image, label, packed=True):
    numbers = field(1, varint(label)) if packed else b"\x08" + varint(label)
    features = {
        b"file_name": field(1, field(1, b"a.png")),
        b"image": field(1, field(1, image)),
        b"label": field(3, numbers),
        b"score": field(2, field(1, struct.pack("<f", 0.5))),
    }
    entries = [field(1, field(1, k) + field(2, v)) for k, v in features.items()]
    return field(1, b"".join(entries))


def record(data):
    size = struct.pack("<Q", len(data))
    return size + struct.pack("<I", tfds._masked_crc(size)) + data + b"\0\0\0\0"


def write_tfds(folder, rows=40):
    folder.mkdir(parents=True)
    for part, count in (("train", rows), ("validation", 10)):
        for shard in range(2):
            raw = b"".join(
                record(example(png(COLOUR[i]), int(LABELS[i]), packed=i % 3 > 0))
                for i in range(shard, count, 2)
            )
            name = f"imagenet2012-{part}.tfrecord-0000{shard}-of-00002"
            (folder / name).write_bytes(raw)
    (folder / "label.labels.txt").write_text("\n".join(f"n{i}" for i in range(10)))
    return folder


def check(found, x, colour=True, order=None):
    """What was read is what was written, in any order."""
    x = x if x.ndim == 4 else x[..., None]
    assert found.x_train.shape == x.shape
    assert found.x_test.shape == (10, *x.shape[1:])
    assert found.y_train.dtype == found.y_test.dtype == np.int32
    for read, labels, rows in (
        (found.x_train, found.y_train, 40),
        (found.x_test, found.y_test, 10),
    ):
        own = sorted((int(y), r.tobytes()) for r, y in zip(read, labels, strict=True))
        written = zip(x[:rows], LABELS[:rows], strict=True)
        assert own == sorted((int(y), r.tobytes()) for r, y in written)


def fails(source, *parts, **options):
    with pytest.raises(DataError) as caught:
        sources.read_images(source, **options)
    for part in parts:
        assert str(part) in str(caught.value)
    assert "expected" in str(caught.value)


# .npz


@pytest.mark.smoke
def test_npz(tmp_path):
    path = write_npz(tmp_path / "a.npz", class_names=np.array(list("abcdefghij")))
    found = sources.read_images(path)
    check(found, GREY)
    assert found.x_train.dtype == np.uint8 and found.class_names[:2] == ("a", "b")
    floats = write_npz(tmp_path / "f.npz", x_train=GREY / 255, x_test=GREY[:10] / 255)
    assert sources.read_images(floats).x_train.dtype == np.float32


def test_damaged_npz(tmp_path):
    path = write_npz(tmp_path / "a.npz")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    fails(path, path, "NumPy cannot read")
    spoilt = bytearray(whole)
    spoilt[300] ^= 0xFF  # inside x_train: the archive's checksum
    path.write_bytes(spoilt)
    fails(path, path, "NumPy cannot read")
    path.write_bytes(b"no archive")
    fails(path, path, "NumPy cannot read")
    np.savez(path, x_train=GREY, labels=LABELS)
    fails(path, "found arrays x_train, labels", "y_train, x_test, y_test")
    write_npz(path, x_train=np.array([{}], dtype=object))
    fails(path, path, "without pickles")
    fails(tmp_path / "none.npz", "none.npz: found nothing")
    (tmp_path / "a.zip").write_bytes(whole)
    fails(tmp_path / "a.zip", "another kind of file")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": GREY[:, 0, 0]}, "train images have shape (40,)"),
        ({"x_test": GREY[:0], "y_test": LABELS[:0]}, "test images have shape (0, 6"),
        ({"y_train": LABELS[:9]}, "train labels have shape (9,)"),
        ({"y_test": LABELS[:10] / 2}, "type float64"),
        ({"y_test": np.arange(10) - 1}, "whole numbers from 0"),
        ({"x_test": COLOUR[:10]}, "train images are (6, 6, 1) and test"),
        ({"class_names": np.array(["a"])}, "found label 9 but 1 class names"),
        ({"x_train": np.array(list("ab"))}, "type <U1, expected numbers"),
        ({"y_train": LABELS + 1, "y_test": LABELS[:10] + 1}, "labels from 1 to 10"),
        ({"y_train": LABELS + 2, "y_test": LABELS[:10] + 2}, "train part has no image"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path, changes, message):
    fails(write_npz(tmp_path / "a.npz", **changes), "a.npz", message)


# What arrays hold


def floats(**at):
    """Pixels from 0 to 1, with some of them replaced: part=(index, value)."""
    x = {"x_train": (GREY / 255).astype(np.float64), "x_test": GREY[:10] / 255}
    for part, (index, value) in at.items():
        x[part][index] = value
    return x


@pytest.mark.smoke
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
@pytest.mark.parametrize("part", ["train", "test"])
def test_pixels_that_are_not_finite_are_counted(tmp_path, part, value):
    path = write_npz(tmp_path / "a.npz", **floats(**{f"x_{part}": ((3, 0, 1), value)}))
    fails(path, f"1 of the {360 if part == 'test' else 1440} pixels of the {part}")
    fails(path, "1 images, the first is image 3")
    more = floats(**{f"x_{part}": ((slice(2, 9, 3), slice(2), 1), value)})
    fails(write_npz(path, **more), "6 of the", "3 images, the first is image 2")


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels_first_are_refused(tmp_path, channels):
    x = np.repeat(GREY[:, None], channels, 1)
    path = write_npz(tmp_path / "a.npz", x_train=x, x_test=x[:10])
    fails(path, f"shape (40, {channels}, 6, 6)", "channels first", "moveaxis")
    last = np.moveaxis(x, 1, -1)
    write_npz(path, x_train=last, x_test=last[:10])
    check(sources.read_images(path), last)


def test_many_channels_may_come_last_but_not_first(tmp_path):
    x = np.repeat(GREY[:, :, :, None], 5, -1)
    path = write_npz(tmp_path / "a.npz", x_train=x, x_test=x[:10])
    check(sources.read_images(path), x)
    first = np.moveaxis(x, -1, 1)
    fails(write_npz(path, x_train=first, x_test=first[:10]), "channels first")


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (GREY, GREY[:10] / 255, ("range from 0 to 255", "from 0 to 1,")),
        (GREY / 255, GREY[:10], ("range from 0 to 1 ", "from 0 to 255")),
        (GREY, GREY[:10] // 16, ("range from 0 to 255", "from 0 to 15")),
        (GREY / 127.5 - 1, GREY[:10] / 255, ("range from -1 to 1 ", "from 0 to 1,")),
        (GREY.astype(np.uint16) * 257, GREY[:10], ("0 to 65535", "from 0 to 255")),
        (GREY, GREY[:10] * 0, ("range from 0 to 255", "from 0 to 0")),
    ],
)
def test_parts_in_different_ranges_are_refused(tmp_path, train, test, message):
    train, test = train.copy(), test.copy()
    for x in (train, test):  # both ends are in every part
        x[0, 0, :2] = x.min(), x.max()
    fails(write_npz(tmp_path / "a.npz", x_train=train, x_test=test), *message)


def test_a_darker_test_part_is_of_the_same_range(tmp_path):
    path = write_npz(tmp_path / "a.npz", x_test=GREY[:10] // 4)
    assert sources.read_images(path).x_test.max() < 64


def test_a_class_missing_from_one_part_is_named(tmp_path):
    names = np.array([f"thing {c}" for c in range(10)])
    path = write_npz(tmp_path / "a.npz", y_test=np.arange(10) % 8, class_names=names)
    fails(path, "test part has no image of class 8 (thing 8), 9 (thing 9)")
    few = np.where(LABELS == 3, 4, LABELS)
    fails(write_npz(path, y_train=few), "train part has no image of class 3 (3)")
    more = np.array([*names, "unicorn"])
    fails(write_npz(path, class_names=more), "class 10 (unicorn)", "each of the 11")
    write_npz(path, y_train=few, y_test=np.arange(10) % 3)
    fails(path, "train part", "class 3")
    first = {"y_train": LABELS % 9 + 1, "y_test": np.r_[1:10, 1]}
    fails(write_npz(path, **first, class_names=names), "no image of class 0 (thing 0)")


def test_labels_from_1_can_be_subtracted(tmp_path):
    path = write_npz(tmp_path / "a.npz", y_train=LABELS + 1, y_test=LABELS[:10] + 1)
    with pytest.raises(DataError, match="subtract 1"):
        streams.load("split-mnist", data=path)


# Hidden files


def hide(folder):
    """What macOS and notebooks leave behind, beside every file."""
    for path in [folder, *folder.rglob("*")]:
        if path != folder:
            (path.parent / f"._{path.name}").write_bytes(b"\0\5\x16\7\0")
        if path.is_dir():
            (path / ".DS_Store").write_bytes(b"\0")
            (path / ".ipynb_checkpoints").mkdir()
            (path / ".ipynb_checkpoints" / "000.png").write_bytes(b"")


@pytest.mark.parametrize(
    "write", [write_mnist, write_cifar100, write_pictures, write_tfds]
)
def test_hidden_files_are_ignored(tmp_path, write):
    write(tmp_path / "mnist")
    hide(tmp_path)
    found = sources.read_images(sources.find(tmp_path, "mnist"))
    check(found, GREY if write is write_mnist else COLOUR)


def test_hidden_files_beside_arrays_and_text_are_ignored(tmp_path):
    write_npz(tmp_path / "mnist.npz")
    (tmp_path / "law.txt").write_text("Nobody is above it. " * 9)
    hide(tmp_path)
    assert sources.find(tmp_path, "mnist").name == "mnist.npz"
    assert [d.name for d in domains.load_folder(tmp_path)] == ["law"]


def test_only_hidden_files_are_nothing(tmp_path):
    (tmp_path / "._train-images-idx3-ubyte").write_bytes(b"")
    (tmp_path / "._a_32x32.mat").write_bytes(b"")
    (tmp_path / "._law.txt").write_bytes(b"")
    fails(tmp_path, "found nothing", "layouts")
    with pytest.raises(DataError, match="has no text"):
        domains.load_folder(tmp_path)


def test_names_of_domains_may_have_dots(tmp_path):
    texts = {
        "v1.0.train.txt": "train " * 20,
        "v1.0.valid.txt": "valid " * 20,
        "v1.1.txt": "plain " * 20,
        "a.valid.b.txt": "other " * 20,
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    found = {d.name: d for d in domains.load_folder(tmp_path)}
    assert list(found) == ["a.valid.b", "v1.0", "v1.1"]
    assert found["v1.0"].train.tobytes() == b"train " * 20
    assert found["v1.0"].valid.tobytes() == b"valid " * 20
    assert found["v1.1"].files["train"] == ["v1.1.txt"]


# idx


@pytest.mark.parametrize("end", [".gz", ""])
def test_idx(tmp_path, end):
    check(sources.read_images(write_mnist(tmp_path / "mnist", end)), GREY)


def test_damaged_idx(tmp_path):
    folder = write_mnist(tmp_path / "mnist")
    path = folder / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    fails(folder, path, "truncated gzip")
    spoilt = bytearray(whole)
    spoilt[100] ^= 0xFF
    path.write_bytes(spoilt)
    fails(folder, path, "damaged or truncated gzip")
    path.write_bytes(gzip.compress(idx(LABELS)))
    fails(folder, path, "0x00000801, expected 0x00000803")
    path.write_bytes(gzip.compress(idx(GREY)[:-1]))
    fails(folder, path, "found 1439 bytes of data, expected 1440", "(40, 6, 6)")
    path.write_bytes(gzip.compress(idx(GREY)[:9]))
    fails(folder, path, "found 9 bytes, expected 16 of header")
    path.unlink()
    fails(folder, path, "found t10k-images-idx3-ubyte.gz", "expected this file")


# CIFAR pickles


def test_cifar100(tmp_path):
    found = sources.read_images(write_cifar100(tmp_path / "cifar-100-python"))
    check(found, COLOUR)
    assert found.class_names[3] == "thing 3"


def test_cifar10(tmp_path):
    for i in range(5):
        batch = cifar_batch("labels", slice(8 * i, 8 * i + 8))
        (tmp_path / f"data_batch_{i + 1}").write_bytes(batch)
    (tmp_path / "test_batch").write_bytes(cifar_batch("labels", slice(0, 10)))
    check(sources.read_images(tmp_path), COLOUR)
    for name in ("data_batch_4", "data_batch_1", "test_batch"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
        fails(tmp_path, f"{tmp_path / name}: found", "expected this file")
        with pytest.raises(DataError) as caught:
            sources.read_images(tmp_path)
        assert "pickle" not in str(caught.value)
        (tmp_path / name).write_bytes(whole)


def test_a_pickle_cannot_run_code(tmp_path, capsys):
    folder = write_cifar100(tmp_path / "cifar")
    (folder / "train").write_bytes(b"cbuiltins\nprint\n(U\x03heytR.")
    fails(folder, folder / "train", "asks for builtins.print")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("key", [str.encode, str])
@pytest.mark.parametrize("listed", [list, np.ndarray.tolist, np.asarray])
def test_pickles_of_this_numpy_can_be_read(tmp_path, protocol, key, listed):
    folder = write_cifar100(tmp_path / "cifar")
    data = COLOUR.transpose(0, 3, 1, 2).reshape(-1, 3072)
    batch = {key("data"): data, key("fine_labels"): listed(LABELS)}
    (folder / "train").write_bytes(pickle.dumps(batch, protocol=protocol))
    names = {key("fine_label_names"): [key(f"thing {c}") for c in range(10)]}
    (folder / "meta").write_bytes(pickle.dumps(names, protocol=protocol))
    found = sources.read_images(folder)
    check(found, COLOUR)
    assert found.class_names[3] == "thing 3"


def test_arrays_stored_by_columns_and_read_only_can_be_read(tmp_path):
    folder = write_cifar100(tmp_path / "cifar")
    data = np.asfortranarray(COLOUR.transpose(0, 3, 1, 2).reshape(-1, 3072))
    data.flags.writeable = False
    batch = {"data": data, "fine_labels": LABELS.tolist()}
    (folder / "train").write_bytes(pickle.dumps(batch, protocol=5))
    check(sources.read_images(folder), COLOUR)


@pytest.mark.parametrize("protocol", [2, 5])
def test_no_object_is_made_of_a_pickle(tmp_path, protocol):
    folder = write_cifar100(tmp_path / "cifar")
    batch = {"data": np.array([print], object), "fine_labels": [0]}
    (folder / "train").write_bytes(pickle.dumps(batch, protocol=protocol))
    fails(folder, folder / "train", "it asks for", ".print")


def test_damaged_cifar(tmp_path):
    folder = write_cifar100(tmp_path / "cifar")
    path = folder / "train"
    whole = path.read_bytes()
    for length in (len(whole) - 1, len(whole) // 2, 40, 3):
        path.write_bytes(whole[:length])
        fails(folder, path, "no pickle of arrays")
    path.write_bytes(cifar_batch("coarse_labels"))
    fails(folder, path, "coarse_labels", "expected fine_labels")
    path.write_bytes(b"](K\x01e.")
    fails(folder, path, "list")
    data = old_array(COLOUR[:2].reshape(2, -1)[:, :100])
    path.write_bytes(old_pickle(data=data, fine_labels=old_list([b"K\x01"] * 2)))
    fails(folder, path, "data of shape (2, 100)")
    path.unlink()
    fails(folder, path, "expected this file")


# SVHN


def test_svhn(tmp_path):
    scipy_io = pytest.importorskip("scipy.io")
    for part, rows in (("train", 40), ("test", 10)):
        y = np.where(LABELS[:rows] == 0, 10, LABELS[:rows])[:, None]
        x = COLOUR[:rows].transpose(1, 2, 3, 0)
        scipy_io.savemat(tmp_path / f"{part}_32x32.mat", {"X": x, "y": y})
    check(sources.read_images(tmp_path), COLOUR)
    path = tmp_path / "test_32x32.mat"
    path.write_bytes(path.read_bytes()[:3000])
    fails(tmp_path, path, "without readable X and y")
    path.unlink()
    fails(tmp_path, path, "expected this file")


# Image folders


@pytest.mark.parametrize("test", ["test", "val"])
def test_image_folder(tmp_path, test):
    found = sources.read_images(write_pictures(tmp_path, test))
    check(found, COLOUR)
    assert found.class_names[2] == "n02"
    fewer = sources.read_images(tmp_path, per_class=3)
    assert np.bincount(fewer.y_train).tolist() == [3] * 10
    assert len(fewer.y_test) == 10


def test_image_folder_scaled_and_grey(tmp_path):
    write_pictures(tmp_path, suffix=".jpg")
    wide = np.zeros((4, 8, 3), np.uint8)
    wide[:, 2:6] = 200  # the centred square
    pillow.fromarray(wide).save(tmp_path / "train" / "n00" / "wide.png")
    fails(tmp_path, "shapes", "pass size=")
    found = sources.read_images(tmp_path, size=4)
    assert found.x_train.shape == (41, 4, 4, 3)
    assert (found.x_train == 200).all((1, 2, 3)).sum() == 1
    grey = folders.decode(png(GREY[0]), "here", None)
    np.testing.assert_array_equal(grey[..., 0], GREY[0])
    pillow.fromarray(GREY[0]).save(tmp_path / "train" / "n00" / "wide.png")
    assert sources.read_images(tmp_path, size=6).x_train.shape[-1] == 3


WIDE = rng.integers(0, 65536, (6, 6)).astype(np.uint16)
WIDE[0, :2] = 0, 65535


@pytest.mark.parametrize("suffix", [".png", ".pgm"])
def test_grey_of_16_bits_keeps_its_values(tmp_path, suffix):
    path = tmp_path / f"wide{suffix}"
    pillow.fromarray(WIDE).save(path)
    found = folders.decode(path, "here", None)
    assert found.shape == (6, 6, 1) and found.dtype == np.float32
    np.testing.assert_allclose(found[..., 0], WIDE / 257, rtol=1e-6)
    assert found.min() == 0 and found.max() == 255
    half = folders.decode(path, "here", 3)
    whole = pillow.fromarray((WIDE / 257).astype(np.float32))
    expected = np.asarray(whole.resize((3, 3), pillow.Resampling.BILINEAR))
    np.testing.assert_allclose(half[..., 0], expected, rtol=1e-5)


def test_pictures_of_8_and_16_bits_are_of_one_range(tmp_path):
    for part in ("train", "test"):
        for label, picture in enumerate((GREY[0], GREY[0].astype(np.uint16) * 257)):
            (tmp_path / part / str(label)).mkdir(parents=True)
            file = tmp_path / part / str(label) / "0.png"
            pillow.fromarray(picture).save(file)
    found = sources.read_images(tmp_path)
    np.testing.assert_allclose(found.x_train[0], found.x_train[1], atol=1e-4)
    np.testing.assert_array_equal(found.x_train[0, ..., 0], GREY[0])


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (WIDE, WIDE / 257),
        (WIDE.astype(np.int32), WIDE / 257),
        (WIDE / np.float32(65535), WIDE / 65535),
        (GREY[0], GREY[0]),
    ],
)
def test_hugging_face_pictures_keep_their_values(stored, expected):
    found = hub._pixels(pillow.fromarray(stored), "here", None)
    np.testing.assert_allclose(found[..., 0], expected, rtol=1e-6)


def test_damaged_image_folder(tmp_path):
    write_pictures(tmp_path)
    path = tmp_path / "train" / "n03" / "003.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    fails(tmp_path, path, "Pillow cannot read")
    path.write_bytes(b"text")
    fails(tmp_path, path, "Pillow cannot read")
    path.write_bytes(whole)
    (tmp_path / "test" / "n03").rename(tmp_path / "test" / "n3")
    fails(tmp_path, "not in both: n03, n3")
    (tmp_path / "test" / "n3").rename(tmp_path / "test" / "n03")
    for file in (tmp_path / "train" / "n05").iterdir():
        file.unlink()
    fails(tmp_path, tmp_path / "train" / "n05", "found no pictures")
    (tmp_path / "test").rename(tmp_path / "other")
    fails(tmp_path, "found other/, train/", "expected")
    with pytest.raises(DataError, match=r"found other/, train/, expected folders"):
        folders.read_image_folder(tmp_path)


# TFDS


def test_tfds(tmp_path):
    older = tmp_path / "imagenet2012" / "5.9.0"
    write_tfds(older, rows=10)
    write_tfds(tmp_path / "imagenet2012" / "5.10.0")
    found = sources.read_images(tmp_path / "imagenet2012")
    check(found, COLOUR)
    assert found.class_names[9] == "n9"
    assert len(sources.read_images(older).y_train) == 10
    fewer = sources.read_images(tmp_path, size=8, per_class=2)
    assert fewer.x_train.shape == (20, 8, 8, 3) and len(fewer.y_test) == 10


def test_tfrecord_checksum():
    # RFC 3720 B.4: CRC-32C of 32 zero bytes is 0x8a9136aa; masked as TFRecord does
    crc = 0x8A9136AA
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    assert tfds._masked_crc(bytes(32)) == masked


def test_damaged_tfds(tmp_path):
    folder = write_tfds(tmp_path / "5.0.0")
    path = folder / "imagenet2012-train.tfrecord-00000-of-00002"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    fails(folder, path, "truncated")
    path.write_bytes(b"\0" * 100)
    fails(folder, path, "does not match its checksum")
    path.write_bytes(whole[:7])
    fails(folder, path, "does not match its checksum")
    path.write_bytes(record(field(1, b"")))
    fails(folder, path, "record 0 without an image or a label")
    path.write_bytes(record(b"\xff\xff"))
    fails(folder, path, "record 0 without an image or a label")
    path.write_bytes(record(example(b"no picture", 1)))
    fails(folder, path, "record 0", "Pillow cannot read")
    for file in folder.glob("*-validation*"):
        file.unlink()
    path.write_bytes(whole)
    fails(folder, folder, "records of the split test or val")
    with pytest.raises(DataError, match="expected files <name>-train.tfrecord"):
        tfds.read_tfds(write_pictures(tmp_path / "pictures"))


# Hugging Face


class Split:
    """As much of datasets.Dataset as the reader uses."""

    def __init__(self, **columns):
        self.columns, self.column_names = columns, list(columns)
        self.features = {name: None for name in columns}
        if "label" in columns:
            names = [f"name {i}" for i in range(10)]
            self.features["label"] = types.SimpleNamespace(names=names)

    def __getitem__(self, key):
        if isinstance(key, str):
            return self.columns[key]
        return {name: column[key] for name, column in self.columns.items()}


@pytest.fixture
def hugging(monkeypatch):
    """Puts a module in the place of `datasets` that serves these splits."""

    def put(splits):
        def load(source):
            if isinstance(splits, Exception):
                raise splits
            return splits

        fake = types.ModuleType("datasets")
        fake.load_dataset = fake.load_from_disk = load
        monkeypatch.setitem(sys.modules, "datasets", fake)

    return put


def split(rows, image="image", label="label"):
    columns = {image: [pillow.fromarray(c) for c in COLOUR[:rows]]}
    return Split(**columns, **{label: LABELS[:rows].tolist()})


def test_hugging_face_images(tmp_path, hugging):
    hugging({"train": split(40), "test": split(10)})
    found = sources.read_images("hf:some/thing")
    check(found, COLOUR)
    assert found.class_names[4] == "name 4"
    assert len(sources.read_images("hf:some/thing", per_class=2).y_train) == 20
    hugging({"train": split(40, "img", "fine_label"), "validation": split(10)})
    (tmp_path / "dataset_dict.json").write_text("{}")
    check(sources.read_images(tmp_path), COLOUR)
    stream = streams.load("split-cifar100", data="hf:x", tasks=5)
    assert stream.train.x.shape == (5, 6, 32, 32, 3)


def test_damaged_hugging_face(hugging, monkeypatch):
    hugging({"train": split(40)})
    fails("hf:a/b", "a/b: found splits train, expected test or val")
    hugging({"train": split(40, "picture"), "test": split(10)})
    fails("hf:a/b", "found columns picture, label, expected image or img")
    hugging(split(40))
    fails("hf:a/b", "found one split")
    hugging(RuntimeError("no such thing"))
    fails("hf:a/b", "no such thing")
    monkeypatch.setitem(sys.modules, "datasets", None)
    fails("hf:a/b", "datasets is not installed", "pip install datasets")


def test_hugging_face_text(tmp_path, hugging):
    for domain in ("law", "poems"):
        (tmp_path / domain).mkdir()
        (tmp_path / domain / "dataset_dict.json").write_text("{}")
    lines = [f"line {i} of the text" for i in range(300)]
    hugging({"train": Split(text=lines), "validation": Split(text=lines[:50])})
    stream = streams.load("text-8", data=tmp_path, tasks=2, context=16)
    assert stream.task_names == ("law", "poems")
    first = bytes(stream.test.x[0, 0].astype(np.uint8))
    assert first in "\n\n".join(lines[:50]).encode()
    with pytest.raises(DataError, match="found law, poems, expected also .* 'news'"):
        streams.load("text-8", data=tmp_path, tasks=1, domains=["news"])
    hugging({"train": Split(text=lines), "test": Split(words=lines)})
    with pytest.raises(DataError, match="found columns words, expected text"):
        streams.load("text-8", data=tmp_path, tasks=1)
    hugging({"train": Split(text=lines)})
    with pytest.raises(DataError, match="found splits train, expected train and test"):
        streams.load("text-8", data=tmp_path, tasks=1)


@pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None, reason="needs Hugging Face datasets"
)
def test_hugging_face_itself(tmp_path):
    import datasets

    def part(rows):
        features = datasets.Features(
            image=datasets.Image(), label=datasets.ClassLabel(names=list("abcdefghij"))
        )
        columns = {"image": [{"bytes": png(c)} for c in COLOUR[:rows]]}
        columns["label"] = LABELS[:rows].tolist()
        return datasets.Dataset.from_dict(columns, features)

    saved = datasets.DatasetDict(train=part(40), test=part(10))
    saved.save_to_disk(str(tmp_path / "images"))
    found = sources.read_images(tmp_path / "images")
    check(found, COLOUR)
    assert found.class_names == tuple("abcdefghij")
    lines = datasets.Dataset.from_dict({"text": [f"line {i}" for i in range(300)]})
    both = datasets.DatasetDict(train=lines, test=lines)
    both.save_to_disk(str(tmp_path / "text" / "lines"))
    (domain,) = streams.registry.text.read_domains(tmp_path / "text", 1)
    assert domain.train[:14].tobytes() == b"line 0\n\nline 1"


# Finding a data set, and streams made of it


def test_data_sets_are_found_in_a_folder(tmp_path):
    write_mnist(tmp_path / "MNIST" / "raw")
    write_cifar100(tmp_path / "cifar-100-python")
    write_npz(tmp_path / "fashion_mnist.npz")
    (tmp_path / "notes.txt").write_text("")
    assert sources.find(tmp_path, "mnist") == tmp_path / "MNIST" / "raw"
    assert sources.find(tmp_path, "fashion-mnist").name == "fashion_mnist.npz"
    assert sources.find(tmp_path, "svhn") is None
    mnist = streams.load("permuted-mnist", data=tmp_path, tasks=2)
    assert mnist.train.x.shape == (2, 30, 36) and mnist.test.x.shape == (2, 10, 36)
    fashion = streams.load("split-fashion-mnist", data=tmp_path / "fashion_mnist.npz")
    assert fashion.train.x.shape == (5, 6, 36)
    cifar = streams.load("split-cifar100", data=tmp_path, tasks=10)
    assert cifar.train.x.shape == (10, 3, 32, 32, 3)
    assert cifar.task_names[1] == "thing 1"
    fails(tmp_path / "nowhere", "nowhere: found nothing")
    fails(tmp_path, "MNIST/, cifar-100-python/, fashion_mnist.npz", "layouts")
    with pytest.raises(DataError, match="expected one of the layouts"):
        streams.load("split-imagenet", data=tmp_path)


@pytest.mark.parametrize("layout", [write_pictures, write_tfds])
def test_imagenet_is_scaled_and_limited(tmp_path, layout, monkeypatch):
    layout(tmp_path / "imagenet2012")
    asked = []
    read = sources.read_images

    def spy(*args, **options):
        asked.append(options)
        return read(*args, **options)

    monkeypatch.setattr(sources, "read_images", spy)
    stream = streams.load("split-imagenet", data=tmp_path, tasks=5, limit=3, size=16)
    assert asked == [{"size": 16, "per_class": 4}]
    assert stream.train.x.shape == (5, 3, 16, 16, 3)
    assert stream.test.x.shape == (5, 2, 16, 16, 3)
    assert (stream.class_mask.sum(1) == 2).all()


def test_digit_five(tmp_path):
    five = ("mnist", "mnist_m", "usps", "svhn", "syn")
    write_mnist(tmp_path / "mnist")
    write_pictures(tmp_path / "MNIST-M")
    write_npz(tmp_path / "usps.npz")
    write_npz(tmp_path / "synth_digits.npz", x_train=COLOUR, x_test=COLOUR[:10])
    with pytest.raises(DataError) as caught:
        streams.load("digit-five", data=tmp_path)
    for part in (tmp_path, "MNIST-M/", "expected also a data set for svhn"):
        assert str(part) in str(caught.value)
    write_npz(tmp_path / "svhn.npz", x_train=COLOUR, x_test=COLOUR[:10])
    stream = streams.load("digit-five", data=tmp_path, limit=20)
    assert stream.task_names == five and stream.scenario == "domain"
    assert stream.train.x.shape == (5, 20, 32, 32, 3)
    assert stream.class_mask.shape == (5, 10)
    two = streams.load("digit-five", data=tmp_path, domains=["syn", "usps"], size=16)
    assert two.task_names == ("syn", "usps") and two.train.x.shape[2] == 16
    assert streams.load("digit-five", data=tmp_path, tasks=2).task_names == five[:2]
    with pytest.raises(DataError, match="tasks: got 6, expected 1 to 5"):
        streams.load("digit-five", data=tmp_path, tasks=6)


def test_lacking_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(DataError, match="pillow is not installed, .*pip install"):
        folders.decode(b"", "here", None)
    assert hub.library("json", "json", "to pass") is not None


def test_digits_are_the_same_every_time():
    first, again = readers.read_digits(), readers.read_digits()
    np.testing.assert_array_equal(first.x_train, again.x_train)
    assert first.x_train.shape == (1438, 8, 8, 1) and first.x_train.max() == 16
