"""Memory of parameters and optimizer state at 1B, 8B and 70B, and of fine-tuning.

    python -m benchmarks.memory [--write]

Shapes alone: `jax.eval_shape` of `init`, and the memory analysis of the compiled update
for arguments that lie on simulated devices as `examples.pod.placement` says. Nothing is
allocated, so this runs anywhere. `--write` puts the tables into docs/scaling.md.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tyro

import adamr
from benchmarks._pages.tables import table, written
from benchmarks._speed import models, timing
from benchmarks._speed.finetuning import boundary, finetuning
from examples.harness import meshes
from examples.pod import placement

PAGE = Path("docs/scaling.md")
RANK, DIRECTIONS, RATE = 64, 100, 1e-3
GB = 1e9

# size -> mesh
MESHES = {"1B": "data=1", "8B": "fsdp=8", "70B": "fsdp=16,tensor=4"}


def _alias(rank: int | None = RANK, head: bool = False, **options) -> Callable:
    def build(params):
        project = adamr.project_out(models.empty(params, rank, head))
        return adamr.adamr(RATE, project, **options)

    return build


def _projected(recipe: Callable, rank: int | None = RANK) -> Callable:
    return lambda params: recipe(RATE, models.empty(params, rank))


def _two_sided(params):
    links = adamr.two_sided(models.empty(params, RANK))
    return optax.chain(links, optax.scale_by_learning_rate(RATE))


def _in_eigenbasis(params):
    subspace = models.empty(params, RANK)
    return optax.chain(
        adamr.route_first_moment(adamr.project_out(subspace)),
        adamr.in_eigenbasis(adamr.faithful_second_moment(), subspace),
        optax.scale_by_learning_rate(RATE),
    )


HALF = {"mu_dtype": jnp.bfloat16, "nu_dtype": jnp.bfloat16}

# name -> params -> optimizer
RECIPES: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "`optax.adam`": lambda p: optax.adam(RATE),
    f"`adamr`, `gpm`, rank {RANK}": _alias(),
    "the same, overlap-adaptive": _alias(strength=adamr.overlap_adaptive_scale()),
    "the same, m and v in bf16": _alias(**HALF),
    "the same, with the head protected": _alias(head=True),
    "`adamr`, `gpm`, rank 256": _alias(256),
    "`adamr`, `gpm`, full rank": _alias(None),
    f"`sgp`, rank {RANK}": _projected(adamr.sgp),
    f"`gpm_si`, rank {RANK}": _projected(adamr.gpm_si),
    f"`two_sided`, rank {RANK}": _two_sided,
    f"`in_eigenbasis`, rank {RANK}": _in_eigenbasis,
    "`adam_nscl`, full rank": _projected(adamr.adam_nscl, None),
    f"`ogd`, {DIRECTIONS} directions": lambda p: adamr.ogd(
        RATE, adamr.empty_directions(p, DIRECTIONS)
    ),
    "`ewc`": lambda p: adamr.ewc(RATE, 1.0),
    "`l2_sp`": lambda p: adamr.l2_sp(RATE),
    "`online_ewc`": lambda p: adamr.online_ewc(RATE, 1.0),
    "`mas`": lambda p: adamr.mas(RATE),
    "`si`": lambda p: adamr.si(RATE),
    "`rwalk`": lambda p: adamr.rwalk(RATE),
    "`agem`": lambda p: adamr.agem(RATE),
    "`gem`": lambda p: adamr.gem(RATE),
    "`er`": lambda p: adamr.er(RATE),
    "`mudman`": lambda p: adamr.mudman(RATE),
    "`hft`": lambda p: adamr.hft(RATE, jax.random.key(0)),
}
COMPARED = list(RECIPES)[:7]  # at every size
PLACED = [COMPARED[i] for i in (0, 1, 2, 5)]  # on simulated devices


def nbytes(tree: Any) -> int:
    """Of arrays or shapes; a PRNG key counts as its data."""
    arrays = jax.eval_shape(
        lambda t: jax.tree.map(
            lambda x: jax.random.key_data(x) if _is_key(x) else x, t
        ),
        tree,
    )
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays))


def _is_key(x: Any) -> bool:
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def state_of(name: str, params: Any) -> Any:
    """Shapes of a recipe's state."""
    return jax.eval_shape(lambda p: RECIPES[name](p).init(p), params)


