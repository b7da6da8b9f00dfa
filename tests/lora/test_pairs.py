"""Pairs are found by the names of each library, and what does not fit is named."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamr
from adamr._tree import is_hole
from adamr.lora import Pair, find_pairs, start_task
from tests.lora.layers import normal

W, A, B = normal(0, 8, 5), normal(1, 8, 2), normal(2, 2, 5)
IN, OUT = normal(1, 2, 8), normal(2, 5, 2)
NAMED = {
    "qwix": (
        {"attn": {"w": W, "bias": jnp.ones(5)}},
        {"attn": {"w_lora_a": A, "w_lora_b": B}},
        "attn/w",
    ),
    "nnx beside": (
        {"kernel": W, "bias": jnp.ones(5)},
        {"lora": {"lora_a": A, "lora_b": B}},
        "kernel",
    ),
    "nnx around": (
        {"q": {"base_module": {"kernel": W}}},
        {"q": {"lora_a": A, "lora_b": B}},
        "q/base_module/kernel",
    ),
    "peft state dict": (
        {"m.q.base_layer.weight": W.T},
        {"m.q.lora_A.default.weight": IN, "m.q.lora_B.default.weight": OUT},
        "m.q.base_layer.weight",
    ),
    "peft adapter file": (
        {"model.q.weight": W.T, "model.norm.weight": jnp.ones(5)},
        {
            "base_model.model.model.q.lora_A.weight": IN,
            "base_model.model.model.q.lora_B.weight": OUT,
        },
        "model.q.weight",
    ),
    "peft nested": (
        {"q": {"weight": W.T}},
        {"q": {"lora_A": {"weight": IN}, "lora_B": {"weight": OUT}}},
        "q/weight",
    ),
    "masked": (
        {"w": W, "w_lora_a": optax.MaskedNode(), "w_lora_b": optax.MaskedNode()},
        {"w": optax.MaskedNode(), "w_lora_a": A, "w_lora_b": B},
        "w",
    ),
}  # fmt: skip


@pytest.mark.parametrize("library", NAMED)
def test_pairs_by_name_and_what_they_add(library):
    base, lora, kernel = NAMED[library]
    (pair,) = find_pairs(base, lora)
    assert pair.kernel == kernel and pair.out_first == library.startswith("peft")
    a, b = jax.tree.leaves(lora)
    axes = adamr.Axes((1,)) if pair.out_first else adamr.Axes((0,))
    flat = jax.tree.map(lambda x: axes if x is a else None, lora, is_leaf=is_hole)
    state = adamr.project_out(adamr.empty_subspace(lora, axes=flat)).init(lora)
    rows = jnp.eye(8)[:3]
    inputs = jax.tree.map(lambda x: rows if x is a else None, lora, is_leaf=is_hole)
    merged, new, _ = start_task(
        base, lora, state, inputs, jax.random.key(0), scaling=0.5, threshold=1.0
    )
    product = (b @ a) if pair.out_first else (a @ b)
    for old, here in zip(jax.tree.leaves(base), jax.tree.leaves(merged), strict=True):
        change = 0.5 * product if old.ndim == 2 else jnp.zeros_like(old)
        np.testing.assert_allclose(here, old + change, rtol=1e-5, atol=1e-6)
    a, b = jax.tree.leaves(new)
    protected = a[:, :3] if pair.out_first else a[:3]
    assert jnp.any(a) and not jnp.any(b)
    assert jnp.max(jnp.abs(protected)) < 1e-6


def test_flattened_axes_of_qwix():
    """`dot_general` pairs: several inputs or outputs in one axis of A or B."""
    base = {
        "q": normal(0, 8, 2, 4), "o": normal(1, 2, 4, 8), "experts": normal(2, 3, 8, 6)
    }  # fmt: skip
    lora = {
        "q_lora_a": normal(3, 8, 2), "q_lora_b": normal(4, 2, 8),
        "o_lora_a": normal(5, 8, 2), "o_lora_b": normal(6, 2, 8),
        "experts_lora_a": normal(7, 3, 8, 2), "experts_lora_b": normal(8, 3, 2, 6),
    }  # fmt: skip
    at = {"q": (0,), "o": (0,), "experts": (1,)}
    axes = {
        name: adamr.Axes(at[name[:-7]], (0,) if "exp" in name else ())
        if name.endswith("a")
        else None
        for name in lora
    }
    state = adamr.project_out(adamr.empty_subspace(lora, axes=axes)).init(lora)
    inputs = {
        name: None if a is None else jnp.zeros((1, 8)) for name, a in axes.items()
    }
    inputs |= {"experts_lora_a": jnp.zeros((3, 1, 8))}
    merged, *_ = start_task(base, lora, state, inputs, jax.random.key(0))
    for name, old in base.items():
        a, b = lora[f"{name}_lora_a"], lora[f"{name}_lora_b"]
        expected = old + (a @ b).reshape(old.shape)
        np.testing.assert_allclose(merged[name], expected, rtol=1e-5, atol=1e-5)


def test_pairs_that_are_given():
    base, lora = {"kernel": W}, {"left": A, "right": B}
    told = r"'left', which belongs to no pair.*pairs=\[\(kernel, A, B\), \.\.\.\]"
    with pytest.raises(ValueError, match=told):
        find_pairs(base, lora)
    assert find_pairs(base, lora, pairs=[("kernel", "left", "right")]) == (
        Pair("kernel", "left", "right"),
    )
    turned = {"left": IN, "right": OUT}
    pair = Pair("kernel", "left", "right", out_first=True)
    assert find_pairs({"kernel": W.T}, turned, pairs=[pair]) == (pair,)
    with pytest.raises(ValueError, match=r"'left'\] as A's.*\['left', 'right'\]"):
        find_pairs(base, {"left": A, "right": B}, pairs=[("kernel", "left", "left")])


BAD = {
    "half": ({"w": W}, {"w_lora_a": A}, "'w_lora_a' and no B for it"),
    "no kernel": (
        {"v": W}, {"w_lora_a": A, "w_lora_b": B},
        r"no kernel for 'w_lora_a'.*'w'.*got v\.",
    ),
    "kernel": (
        {"w": normal(0, 8, 6)}, {"w_lora_a": A, "w_lora_b": B},
        r"'w' of shape \(8, 6\).*\(8, 2\).*\(2, 5\)",
    ),
    "rank": ({"w": W}, {"w_lora_a": A, "w_lora_b": normal(0, 3, 5)}, "the same r"),
    "empty": ({"w": W}, {"x": None}, "lora has no leaves"),
}  # fmt: skip


@pytest.mark.smoke
@pytest.mark.parametrize("what", BAD)
def test_what_does_not_fit_is_named(what):
    base, lora, message = BAD[what]
    with pytest.raises(ValueError, match=message):
        find_pairs(base, lora)
