"""A folder of Hugging Face files: its config.json and the headers of its tensors."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from examples.llm.errors import ModelError
from examples.streams.files import listing

__all__ = ["end_tokens", "mixes_dtypes", "read_config"]

DTYPES = ("BF16", "F16", "F32")  # of safetensors, as far as Tunix reads them


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file}: found no valid JSON ({error}).") from error


def _read_object(file: Path) -> dict[str, Any]:
    found = _read_json(file)
    if not isinstance(found, dict):
        raise ModelError(f"{file}: found {found!r:.80}, expected a JSON object.")
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """config.json; of a model for text and pictures, the part about text."""
    file = folder / "config.json"
    if not file.is_file():
        found = listing(folder) if folder.is_dir() else "no folder"
        raise ModelError(
            f"{folder}: found {found}, expected a folder with config.json, "
            "tokenizer.json and *.safetensors."
        )
    config = _read_object(file)
    if config.get("model_type") != "gemma3":
        return config
    text = config.get("text_config")
    if not isinstance(text, dict):
        raise ModelError(
            f"{file}: found text_config = {text!r:.80}, expected an object with the "
            "sizes of the part about text, as model_type is 'gemma3'."
        )
    return text


def end_tokens(folder: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    """`eos_token_id` of config.json and of generation_config.json."""
    file = folder / "generation_config.json"
    ends = set()
    for options in [config, _read_object(file) if file.is_file() else {}]:
        found = options.get("eos_token_id")
        ends |= set(found if isinstance(found, list) else [found])
    return tuple(sorted(ends - {None}))


def _header(file: Path) -> dict[str, Any]:
    """What a safetensors file says it holds."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size:
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        end = max((t["data_offsets"][1] for t in header.values()), default=0)
        if size != 8 + length + end:
            raise ValueError(f"{size} bytes, not {8 + length + end}")
    except (KeyError, TypeError, ValueError, struct.error) as error:
        raise ModelError(
            f"{file}: found {error}, expected a complete safetensors file."
        ) from error
    return header


def mixes_dtypes(folder: Path, expected: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a file has tensors of several dtypes.

    Args:
      folder: with *.safetensors.
      expected: names and shapes of the tensors that the model needs.

    Raises:
      ModelError: for a file that is cut off, and for tensors that are missing, of
        another shape, or of a dtype that Tunix does not read.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder}: found {listing(folder)}, expected *.safetensors.")
    headers = [_header(file) for file in files]
    found = {
        name.removeprefix("language_model."): tuple(tensor["shape"])
        for header in headers
        for name, tensor in header.items()
    }
    missing = sorted(expected.keys() - found.keys())
    if missing:
        raise ModelError(
            f"{folder}: {len(missing)} of the tensors that config.json announces are "
            f"missing, such as {', '.join(missing[:3])}."
        )
    for name, shape in expected.items():
        if found[name] != shape:
            raise ModelError(
                f"{folder}: {name} is {found[name]}, expected {shape} by config.json."
            )
    used = [{tensor["dtype"] for tensor in header.values()} for header in headers]
    odd = sorted(set().union(*used) - set(DTYPES))
    if odd:
        raise ModelError(
            f"{folder}: found weights of {', '.join(odd)}, expected "
            f"{', '.join(DTYPES)}."
        )
    return any(len(dtypes) > 1 for dtypes in used)
