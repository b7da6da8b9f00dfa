"""Where the weights of a model went: along old inputs, along old singular directions.

With D the change of a kernel W (n inputs, m outputs), X the inputs that it met in rows
of the first task when that was learned, each of unit length, and P, Q the projectors on
the leading half of the singular directions of the pretrained W, on either side:

    moved         ‖X D‖ / ‖X W‖          how far the responses to old inputs moved
    along_inputs  n ‖X D‖² / (‖X‖² ‖D‖²)  1: as a change that knows nothing of X
    along_inside  ‖P D‖² / ‖D‖²           min(n, m) / 2n: as one that knows nothing of W
    along_outside ‖D Q‖² / ‖D‖²           min(n, m) / 2m

Sums over all kernels are taken above and below the line.
"""

import functools
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import adamr
from adamr.lora.pairs import located
from adamr.subspaces import covariance
from examples.llm.learner import Learner
from examples.llm.tokens import Encoded

__all__ = ["Kernels", "kernels_of", "met_by", "moved", "share_of_singular"]

PORTION = 16  # rows whose inputs are collected at once

# Kernels as (n, m) arrays on the host, by the names of their leaves.
Kernels = dict[str, np.ndarray]


class Site(NamedTuple):
    """A kernel of the model: its leaf, and the axes of its fan-in."""

    leaf: int
    axes: tuple[int, ...]


def _base(learner: Learner, trained: Any, base: Any) -> Any:
    return trained if learner.scaling is None else base


def _sites(learner: Learner) -> dict[str, Site]:
    """The kernels of attention and MLP."""
    forward, trained, base, tokens = learner.traced()
    if learner.scaling is None:
        axes = adamr.contracted_axes(forward, trained, base, tokens)
    else:
        whole = lambda base, tokens: forward(trained_, base, tokens)  # noqa: E731
        trained_ = learner.trained
        axes = adamr.contracted_axes(whole, base, tokens)
    paths = jax.tree_util.tree_flatten_with_path(axes, is_leaf=_is_entry)[0]
    found = {}
    for i, (path, entry) in enumerate(paths):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if entry is not None and "layers" in name:
            found[name] = Site(i, entry.protected)
    return found


def _is_entry(x: Any) -> bool:
    return x is None or isinstance(x, adamr.Axes)


def _flat(x: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    first = np.moveaxis(x, axes, range(len(axes)))
    return first.reshape(int(np.prod([x.shape[a] for a in axes])), -1)


def kernels_of(learner: Learner, trained: Any, base: Any) -> Kernels:
    """The kernels as the model uses them now, low-rank pairs added."""
    leaves = list(jax.tree.leaves(_base(learner, trained, base)))
    if learner.scaling is not None:
        halves = jax.tree.leaves(trained)
        for each in located(base, trained):
            product = each.meeting.product(halves[each.a], halves[each.b])
            leaves[each.kernel] = leaves[each.kernel] + learner.scaling * product
    return {
        name: _flat(np.asarray(leaves[site.leaf], np.float32), site.axes)
        for name, site in _sites(learner).items()
    }


def met_by(learner: Learner, trained: Any, base: Any, rows: Encoded) -> Kernels:
    """X̄ = XᵀX / N of every kernel, (n, n)."""
    sites = _sites(learner)
    total = None
    for first in range(0, len(rows.tokens), PORTION):
        part = slice(first, first + PORTION)
        mask = np.arange(rows.tokens.shape[1]) < rows.lengths[part, None]
        found = _met(
            learner.forward, learner.scaling is None, trained, base,
            rows.tokens[part], mask,
        )  # fmt: skip
        total = found if total is None else covariance.update_covariance(total, found)
    assert total is not None
    return {name: np.asarray(total.moments[site.leaf]) for name, site in sites.items()}


@functools.partial(jax.jit, static_argnames=("forward", "dense"))
def _met(forward, dense, trained, base, tokens, mask):
    def whole(kernels, tokens):
        own = (kernels, base) if dense else (trained, kernels)
        return forward(*own, tokens)

    return adamr.layer_inputs(
        whole, trained if dense else base, tokens, mask=mask, normalize=True,
        leaves=lambda name: "layers" in name and "norm" not in name, max_fan_in=None,
    )  # fmt: skip


def moved(before: Kernels, after: Kernels, met: Kernels) -> dict[str, float]:
    """`moved` and `along_inputs`."""
    response = change = blind = 0.0
    for name, moment in met.items():
        d = after[name] - before[name]
        response += float(np.vdot(before[name], moment @ before[name]))
        change += float(np.vdot(d, moment @ d))
        blind += float(np.vdot(d, d) * np.trace(moment) / len(moment))
    return {
        "moved": (max(change, 0.0) / response) ** 0.5,
        "along_inputs": change / blind if blind else 0.0,
    }


def _halves(kernels: Kernels, cache: Path) -> dict[str, np.ndarray]:
    """The leading singular directions of each kernel, kept in a folder."""
    digest = hashlib.sha256()
    for name, w in sorted(kernels.items()):
        digest.update(name.encode() + np.ascontiguousarray(w).data)
    path = cache / f"singular_{digest.hexdigest()[:12]}.npz"
    if not path.exists():
        found = {}
        for name, w in kernels.items():
            u, _, vt = np.linalg.svd(w, full_matrices=False)
            half = u.shape[1] // 2
            found[f"{name}:in"], found[f"{name}:out"] = u[:, :half], vt[:half].T
        cache.mkdir(parents=True, exist_ok=True)
        np.savez(path, **found)
    with np.load(path) as held:
        return dict(held)


def share_of_singular(
    pretrained: Kernels, after: Kernels, cache: Path
) -> dict[str, float]:
    """`along_inside` and `along_outside`."""
    halves = _halves(pretrained, cache)
    inside = outside = total = 0.0
    for name, w in pretrained.items():
        d = after[name] - w
        inside += float(np.sum((halves[f"{name}:in"].T @ d) ** 2))
        outside += float(np.sum((d @ halves[f"{name}:out"]) ** 2))
        total += float(np.vdot(d, d))
    if not total:
        return {"along_inside": 0.0, "along_outside": 0.0}
    return {"along_inside": inside / total, "along_outside": outside / total}
