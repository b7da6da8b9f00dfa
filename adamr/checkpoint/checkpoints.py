"""Exact resume: a killed run, started again, ends in the same bits.

    with Checkpoints(directory, config=config, every=100) as checkpoints:
        start = checkpoints.restore(state) or Restored(0, state, [])
        step, state, metrics = start
        while step < steps:
            state, loss = train_step(state, data[step])
            step += 1
            metrics.append(float(loss))
            checkpoints.save(step, state, metrics)  # when it is due
            if checkpoints.stopping:  # SIGTERM came and this step was saved
                sys.exit()

The state is one pytree: parameters, optimizer and continual state, buffers, PRNG keys,
position in the data. Anything that the loop carries from step to step must be in the
state, the step or the metrics, or it is lost. A checkpoint is a folder `step-…` that
appears by one rename, with a checksum of every file:

    arrays/      array leaves, in orbax's format, by position
    state.json   everything else: step, metrics, config, versions, names of the leaves
    SHA256SUMS   for `sha256sum -c`; if it is missing or does not match, the checkpoint
                 is damaged

In several processes (`jax.distributed`) all make the same calls and see the same
directory. Each writes its shards of the arrays that lie over all of them; everything
else (metrics, NumPy arrays, arrays of one process) must be the same in all and is
written by the first. A checkpoint can be read with another number of devices or
processes: arrays get the placement that they have in `like`.

Needs orbax (`pip install 'adamr-jax[orbax]'`) and a POSIX file system.
"""

import concurrent.futures
import contextlib
import datetime
import operator
import os
import signal
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import jax

from adamr import _processes
from adamr.checkpoint import _contents, _folders, _leaves
from adamr.checkpoint._contents import Restored

__all__ = ["Checkpoints", "Restored", "load"]


def load(path: str | os.PathLike, like: Any) -> Restored:
    """Reads one checkpoint without comparing hyperparameters and versions.

    For evaluation, or to begin another run; `Checkpoints.restore` resumes a run.

    Args:
      path: the folder `step-…`.
      like: a state with the same leaves, such as the initial one, or the same tree of
        `jax.ShapeDtypeStruct`s. Arrays get the placement that they have here; values
        are not read.

    Returns:
      Step, state and metrics.

    Raises:
      ValueError: if it is damaged, or its state differs from `like`.

    >>> import tempfile
    >>> directory, state = tempfile.mkdtemp(), {"w": jax.numpy.ones(2)}
    >>> with Checkpoints(directory, config={}, every=1) as checkpoints:
    ...     saved = checkpoints.save(1, state)
    >>> load(directory + "/step-000000000001", state).state["w"]
    Array([1., 1.], dtype=float32)
    """
    reason = _folders.damage(Path(path))
    if reason:
        raise ValueError(f"{path} is damaged: {reason}.")
    return _contents.read(Path(path), like, None)


