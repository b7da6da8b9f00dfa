"""python -m examples.pod: the text stream on a mesh of devices.

    python -m examples.pod --mesh data=4,fsdp=2 --cpu-devices 8
    python -m examples.pod --mesh fsdp=8,tensor=4 --preset 256m --coordinator auto

Many processes: the same command in each, with `--coordinator auto` where JAX finds the
others by itself (TPU pods, Slurm, Open MPI), else with the address of the first one:

    python -m examples.pod --coordinator host:1234 --processes 2 --process 0
    python -m examples.pod --coordinator host:1234 --processes 2 --process 1
"""

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np
import tyro
from jax.sharding import Mesh

from adamr.checkpoint.checkpoints import Checkpoints
from examples.harness import meshes
from examples.harness.example import UsageError
from examples.harness.report import versions, write
from examples.lm.model import PRESETS, Preset
from examples.lm.problem import THRESHOLD
from examples.pod.train import learn_stream, programs
from examples.streams import installed
from examples.streams.domains import DataError, Domain, check_lengths, load_folder


@dataclasses.dataclass(frozen=True)
class Config:
    """Learns a stream of text domains on a mesh of devices with `adamr.adamr`.

    Parameters, moments and bases are split over the mesh; what a task boundary protects
    is found there as well. The same command again, on the same mesh or another one,
    continues where an interrupted run stopped.
    """

    mesh: str | None = None
    """Sizes of the axes data, fsdp and tensor, such as data=4,fsdp=2; their product is
    the number of devices. Default: all devices on data."""
    preset: Literal["tiny", "default", "256m"] = "default"
    """Size of model and run."""
    batch: int | None = None
    """Windows per step, over all devices. Default: the preset's."""
    steps: int | None = None
    """Steps per domain. Default: the preset's."""
    learning_rate: float = 1e-3
    """Constant over the stream."""
    max_rank: int = 64
    """Directions that a kernel can protect."""
    threshold: float = THRESHOLD
    """Share of the energy of a domain's layer inputs that is protected after it."""
    seed: int = 0
    """Of the initial parameters and of the order of windows."""
    data: Path | None = None
    """Folder of <domain>.train.txt and <domain>.valid.txt, or of <domain>.txt. Without
    it: text that is installed with Python and the packages."""
    domains: str | None = None
    """Domains to learn, in this order, separated by commas. Default: all."""
    every: int = 100
    """Steps between checkpoints."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/pod")
    """Where results.json and the checkpoints go; the same folder for all processes."""
    cpu_devices: int | None = None
    """Simulates this number of CPU devices in each process."""
    coordinator: str | None = None
    """host:port of the first process, or auto."""
    processes: int | None = None
    """How many processes there are."""
    process: int | None = None
    """Which one this is: 0, 1, ..."""


def _check(config: Config) -> None:
    for name in ("batch", "steps", "max_rank", "every", "cpu_devices", "processes"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UsageError(
                f"--{name.replace('_', '-')}: got {value}, expected at least 1."
            )
    if not 0 < config.learning_rate < math.inf:
        raise UsageError(
            f"--learning-rate: got {config.learning_rate}, expected a positive number."
        )
    if not 0 <= config.threshold <= 1:
        raise UsageError(
            f"--threshold: got {config.threshold}, expected a share from 0 to 1."
        )


def start_processes(config: Config) -> None:
    """Joins the others; before anything else asks JAX for its devices."""
    if config.cpu_devices is not None:
        meshes.simulate(config.cpu_devices)
    numbers = (config.processes, config.process)
    if config.coordinator in (None, "auto"):
        if numbers != (None, None):
            raise UsageError(
                "--processes and --process need --coordinator host:port, the address "
                "of process 0."
            )
        if config.coordinator == "auto":
            jax.distributed.initialize()
        return
    _, _, port = config.coordinator.rpartition(":")
    if None in numbers or not port.isdecimal():
        raise UsageError(
            f"--coordinator: got {config.coordinator!r} with --processes "
            f"{config.processes} and --process {config.process}, expected host:port "
            "and both numbers, or auto."
        )
    if not 0 <= config.process < config.processes:
        raise UsageError(
            f"--process: got {config.process}, expected 0 to {config.processes - 1}."
        )
    jax.distributed.initialize(config.coordinator, *numbers)


def _preset(config: Config, mesh: Mesh) -> Preset:
    preset = PRESETS[config.preset]
    batch, steps = config.batch or preset.batch, config.steps or preset.steps
    meshes.check_batch(batch, mesh, "windows")
    return dataclasses.replace(preset, batch=batch, steps=steps)


def _domains(config: Config, context: int) -> list[Domain]:
    listed = config.domains and [n.strip() for n in config.domains.split(",")]
    if config.data is None:
        domains, _ = installed.load_installed(listed)
    else:
        domains = load_folder(config.data, listed)
    check_lengths(domains, context)
    return domains


def run(config: Config) -> dict:
    """Returns what `results.json` says."""
    devices = jax.devices()
    text = f"data={len(devices)}" if config.mesh is None else config.mesh
    mesh = meshes.parse_mesh(text, devices)
    preset = _preset(config, mesh)
    domains = _domains(config, preset.context)
    numbers = {
        name: getattr(config, name)
        for name in ("seed", "learning_rate", "max_rank", "threshold")
    }
    made = programs(preset, mesh, **numbers)
    settings = {
        **numbers,
        "preset": {"name": config.preset, **dataclasses.asdict(preset)},
        "domains": {d.name: len(d.train) for d in domains},
    }
    first = jax.process_index() == 0
    about = {
        "parameters": sum(x.size for x in jax.tree.leaves(made.like.params)),
        "devices": f"{len(devices)} {devices[0].device_kind}",
        "processes": jax.process_count(),
        "mesh": dict(mesh.shape),
        "parameter_bytes_per_device": meshes.bytes_per_device(made.like.params),
        "state_bytes_per_device": meshes.bytes_per_device(made.like.opt_state),
    }

    def say(*words):
        if first:
            print(*words, flush=True)

    for name, value in about.items():
        text = f"{value:,}" if isinstance(value, int) else value
        say(f"{name.replace('_', ' ')}: {text}")
    times = []

    def report(step, loss, seconds):
        times.append(seconds)
        if step % max(1, preset.steps // 5) == 0:
            domain = domains[(step - 1) // preset.steps].name
            say(f"step {step} {domain}: loss {loss:.3f}, {1e3 * seconds:.0f} ms")

    folder = config.out / "checkpoints"
    with Checkpoints(folder, config=settings, every=config.every) as checkpoints:
        done = learn_stream(
            made, domains, preset, mesh, checkpoints, seed=config.seed, report=report
        )
    matrix = np.array(done["matrix"])
    written = {
        "config": settings,
        **about,
        "versions": versions(),
        "steps": done["step"],
        "losses": done["losses"],
        "loss_matrix": done["matrix"],
        "median_step_seconds": float(np.median(times)) if times else None,
    }
    if first:
        write(config.out / "results.json", written)
    if len(matrix) == len(domains):
        learnt, final = matrix.diagonal().mean(), matrix[-1].mean()
        say(f"loss when learnt {learnt:.3f}, at the end {final:.3f}")
    else:
        say(f"stopped after step {done['step']}; the same command continues.")
    return written


def main(args: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for bad input."""
    config = tyro.cli(Config, prog="python -m examples.pod", args=args)
    try:
        _check(config)
        start_processes(config)
        run(config)
    except (UsageError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
