"""Recipes as users meet them: by name, with visible parameters, under injection."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamr

PARAMS = {"w": jnp.ones((3, 2))}
EVIDENCE = {
    "agem": {"memory_gradient": PARAMS},
    "gem": {"memory_gradients": {"w": jnp.ones((2, 3, 2))}},
    "p_mgem": {"memory_gradients": {"w": jnp.ones((2, 3, 2))}},
    "d_mgem": {"memory_gradients": {"w": jnp.ones((2, 2, 3, 2))}},
    "er": {"memory_gradient": PARAMS},
    "mudman": {"retain_gradient": PARAMS},
}


def arguments(name):
    subspace = adamr.empty_subspace(PARAMS)
    more = {
        "gpm": {"subspace": subspace},
        "gpm_si": {"subspace": subspace},
        "sgp": {"subspace": subspace},
        "adam_nscl": {"subspace": subspace},
        "ogd": {"directions": adamr.empty_directions(PARAMS, 2)},
        "ewc": {"strength": 1.0},
        "online_ewc": {"strength": 1.0},
        "hft": {"key": jax.random.key(0)},
    }
    return {"learning_rate": 0.1, **more.get(name, {})}


RECIPES = [
    "adam_nscl", "agem", "d_mgem", "er", "ewc", "gem", "gpm", "gpm_si", "hft", "l2_sp",
    "mas", "mudman", "ogd", "online_ewc", "p_mgem", "rwalk", "sgp", "si",
]  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_works_under_inject_hyperparams(name):
    recipe, given = getattr(adamr, name), arguments(name)
    extra = EVIDENCE.get(name, {})
    static = [n for n in ("key",) if n in given]
    injected = optax.inject_hyperparams(recipe, static_args=static)(**given)
    plain = recipe(**given)
    steps = []
    for tx in (plain, injected):
        state = tx.init(PARAMS)
        step, state = tx.update(PARAMS, state, PARAMS, **extra)
        steps.append(step["w"])
    np.testing.assert_allclose(*steps, rtol=1e-5)  # 1 - b2 in float32
    once, _ = injected.update(PARAMS, state, PARAMS, **extra)
    state.hyperparams["learning_rate"] = jnp.asarray(0.2)
    twice, _ = injected.update(PARAMS, state, PARAMS, **extra)
    np.testing.assert_allclose(
        twice["w"], 2 * once["w"], rtol=0.02
    )  # a proximal step: nearly


@pytest.mark.parametrize("name", [*RECIPES, "trgp", "rogo"])
def test_steps_descend_and_parameters_are_visible(name):
    recipe = getattr(adamr, name)
    kinds = [p.kind for p in inspect.signature(recipe).parameters.values()]
    assert inspect.Parameter.VAR_KEYWORD not in kinds
    assert {"b1", "b2", "eps"} <= set(inspect.signature(recipe).parameters)
    if name in ("trgp", "rogo"):
        return
    tx = recipe(**arguments(name))
    extra = EVIDENCE.get(name, {})
    step, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS, **extra)
    assert float(optax.tree.vdot(step, PARAMS)) < 0


MOMENTS = {"b1": 0.7, "b2": 0.8, "eps": 0.1, "eps_root": 0.2}
STORED = {"mu_dtype": jnp.float16, "nu_dtype": jnp.bfloat16}
LINK = {**MOMENTS, "estimator": "amsgrad", "share": "fan_in", "guard": "shared"}
DECAY = {"weight_decay": 0.3, "mask": {"w": True}, "strength": 0.6}


def around_a_projection():
    subspace = adamr.empty_subspace(PARAMS)
    options = {**MOMENTS, **STORED, **DECAY}
    return adamr.adamr(0.1, adamr.project_out(subspace), **options), options


def around_a_constraint():
    constraint = adamr.agem_constraint()
    options = {**LINK, **STORED}
    return optax.chain(
        adamr.route_first_moment(optax.identity()),
        adamr.constrained_second_moment(constraint, **options),
        optax.scale_by_learning_rate(0.1),
    ), options


def around_directions():
    options = {**LINK, **STORED}
    two_sided = adamr.two_sided(adamr.empty_directions(PARAMS, 2), **options)
    return optax.chain(two_sided, optax.scale_by_learning_rate(0.1)), options


def around_a_penalty():
    options = {**MOMENTS, **STORED, "share": "fan_in"}
    return optax.chain(
        adamr.route_first_moment(optax.identity()),
        adamr.proximal_second_moment(0.1, **options),
        optax.scale_by_learning_rate(0.1),
    ), options


@pytest.mark.parametrize(
    "name, links",
    [
        ("gpm", around_a_projection),
        ("sgp", around_a_projection),
        ("agem", around_a_constraint),
        ("ogd", around_directions),
        ("ewc", around_a_penalty),
        ("mas", around_a_penalty),
    ],
)
def test_every_option_reaches_its_link(name, links):
    expected, options = links()
    found = getattr(adamr, name)(**arguments(name), **options)
    extra = EVIDENCE.get(name, {})
    results = [
        jax.tree.leaves(tx.update(PARAMS, tx.init(PARAMS), PARAMS, **extra))
        for tx in (found, expected)
    ]
    for x, y in zip(*results, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.smoke
def test_unknown_parameters_are_refused_by_name():
    with pytest.raises(TypeError, match="b3"):
        adamr.gpm(0.1, adamr.empty_subspace(PARAMS), b3=0.5)


@pytest.mark.parametrize("recipe", [adamr.gpm, adamr.sgp, adamr.trgp, adamr.rogo])
def test_recipes_of_subspaces_refuse_directions(recipe):
    directions = adamr.empty_directions({"w": jnp.ones((3, 2))}, 2)
    with pytest.raises(TypeError, match="subspace must be a Subspace, got Directions"):
        recipe(0.1, directions)
