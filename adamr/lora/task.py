"""Task boundaries of low-rank pairs that are merged into their kernels.

With h = xW + s·(xA)B, and U a basis of the inputs x of all finished tasks: if UᵀA = 0,
then xA = 0 for every x in span U, and h does not move, whatever B does. So A is drawn
in the complement of U and stays there, because its gradient is projected, and B is
free. The other choices fail: with B projected and A free, xA moves; with A projected
but not drawn anew, xA ≠ 0 and B moves h; with both projected, B's r inputs are used up
after one task, and little more is learned.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from adamr import _tree
from adamr._nodes import find_nodes, map_nodes
from adamr._tree import placed_like
from adamr.capture.axes import contracted_axes
from adamr.lora.draw import Init, he_uniform, redrawn
from adamr.lora.pairs import Halves, Located, halves, located
from adamr.lora.precision import require_wide
from adamr.lora.remaining import held, warn_of_gaps
from adamr.modifiers.penalty import Anchor
from adamr.penalties.anchor import rewrite_anchors
from adamr.penalties.si import SIState
from adamr.state import protect_inputs, reset_moments
from adamr.subspaces.axes import Axes
from adamr.subspaces.subspace import Subspace

__all__ = ["axes", "start_task"]


def axes(
    forward: Callable[..., Any],
    lora: Any,
    *inputs: Any,
    pairs: Sequence[Any] | None = None,
) -> Any:
    """What to protect of low-rank pairs: the fan-in of every A, and no B.

    B reads xA, of r dimensions: protected, it could learn nothing after r directions,
    and it need not be, because xA = 0 for every protected x.

    Args:
      forward: `(lora, *inputs) -> anything`, with the base inside.
      lora: the A's and B's, arrays or `ShapeDtypeStruct`s; holes are left out.
      *inputs: of `forward`; `ShapeDtypeStruct`s are enough, nothing is computed.
      pairs: as for `find_pairs`.

    Returns:
      A tree like `lora` of `Axes` or None, for `empty_subspace(lora, axes=...)`, which
      warns of every A that could not be read.

    Raises:
      ValueError: as `find_pairs` and `contracted_axes` raise it, and if no A can be
        read.

    >>> from adamr import empty_subspace
    >>> lora = {"w_lora_a": jnp.ones((4, 2)), "w_lora_b": jnp.zeros((2, 3))}
    >>> forward = lambda p, x: x @ p["w_lora_a"] @ p["w_lora_b"]
    >>> found = axes(forward, lora, jnp.ones((1, 4)))
    >>> found["w_lora_a"], found["w_lora_b"]
    (Axes(protected=(0,), batch=()), None)
    >>> subspace = empty_subspace(lora, axes=found, max_rank=3)
    """
    kept = {each.a for each in halves(lora, pairs)}
    read = contracted_axes(forward, lora, *inputs)

    def is_entry(x: Any) -> bool:
        return x is None or isinstance(x, Axes)

    leaves, treedef = jax.tree.flatten(read, is_leaf=is_entry)
    if not any(leaves[i] is not None for i in kept):
        names = _tree.flatten_with_names(lora)[0]
        raise ValueError(
            "forward contracts none of the A's "
            f"{_tree.listed(names[i] for i in sorted(kept))} with data, expected a "
            "layer's input to meet each of them."
        )
    found = [x if i in kept else None for i, x in enumerate(leaves)]
    return jax.tree.unflatten(treedef, found)


def bases_of(opt_state: Any, lora: Any, pairs: Sequence[Halves | Located]) -> Subspace:
    """The subspace in a state, at the leaves of `lora`; raises if it protects a B."""
    here = held(opt_state).at(lora, "the subspace in opt_state")
    names = _tree.flatten_with_names(lora)[0]
    protected = [names[each.b] for each in pairs if here.bases[each.b] is not None]
    if protected:
        raise ValueError(
            f"the subspace in opt_state protects the B's {_tree.listed(protected)}, "
            "expected the A's alone: empty_subspace(lora, axes=lora.axes(forward, "
            "lora, *inputs))."
        )
    narrow = [b.dtype for b in here.bases if b is not None and b.dtype.itemsize < 4]
    if narrow:
        raise ValueError(
            f"the subspace in opt_state has bases of {narrow[0]}, expected float32: "
            "they are grown here, and A is drawn orthogonal to them to their rounding. "
            "Cast them (subspaces.cast_bases) for training alone, and set the float32 "
            "ones again (set_subspace) before a task ends."
        )
    if all(here.bases[each.a] is None for each in pairs):
        raise ValueError(
            "the subspace in opt_state protects no A, expected a basis for each of "
            f"{[names[each.a] for each in pairs]}."
        )
    return here


def _empty_group(node: optax.MultiStepsState) -> optax.MultiStepsState:
    mini_step, gradients = _tree.cleared((node.mini_step, node.acc_grads))
    return node._replace(mini_step=mini_step, acc_grads=gradients)


# Optimizers that step from a copy of the parameters; of newer versions of Optax, too.
_WITH_A_COPY = tuple(
    getattr(optax.contrib, name)
    for name in ("ScheduleFreeState", "COCOBState", "MadgradState")
    if hasattr(optax.contrib, name)
)


def require_restartable(opt_state: Any) -> None:
    """Raises for a state that holds the old pairs themselves."""
    found = find_nodes(opt_state, *_WITH_A_COPY)
    if found:
        raise ValueError(
            f"opt_state has a {type(found[0]).__name__}, which steps from a copy of "
            "the old pairs: they are drawn anew here. Use another optimizer."
        )


def restarted(opt_state: Any, lora: Any) -> Any:
    """Moments, groups of MultiSteps, and the path of SI, start anew at `lora`."""
    opt_state = map_nodes(_empty_group, opt_state, optax.MultiStepsState)
    opt_state = reset_moments(opt_state)
    opt_state = map_nodes(
        lambda node: node._replace(omega=_tree.cleared(node.omega)), opt_state, SIState
    )
    if not find_nodes(opt_state, Anchor):
        return opt_state
    return rewrite_anchors(opt_state, lambda omega, _, theta: (omega, theta), lora=lora)


def _merged(base: Any, lora: Any, pairs: Sequence[Located], scaling: Any) -> Any:
    """W + scaling · A·B for every pair, rounded once to the dtype of W."""
    kernels, treedef = _tree.flatten(base)
    leaves = _tree.flatten(lora)[0]
    for each in pairs:
        w = kernels[each.kernel]
        change = scaling * each.meeting.product(leaves[each.a], leaves[each.b])
        wide = w.astype(jnp.promote_types(w.dtype, change.dtype))
        kernels[each.kernel] = new = placed_like(w, wide + change)
        finite = jnp.all(jnp.isfinite(new))
        if not _tree.is_traced(finite) and not finite:
            raise ValueError(
                f"W + scaling · A·B has NaN or infinite entries at {each.pair.kernel!r}"
                f" ({w.dtype}), expected a pair that training has left finite."
            )
    return jax.tree.unflatten(treedef, kernels)


def start_task(
    base: Any,
    lora: Any,
    opt_state: Any,
    inputs: Any,
    key: jax.Array,
    *,
    scaling: jax.typing.ArrayLike = 1.0,
    threshold: float = 0.97,
    init: Init = he_uniform,
    pairs: Sequence[Any] | None = None,
) -> tuple[Any, Any, Any]:
    """Ends a task and starts the next: merge, protect, draw anew.

        W <- W + scaling · A·B                  the model computes what it did
        U <- grow_subspace(U, inputs, threshold)
        A <- (I − UUᵀ) A₀                       columns as long as those of A₀ from init
        B <- 0,  moments <- 0

    Guarantee: from here on the model's response to inputs x in span U does not move,
    whatever B does, in each layer for as long as the layer's own inputs stay in span U.
    Float32 rounding leaves |xA| of about 1e-6 ‖x‖ ‖A‖, which B multiplies: with weights
    as training makes them at most 1e-5 of a response. It needs float32 pairs, full
    weights λ, and an optimizer whose step keeps A in the complement:
    `adamr(rate, project_out(subspace))`, `gpm` or `gpm_si` over the tree of the pairs,
    with `subspace = empty_subspace(lora, axes=lora.axes(forward, lora, x))`. There v is
    shared along A's fan-in, and B gets plain Adam.

    A₀ is random, and where much is protected, little of it meets the new task's inputs.
    `lora.inflora(lora, opt_state, inputs of the new task)` then draws A from those.

    To protect text that the pretrained model should keep, make the same call before the
    first task, with that text's inputs: B = 0, so the merge changes nothing.

    `gpm_si`: call `consolidate_si` first; Ω stays, and its θ* becomes the new pairs. A
    group of `optax.MultiSteps` that is not finished is dropped: its gradients are those
    of the old pairs. No other state that refers to the old A and B is changed.

    Args:
      base: the frozen kernels, any floating dtype. Names of PEFT stand for kernels
        (out, in), others for (in, out). Where a shape allows the other alone, it is
        read so; a square kernel the other way round would be merged transposed: leave
        its pair out. The model uses a kernel with a pair
        in one place, always with the pair: where it is used without it as well (an
        embedding that is also the head), or one pair serves two kernels, the merge
        changes what the model computes: leave such a pair out. The merge is rounded
        once: in bfloat16 each entry by up to 2⁻⁸ of itself (0.4 %), which changes every
        response a little, and loses what A·B adds below that. With
        `lora.masters(base)`, cast inside the loss, this does not add up over tasks; it
        does not occur where the layers compute in float32.
      lora: the A's and B's, float32 (`lora.masters`).
      opt_state: of an optimizer over `lora`, in any wrapper, that holds a `Subspace` of
        the A's and of no B.
      inputs: `layer_inputs(forward, lora, x)` of the finished task (A meets what its
        kernel meets), a `Covariance`, or a tree like `lora` of arrays (num_samples, n).
      key: for A₀.
      scaling: the number by which the model multiplies A·B: α / r in Qwix and PEFT, 1
        in Flax.
      threshold: the share of the inputs' energy to protect, in [0, 1].
      init: `(key, (n, r), dtype) -> A₀` as JAX's initializers, once per stacked layer;
        n is all of A's fan-in. He-uniform, as Qwix and Flax draw it; PEFT's A₀ is
        `jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")`.
      pairs: as for `find_pairs`.

    Returns:
      (base, lora, opt_state) of the same structures, shapes, dtypes and placement: the
      step does not recompile. Works under jit; along explicit mesh axes there only
      where no fan-in is sharded. Where U is full, A = 0 and the layer learns no more;
      `lora.room` says how much is left. An A that the subspace leaves
      out is drawn anew without protection.

    Raises:
      ValueError: as `find_pairs`, `get_subspace` and `grow_subspace` raise it; for
        kernels that are not floating (use `lora.start_block`), for pairs narrower than
        float32, for a subspace that protects a B or no A, for optimizers that step from
        a copy of the pairs (`schedule_free`, `cocob`, `madgrad`), and, outside jit, if
        A·B is not finite.
      TypeError: for a state with `Directions`.
    Warns, outside jit, of A's without inputs, of those whose basis is full, and of
    those that are zero.

    >>> import optax
    >>> from adamr import adamr, empty_subspace, layer_inputs, project_out
    >>> base = {"w": jnp.ones((4, 3))}
    >>> lora = {"w_lora_a": jnp.ones((4, 2)), "w_lora_b": jnp.zeros((2, 3))}
    >>> def forward(lora, base, x):
    ...     return x @ base["w"] + 0.5 * (x @ lora["w_lora_a"] @ lora["w_lora_b"])
    >>> general, old = jnp.eye(4)[:1], jnp.eye(4)[1:2]  # inputs to keep
    >>> subspace = empty_subspace(lora, axes=axes(forward, lora, base, general))
    >>> tx = adamr(0.1, project_out(subspace))
    >>> state = tx.init(lora)
    >>> tasks = enumerate(jax.random.split(jax.random.key(0)))
    >>> for (i, key), x in zip(tasks, (general, old)):
    ...     inputs = layer_inputs(forward, lora, base, x)
    ...     base, lora, state = start_task(base, lora, state, inputs, key, scaling=0.5)
    ...     before = forward(lora, base, x)
    ...     new = jnp.ones((1, 4))
    ...     loss = lambda lora: jnp.sum((forward(lora, base, new) - i) ** 2)
    ...     step, state = tx.update(jax.grad(loss)(lora), state, lora)
    ...     lora = optax.apply_updates(lora, step)
    ...     print(jnp.max(jnp.abs(forward(lora, base, x) - before)) < 1e-6)
    True
    True

    References:
      Saha, Garg, Roy, Gradient Projection Memory, arXiv:2103.09762. Hu et al., LoRA,
      arXiv:2106.09685. Liang, Li, InfLoRA, arXiv:2404.00228, which fixes A.
    """
    found = located(base, lora, pairs)
    names, leaves = _tree.flatten_with_names(lora)
    require_wide(leaves, names)
    require_restartable(opt_state)
    # What does not fit is told before the long computation.
    bases_of(opt_state, lora, found)
    base = _merged(base, lora, found, scaling)
    opt_state = protect_inputs(opt_state, inputs, threshold=threshold, moments="keep")
    warn_of_gaps(opt_state, inputs, lora)
    here = bases_of(opt_state, lora, found)
    fresh = redrawn(key, leaves, [each.halves for each in found], here, init)
    new = [
        x if _tree.is_hole(x) else placed_like(x, fresh.get(i, jnp.zeros_like(x)))
        for i, x in enumerate(leaves)
    ]
    lora = jax.tree.unflatten(_tree.flatten(lora)[1], new)
    return base, lora, restarted(opt_state, lora)
