"""Low-rank pairs in a plain `nnx.Optimizer` loop.

    python -m examples.trainers.nnx_loop

A small transformer learns prose, as a stand-in for a pretrained model. Then its
low-rank pairs learn code and after that tables, with plain Adam and protected. What
protection adds to the loop is in `protected` and `end_task`.
"""

from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import adamr
from examples.trainers.pretrain import pretrain
from examples.trainers.text import CONTEXT, SYMBOLS, Text, read_text, show

WIDTH, RANK, RATE = 64, 4, 3e-3


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        def linear(inputs: int, outputs: int) -> nnx.Module:
            return nnx.LoRALinear(inputs, outputs, lora_rank=RANK, rngs=rngs)

        self.norm1, self.norm2 = (nnx.RMSNorm(WIDTH, rngs=rngs) for _ in range(2))
        self.qkv, self.out = linear(WIDTH, 3 * WIDTH), linear(WIDTH, WIDTH)
        self.up, self.down = linear(WIDTH, 4 * WIDTH), linear(4 * WIDTH, WIDTH)

    def __call__(self, x: jax.Array) -> jax.Array:
        heads = (*x.shape[:2], 4, WIDTH // 4)
        qkv = jnp.split(self.qkv(self.norm1(x)), 3, -1)
        q, k, v = (part.reshape(heads) for part in qkv)
        seen = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(SYMBOLS, WIDTH, rngs=rngs)
        self.position = nnx.Embed(CONTEXT, WIDTH, rngs=rngs)
        self.blocks = nnx.List(Block(rngs) for _ in range(2))
        self.head = nnx.Linear(WIDTH, SYMBOLS, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x = self.embedding(tokens) + self.position(places)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@nnx.jit
def loss(model: Model, windows: jax.Array) -> jax.Array:
    cost = optax.softmax_cross_entropy_with_integer_labels
    return cost(model(windows[:, :-1]), windows[:, 1:]).mean()


@nnx.jit
def step(model: Model, optimizer: nnx.Optimizer, batch: jax.Array) -> None:
    gradient = nnx.grad(loss, argnums=nnx.DiffState(0, optimizer.wrt))
    optimizer.update(model, gradient(model, batch))


def learn(model: Model, optimizer: nnx.Optimizer, text: Text, steps: int) -> None:
    for batch in text.batches(steps):
        step(model, optimizer, batch)


def forward(pairs: nnx.State, rest: nnx.State, graph: nnx.GraphDef, tokens: jax.Array):
    return nnx.merge(graph, pairs, rest)(tokens)


def protected(model: Model) -> nnx.Optimizer:
    """1. An optimizer of the pairs that has room for what it will protect."""
    graph, pairs, rest = nnx.split(model, nnx.LoRAParam, ...)
    one = jnp.zeros((1, CONTEXT), jnp.int32)
    axes = adamr.lora.axes(forward, pairs, rest, graph, one)
    subspace = adamr.empty_subspace(pairs, axes=axes)
    return nnx.Optimizer(model, adamr.gpm(RATE, subspace), wrt=nnx.LoRAParam)


@partial(jax.jit, static_argnums=0)
def boundary(graph, pairs, rest, opt_state, tokens, key):
    """2. What the layers see in the finished task.  3. It stays as it is from here."""
    subspace = adamr.get_subspace(opt_state)
    inputs = adamr.layer_inputs(forward, pairs, rest, graph, tokens, leaves=subspace)
    return adamr.lora.start_task(rest, pairs, opt_state, inputs, key)


def end_task(model: Model, optimizer: nnx.Optimizer, text: Text, seed: int) -> None:
    """Call it between two steps; the next step does not recompile."""
    graph, pairs, rest = nnx.split(model, nnx.LoRAParam, ...)
    tokens, key = text.batches(1, size=128)[0, :, :-1], jax.random.key(seed)
    state = optimizer.opt_state
    rest, pairs, state = boundary(graph, pairs, rest, state, tokens, key)
    nnx.update(model, rest, pairs)
    nnx.update(optimizer.opt_state, nnx.state(state))


def main(steps: int = 200) -> dict[str, tuple[float, float, float]]:
    general, old, new = read_text()
    pretrained, rows = Model(nnx.Rngs(0)), {}
    pretrain(pretrained, loss, general, 2 * steps)
    for name in ("Adam", "protected"):
        model = nnx.clone(pretrained)
        if name == "protected":
            optimizer = protected(model)
        else:
            optimizer = nnx.Optimizer(model, optax.adam(RATE), wrt=nnx.LoRAParam)
        learn(model, optimizer, old, steps)
        before = float(loss(model, old.held_out))
        if name == "protected":
            end_task(model, optimizer, old, seed=1)
        learn(model, optimizer, new, steps)
        after, learned = (float(loss(model, text.held_out)) for text in (old, new))
        rows[name] = before, after, learned
    show(old, new, rows)
    return rows


if __name__ == "__main__":
    main()
