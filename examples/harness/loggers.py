"""Where scalars go in addition to the JSON lines: thin hooks around known loggers.

with HOOKS[name](out) as log:
    log(run, step, {scalar: value})
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

Hook = Callable[[str, int, dict[str, float]], None]


@contextlib.contextmanager
def none(out: Path) -> Iterator[Hook]:
    """Logs nowhere."""
    del out
    yield lambda run, step, scalars: None


@contextlib.contextmanager
def tensorboard(out: Path) -> Iterator[Hook]:
    """TensorBoard event files under `out/tensorboard/<run>`.

    A run that continues logs its past again: what an earlier process wrote is purged.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "--log tensorboard needs tensorboardX: python -m pip install tensorboardX."
        ) from error
    with contextlib.ExitStack() as opened:
        writers = {}

        def log(run, step, scalars):
            if run not in writers:
                folder = out / "tensorboard" / run
                writer = SummaryWriter(str(folder), purge_step=0)
                writers[run] = opened.enter_context(writer)
            for name, value in scalars.items():
                writers[run].add_scalar(name, value, step)

        yield log


@contextlib.contextmanager
def wandb(out: Path) -> Iterator[Hook]:
    """One Weights & Biases run; scalars are named `<run>/<scalar>`, over its steps."""
    try:
        import wandb as client
    except ImportError as error:
        raise ImportError(
            "--log wandb needs Weights & Biases: python -m pip install wandb."
        ) from error
    with client.init(project="adamr", dir=str(out)) as whole:
        seen = set()

        def log(run, step, scalars):
            if run not in seen:
                whole.define_metric(f"{run}/*", step_metric=f"{run}/step")
                seen.add(run)
            named = {f"{run}/{name}": value for name, value in scalars.items()}
            whole.log({**named, f"{run}/step": step})

        yield log


HOOKS: dict[str, Callable[[Path], contextlib.AbstractContextManager[Hook]]] = {
    "none": none,
    "tensorboard": tensorboard,
    "wandb": wandb,
}
