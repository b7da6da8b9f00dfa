"""The methods by name: what each trains, by which optimizer, and what ends a task.

Numbers that a recipe has a default for are taken from its signature.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import optax

import adamr
from adamr import lora
from examples.harness import methods as shared
from examples.harness.methods import Coefficient
from examples.llm import task_ends
from examples.llm.learner import Learner
from examples.llm.task_ends import KEEP, Setting

__all__ = ["DEFAULT", "METHODS", "Method"]


class Method(NamedTuple):
    """One row of the table.

    Attributes:
      about: one line for tables and help.
      build: (learning rate, coefficient, learner, setting) -> optimizer.
      trains: "pairs", "blocks" (pairs with `rank` columns for every task) or "all".
      protects_general: whether `end` is also called before the first task, with
        general text, so that the pretrained model keeps it.
      start: what happens before a task, with rows of it; None: nothing.
      end: what happens after it, as in `task_ends`; None: nothing.
      replays: whether `update` needs `memory_gradient`.
      penalty: (trained, opt_state) -> what the coefficient times it adds to the loss.
      learning_rate: that is taken without `--learning-rate` and `--lr-grid`.
      coefficient: None: the method has none.
    """

    about: str
    build: Callable[[Any, Any, Learner, Setting], optax.GradientTransformation]
    trains: Literal["pairs", "blocks", "all"] = "pairs"
    protects_general: bool = False
    start: Callable[..., Any] | None = None
    end: Callable[..., Any] | None = None
    replays: bool = False
    penalty: Callable[..., Any] | None = None
    learning_rate: float = 1e-3
    coefficient: Coefficient | None = None


class _Held(NamedTuple):
    """What the recipes of the other examples read of their setting."""

    subspace: Any = None


def _of_pairs(learner: Learner, setting: Setting):
    """Room for the inputs of every A; B stays free."""

    def room(pairs):
        axes = lora.axes(*learner.traced())
        return adamr.empty_subspace(
            pairs, axes=axes, max_rank=setting.capacity, max_fan_in=None
        )

    return room


def _of_all(learner: Learner, setting: Setting):
    """Room for the inputs of every trained kernel; with pairs, of every A and B."""

    def room(trained):
        axes = adamr.contracted_axes(*learner.traced())
        return adamr.empty_subspace(
            trained,
            axes=axes,
            max_rank=setting.capacity,
            unprotected=task_ends.not_kernels(trained, axes),
            max_fan_in=None,
        )

    return room


def _recipe(name: str, room=None):
    """A recipe of the other examples over these parameters."""
    build = shared.METHODS[name].build

    def made(rate, coefficient, learner, setting):
        held = _Held() if room is None else _Held(room(learner, setting))
        return build(rate, coefficient, held)

    return made


def _gpm_of_a(rate, _, learner, setting):
    return adamr.gpm(rate, _of_pairs(learner, setting))


def _b_alone(rate, _, learner, setting):
    return lora.train_b(_gpm_of_a(rate, None, learner, setting))


def _o_lora(rate, _, learner, setting):
    del learner
    return lora.train_block(optax.adam(rate), setting.rank)


def _osft(rate, _, learner, setting, **options):
    del setting
    sides = [lambda p, i=i: task_ends.kernel_sides(learner, p)[i] for i in (0, 1)]
    return adamr.osft(rate, *sides, **options)


def _osft_hooked(rate, _, learner, setting):
    del setting
    hooks = [
        adamr.project_out(lambda p, i=i: task_ends.kernel_sides(learner, p)[i])
        for i in (0, 1)
    ]
    return optax.chain(*hooks, optax.adamw(rate, weight_decay=0.01))


def _mofo(rate, share, learner, setting):
    """A matrix is one tensor, as in PyTorch, though Tunix keeps its heads apart."""
    del learner, setting

    def whole(path, shape):
        del path
        return adamr.Axes(tuple(range(len(shape) - 1))) if len(shape) > 1 else None

    return adamr.mofo(rate, share, axes=whole)


def _on_both(name: str, route: str) -> Method:
    # General text would use up the inputs of B, which are as many as the rank.
    return Method(
        f"GPM on A and on B, {route}", _recipe(name, _of_all), end=task_ends.grow
    )


def _borrowed(name: str, about: str, **options: Any) -> Method:
    own = shared.METHODS[name].coefficient
    return Method(about, _recipe(name), coefficient=own, **options)


METHODS: dict[str, Method] = {
    "adam": Method("Adam on the pairs", _recipe("adam")),
    "lora_restart": Method(
        "pairs merged and drawn anew, nothing protected (control of lora_random)",
        _gpm_of_a,
        end=functools.partial(task_ends.start_task, threshold=0.0),
    ),
    "lora_complement": Method(
        "pairs merged; A from new inputs outside old ones, projected; B free",
        _gpm_of_a,
        protects_general=True,
        start=task_ends.choose_a,
        end=task_ends.start_task,
        learning_rate=3e-3,
    ),
    "lora_random": Method(
        "pairs merged; A random outside old inputs, projected; B free",
        _gpm_of_a,
        protects_general=True,
        end=task_ends.start_task,
        learning_rate=3e-3,
    ),
    "inflora": Method(
        "InfLoRA: A fixed, from the new task's inputs outside old ones, B free",
        _b_alone,
        protects_general=True,
        start=task_ends.choose_a,
        end=task_ends.start_task,
        learning_rate=3e-3,
    ),
    "keeplora": Method(
        "KeepLoRA: A fixed, from the new task's gradient outside old inputs, B free",
        _b_alone,
        protects_general=True,
        start=task_ends.choose_a_by_gradient,
        end=task_ends.start_task,
    ),
    "o_lora": Method(
        "O-LoRA: a pair per task, A's kept orthogonal by a penalty",
        _o_lora,
        trains="blocks",
        end=task_ends.start_block,
        penalty=lora.orthogonality,
        coefficient=Coefficient("weight", 0.5),
    ),
    "ewc": _borrowed(
        "ewc", "EWC on the pairs, sampled Fisher, proximal", end=task_ends.consolidate
    ),
    "si": _borrowed(
        "si", "Synaptic Intelligence on the pairs", end=task_ends.consolidate_si
    ),
    "er": _borrowed("er", "experience replay on the pairs", replays=True),
    "gpm_shared": _on_both("gpm_shared", "shared routing"),
    "gpm_decoupled": _on_both("gpm_decoupled", "element-wise decoupled routing"),
    "gpm_adaptive": _on_both("gpm_adaptive", "decoupled, overlap-adaptive strength"),
    "gpm": _on_both("gpm", "v shared along the projected axis"),
    "adam_full": Method(
        "Adam on all parameters", _recipe("adam"), trains="all", learning_rate=1e-4
    ),
    "gpm_full": Method(
        "GPM on all kernels, Adam on the rest",
        _recipe("gpm", _of_all),
        trains="all",
        protects_general=True,
        end=task_ends.grow,
        learning_rate=1e-4,
    ),
    "gpm_si_full": Method(
        "GPM on all kernels, SI's pull on everything",
        _recipe("gpm_si", _of_all),
        trains="all",
        protects_general=True,
        end=task_ends.grow_and_consolidate_si,
        learning_rate=1e-4,
        coefficient=shared.METHODS["gpm_si"].coefficient,
    ),
    "osft": Method(
        f"OSFT, exact: the top {KEEP:.0%} of every kernel's singular directions kept",
        _osft,
        trains="all",
        end=task_ends.decompose,
        learning_rate=1e-4,
    ),
    "osft_shared_v": Method(
        "OSFT, exact, with one v per kernel",
        functools.partial(_osft, share_v=True),
        trains="all",
        end=task_ends.decompose,
        learning_rate=1e-4,
    ),
    "osft_hooked": Method(
        "OSFT's projection of gradients, then AdamW with decay",
        _osft_hooked,
        trains="all",
        end=task_ends.decompose,
        learning_rate=1e-4,
    ),
    "mofo": Method(
        "MoFO: the entries of largest momentum move",
        _mofo,
        trains="all",
        learning_rate=1e-4,
        coefficient=shared.METHODS["mofo"].coefficient,
    ),
}

DEFAULT = ("adam", "lora_complement")
