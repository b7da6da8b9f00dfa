"""The hooks against the real loggers, where these are installed."""

import importlib.util
import struct

import pytest

from examples.harness.loggers import HOOKS

LOGGED = [
    ("adam-0", 2, {"loss": 2.5, "accuracy_so_far": 0.25}),
    ("gpm-0", 2, {"loss": 2.25}),
    ("adam-0", 4, {"loss": 1.5, "accuracy_so_far": 0.5}),
]


def log_all(name, out):
    with HOOKS[name](out) as log:
        for record in LOGGED:
            log(*record)


@pytest.mark.smoke
def test_nothing_is_logged_to_nowhere(tmp_path):
    log_all("none", tmp_path)
    assert not list(tmp_path.iterdir())


def events(folder):
    """TensorBoard's events of a run, file after file."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            yield Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]


def test_tensorboard_has_every_scalar_once(tmp_path):
    pytest.importorskip("tensorboardX")
    for _ in range(2):  # a run that goes on logs its past again
        log_all("tensorboard", tmp_path)
    for run in ("adam-0", "gpm-0"):
        found = []
        for event in events(tmp_path / "tensorboard" / run):
            if event.HasField("session_log"):  # what came before is purged
                found = [x for x in found if x[0] < event.step]
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
        wanted = [(step, *x) for r, step, s in LOGGED if r == run for x in s.items()]
        assert found == wanted


@pytest.mark.filterwarnings("ignore")  # of a package that is not ours
def test_wandb_keeps_every_scalar(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log_all("wandb", tmp_path)
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = path.read_bytes()
    for run, _, scalars in LOGGED:
        for name in (*scalars, "step"):
            assert f"{run}/{name}".encode() in content


@pytest.mark.parametrize(
    ("name", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")]
)
def test_a_missing_logger_is_named(tmp_path, name, package):
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(ImportError, match=f"pip install {package}"):
        log_all(name, tmp_path)
