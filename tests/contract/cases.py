"""The table of every public constructor. A new transformation is a new row.

`build(subspace)` returns a factory whose arguments are the numeric hyperparameters
(so that `optax.inject_hyperparams` can take it); the factory returns a transformation
from a plain gradient tree to a plain step.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adamr
from adamr import _tree

Tree = Any
ExtraArgs = dict[str, Tree]
Factory = Callable[..., optax.GradientTransformation]
Build = Callable[[adamr.Subspace], Factory]


def no_extra_args(gradient: Tree) -> ExtraArgs:
    return {}


class Case(NamedTuple):
    name: str
    build: Build
    holds_subspace: bool = True
    extra_args: Callable[[Tree], ExtraArgs] = no_extra_args


def params(dtype: Any = jnp.float32) -> Tree:
    """Every layout that matters: dense, bias, stacked, convolution, scalar."""
    keys = iter(jax.random.split(jax.random.key(0), 5))
    shapes = {
        "dense": {"bias": (8,), "kernel": (6, 8)},
        "conv": (2, 2, 3, 8),
        "scale": (),
        "stack": (2, 5, 8),
    }
    return jax.tree.map(
        lambda s: jax.random.normal(next(keys), s, dtype),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def gradients(seed: int, tree: Tree = None) -> Tree:
    tree = params() if tree is None else tree
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(
        treedef,
        [
            jax.random.normal(k, x.shape, x.dtype)
            for k, x in zip(keys, leaves, strict=True)
        ],
    )


def memory_gradients(gradient: Tree) -> ExtraArgs:
    """Two tasks, the first of them in conflict with the gradient."""
    rows = jax.tree.map(lambda x: jnp.stack([0.5 - x, x + 1.0]), gradient)
    return {"memory_gradients": rows}


def task_gradients(gradient: Tree) -> ExtraArgs:
    rows = jax.tree.map(lambda x: jnp.stack([x, 0.5 - x]), gradient)
    return {"task_gradients": rows}


def memory_gradient(gradient: Tree) -> ExtraArgs:
    """Agrees in sign with some coordinates only."""
    return {"memory_gradient": jax.tree.map(lambda x: 1 - x, gradient)}


def retain_gradient(gradient: Tree) -> ExtraArgs:
    return {"retain_gradient": memory_gradient(gradient)["memory_gradient"]}


def orthonormal(seed: int, *shape: int) -> np.ndarray:
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=shape))[0]
    return q.astype(np.float32)


def bases(seed: int = 0) -> Tree:
    return {
        "dense": {"bias": None, "kernel": orthonormal(seed, 6, 2)},
        "conv": orthonormal(seed + 1, 12, 3),
        "scale": None,
        "stack": orthonormal(seed + 2, 2, 5, 2),
    }


def subspace(seed: int = 0, max_rank: int = 4) -> adamr.Subspace:
    return adamr.make_subspace(params(), bases(seed), max_rank=max_rank)


def output_side(s: Any) -> Any:
    """A subspace over the outputs of the same leaves; a function where `s` is one."""
    if callable(s):
        return lambda p: output_side(s(p))
    if len(s.bases) == 2:  # the leaves of nnx
        small = {"bias": jnp.zeros(8), "kernel": jnp.zeros((6, 8))}
        axes = {"bias": None, "kernel": adamr.Axes((1,))}
        return adamr.empty_subspace(small, axes=axes, max_rank=3)
    axes = {
        "dense": {"bias": None, "kernel": adamr.Axes((1,))},
        "conv": adamr.Axes((3,)),
        "scale": None,
        "stack": adamr.Axes((2,), (0,)),
    }
    kept = {
        "dense": {"bias": None, "kernel": orthonormal(6, 8, 2)},
        "conv": orthonormal(7, 8, 3),
        "scale": None,
        "stack": orthonormal(8, 2, 8, 2),
    }
    found = adamr.make_subspace(params(), kept, axes=axes, max_rank=3)
    more = (None,) * (len(s.bases) - 5)  # leaves that protect nothing come last
    return adamr.Subspace(found.bases + more, found.weights + more)


def directions(s: adamr.Subspace) -> adamr.Directions:
    """Of the whole vector, for the tree of `params` or, by its leaves, of nnx."""
    small = {"bias": jnp.zeros(8), "kernel": jnp.zeros((6, 8))}
    tree = params() if len(s.bases) == 5 else small
    d = adamr.empty_directions(tree, 4)
    samples = [gradients(seed, tree) for seed in (98, 99)]
    return adamr.grow_directions(d, jax.tree.map(lambda *x: jnp.stack(x), *samples))


def last_axes(tree: Tree) -> list[int | None]:
    """The last axis of every kernel, as that of an A's columns."""
    leaves = _tree.flatten(tree)[0]
    return [x.ndim - 1 if getattr(x, "ndim", 0) > 1 else None for x in leaves]


