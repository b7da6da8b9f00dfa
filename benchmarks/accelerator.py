"""How near to the machine's limits the update, the projection and a training step are.

    python -m benchmarks.accelerator [--quick] [--width 1152 --layers 16 ...]

With the defaults: a language model of 256 million parameters, 8192 tokens a step, rank
64. Measured first: the rate at which the device copies and the rate at which it
multiplies matrices. Then, interleaved round by round,

    compile     tracing and compiling the update
    update      bytes that must be moved / time, as a share of the copy rate
    projection  operations / time, as a share of the matmul rate at the same precision
    training    whole steps with `optax.adam`, and with adamr in its place
    adapters    the update of low-rank pairs beside all kernels of Llama-2-7B, and
                `lora.start_task` for a few of its layers

The parts that are not in `--parts` are left out. Writes accelerator_<device>.json.
"""

import dataclasses
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx

import adamr
from benchmarks._speed import large_pairs, timing
from benchmarks._speed.limits import measure_limits, seconds_per_call
from benchmarks._speed.rivals import moved_bytes, rivals, torch_adam
from benchmarks.step_time import gradients_like
from examples.harness.report import write
from examples.harness.setting import kernel_axes
from examples.lm.model import BYTES, Preset, Transformer

UNPROTECTED = ("embedding", "norm", "head")

# comparison -> (part, numerator, denominator, target)
RATIOS = {
    "shared v / optax.adam": ("update", "shared", "adam", 0.75),
    "alias / optax.adam": ("update", "alias", "adam", None),
    "adaptive alias / optax.adam": ("update", "adaptive", "adam", None),
    "alias / optax.contrib.muon": ("update", "alias", "muon", None),
    "compile time, alias / optax.adam": ("compile", "alias", "adam", 1.3),
    "compile time, adaptive / optax.adam": ("compile", "adaptive", "adam", 1.3),
    "training with the alias": ("training", "alias", "adam", 1.05),
    "training with the adaptive alias": ("training", "adaptive", "adam", 1.05),
    "pairs of 7B, alias / optax.adam": ("adapters", "alias", "adam", 2.5),
}
SMALL_PAIRS = 64, 32, 96
COPY_TARGET = 0.85
COMPARED = ("adam", "alias", "adaptive")


@dataclasses.dataclass
class Config:
    """The update, the projection and a training step against the machine's limits."""

    width: int = 1152
    """Of the transformer; a multiple of 64, the size of its heads."""
    layers: int = 16
    """Of the transformer."""
    context: int = 512
    """Tokens in a window."""
    tokens: int = 8192
    """Per training step."""
    rank: int = 64
    """Protected directions per kernel."""
    steps: int = 10
    """Steps between two waits for the device."""
    seconds: float = 45.0
    """Time per group of rivals, after which no further round starts."""
    rounds: int = 100
    """Per group, at most."""
    at_least: int = 11
    """Rounds per group that run however long they take."""
    copied: int = 2**28
    """Numbers that are copied to measure the bandwidth."""
    matmul: int = 8192
    """Size of the matrices that are multiplied to measure the rate."""
    pairs_in: int = 32
    """Layers of Llama-2-7B whose kernels have low-rank pairs."""
    pairs_rank: int = 512
    """Protected directions of each of them; 2.3 GB of bases in all."""
    ending: int = 2
    """Layers of which a task is ended."""
    parts: tuple[str, ...] = (
        "compile", "projection", "update", "training", "adapters"
    )  # fmt: skip
    """What is measured."""
    seed: int = 0
    quick: bool = False
    """Small sizes: does it run at all?"""
    out: Path = Path("benchmarks/results")


QUICK = {
    "width": 64, "layers": 1, "context": 32, "tokens": 256, "rank": 8, "steps": 2,
    "seconds": 0.5, "rounds": 11, "copied": 2**20, "matmul": 256,
    "pairs_in": 1, "pairs_rank": 8, "ending": 1,
}  # fmt: skip