class Checkpoints:
    """The checkpoints of one run: saved while it runs, restored when it starts again.

    Guarantee: a run that is killed at any moment and started again with the same
    command ends with the same bits as a run that was never killed. This needs the same
    hardware and a loop that is a function of its state: batches drawn by step or key.

    Args:
      directory: a local directory for this run alone; made if it does not exist.
      config: hyperparameters and everything else that the run depends on, a dict that
        JSON can hold. A checkpoint with another config is refused.
      every: save when the step passes a multiple of this number, or when this
        `datetime.timedelta` has passed since the last save; positive.
      keep: how many of the newest undamaged checkpoints to keep, at least 1; None: all.
        Before an older one is deleted, these are read again and compared with their
        checksums, in the background. Damaged ones are not counted and never deleted.

    Attributes:
      stopping: True once SIGTERM has come and `save` has saved: leave the loop then. A
        SIGTERM after the last save is raised again at the end of the with statement.

    Raises:
      ValueError: for a directory that is not local, or every or keep out of range.
      TypeError: for a config that JSON cannot hold.
      OSError: on entry, if the directory cannot be written; from `save` or on exit, if
        a checkpoint could not be written. Earlier ones stay.
      RuntimeError: on entry, if another process saves there.
      ImportError: on entry, without orbax.

    >>> import tempfile
    >>> directory, config = tempfile.mkdtemp(), {"learning_rate": 0.1}
    >>> state = {"w": jax.numpy.ones(2), "key": jax.random.key(0)}
    >>> with Checkpoints(directory, config=config, every=10) as checkpoints:
    ...     saved = [checkpoints.save(n, state, {"loss": 0.5}) for n in (5, 10, 15)]
    >>> saved
    [False, True, False]
    >>> with Checkpoints(directory, config=config, every=10) as checkpoints:
    ...     step, state, metrics = checkpoints.restore(state)
    >>> step, state["w"], metrics
    (10, Array([1., 1.], dtype=float32), {'loss': 0.5})
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        config: dict[str, Any],
        every: int | datetime.timedelta,
        keep: int | None = 3,
    ):
        if "://" in os.fspath(directory):
            raise ValueError(f"directory is {directory}, expected a local path.")
        if not isinstance(config, dict):
            raise TypeError(f"config is a {type(config).__name__}, expected a dict.")
        number = not isinstance(every, datetime.timedelta)
        if (every if number else every.total_seconds()) <= 0:
            raise ValueError(f"every must be positive, got {every}.")
        if keep is not None and keep < 1:
            raise ValueError(f"keep must be at least 1 or None, got {keep}.")
        self.stopping = False
        self._directory = Path(directory).absolute()
        self._config = _contents.plain(config, "config")
        self._every, self._keep = every, keep
        self._step, self._time = 0, time.monotonic()
        self._expected = None  # names, shapes and dtypes of the state, once restored
        self._signalled, self._calls = False, 0
        self._writer: concurrent.futures.Executor | None = None
        self._writing: concurrent.futures.Future | None = None

    def __enter__(self) -> "Checkpoints":
        _contents.orbax()
        with contextlib.ExitStack() as stack:
            locked = _folders.locked(self._directory)
            _processes.by_first(lambda: stack.enter_context(locked))
            writer = concurrent.futures.ThreadPoolExecutor(1, "checkpoints")
            self._writer = stack.enter_context(writer)
            alone = jax.process_count() == 1  # otherwise JAX handles the signal
            if alone and threading.current_thread() is threading.main_thread():
                before = signal.signal(signal.SIGTERM, self._on_signal)
                stack.callback(signal.signal, signal.SIGTERM, before or signal.SIG_DFL)
            self._open = stack.pop_all()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        with self._open:
            try:
                self.wait()
            except OSError as failure:
                if error is None or isinstance(error, SystemExit):
                    raise
                warnings.warn(str(failure), stacklevel=2)  # `error` matters more
            finally:
                self._writer = None
        if self._signalled and not self.stopping and error is None:
            signal.raise_signal(signal.SIGTERM)  # came after the last save

    def _require_open(self) -> concurrent.futures.Executor:
        if self._writer is None:
            raise RuntimeError("Checkpoints is closed: use it in a with statement.")
        return self._writer

    def _on_signal(self, number, frame) -> None:
        self._signalled = True

    def restore(self, like: Any) -> Restored | None:
        """Reads the newest checkpoint that is not damaged.

        Args:
          like: a state as the loop holds it, such as the initial one, or the same tree
            of `jax.ShapeDtypeStruct`s. Arrays get the placement that they have here;
            values are not read.

        Returns:
          Step, state and metrics, or None if there is no such checkpoint. Damaged
          checkpoints are skipped with a warning each.

        Raises:
          ValueError: if the checkpoint is from other hyperparameters, other versions of
            adamr, jax, jaxlib or optax, other JAX settings or a state of another
            structure; the message lists what differs.
        """
        self._require_open()
        self.wait()
        self._expected = _leaves.described(like)
        path = _processes.by_first(lambda: _folders.newest(self._directory))
        if path is None:
            return None
        restored = _contents.read(Path(path), like, self._config)
        self._step, self._time = restored.step, time.monotonic()
        return restored

    def _due(self, step: int) -> bool:
        """Whether `every` or a signal asks for a save at this step."""
        if self._signalled and not self.stopping:
            return True
        if isinstance(self._every, datetime.timedelta):
            passed = time.monotonic() - self._time
            return _processes.agreed(passed >= self._every.total_seconds())
        return step // self._every > self._step // self._every

    def save(
        self, step: int, state: Any, metrics: Any = None, *, force: bool = False
    ) -> bool:
        """Saves if a save is due, if SIGTERM has come, or with `force`.

        The state is copied before the call returns, so its buffers may be donated next.
        It is written while the loop continues; the next save waits for that.

        Args:
          step: how far the run is, at least 0 and at least that of the checkpoints in
            the directory.
          state: pytree of JAX arrays and PRNG keys, NumPy arrays and scalars, bools,
            ints, floats and strings, of the same structure and shapes every time.
          metrics: anything that JSON can hold; may grow. Tuples become lists.
          force: save even if no save is due.

        Returns:
          Whether it saved.

        Raises:
          OSError: if this or the save before it could not be written.
          TypeError: for a leaf, or metrics, that cannot be stored.
          ValueError: for a negative step, if the directory has a later checkpoint, or
            if the structure of the state is not that of `like` in `restore`.
          RuntimeError: outside the with statement.
        """
        writer, step = self._require_open(), operator.index(step)
        if step < 0:
            raise ValueError(f"step must be at least 0, got {step}.")
        if self._writing is not None and self._writing.done():
            self.wait()
        if jax.process_count() > 1:
            self._calls += 1
            self._signalled |= _processes.told_to_stop(self._calls)
        stopping = self._signalled
        if not (force or self._due(step)):
            return False
        self.wait()
        path = Path(
            _processes.by_first(lambda: _folders.new_path(self._directory, step))
        )
        folder = Path(_processes.agreed(str(_folders.unused(self._directory))))
        records, arrays = stored = _leaves.stored(state)
        if jax.process_count() > 1:
            _processes.require_equal(_leaves.digest(stored), "state")
        if self._expected is not None:
            here = {"state": _leaves.signature(records)}
            changed = _contents.differences({"state": self._expected}, here)
            if changed:
                raise ValueError(
                    "state differs from the `like` of restore (like, state):\n  "
                    + "\n  ".join(changed)
                )
        text = _contents.text(step, self._config, metrics, records)
        self._writing = writer.submit(self._write, path, folder, text, arrays)
        self._step, self._time = step, time.monotonic()
        self.stopping = self.stopping or stopping
        return True

    def wait(self) -> None:
        """Returns when the last save is on the disk.

        Raises:
          OSError: if it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(
        self, path: Path, folder: Path, text: str, arrays: dict[str, Any]
    ) -> None:
        """Writes, commits and retains, in the background."""
        try:
            _processes.made_by_first(folder.mkdir, folder)
            _contents.write(folder, text, arrays)
            _processes.made_by_first(lambda: _folders.commit(folder, path), path)
        except Exception as error:
            with contextlib.suppress(OSError):
                if _processes.first() and folder.exists():
                    _folders.remove(folder)
            raise OSError(
                f"the checkpoint {path} could not be written: {error}"
            ) from error
        if _processes.first():
            _folders.retain(self._directory, self._keep)
