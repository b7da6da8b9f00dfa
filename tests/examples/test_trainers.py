"""The same lines in three training loops: old outputs stay, nothing recompiles."""

import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import adamr
from examples.trainers import linen_pairs, linen_state, nnx_loop, text
from tests.contract.cases import CASES, params

NAMES = ("general", "old", "new")
KEPT = 0.6  # the most that may be forgotten, as a share of what Adam forgets


@pytest.fixture
def short_text(monkeypatch):
    """Texts of 16 letters each, which have few letters in common."""

    def windows(seed):
        rng = np.random.default_rng(seed)
        letters = rng.choice(text.SYMBOLS, 16, replace=False)
        after = rng.integers(0, 16, (16, 2))  # two letters may follow each
        places = [rng.integers(0, 16, 64)]
        for _ in range(text.CONTEXT):
            places.append(after[places[-1], rng.integers(0, 2, 64)])
        return letters[np.stack(places, 1)].astype(np.int32)

    found = [text.Text(n, windows(i), windows(i)) for i, n in enumerate(NAMES)]
    return lambda *modules: [
        monkeypatch.setattr(module, "read_text", lambda: found) for module in modules
    ]


def assert_forgets_less(rows):
    """Both learn; protected forgets less than Adam."""
    (a, b, _), (c, d, learned) = rows["Adam"], rows["protected"]
    assert b - a > 0.3 and d - c < KEPT * (b - a)
    assert learned < np.log(text.SYMBOLS)


# Programs of the step: one for each optimizer in nnx_loop, which pretrains with another
# step; two in a TrainState, whose count begins as a Python integer.
@pytest.mark.parametrize(
    "module, step, programs",
    [
        (linen_state, linen_state.step, 6),
        (linen_pairs, linen_state.step, 6),
        (nnx_loop, nnx_loop.step.jitted_fn, 2),
    ],
    ids=["linen_state", "linen_pairs", "nnx_loop"],
)
def test_old_text_is_kept_and_no_step_recompiles(short_text, module, step, programs):
    short_text(module)
    before = step._cache_size()
    assert_forgets_less(module.main(steps=40))
    assert step._cache_size() - before == programs


# Tunix ----------------------------------------------------------------------------

STEPS = 3
needs_tunix = pytest.mark.filterwarnings("default::DeprecationWarning")


@pytest.fixture
def peft():
    """The example, under the promotion that Tunix relies on."""
    pytest.importorskip("tunix")
    pytest.importorskip("qwix")
    pytest.importorskip("tokenizers")
    from examples.trainers import tunix_peft

    with jax.numpy_rank_promotion("allow"):
        yield tunix_peft


def adapted(peft, folder, mesh=None, dtype="float32"):
    from examples.llm.models import load
    from examples.llm.tiny import write_tiny

    folder = folder / "model"
    if not folder.is_dir():
        write_tiny(folder, num_hidden_layers=1)
    columns = peft.TASKS * peft.RANK
    return peft.with_lora(load(folder, dtype, mesh), columns, alpha=columns).module


def batches(steps, size=4, time=7):
    rng = np.random.default_rng(0)
    drawn = rng.integers(3, 200, (steps, size, time))
    return [{"windows": each.astype(np.int32)} for each in drawn]


TOKENS = batches(1)[0]["windows"][:1, :-1]
OLD = TOKENS, np.ones(TOKENS.shape, bool)


def trainer_of(peft, model, hooks, folder=None, group=None):
    import orbax.checkpoint as ocp

    config = peft.TrainingConfig(
        eval_every_n_steps=100,
        max_steps=2 * STEPS,
        gradient_accumulation_steps=group,
        checkpoint_root_directory=str(folder) if folder else None,
        checkpointing_options=ocp.CheckpointManagerOptions(
            save_interval_steps=1, enable_async_checkpointing=False
        ),
    )
    trainer = peft.PeftTrainer(model, peft.protected(model), config)
    trainer.with_loss_fn(peft.loss).with_training_hooks(hooks)
    return trainer


def arrays(trainer):
    states = nnx.state(trainer.model), nnx.state(trainer.optimizer)
    return [np.asarray(x) for x in jax.tree.leaves(states)]


def assert_same(trainer, other):
    for a, b in zip(arrays(trainer), arrays(other), strict=True):
        np.testing.assert_array_equal(a, b)


