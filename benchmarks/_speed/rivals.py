"""What adamr is compared with on a device, and the bytes that an update must move."""

import time
from collections.abc import Callable
from typing import Any

import jax
import optax
from optax import contrib

import adamr
from benchmarks._speed import timing
from benchmarks.step_time import LEARNING_RATE, optimizers_by_size


def rivals(subspace: adamr.Subspace) -> dict[str, optax.GradientTransformation]:
    project = adamr.project_out(subspace)
    adaptive = adamr.overlap_adaptive_scale()
    return {
        **optimizers_by_size(),  # adam, elementwise, shared
        "muon": contrib.muon(LEARNING_RATE),
        "alias": adamr.adamr(LEARNING_RATE, project),
        "adaptive": adamr.adamr(LEARNING_RATE, project, strength=adaptive),
    }


def moved_bytes(params: Any, state: Any) -> int:
    """What an update must read and write: bases and the gradient are only read."""
    bases = timing.basis_bytes(state)
    changed = timing.nbytes(params) + timing.nbytes(state) - bases
    return 2 * changed + timing.nbytes(params) + bases


def torch_adam(params: Any, steps: int) -> Callable[[Any], float] | None:
    """The same as `timing.stepper`, of PyTorch's fused Adam; None without PyTorch."""
    try:
        import torch
    except ImportError:
        return None
    place = "cuda" if torch.cuda.is_available() else "cpu"
    if place == "cpu" and jax.default_backend() != "cpu":
        return None
    leaves = [
        torch.zeros(x.shape, device=place, requires_grad=True)
        for x in jax.tree.leaves(params)
    ]
    for leaf in leaves:
        leaf.grad = torch.full_like(leaf, 1e-2)
    adam = torch.optim.Adam(leaves, lr=LEARNING_RATE, fused=True)
    wait = torch.cuda.synchronize if place == "cuda" else lambda: None

    def run(gradient):
        del gradient
        wait()
        start = time.perf_counter()
        for _ in range(steps):
            adam.step()
        wait()
        return (time.perf_counter() - start) / steps

    return run
