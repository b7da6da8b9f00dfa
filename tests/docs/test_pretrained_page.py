"""The lines of docs/pretrained.md run, and keep what they promise to keep."""

import json
import re
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PAGE = Path(__file__).parents[2] / "docs" / "pretrained.md"
RESULTS = PAGE.parents[1] / "benchmarks" / "results"
N, R, SCALING = 24, 2, 2.0


class Task(NamedTuple):
    some_tokens: jax.Array
    batches: list[tuple[jax.Array, jax.Array]]


def forward(pairs, base, x):
    def layer(x, name):
        low = x @ pairs[f"{name}/w_lora_a"] @ pairs[f"{name}/w_lora_b"]
        return x @ base[f"{name}/w"] + SCALING * low

    return layer(jax.nn.relu(layer(x, "in")), "out")


def loss(pairs, base, batch):
    x, y = batch
    return jnp.mean(jnp.square(forward(pairs, base, x) - y))


def rows(seed, dimensions):
    """Inputs in a random subspace, of which a wide layer leaves much free."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(12, dimensions)) @ rng.normal(size=(dimensions, N))
    return jnp.asarray(x, jnp.float32) / N**0.5


def test_old_answers_stay_and_every_task_is_learned():
    rng, shapes = np.random.default_rng(0), {"in": (N, 64), "out": (64, 5)}
    base, pairs = {}, {}
    for name, (n, m) in shapes.items():
        normal = rng.normal(size=(n, m)) / n**0.5
        base[f"{name}/w"] = jnp.asarray(normal, jnp.float32)
        pairs[f"{name}/w_lora_a"] = jnp.ones((n, R)) / n**0.5
        pairs[f"{name}/w_lora_b"] = jnp.zeros((R, m))
    general = rows(1, 3)
    tasks = []
    for seed in (2, 3):
        x = rows(seed, 4)
        y = jnp.asarray(np.random.default_rng(seed).normal(size=(12, 5)), jnp.float32)
        tasks.append(Task(x, [(x, y)] * 300))
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S)
    # A threshold of 1 makes the promise exact; each task is watched as it ends.
    code = block.replace("threshold=0.9", "threshold=1.0")
    code = code.replace("1e-3", "1e-2").replace(
        "    base, pairs, opt_state = end_task(task",
        "    learned.append(loss(pairs, base, task.batches[0]))\n"
        "    base, pairs, opt_state = end_task(task",
    )
    assert code.count("learned.append") == 1
    before = forward(pairs, base, general)
    untrained = [loss(pairs, base, task.batches[0]) for task in tasks]
    names = {
        "forward": forward,
        "loss": jax.jit(loss),
        "base": base,
        "pairs": pairs,
        "general": general,
        "tasks": tasks,
        "scaling": SCALING,
        "learned": [],
    }
    exec(code, names)
    pairs, base, learned = (names[name] for name in ("pairs", "base", "learned"))
    np.testing.assert_allclose(forward(pairs, base, general), before, atol=2e-4)
    at_the_end = [loss(pairs, base, task.batches[0]) for task in tasks]
    np.testing.assert_allclose(at_the_end, learned, rtol=1e-3)
    assert all(x < 0.8 * y for x, y in zip(learned, untrained, strict=True))


def test_the_tables_say_what_was_measured():
    found = json.loads((RESULTS / "llm_instruct.json").read_text())
    lines = PAGE.read_text().splitlines()
    labels = {"adam": "Adam on the pairs", "lora_complement": "the lines above"}
    for row in found["methods"]:
        whole, each = (x for x in lines if x.startswith(f"| {labels[row['method']]} |"))
        assert whole.split(" | ")[1:] == [
            f"{row['learned_loss']:.3f}",
            f"{row['final_loss']:.3f}",
            f"{row['forgetting']:.3f}",
            f"{row['general_loss_before']:.3f} → {row['general_loss_after']:.3f}",
            f"{row['kl']:.3f} |",
        ]
        losses = row["loss_matrix"]
        told = [f"{own[i]:.3f} → {losses[-1][i]:.3f}" for i, own in enumerate(losses)]
        assert each.removesuffix(" |").split(" | ")[1:] == told
    text, other = PAGE.read_text(), found["threshold_0.95"]
    assert found["command"] in text
    told = f"learned {other['learned_loss']:.3f}\nand forgot {other['forgetting']:.3f}"
    assert told in text