class Killed(Exception):
    pass


@needs_tunix
def test_a_killed_tunix_run_ends_with_the_same_bits(peft, tmp_path):
    """Killed after the boundary; and what is left of a run killed right before it."""

    class Kill(peft.Boundaries):
        def on_train_step_start(self, trainer):
            super().on_train_step_start(trainer)
            if trainer.train_steps == STEPS + 1:
                raise Killed

    def start(folder, hooks=peft.Boundaries):
        model = adapted(peft, tmp_path)
        return trainer_of(peft, model, hooks({STEPS: OLD}), tmp_path / folder)

    whole = start("whole")
    whole.train(batches(2 * STEPS))
    killed = start("killed", Kill)
    with pytest.raises(Killed):
        killed.train(batches(2 * STEPS))
    killed.checkpoint_manager.close()
    before = tmp_path / "before"
    before.mkdir()
    shutil.copytree(tmp_path / "killed" / str(STEPS), before / str(STEPS))
    for folder, steps in (("killed", STEPS + 1), ("before", STEPS)):
        resumed = start(folder)
        assert resumed.train_steps == steps
        resumed.train(batches(2 * STEPS))
        assert_same(whole, resumed)
    bases = adamr.get_subspace(whole.optimizer.opt_state).bases
    assert any(b is not None and np.any(np.asarray(b)) for b in bases)


def cache_size(trainer):
    """Programs of the train step, as Tunix counts them."""
    step, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=True)
    return step.func.jitted_fn._cache_size()


def assert_protected(peft, trainer):
    """A of the block that trains has nothing along the protected directions."""
    pairs = nnx.state(trainer.model, nnx.LoRAParam)
    bases = adamr.get_subspace(trainer.optimizer.opt_state).bases
    assert any(basis is not None for basis in bases)
    for a, basis in zip(jax.tree.leaves(pairs), bases, strict=True):
        if basis is not None:
            a, basis = (np.asarray(x).reshape(-1, x.shape[-1]) for x in (a, basis))
            a = a[:, peft.RANK :]
            assert np.abs(a).max() > 0.01 and np.abs(basis).max() > 0.01
            assert np.abs(basis.T @ a).max() <= 1e-5 * np.abs(a).max()


@needs_tunix
@pytest.mark.parametrize(
    "group, dtype", [(None, "float32"), (2, "float32"), (None, "bfloat16")]
)
def test_a_boundary_in_tunix_compiles_no_step_and_protects(
    peft, tmp_path, monkeypatch, group, dtype
):
    """With accumulation it is between two groups, once; bf16 bases get wide pairs."""
    calls, programs, end_task = [], [], peft.end_task

    def counted(trainer, *rows):
        end_task(trainer, *rows)
        calls.append((trainer.train_steps, trainer.iter_steps))
        programs.append(cache_size(trainer))

    monkeypatch.setattr(peft, "end_task", counted)
    model = adapted(peft, tmp_path, dtype=dtype)
    trainer = trainer_of(peft, model, peft.Boundaries({STEPS: OLD}), group=group)
    group = group or 1
    trainer.train(batches(2 * STEPS * group))
    assert calls == [(STEPS, STEPS * group)] and trainer.train_steps == 2 * STEPS
    assert [cache_size(trainer)] == programs
    assert_protected(peft, trainer)


@needs_tunix
def test_more_tasks_than_blocks(peft):
    peft.Boundaries({0: OLD, 3: OLD})
    with pytest.raises(ValueError, match=r"after \[3, 6\] steps, expected fewer"):
        peft.Boundaries({3: OLD, 6: OLD})


@needs_tunix
def test_a_model_without_a_block_for_every_task_is_refused(peft, tmp_path, monkeypatch):
    model = adapted(peft, tmp_path)
    monkeypatch.setattr(peft, "TASKS", peft.TASKS + 1)
    with pytest.raises(ValueError, match=r"the pairs have \[8\] columns, expected"):
        peft.protected(model)


@needs_tunix
def test_padding_is_not_protected_in_tunix(peft, tmp_path):
    """As if the rows had ended where the padding begins."""
    tokens, _ = OLD
    counts = np.arange(tokens.shape[1]) < 3
    found = []
    for rows in ((tokens, counts[None]), (tokens[:, :3], np.ones((1, 3), bool))):
        trainer = trainer_of(peft, adapted(peft, tmp_path), peft.Boundaries({}))
        peft.end_task(trainer, *rows)
        ranks = adamr.subspaces.rank(adamr.get_subspace(trainer.optimizer.opt_state))
        found.append([rank for rank in ranks if rank is not None])
    np.testing.assert_array_equal(*found)
    assert 0 < np.max(found[0]) <= 3


