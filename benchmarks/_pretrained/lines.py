"""LiNeS on low-rank pairs: after plain fine-tuning, shallow blocks are moved back."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamr.averaging import lines_scaling
from examples.llm import measures
from examples.llm.learner import mean_loss
from examples.llm.stream import Plan
from examples.llm.task_ends import Run

__all__ = ["ALPHAS", "row", "tuned"]

ALPHAS = (0.0, 0.33, 0.67)  # scales of the first block; the last keeps its change


def _scaled(run: Run, alpha: float) -> Run:
    """B is 0 before, so that scaling it scales what the pair adds to its kernel."""

    def start(path: Any, x: jax.Array) -> jax.Array:
        return jnp.zeros_like(x) if "lora_b" in jax.tree_util.keystr(path) else x

    before = jax.tree_util.tree_map_with_path(start, run.trained)
    return run._replace(trained=lines_scaling(before, run.trained, alpha, block=_block))


def _block(name: str) -> int | None:
    found = re.search(r"layers[^0-9]*([0-9]+)", name)
    return int(found[1]) if found else None


def _losses(plan: Plan, run: Run) -> list[float]:
    at = run.trained, run.base
    return [mean_loss(plan.learner, *at, part.test) for part in plan.stream.parts]


def tuned(plan: Plan, run: Run) -> float:
    """The α of the lowest loss on the tuning tasks."""
    scores = [float(np.mean(_losses(plan, _scaled(run, a)))) for a in (*ALPHAS, 1.0)]
    return (*ALPHAS, 1.0)[int(np.argmin(scores))]


def row(plan: Plan, run: Run, plain: dict[str, Any], alpha: float) -> dict[str, Any]:
    """The row of a finished run with its last state scaled; the rest as it was."""
    scaled = _scaled(run, alpha)
    matrix = [*plain["loss_matrix"][:-1], _losses(plan, scaled)]
    general = mean_loss(
        plan.learner, scaled.trained, scaled.base, plan.stream.general.test
    )
    return {
        "seed": plain["seed"],
        "alpha": alpha,
        **measures.of_losses(np.array(matrix, float)),
        "general_loss_before": plain["general_loss_before"],
        "general_loss_after": general,
        "loss_matrix": matrix,
    }
