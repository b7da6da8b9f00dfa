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
position in the data. Whatever the loop carries from step to step and is neither in it,
in step nor in metrics, is lost. A checkpoint is a folder `step-…` that appears by one
rename, with a checksum of every file (`_folders.py`):

    arrays/      array leaves, in orbax's format, by position
    state.json   everything else: step, metrics, config, versions, names of the leaves
    SHA256SUMS   for `sha256sum -c`; without it, or if it does not hold, it is damaged

In several processes (`jax.distributed`) all make the same calls, and see the same
directory. Each writes its shards of arrays that lie over all of them; everything else
(metrics, NumPy arrays, arrays of one process) must be the same in all and is written by
the first. Another number of devices or processes reads it, too: arrays go where `like`
has them.

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
    """One checkpoint, whatever hyperparameters and versions it is from.

    For evaluation, or to begin another run; `Checkpoints.restore` resumes a run.

    Args:
      path: the folder `step-…`.
      like: as for `Checkpoints.restore`.

    Raises:
      ValueError: if it is damaged, or its state differs from `like`.
    """
    reason = _folders.damage(Path(path))
    if reason:
        raise ValueError(f"{path} is damaged: {reason}.")
    return _contents.read(Path(path), like, None)


class Checkpoints:
    """The checkpoints of one run: saved while it goes on, found again when it died.

    A run that is killed at any moment, and started again with the same command, ends
    with the bits of a run that was not (`test_fifty_kills`). That needs the same
    hardware and a loop that is a function of its state: batches drawn by step or key.

    Args:
      directory: of this run alone; made if it is not there.
      config: hyperparameters and whatever else the run depends on, a dict that JSON can
        hold. A checkpoint with another one is refused.
      every: save when the step passes a multiple of this number, or when this
        `datetime.timedelta` has gone by since the last save.
      keep: how many undamaged checkpoints stay, the newest; None: all. Before an older
        one is deleted, these are read again and compared with their checksums, in the
        background. Damaged ones are not counted and never deleted.

    Attributes:
      stopping: True once SIGTERM has come and `save` has saved: leave the loop then. A
        SIGTERM that no save has seen is passed on at the end of the with statement.

    Raises:
      OSError: on entry, if the directory cannot be written; from `save` or on exit, if
        a checkpoint could not be. Earlier ones stay.
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
            alone = jax.process_count() == 1  # else JAX listens for the signal
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
                warnings.warn(str(failure), stacklevel=2)  # the other error is the news
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
        """The newest checkpoint that is not damaged, or None if there is none.

        Args:
          like: a state as the loop holds it, such as the initial one, or the same tree
            of `jax.ShapeDtypeStruct`s. Arrays get the placement that they have here;
            values are not read.

        Returns:
          Step, state and metrics. Damaged checkpoints are skipped with a warning each.

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
        if self._signalled and not self.stopping:
            return True
        if isinstance(self._every, datetime.timedelta):
            passed = time.monotonic() - self._time
            return _processes.agreed(passed >= self._every.total_seconds())
        return step // self._every > self._step // self._every

    def save(
        self, step: int, state: Any, metrics: Any = None, *, force: bool = False
    ) -> bool:
        """Saves if it is due, or SIGTERM has come, or with `force`.

        The state is copied before it returns, so its buffers may be donated next, and
        is written while the loop goes on; the next save waits for that.

        Args:
          step: how far the run is; never less than at an earlier checkpoint.
          state: pytree of JAX arrays and PRNG keys, NumPy arrays and scalars, bools,
            ints, floats and strings, of the same structure and shapes every time.
          metrics: what JSON can hold; may grow. Tuples come back as lists.

        Returns:
          Whether it saved.

        Raises:
          OSError: if this or the save before it could not be written.
          TypeError: for a leaf, or metrics, that cannot be stored.
          ValueError: if the directory has a later checkpoint, or the structure of the
            state is not that of `like` in `restore`.
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
                    "state could not be restored (like, state):\n  "
                    + "\n  ".join(changed)
                )
        text = _contents.text(step, self._config, metrics, records)
        self._writing = writer.submit(self._write, path, folder, text, arrays)
        self._step, self._time = step, time.monotonic()
        self.stopping = self.stopping or stopping
        return True

    def wait(self) -> None:
        """Returns when the last save is on disk; raises what went wrong with it."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(
        self, path: Path, folder: Path, text: str, arrays: dict[str, Any]
    ) -> None:
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
