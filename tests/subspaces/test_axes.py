"""The rule for dense trees, rules and trees of axes, leaves that are not kernels."""

import jax
import jax.numpy as jnp
import pytest

import adamr
from adamr import Axes, default_axes
from adamr.subspaces.axes import read_axes


@pytest.mark.parametrize(
    "path",
    [
        "attention/query/bias",
        "blocks/norm/scale",
        "blocks/linear/bias/value",
        "layers/q_bias",
        "stack/layer_norm/offset",
        "stack/linear/b",
        "encoder/norm1/weight",
        "model/input_layernorm",
    ],
)
@pytest.mark.parametrize("shape", [(4,), (4, 4), (2, 4, 4), (2, 3, 4, 4)])
def test_a_bias_or_scale_is_never_a_kernel(path, shape):
    assert default_axes(path, shape) is None


@pytest.mark.parametrize(
    "path, shape, axes",
    [
        ("mlp/kernel", (4, 8), Axes((0,))),
        ("scale/kernel", (4, 8), Axes((0,))),
        ("attention/query/kernel", (8, 2, 4), Axes((0,))),
        ("attention/out/kernel", (2, 4, 8), Axes((0, 1))),
        ("Conv_0/kernel", (3, 4, 8), Axes((0, 1))),
        ("layers/kernel", (3, 4, 8), Axes((1,), (0,))),
        ("conv/kernel", (3, 3, 4, 8), Axes((0, 1, 2))),
        ("w", (4, 8), Axes((0,))),
    ],
)
def test_kernels_of_dense_trees(path, shape, axes):
    assert default_axes(path, shape) == axes


@jax.tree_util.register_pytree_node_class
class Callable:
    """As an Equinox module: a tree that can be called."""

    def __init__(self, w, act):
        self.w, self.act = w, act

    def __call__(self, *args):
        raise AssertionError("a tree is not a rule")

    def tree_flatten(self):
        return (self.w, self.act), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def test_a_tree_that_can_be_called_is_a_tree():
    params = Callable(jnp.ones((4, 3)), jnp.tanh)
    axes = Callable(Axes((1,)), None)
    subspace = adamr.empty_subspace(params, axes=axes)
    assert subspace.bases[0].shape == (1, 3, 3) and subspace.bases[1] is None
    assert adamr.empty_subspace(params).bases[0].shape == (4, 1, 4)
    rule = lambda path, shape: Axes((-1,))  # noqa: E731
    assert adamr.empty_subspace(params, axes=rule).bases[0].shape == (1, 3, 3)


def test_unread_leaves_are_named_once_by_reason_unless_accepted():
    params = {"a": jnp.ones(3), "b": jnp.ones(3), "w": jnp.ones((3, 2))}
    read = read_axes(Axes((0,)), {"a": "added", "b": "added"})
    axes = {"a": None, "b": None, "w": read}
    with pytest.warns(UserWarning, match=r"2 leaves stay unprotected: a, b \(added\)"):
        subspace = adamr.empty_subspace(params, axes=axes)
    assert [b is None for b in subspace.bases] == [True, True, False]
    adamr.empty_subspace(params, axes=axes, unprotected=["a", "b"])
    adamr.empty_subspace(params, axes={**axes, "w": Axes((0,))})
    assert axes["w"] == Axes((0,))


def test_reasons_survive_in_a_larger_tree():
    read = read_axes(Axes((0,)), {"bias": "added to data"})
    axes = {"enc": {"bias": None, "w": read}, "head": {"bias": None, "w": read}}
    params = {
        name: {"bias": jnp.ones(2), "w": jnp.ones((3, 2))} for name in ("enc", "head")
    }
    with pytest.warns(UserWarning, match=r"enc/bias, head/bias \(added to data\)"):
        adamr.empty_subspace(params, axes=axes)
