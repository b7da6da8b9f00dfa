"""Domains of text and the transformer, in the terms of the shared loop."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import adamr
from adamr import diagnostics
from adamr.subspaces.subspace import rank
from examples.harness.problem import Data, Feed, Problem
from examples.harness.setting import Setting, kernel_axes, setting_for
from examples.lm.model import BYTES, Preset, create
from examples.streams.domains import (
    HELD_OUT_SHARE,
    Domain,
    sample_windows,
    spaced_windows,
)

UNPROTECTED = ("embedding", "norm", "head")
# Below the default of `grow_subspace`: all that was measured on text was measured here.
THRESHOLD = 0.95
CAPTURED = 4096  # layer inputs per kernel from which a domain's subspace is found
SAMPLED = 1024  # windows among which a boundary chooses

__all__ = ["THRESHOLD", "UNPROTECTED", "feed", "for_tuning", "problem", "setting"]


def _data(windows: Any, classes: Any) -> Data:
    """Windows (..., context + 1) as inputs and next bytes."""
    windows = windows.astype(np.int32)
    return Data(windows[..., :-1], windows[..., 1:], classes)


def feed(
    domains: Sequence[Domain],
    preset: Preset,
    unions: Sequence[Sequence[int]] | None = None,
) -> Feed:
    """Random windows of one domain after the other, the same for every method.

    Args:
      domains: the text.
      preset: sizes.
      unions: the domains that each task mixes, in equal parts; it is tested on the last
        of them. Default: a task per domain.
    """
    unions = unions or [[index] for index in range(len(domains))]
    own = [domains[union[-1]] for union in unions]
    classes = np.ones(BYTES, bool)

    def batches(task, seed, first, steps):
        rng = np.random.default_rng([seed, *unions[task]])
        shape = (first + steps, preset.batch)
        texts = (domains[index].train for index in unions[task])
        drawn = [sample_windows(text, shape, preset.context, rng) for text in texts]
        which = rng.integers(len(drawn), size=(*shape, 1))
        mixed = np.select([which == i for i in range(len(drawn))], drawn)
        return mixed[first:]

    def samples(task):
        return _data(spaced_windows(own[task].train, SAMPLED, preset.context), classes)

    held_out = np.stack(
        [spaced_windows(d.valid, preset.eval_windows, preset.context) for d in own]
    )
    return Feed(
        names=[domain.name for domain in own],
        batches=batches,
        train=lambda task: classes,
        samples=samples,
        test=_data(held_out, np.ones((len(own), BYTES), bool)),
        weight=np.ones(held_out.shape[:2], np.float32),
        masks=lambda task: np.ones((len(own), BYTES), bool),
    )


def for_tuning(domains: Sequence[Domain]) -> list[Domain]:
    """The domains with the last tenth of their training text as the held-out one."""

    def split(domain):
        cut = len(domain.train) - int(len(domain.train) * HELD_OUT_SHARE)
        parts = dict(train=domain.train[:cut], valid=domain.train[cut:])
        files = dict.fromkeys(parts, domain.files["train"])
        return Domain(domain.name, source=domain.source, files=files, **parts)

    return [split(domain) for domain in domains]


def _observe(gradient, updates, opt_state, setting) -> dict[str, jax.Array]:
    """Scalars of a step, with the protected subspace that the state holds.

    overlap: share of the gradient's energy in it; strength: share of the projection
    that the optimizer applied; leak: share of the update's length in it; used: share of
    the protected kernels' input directions that it has.
    """
    del setting
    subspace = adamr.get_subspace(opt_state)
    removed = optax.tree.sub(gradient, adamr.subspaces.project(subspace, gradient))
    total = optax.tree.norm(gradient, squared=True)
    ranks = zip(rank(subspace), subspace.bases, strict=True)
    return {
        "overlap": optax.tree.norm(removed, squared=True)
        / jnp.where(total > 0, total, 1.0),
        "strength": optax.tree.get(opt_state, "strength"),
        "leak": diagnostics.update_leak(updates, subspace).total,
        "used": jnp.mean(
            jnp.stack([r / b.shape[-1] for r, b in ranks if b is not None])
        ),
    }


@functools.cache
def problem(preset: Preset) -> Problem:
    """The loop's view of the transformer."""
    graph, _ = create(preset, 0)

    def logits(params, x):
        return nnx.merge(graph, params)(x)

    return Problem(
        init=lambda key: create(preset, key)[1],
        logits=logits,
        batch=lambda classes, windows: _data(windows, classes),
        capture=lambda params, x: adamr.layer_inputs(
            logits, params, x, kind="rows", max_rows=CAPTURED
        ),
        observe=_observe,
        observed=("overlap", "strength", "leak", "used"),
    )


def setting(preset: Preset, tasks: int, threshold: float) -> Setting:
    """An empty subspace for every `nnx.Linear` kernel inside the blocks."""
    _, params = create(preset, 0)
    tokens = jax.ShapeDtypeStruct((1, preset.context), np.int32)
    return setting_for(
        params,
        kernel_axes(problem(preset).logits, params, tokens),
        tasks=tasks,
        unprotected=UNPROTECTED,
        threshold=threshold,
        samples=-(-CAPTURED // preset.context),
    )