def _merged(route: Factory) -> Build:
    """A full chain around a route, with the modifier that every case shares."""
    return lambda s: (
        lambda b1=0.9, b2=0.99, eps=1e-8: optax.chain(
            route(adamr.project_out(s)),
            adamr.faithful_second_moment(b1, b2, eps),
        )
    )


def _estimator(
    name: Literal["adam", "amsgrad", "rmsprop", "adagrad", "yogi", "adafactor"],
    share: Literal["fan_in"] | None = None,
) -> Build:
    return lambda s: (
        lambda b1=0.9, b2=0.99, eps=1e-8: optax.chain(
            adamr.route_first_moment(adamr.project_out(s)),
            adamr.faithful_second_moment(b1, b2, eps, estimator=name, share=share),
        )
    )


def _overlap(aggregate: Literal["global", "mean", "leaf"], **kwargs: Any) -> Build:
    return lambda s: (
        lambda alpha_max=0.5, decay=0.9: optax.chain(
            adamr.route_first_moment(adamr.project_out(s)),
            adamr.overlap_adaptive_scale(
                alpha_max, decay, aggregate=aggregate, **kwargs
            ),
            adamr.faithful_second_moment(),
        )
    )


CASES = [
    Case("route_first_moment", _merged(adamr.route_first_moment)),
    Case("route_both_moments", _merged(adamr.route_both_moments)),
    Case("route_second_moment", _merged(adamr.route_second_moment)),
    Case(
        "constant_scale",
        lambda s: (
            lambda alpha=0.5: optax.chain(
                adamr.route_first_moment(adamr.project_out(s)),
                adamr.constant_scale(alpha),
                adamr.faithful_second_moment(),
            )
        ),
    ),
    Case("overlap_global", _overlap("global")),
    Case("overlap_mean_debiased", _overlap("mean", debias=True)),
    Case("overlap_leaf_rising", _overlap("leaf", rule=lambda overlap: overlap)),
    *[
        Case(f"faithful_{name}", _estimator(name))
        for name in ("amsgrad", "rmsprop", "adagrad", "yogi", "adafactor")
    ],
    Case("faithful_shared", _estimator("adam", share="fan_in")),
    Case("faithful_shared_amsgrad", _estimator("amsgrad", share="fan_in")),
    Case(
        "faithful_identity",
        lambda s: (
            lambda b1=0.9: optax.chain(
                adamr.route_first_moment(optax.identity()),
                adamr.faithful_second_moment(b1),
            )
        ),
        holds_subspace=False,
    ),
    Case("project_out", lambda s: lambda: adamr.project_out(s)),
    Case(
        "protect_update",
        lambda s: (
            lambda b1=0.9: optax.chain(optax.scale_by_adam(b1), adamr.protect_update(s))
        ),
    ),
    Case("two_sided", lambda s: lambda b1=0.9: adamr.two_sided(s, b1=b1)),
    # Their task boundaries are in test_directions.py.
    *[
        Case(
            f"{name}_directions",
            lambda s, name=name: lambda: getattr(adamr, name)(directions(s)),
            holds_subspace=False,
        )
        for name in ("project_out", "two_sided", "fopng")
    ],
    Case(
        "fopng_as_published",
        lambda s: lambda: adamr.fopng(directions(s), as_published=True),
        holds_subspace=False,
    ),
    Case(
        "ogd",
        lambda s: (
            lambda learning_rate=0.1, b1=0.9: adamr.ogd(
                learning_rate, directions(s), b1=b1
            )
        ),
        holds_subspace=False,
    ),
    Case(
        "oblique_second_moment",
        lambda s: (
            lambda b1=0.9, b2=0.99: optax.chain(
                adamr.route_first_moment(optax.identity()),
                adamr.oblique_second_moment(s, b1, b2),
            )
        ),
    ),
    # A rotated coordinate can be small by cancellation, and Adam's first step is its
    # sign: eps keeps two correct float32 evaluations comparable.
    Case(
        "in_eigenbasis",
        lambda s: (
            lambda b1=0.9, eps=0.1: optax.chain(
                adamr.route_first_moment(adamr.project_out(s)),
                adamr.in_eigenbasis(adamr.faithful_second_moment(b1, eps=eps), s),
            )
        ),
    ),
    Case(
        "in_eigenbasis_of_optax",
        lambda s: lambda eps=0.1: adamr.in_eigenbasis(optax.scale_by_adam(eps=eps), s),
    ),
    Case(
        "adamr",
        lambda s: (
            lambda learning_rate=0.1, weight_decay=0.01: adamr.adamr(
                learning_rate, adamr.project_out(s), weight_decay=weight_decay
            )
        ),
    ),
    Case(
        "adamr_adaptive",
        lambda s: (
            lambda learning_rate=0.1, b1=0.9: adamr.adamr(
                learning_rate,
                adamr.project_out(s),
                b1=b1,
                strength=adamr.overlap_adaptive_scale(),
            )
        ),
    ),
    Case(
        "adamr_elementwise",
        lambda s: (
            lambda learning_rate=0.1: adamr.adamr(
                learning_rate, optax.clip(0.5), strength=0.5
            )
        ),
        holds_subspace=False,
    ),
    Case(
        "gpm",
        lambda s: lambda learning_rate=0.1, b1=0.9: adamr.gpm(learning_rate, s, b1=b1),
    ),
    Case("sgp", lambda s: lambda learning_rate=0.1: adamr.sgp(learning_rate, s)),
    Case(
        "gpm_si",
        lambda s: lambda learning_rate=0.1, c=3.0: adamr.gpm_si(learning_rate, s, c),
    ),
    Case(
        "adam_nscl",
        lambda s: (
            lambda learning_rate=0.1, b1=0.9: adamr.adam_nscl(learning_rate, s, b1)
        ),
    ),
    Case(
        "adam_nscl_as_in_code",
        lambda s: (
            lambda learning_rate=0.1: adamr.adam_nscl(learning_rate, s, as_in_code=True)
        ),
    ),
    Case(
        "osft",
        lambda s: (
            lambda learning_rate=0.1, weight_decay=0.1: adamr.osft(
                learning_rate, s, output_side(s), weight_decay=weight_decay
            )
        ),
    ),
    Case(
        "osft_paper",
        lambda s: (
            lambda learning_rate=0.1: adamr.osft(
                learning_rate, s, output_side(s), form="paper"
            )
        ),
    ),
    Case(
        "osft_shared_v",
        lambda s: (
            lambda learning_rate=0.1, weight_decay=0.1: adamr.osft(
                learning_rate,
                s,
                output_side(s),
                weight_decay=weight_decay,
                share_v=True,
            )
        ),
    ),
    # trgp and rogo take {"params", "scales"}: tests/test_recipes_gpm.py.
    Case(
        "gem_constraint",
        lambda s: lambda memory_strength=0.5: adamr.gem_constraint(memory_strength),
        holds_subspace=False,
        extra_args=memory_gradients,
    ),
    Case(
        "gem_parameterwise",
        lambda s: (
            lambda memory_strength=0.5: adamr.gem_constraint(
                memory_strength, partition="leaf", solver="diagonal"
            )
        ),
        holds_subspace=False,
        extra_args=memory_gradients,
    ),
    Case(
        "gem_exact_by_leaf",
        lambda s: (
            lambda memory_strength=0.5: adamr.gem_constraint(
                memory_strength, partition="leaf"
            )
        ),
        holds_subspace=False,
        extra_args=memory_gradients,
    ),
    Case(
        "agem_constraint",
        lambda s: lambda: adamr.agem_constraint(),
        holds_subspace=False,
        extra_args=lambda g: {"memory_gradient": jax.tree.map(lambda x: 1 - x, g)},
    ),
    Case(
        "constrained_second_moment",
        lambda s: (
            lambda b1=0.9, eps=0.1: optax.chain(
                adamr.route_first_moment(optax.identity()),
                adamr.constrained_second_moment(adamr.gem_constraint(), b1, eps=eps),
            )
        ),
        holds_subspace=False,
        extra_args=memory_gradients,
    ),
    Case(
        "gem",
        lambda s: lambda learning_rate=0.1, eps=0.1: adamr.gem(learning_rate, eps=eps),
        holds_subspace=False,
        extra_args=memory_gradients,
    ),
    Case(
        "agem",
        lambda s: lambda learning_rate=0.1, eps=0.1: adamr.agem(learning_rate, eps=eps),
        holds_subspace=False,
        extra_args=lambda g: {"memory_gradient": jax.tree.map(lambda x: 1 - x, g)},
    ),
    Case(
        "p_mgem",
        lambda s: (
            lambda learning_rate=0.1, eps=0.1: adamr.p_mgem(
                learning_rate, eps=eps, solver="diagonal"
            )
        ),
        holds_subspace=False,
        extra_args=memory_gradients,
    ),
    Case(
        "pcgrad",
        lambda s: lambda: adamr.pcgrad(key=jax.random.key(0)),
        holds_subspace=False,
        extra_args=task_gradients,
    ),
    Case(
        "cagrad",
        lambda s: lambda c=0.5: adamr.cagrad(c),
        holds_subspace=False,
        extra_args=task_gradients,
    ),
    Case(
        "quadratic_penalty",
        lambda s: (
            lambda strength=3.0: adamr.quadratic_penalty(strength, importance=0.5)
        ),
        holds_subspace=False,
    ),
    Case(
        "proximal_second_moment",
        lambda s: (
            lambda learning_rate=0.1, strength=3.0, b1=0.9: optax.chain(
                adamr.route_first_moment(adamr.project_out(s)),
                adamr.proximal_second_moment(
                    learning_rate, strength, b1, importance=0.5, share="fan_in"
                ),
            )
        ),
    ),
    Case(
        "proximal_penalty",
        lambda s: (
            lambda learning_rate=0.1, strength=3.0: adamr.protection.proximal_penalty(
                learning_rate, strength, importance=0.5
            )
        ),
        holds_subspace=False,
    ),
    Case(
        "l2_sp_additive",
        lambda s: (
            lambda learning_rate=0.1, strength=3.0: adamr.l2_sp(
                learning_rate, strength, form="additive"
            )
        ),
        holds_subspace=False,
    ),
    *[
        Case(
            make.__name__,
            lambda s, make=make: (
                lambda learning_rate=0.1, strength=3.0: make(learning_rate, strength)
            ),
            holds_subspace=False,
        )
        for make in (
            adamr.l2_sp,
            adamr.ewc,
            adamr.online_ewc,
            adamr.mas,
            adamr.si,
            adamr.rwalk,
        )
    ],
    Case(
        "track_si",
        lambda s: (
            lambda strength=3.0: adamr.penalties.track_si(
                optax.chain(adamr.project_out(s), adamr.quadratic_penalty(strength))
            )
        ),
    ),
    Case(
        "track_rwalk",
        lambda s: (
            lambda strength=3.0, alpha=0.9: adamr.penalties.track_rwalk(
                adamr.quadratic_penalty(strength, importance=0.5), 2, alpha
            )
        ),
        holds_subspace=False,
    ),
    Case(
        "mix_gradients",
        lambda s: lambda weight=0.3: adamr.modifiers.mix_gradients(weight),
        holds_subspace=False,
        extra_args=memory_gradient,
    ),
    Case(
        "replay_routing",
        lambda s: (
            lambda weight=0.3, b1=0.9: optax.chain(
                adamr.modifiers.replay_routing(weight), adamr.faithful_second_moment(b1)
            )
        ),
        holds_subspace=False,
        extra_args=memory_gradient,
    ),
    Case(
        "er",
        lambda s: lambda learning_rate=0.1, weight=0.3: adamr.er(learning_rate, weight),
        holds_subspace=False,
        extra_args=memory_gradient,
    ),
    Case(
        "disruption_mask",
        lambda s: lambda decay=0.9: adamr.modifiers.disruption_mask(decay),
        holds_subspace=False,
        extra_args=retain_gradient,
    ),
    Case(
        "freeze_masked_decoupled",
        lambda s: (
            lambda decay=0.9, b1=0.9: optax.chain(
                adamr.route_first_moment(
                    adamr.modifiers.disruption_mask(decay, normalize=False)
                ),
                adamr.freeze_masked(adamr.faithful_second_moment(b1)),
            )
        ),
        holds_subspace=False,
        extra_args=retain_gradient,
    ),
    Case(
        "mudman",
        lambda s: (
            lambda learning_rate=0.1, decay=0.9, b2=0.99: adamr.mudman(
                learning_rate, decay, b2=b2
            )
        ),
        holds_subspace=False,
        extra_args=retain_gradient,
    ),
    Case(
        "half_fine_tuning",
        lambda s: (
            lambda learning_rate=0.1, b1=0.9: adamr.protection.half_fine_tuning(
                adamr.adamr(learning_rate, adamr.project_out(s), b1=b1),
                jax.random.key(3),
            )
        ),
    ),
    Case(
        "train_b",
        lambda s: (
            lambda learning_rate=0.1, b1=0.9: adamr.lora.hold(
                adamr.adamr(
                    learning_rate, adamr.project_out(s), b1=b1, weight_decay=0.1
                ),
                lambda tree: [axis is not None for axis in last_axes(tree)],
            )
        ),
    ),
    Case(
        "train_block",
        lambda s: (
            lambda learning_rate=0.1, b1=0.9: adamr.lora.in_blocks(
                adamr.adamr(
                    learning_rate, adamr.project_out(s), b1=b1, weight_decay=0.1
                ),
                rank=4,
                axes=last_axes,
            )
        ),
    ),
    Case(
        "hft",
        lambda s: (
            lambda learning_rate=0.1, weight_decay=0.1: adamr.hft(
                learning_rate, jax.random.key(3), weight_decay=weight_decay
            )
        ),
        holds_subspace=False,
    ),
    Case(
        "normalize_and_project",
        lambda s: (
            lambda learning_rate=0.1: optax.chain(
                optax.adam(learning_rate), adamr.recipes.norms.normalize_and_project()
            )
        ),
        holds_subspace=False,
    ),
    Case(
        "remove_radial",
        lambda s: (
            lambda b1=0.9, delta=0.5: adamr.recipes.norms.remove_radial(
                optax.scale_by_adam(b1), delta, weight_decay=0.1
            )
        ),
        holds_subspace=False,
    ),
    Case(
        "adamp",
        lambda s: lambda learning_rate=0.1, b1=0.9: adamr.adamp(learning_rate, b1),
        holds_subspace=False,
    ),
    Case(
        "muon",
        lambda s: (
            lambda learning_rate=0.1, beta=0.9, weight_decay=0.01: adamr.muon(
                learning_rate,
                adamr.project_out(s),
                beta=beta,
                weight_decay=weight_decay,
                adam_learning_rate=learning_rate / 2,
                # Its default coefficients magnify the last bits of float32.
                ns_coeffs=(1.875, -1.25, 0.375),
                ns_steps=3,
            )
        ),
    ),
    Case(
        "mofo",
        lambda s: (
            lambda learning_rate=0.1, share=0.2, weight_decay=0.01: adamr.mofo(
                learning_rate, share, weight_decay=weight_decay
            )
        ),
        holds_subspace=False,
    ),
    Case(
        "classp",
        lambda s: (
            lambda learning_rate=0.1, threshold=0.5, power=2.0: adamr.classp(
                learning_rate, threshold, power
            )
        ),
        holds_subspace=False,
    ),
]

# Rows made of links that have rows of their own, and their variants: these meet jit,
# scan, donation, map_params and checkpoints in every run, wrappers and devices nightly.
COMPOSED = frozenset(
    """
    route_both_moments route_second_moment overlap_mean_debiased overlap_leaf_rising
    faithful_rmsprop faithful_adagrad faithful_yogi faithful_shared_amsgrad
    adamr_elementwise gpm gpm_si adam_nscl ogd gem agem p_mgem gem_exact_by_leaf
    l2_sp_additive l2_sp ewc online_ewc mas er mudman hft adamp fopng_as_published
    osft_paper osft_shared_v
    """.split()
)
