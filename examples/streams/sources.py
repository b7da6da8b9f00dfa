"""Finds a data set under the path one was given, and the reader that fits.

<name>.npz                          arrays x_train, y_train, x_test, y_test
{train,t10k}-{images,labels}-idx*   the MNIST family, .gz or not
train + meta, data_batch_1 ...      CIFAR python pickles
train_32x32.mat, test_32x32.mat     SVHN
train/<class>/*.png + test/ or val/ image folders
*-train.tfrecord-*                  TFDS
dataset_dict.json                   Hugging Face, `save_to_disk`
hf:<name>                           Hugging Face, `load_dataset` (may download)
"""

from pathlib import Path

from examples.streams import cifar, folders, hub, readers, tfds
from examples.streams.domains import DataError
from examples.streams.files import listing, visible

ALIASES = {
    "cifar100": ("cifar100python",),
    "imagenet": ("imagenet2012", "imagenet1k", "ilsvrc2012"),
    "mnist_m": ("mnistm",),
    "syn": ("synthdigits", "syndigits", "synnumber"),
}


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def find(data: Path, name: str) -> Path | None:
    """The file or folder of data set `name` in the folder `data`."""
    wanted = {_plain(name), *ALIASES.get(name, ())}
    entries = visible(data.iterdir(), data) if data.is_dir() else []
    for entry in entries:
        own = entry.is_dir() or entry.suffix == ".npz"
        if own and _plain(entry.name if entry.is_dir() else entry.stem) in wanted:
            raw = entry / "raw"  # torchvision keeps MNIST's files there
            return raw if raw.is_dir() else entry
    return None


def read_images(
    source: Path | str, size: int | None = None, per_class: int | None = None
) -> readers.Images:
    """Reads the data set at a path, or `hf:<name>`, in any format that is known here.

    Args:
      source: file, folder, or `hf:` and the name of a Hugging Face dataset.
      size: scale pictures to size x size (image folders, TFDS, Hugging Face).
      per_class: read at most so many training pictures of a class (the same formats).

    Raises:
      DataError: if nothing readable is there.
    """
    if str(source).startswith("hf:"):
        return hub.read_huggingface(str(source)[3:], size, per_class)
    path = Path(source)
    if path.is_file() and path.suffix == ".npz":
        return readers.read_npz(path)
    if not path.is_dir():
        found = "another kind of file" if path.is_file() else "nothing"
        raise DataError(f"{path}: found {found}, expected an .npz file or a folder.")
    if (path / "dataset_dict.json").is_file():
        return hub.read_huggingface(path, size, per_class)
    if folders.has_class_folders(path):
        return folders.read_image_folder(path, size, per_class)
    if tfds.find_tfds(path) is not None:
        return tfds.read_tfds(path, size, per_class)
    names = [p.name for p in visible(path.iterdir(), path)]
    if any("-ubyte" in name for name in names):
        return readers.read_idx_folder(path)
    if any(name.endswith("_32x32.mat") for name in names):
        return readers.read_svhn(path)
    if cifar.is_cifar(path):
        return cifar.read_cifar(path)
    raise DataError(
        f"{path}: found {listing(path)}, expected one of the layouts that "
        "examples/streams/sources.py lists."
    )


def need(name: str, data: Path | str | None, stream: str) -> Path | str:
    """Where data set `name` is: in `data`, or `data` itself."""
    if data is None:
        raise DataError(
            f"{stream} needs data= (--data): the path of {name} or of a folder with "
            "it; nothing is downloaded."
        )
    if str(data).startswith("hf:"):
        return str(data)
    return find(Path(data), name) or Path(data)
