"""The contents of a checkpoint: the state, and the settings of the run that saved it.

Both are compared as text with those of the current run, so that a message can list
every difference.
"""

import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax

from adamr import _processes
from adamr.checkpoint import _leaves

__all__ = ["Restored", "differences", "orbax", "plain", "read", "text", "write"]

_SETTINGS = (  # the settings of JAX that change bits
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_enable_x64",
    "jax_numpy_dtype_promotion",
    "jax_threefry_partitionable",
)


def plain(value: Any, name: str) -> Any:
    """A copy as JSON returns it: equal, except that tuples become lists.

    Raises:
      TypeError: for an entry that JSON cannot hold; the message names it.
    """

    def check(value, name):
        if isinstance(value, dict):
            for key, item in value.items():
                if not isinstance(key, str):
                    raise TypeError(f"{name} has the key {key!r}, expected a str.")
                check(item, f"{name}/{key}")
        elif isinstance(value, list | tuple):
            for i, item in enumerate(value):
                check(item, f"{name}/{i}")
        elif not (value is None or isinstance(value, bool | int | float | str)):
            raise TypeError(
                f"{name} is a {type(value).__name__}, expected a value that JSON can "
                "hold: a number, a string, None, or lists and dicts of these."
            )

    check(value, name)
    return json.loads(json.dumps(value))


def _origin(config: dict[str, Any]) -> dict[str, Any]:
    """The hyperparameters, the versions and the settings of JAX."""
    import jaxlib
    import optax

    import adamr

    modules = (adamr, jax, jaxlib, optax)
    return {
        "config": config,
        "version": {m.__name__: m.__version__ for m in modules},
        "setting": {name: getattr(jax.config, name) for name in _SETTINGS},
    }


def _devices() -> str:
    """The devices of the run, such as `8 cpu`."""
    kinds = [device.device_kind for device in jax.devices()]
    text = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted({*kinds}))
    count = jax.process_count()
    return text if count == 1 else f"{text} in {count} processes"


def _flat(value: Any, name: str) -> dict[str, str]:
    """Nested dicts as one, of values as text under names such as `config/rate`."""
    if not isinstance(value, dict) or not value:
        return {name: json.dumps(value)}
    parts = [_flat(item, f"{name}/{key}") for key, item in value.items()]
    return {key: text for part in parts for key, text in part.items()}


def differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """One line for each entry that differs, such as `config/rate: 0.1, 0.2`."""
    saved, now = [
        {k: v for name, part in whole.items() for k, v in _flat(part, name).items()}
        for whole in (there, here)
    ]
    return [
        f"{key}: {saved.get(key, 'absent')}, {now.get(key, 'absent')}"
        for key in sorted({*saved, *now})
        if saved.get(key) != now.get(key)
    ]


class Restored(NamedTuple):
    """What a checkpoint gives back.

    Attributes:
      step: how far the run was.
      state: a tree like the one that was saved, placed like `like`.
      metrics: what was saved as metrics; tuples have become lists.
    """

    step: int
    state: Any
    metrics: Any


def orbax() -> Any:
    """The module `orbax.checkpoint`, imported when it is needed."""
    try:
        import orbax.checkpoint
    except ImportError as error:
        raise ImportError(
            "adamr.checkpoint needs orbax: python -m pip install 'adamr-jax[orbax]'."
        ) from error
    return orbax.checkpoint


def text(step: int, config: dict[str, Any], metrics: Any, records: list) -> str:
    """Everything in a checkpoint except its arrays, as JSON."""
    contents = {
        "step": step,
        "origin": _origin(config),
        "devices": _devices(),
        "metrics": plain(metrics, "metrics"),
        "leaves": records,
    }
    return json.dumps(contents, indent=1)


def _arrays() -> Any:
    """Orbax's reader and writer of a tree of arrays, a context manager."""
    ocp = orbax()
    if jax.process_count() == 1:
        return ocp.Checkpointer(ocp.StandardCheckpointHandler())
    # Processes that are named wait for each other without the devices, which the main
    # thread uses.
    everyone = ocp.options.MultiprocessingOptions(
        primary_host=0, active_processes=set(range(jax.process_count()))
    )
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=everyone)
    return ocp.Checkpointer(handler, multiprocessing_options=everyone)


def write(folder: Path, text: str, arrays: dict[str, Any]) -> None:
    """Writes a checkpoint into an empty folder."""
    if _processes.first():
        (folder / "state.json").write_text(text, encoding="utf-8")
    if arrays:
        ocp = orbax()
        with _arrays() as writer:
            writer.save(folder / "arrays", args=ocp.args.StandardSave(arrays))


def read(path: Path, like: Any, config: dict[str, Any] | None) -> Restored:
    """Reads the undamaged checkpoint at `path`.

    Raises:
      ValueError: if its state differs from `like`, or, unless config is None, if it was
        saved with another config, other versions or other settings.
    """
    saved = json.loads((path / "state.json").read_text(encoding="utf-8"))
    lines = []
    if config is not None:
        lines = differences(saved["origin"], _origin(config))
    here = _leaves.described(like)
    held = _leaves.signature(saved["leaves"])
    lines += differences({"state": held}, {"state": here})
    if lines:
        raise ValueError(
            f"{path} is from another run (there, here):\n  "
            + "\n  ".join(lines)
            + "\nContinue with the settings it was saved with, or use another "
            "directory. adamr.checkpoint.load reads it without comparing "
            "hyperparameters and versions."
        )
    if config is not None and saved["devices"] != _devices():
        warnings.warn(
            f"{path} was saved on {saved['devices']}, this is {_devices()}: the "
            "run continues, but its last bits may differ.",
            stacklevel=3,
        )
    arrays = _leaves.placeholders(saved["leaves"], like)
    if arrays:
        ocp = orbax()
        with _arrays() as reader:
            how = ocp.args.StandardRestore(arrays)
            arrays = reader.restore(path.absolute() / "arrays", args=how)
    state = _leaves.restored(saved["leaves"], arrays, like)
    return Restored(saved["step"], state, saved["metrics"])