def model(config: Config) -> tuple[Preset, Any, Any, Any]:
    """Preset, graph, parameters, and a random subspace of the kernels of all blocks."""
    preset = Preset(
        config.context, config.width, config.layers, max(1, config.width // 64),
        steps=0, batch=max(1, config.tokens // config.context), eval_windows=0,
        dtype="float32" if jax.default_backend() == "cpu" else "bfloat16",
    )  # fmt: skip
    net = Transformer(preset, nnx.Rngs(config.seed))
    graph, params = nnx.split(net, nnx.Param)
    axes = kernel_axes(
        lambda params, tokens: nnx.merge(graph, params)(tokens),
        params,
        jax.ShapeDtypeStruct((1, preset.context), np.int32),
    )
    empty = adamr.empty_subspace(
        params, axes=axes, max_rank=config.rank, unprotected=UNPROTECTED
    )
    keys = iter(jax.random.split(jax.random.key(config.seed), len(empty.bases)))

    @jax.jit
    def fill(key, like):
        flat = like.reshape(-1, like.shape[-1])
        basis = jnp.linalg.qr(jax.random.normal(key, flat.shape)).Q
        return basis.reshape(like.shape)

    bases = tuple(b if b is None else fill(next(keys), b) for b in empty.bases)
    weights = tuple(w if w is None else jnp.ones_like(w) for w in empty.weights)
    return preset, graph, params, adamr.Subspace(bases, weights)


def race(
    optimizers: dict, params: Any, inputs: list, gradient: Callable, config: Config
) -> tuple[dict[str, Callable], dict[str, dict]]:
    """Per optimizer, what runs its steps on the inputs, and what compilation tells."""
    runs, about = {}, {}
    for name, tx in optimizers.items():
        compiled = timing.compile_step(tx, params, inputs[0], gradient)
        state, memory = tx.init(params), compiled.step.memory_analysis()
        runs[name] = timing.stepper(compiled.step, params, state, config.steps)
        about[name] = {
            "trace_s": compiled.trace_s,
            "compile_s": compiled.compile_s,
            "state_bytes": timing.nbytes(state),
            "temporary_bytes": memory.temp_size_in_bytes if memory else None,
            "moved_bytes": moved_bytes(params, state),
        }
    return runs, about


def timed(runs: dict, about: dict, inputs: list, config: Config):
    """Seconds per round and rival; their medians go into `about`."""
    times = timing.time_rounds(
        runs,
        inputs,
        rounds=config.rounds,
        seconds=config.seconds,
        seed=config.seed,
        at_least=config.at_least,
    )
    for name, each in about.items():
        each["milliseconds"] = 1e3 * float(np.median(times[name]))
    return times, about


def update(config: Config, params: Any, subspace: Any, copy_rate: float):
    """The update alone, on given gradients."""
    rng = np.random.default_rng(config.seed)
    gradients = [gradients_like(params, rng) for _ in range(2)]
    given = lambda params, gradient: gradient  # noqa: E731
    runs, about = race(rivals(subspace), params, gradients, given, config)
    fused = torch_adam(params, config.steps)
    if fused is not None:
        runs["torch fused adam"] = fused
        about["torch fused adam"] = {"moved_bytes": about["adam"]["moved_bytes"]}
    times, about = timed(runs, about, gradients, config)
    for name, each in about.items():
        rate = each["moved_bytes"] / (1e-3 * each["milliseconds"])
        each["share_of_copy_rate"] = rate / copy_rate
        print(
            f"  update {name:17} {each['milliseconds']:9.3f} ms, "
            f"{rate / copy_rate:.2f} of the copy rate"
        )
    return times, about


def projection(config: Config, params: Any, subspace: Any, found: dict) -> dict:
    """The projection alone, against both limits."""
    gradient = gradients_like(params, np.random.default_rng(config.seed))
    leaves = jax.tree.leaves(params)
    pairs = zip(leaves, subspace.bases, strict=True)
    protected = [x for x, basis in pairs if basis is not None]
    size = sum(x.size for x in protected)
    operations = 4 * config.rank * size

    @jax.jit
    def project(subspace, gradient):  # what passes through unchanged would be copied
        projected = jax.tree.leaves(adamr.subspaces.project(subspace, gradient))
        pairs = zip(projected, subspace.bases, strict=True)
        return [x for x, basis in pairs if basis is not None]

    seconds = seconds_per_call(project, subspace, gradient, calls=config.steps)
    by_matmul = operations / found["matmul_float32_highest_flop_per_s"]
    by_copy = 2 * 4 * size / found["copy_bytes_per_s"]
    told = {
        "milliseconds": 1e3 * seconds,
        "operations": operations,
        "share_of_matmul_rate": by_matmul / seconds,
        "share_of_the_nearer_limit": max(by_matmul, by_copy) / seconds,
    }
    print(
        f"  projection {1e3 * seconds:.3f} ms, {told['share_of_matmul_rate']:.2f} of "
        f"the matmul rate, {told['share_of_the_nearer_limit']:.2f} of the nearer limit"
    )
    return told


def compilation(params: Any, subspace: Any):
    """Three times in turns; nothing runs."""
    optimizers = rivals(subspace)
    times = {name: [] for name in COMPARED}
    for _ in range(3):
        for name, each in times.items():
            compiled = timing.compile_step(optimizers[name], params)
            each.append(compiled.trace_s + compiled.compile_s)
    times = {name: np.array(each) for name, each in times.items()}
    return times, {n: {"seconds": float(np.median(t))} for n, t in times.items()}


def training(config: Config, preset: Preset, graph: Any, params: Any, subspace: Any):
    """Whole training steps on random windows."""

    def loss_fn(params, windows):
        logits = nnx.merge(graph, params)(windows[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])
        return losses.mean()

    rng = np.random.default_rng(config.seed)
    shape = (preset.batch, config.context + 1)
    batches = [jnp.asarray(rng.integers(0, BYTES, shape, np.int32)) for _ in range(2)]
    known = rivals(subspace)
    optimizers = {name: known[name] for name in COMPARED}
    runs, about = race(optimizers, params, batches, jax.grad(loss_fn), config)
    times, about = timed(runs, about, batches, config)
    tokens = preset.batch * config.context
    for name, each in about.items():
        each["tokens_per_s"] = 1e3 * tokens / each["milliseconds"]
        print(f"  training {name:9} {each['milliseconds']:9.2f} ms")
    return times, about


def adapters(config: Config):
    """The update of low-rank pairs, and what ends a task of theirs."""
    sizes = SMALL_PAIRS if config.quick else large_pairs.SIZES
    rank, seed = config.pairs_rank, config.seed
    tree = large_pairs.pairs(config.pairs_in, sizes, seed)
    project = adamr.project_out(large_pairs.protected(tree, rank, seed))
    optimizers = {"adam": optax.adam(1e-3), "alias": adamr.adamr(1e-3, project)}
    rng = np.random.default_rng(seed)
    gradients = [gradients_like(tree, rng) for _ in range(2)]
    given = lambda params, gradient: gradient  # noqa: E731
    runs, about = race(optimizers, tree, gradients, given, config)
    times, about = timed(runs, about, gradients, config)
    ended = large_pairs.boundary(config.ending, sizes, rank, 4 * rank, seed)
    for name in ("layer_inputs", "start_task", "inflora"):
        print(f"  {name} {ended[name]['seconds'] / config.ending:.2f} s a layer")
    return times, about | {"boundary": ended}


def run(config: Config) -> dict[str, Any]:
    start, device = time.perf_counter(), jax.devices()[0]
    print(f"{device.platform}: {device.device_kind}")
    found = measure_limits(config.copied, config.matmul, config.steps)
    for name, value in found.items():
        print(f"  {name} {value:.3g}")
    preset, graph, params, subspace = model(config)
    results = {
        "machine": timing.machine(),
        "config": {**dataclasses.asdict(config), "out": config.out.as_posix()},
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "dtype": preset.dtype,
        "limits": found,
    }
    print(f"  {results['parameters']:,} parameters")
    times = {}
    if "compile" in config.parts:
        times["compile"], results["compile"] = compilation(params, subspace)
    if "projection" in config.parts:
        results["projection"] = projection(config, params, subspace, found)
    if "update" in config.parts:
        rate = found["copy_bytes_per_s"]
        times["update"], results["update"] = update(config, params, subspace, rate)
    if "training" in config.parts:
        made = training(config, preset, graph, params, subspace)
        times["training"], results["training"] = made
    if "adapters" in config.parts:
        times["adapters"], results["adapters"] = adapters(config)
    results["ratios"] = {
        label: {
            **timing.ratio(times[p][a], times[p][b], config.seed),
            "target": target,
        }
        for label, (p, a, b, target) in RATIOS.items()
        if p in times
    }
    for label, each in results["ratios"].items():
        target = f"target {each['target']:.2f}" if each["target"] else ""
        low, high = each["low"], each["high"]
        print(f"  {label:35} {each['median']:.3f} [{low:.3f}, {high:.3f}] {target}")
    results["copy_target"] = COPY_TARGET
    results["seconds"] = time.perf_counter() - start
    print(f"  {results['seconds']:.0f} s")
    return results


def main(config: Config) -> Path:
    if config.quick:
        config = dataclasses.replace(config, **QUICK)
    results = run(config)
    config.out.mkdir(parents=True, exist_ok=True)
    kind = re.sub(r"\W+", "_", jax.devices()[0].device_kind.lower())
    path = config.out / f"accelerator_{kind}.json"
    write(path, results)
    return path


if __name__ == "__main__":
    main(tyro.cli(Config))