@pytest.mark.slow
@needs_tunix
def test_old_text_is_kept_in_tunix(short_text, peft):
    short_text(peft)
    assert_forgets_less(peft.main(steps=40))


@needs_tunix
def test_tunix_on_a_mesh(peft, tmp_path):
    """Bases and moments lie as `state_shardings` says, to the end and when resumed."""

    class Hooks(peft.Boundaries):
        def on_train_step_start(self, trainer):
            super().on_train_step_start(trainer)
            if trainer.train_steps == STEPS:
                self.programs = cache_size(trainer)

    def start(folder):
        model = adapted(peft, tmp_path, mesh)
        return trainer_of(peft, model, Hooks({STEPS: OLD}), folder)

    def assert_placed(trainer):
        pairs = nnx.state(trainer.model, nnx.LoRAParam)
        wanted = adamr.state_shardings(trainer.optimizer.tx, pairs)
        found = trainer.optimizer.opt_state
        both = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
        assert all(x.sharding.is_equivalent_to(where, x.ndim) for x, where in both)
        bases = [b for b in adamr.get_subspace(found).bases if b is not None]
        assert all(not b.sharding.is_fully_replicated for b in bases)

    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), (jax.sharding.AxisType.Auto,) * 2)
    with mesh:
        whole = start(tmp_path / "run")
        whole.train(batches(2 * STEPS))
        assert_placed(whole)
        assert_protected(peft, whole)
        assert cache_size(whole) == whole.training_hooks.programs
        for later in range(STEPS + 1, 2 * STEPS + 1):
            shutil.rmtree(tmp_path / "run" / str(later))
        resumed = start(tmp_path / "run")
        assert resumed.train_steps == STEPS
        resumed.train(batches(2 * STEPS))
        assert_placed(resumed)
    assert_same(whole, resumed)


# Which methods work where -----------------------------------------------------------

PAGE = (Path(__file__).parents[2] / "docs" / "trainers.md").read_text(encoding="utf-8")


def listed(row):
    (line,) = re.findall(rf"^\| {row} \| (.*) \|$", PAGE, re.MULTILINE)
    return set(re.findall(r"`([a-z_0-9]+)`", line))


NEEDS = ["memory_gradient", "memory_gradients", "task_gradients", "retain_gradient"]


def test_the_page_says_which_methods_need_extra_arguments():
    """Against the table of constructors; each recipe is listed once."""
    lists = {name: listed(f"need `{name}`") for name in NEEDS}
    lists["nothing"] = listed("work")
    found = [name for names in lists.values() for name in names]
    recipes = {
        name
        for name, x in vars(adamr).items()
        if getattr(x, "__module__", "").startswith("adamr.recipes")
    }
    assert len(found) == len(set(found)) and {"gpm"} < recipes <= set(found)
    for case in CASES:
        wanted = next(iter(case.extra_args(params())), "nothing")
        # A case is named like its constructor, with its options after that.
        names = [name for name in found if case.name.startswith(name)]
        if wanted != "nothing" or case.name in names:
            assert max(names, key=len) in lists[wanted], case.name


def test_arguments_reach_the_optimizer_where_the_page_says_so():
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    tx = adamr.agem(0.1)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    g = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    with pytest.raises((TypeError, ValueError), match="memory_gradient"):
        optimizer.update(model, g)
    before = model.kernel[...]
    optimizer.update(model, g, memory_gradient=g)
    assert jnp.all(model.kernel[...] < before)
    state = linen_state.create(lambda p, x: x, {"w": jnp.ones(2)}, tx)
    grads = {"w": jnp.ones(2)}
    with pytest.raises((TypeError, ValueError), match="memory_gradient"):
        state.apply_gradients(grads=grads)
    code = re.search(r"```python\n(updates, opt_state = .*?)```", PAGE, re.DOTALL)[1]
    names = {"state": state, "grads": grads, "old_grads": grads, "optax": optax}
    exec(code, names)
    assert names["state"].step == 1 and jnp.all(names["state"].params["w"] < 1)
