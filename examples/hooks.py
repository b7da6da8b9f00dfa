"""Where scalars go beside the JSON lines: thin hooks around loggers people have."""

from collections.abc import Callable
from pathlib import Path

Hook = Callable[[str, int, dict[str, float]], None]


def none(run: str, step: int, scalars: dict[str, float]) -> None:
    """Logs nowhere."""


def tensorboard(out: Path) -> Hook:
    """TensorBoard event files under `out/tensorboard/<run>`."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "--log tensorboard needs tensorboardX: python -m pip install tensorboardX."
        ) from error
    writers = {}

    def log(run, step, scalars):
        if run not in writers:
            writers[run] = SummaryWriter(str(out / "tensorboard" / run))
        for name, value in scalars.items():
            writers[run].add_scalar(name, value, step)
        writers[run].flush()

    return log


def wandb(out: Path) -> Hook:
    """One Weights & Biases run; scalars are named `<run>/<scalar>`."""
    try:
        import wandb as client
    except ImportError as error:
        raise ImportError(
            "--log wandb needs Weights & Biases: python -m pip install wandb."
        ) from error
    run_of_all = client.init(project="adamr", dir=str(out))

    def log(run, step, scalars):
        named = {f"{run}/{name}": value for name, value in scalars.items()}
        run_of_all.log({**named, f"{run}/step": step})

    return log


HOOKS: dict[str, Callable[[Path], Hook]] = {
    "none": lambda out: none,
    "tensorboard": tensorboard,
    "wandb": wandb,
}