def recipes() -> str:
    """State of every recipe at 8B parameters in float32."""
    params = models.shapes(models.SIZES["8B"])
    number = models.count(params)
    adam = nbytes(state_of("`optax.adam`", params))
    rows = []
    for name in RECIPES:
        size = nbytes(state_of(name, params))
        rows.append([name, f"{size / number:.2f}", f"{size / adam:.3f}"])
    return table(["recipe", "bytes of state per parameter", "of Adam's"], rows)


def sizes() -> str:
    """Totals by size, all in float32 unless a row says otherwise."""
    rows = []
    for size in models.SIZES:
        params = models.shapes(models.SIZES[size])
        adam = nbytes(state_of("`optax.adam`", params))
        for name in COMPARED:
            state = state_of(name, params)
            own, bases = nbytes(state), timing.basis_bytes(state)
            rows.append(
                [
                    f"{size} ({models.count(params) / 1e9:.2f}e9), {name}",
                    f"{nbytes(params) / GB:.2f}",
                    f"{(own - bases) / GB:.2f}",
                    f"{(own - bases) / adam:.3f}",
                    f"{bases / GB:.2f}",
                    f"{(nbytes(params) + own) / GB:.2f}",
                ]
            )
    heads = ["", "parameters", "moments", "of Adam's", "bases", "all, GB"]
    return table(heads, rows)


def compiled(name: str, size: str) -> Any:
    """Memory analysis of one update per device, parameters and state donated."""
    params = models.shapes(models.SIZES[size])
    devices = jax.devices()[: math.prod(map(int, re.findall(r"\d+", MESHES[size])))]
    mesh = meshes.parse_mesh(MESHES[size], devices)
    specs = placement.param_specs(params)
    placement.check_fit(params, specs, mesh)
    params = meshes.structs(params, placement.shardings(mesh, specs))
    tx = optax.GradientTransformation(lambda p: RECIPES[name](p).init(p), None)
    where = (
        jax.tree.map(lambda x: x.sharding, params),
        adamr.state_shardings(tx, params),
    )
    state = meshes.structs(state_of(name, params), where[1])

    def step(params, state, gradient):
        updates, state = RECIPES[name](params).update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1), out_shardings=where)
    # The order that needs the least memory, as backends of accelerators take it.
    options = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    lowered = step.lower(params, state, params)
    return lowered.compile(compiler_options=options).memory_analysis()


def devices() -> str:
    """Per device: what the compiled update takes, keeps and needs on the way."""
    rows = []
    for size in models.SIZES:
        for name in PLACED:
            found = compiled(name, size)
            kept = found.alias_size_in_bytes
            rows.append(
                [
                    f"{size}, {MESHES[size]}, {name}",
                    f"{kept / GB:.2f}",
                    f"{(found.argument_size_in_bytes - kept) / GB:.2f}",
                    f"{found.temp_size_in_bytes / GB:.2f}",
                ]
            )
    heads = ["", "parameters and state", "gradient", "temporary, GB"]
    return table(heads, rows)


FROM_SHAPES = (recipes, sizes, finetuning, boundary)


@dataclasses.dataclass
class Config:
    """Prints the tables of docs/scaling.md."""

    write: bool = False
    """Also writes them there."""


def main(config: Config) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 64)
    page = PAGE.read_text()
    for make in (*FROM_SHAPES, devices):
        content = make()
        print(f"{make.__name__}: {make.__doc__}\n{content}\n")
        page = written(page, make.__name__, content)
    if config.write:
        PAGE.write_text(page)


if __name__ == "__main__":
    main(tyro.cli(Config))
