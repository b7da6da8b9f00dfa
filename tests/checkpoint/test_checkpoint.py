"""Exact resume: bits, damage, refusals, signals. Kills are in test_checkpoint_kills."""

import datetime
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import adamr
from adamr import buffers
from adamr.checkpoint import _contents, _folders
from adamr.checkpoint.checkpoints import Checkpoints, load

CONFIG = {"rate": 0.1, "model": {"width": 32, "layers": [1, 2]}, "name": None}


def opened(directory, config=None, every=1, **options):
    config = CONFIG if config is None else config
    return Checkpoints(directory, config=config, every=every, **options)


def restored(directory, like, **options):
    with opened(directory, **options) as checkpoints:
        return checkpoints.restore(like)


def save_all(directory, states, **options):
    """Checkpoints of steps 1, 2, …"""
    with opened(directory, **options) as checkpoints:
        for step, state in enumerate(states, 1):
            assert checkpoints.save(step, state)
    return sorted(path for path in directory.iterdir() if path.is_dir())


def bits(leaf):
    """All that a leaf is, to the last bit."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        impl = str(jax.random.key_impl(leaf))
        return "key", impl, leaf.committed, bits(jax.random.key_data(leaf))[-2:]
    if isinstance(leaf, jax.Array):
        kind = "jax", leaf.weak_type, leaf.committed, leaf.sharding
        leaf = np.asarray(leaf)
        return *kind, leaf.dtype, leaf.shape, leaf.tobytes()
    if isinstance(leaf, np.ndarray | np.generic):
        return type(leaf), leaf.dtype, leaf.shape, leaf.tobytes()
    return type(leaf), repr(leaf)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert list(map(bits, jax.tree.leaves(a))) == list(map(bits, jax.tree.leaves(b)))


def assert_round_trip(directory, state):
    save_all(directory, [state])
    found = restored(directory, state)
    assert found.step == 1
    assert_same(found.state, state)


DTYPES = (
    "bool int2 int4 uint4 int8 uint8 int16 uint16 int32 uint32 int64 uint64 "
    "float4_e2m1fn float8_e4m3fn float8_e5m2 float8_e4m3b11fnuz "
    "float16 bfloat16 float32 float64 complex64 complex128"
).split()


@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (2, 1, 3)])
def test_every_dtype_comes_back_bit_by_bit(tmp_path, shape):
    rng = np.random.default_rng(0)
    state = {}
    for name in DTYPES:
        dtype = jnp.dtype(name)
        if name in ("bool", "int2", "int4", "uint4"):
            values = rng.integers(0, 2, shape).astype(dtype)
        else:  # any bits at all: NaNs with a payload, denormals, −0
            raw = rng.bytes(int(np.prod(shape)) * dtype.itemsize)
            values = np.frombuffer(raw, dtype).reshape(shape)
        state[name] = values
        if dtype.itemsize < 8:
            state[f"{name} in jax"] = jnp.asarray(values)
    assert_round_trip(tmp_path, state)


def test_plain_leaves_and_metrics_come_back(tmp_path):
    generator = np.random.default_rng(3)
    generator.random(5)
    state = {
        "rng": generator.bit_generator.state,
        "numbers": [True, 3, -0.0, 0.1, float("inf"), float("nan"), 2**200, "é\n"],
        "scalars": (np.float32(0.1), np.int64(3), np.bool_(True)),
        "holes": (None, optax.MaskedNode(), ()),
    }
    metrics = {"loss": [0.1, 1e-300, None], "names": ["a"], "best": {"x": True}}
    with opened(tmp_path) as checkpoints:
        checkpoints.save(7, state, metrics)
    step, found, read = restored(tmp_path, state)
    assert_same(found, state)
    assert (step, read) == (7, metrics)


def test_metrics_are_those_of_the_save(tmp_path):
    metrics = [1.0]
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, {"a": 1}, metrics)
        metrics.append(2.0)
    assert restored(tmp_path, {"a": 0}).metrics == [1.0]


@pytest.mark.smoke
@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_keys_come_back(tmp_path, impl):
    key = jax.random.key(7, impl=impl)
    raw = jax.random.key_data(key)
    placed = jax.device_put(key, jax.devices()[3])
    state = {
        "key": key,
        "keys": jax.random.split(key, (2, 3)),
        "raw": raw,
        "on": placed,
    }
    assert_round_trip(tmp_path, state)
    found = restored(tmp_path, state).state
    draw = jax.random.normal(found["keys"][1, 2], 4)
    assert_same(draw, jax.random.normal(state["keys"][1, 2], 4))


def test_weak_types_come_back(tmp_path):
    full = jnp.full((3,), 1.5)
    state = [full, jnp.asarray(2), jnp.asarray(2.0), jnp.asarray(1j), jnp.zeros(2)]
    assert [x.weak_type for x in state] == [True, True, True, True, False]
    assert_round_trip(tmp_path, state)
    strong = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)
    assert_same(restored(tmp_path, strong).state, state)


def sharding(*axes):
    mesh = jax.make_mesh((4, 2), ("a", "b"), (jax.sharding.AxisType.Auto,) * 2)
    return jax.NamedSharding(mesh, jax.P(*axes))


def test_placement_is_that_of_like(tmp_path):
    values = jnp.arange(64.0).reshape(8, 8)
    state = {
        "sharded": jax.device_put(values, sharding("a", "b")),
        "replicated": jax.device_put(values, sharding()),
        "one": jax.device_put(values, jax.devices()[5]),
        "free": values,
    }
    assert_round_trip(tmp_path, state)
    # Another layout, such as that of a machine with fewer devices.
    fewer = jax.tree.map(lambda x: jax.device_put(x, jax.devices()[0]), state)
    assert_same(restored(tmp_path, fewer).state, fewer)
    more = jax.tree.map(lambda x: jax.device_put(x, sharding("b")), state)
    assert_same(restored(tmp_path, more).state, more)
    shapes = jax.tree.map(lambda x: jax.typeof(x), state)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), shapes)
    free = jax.tree.map(lambda x: values, state)
    assert_same(restored(tmp_path, shapes).state, free)
    shapes["one"] = jax.ShapeDtypeStruct(
        values.shape, values.dtype, sharding=state["one"].sharding
    )
    assert_same(restored(tmp_path, shapes).state["one"], state["one"])


def test_other_devices_are_told(tmp_path, monkeypatch):
    save_all(tmp_path, [{"a": 1}])
    monkeypatch.setattr(_contents, "_devices", lambda: "1 tpu")
    with pytest.warns(UserWarning, match=r"saved on 8 cpu, this is 1 tpu"):
        assert restored(tmp_path, {"a": 0}).step == 1


def params():
    return {"w": jnp.ones((3, 2)), "b": jnp.zeros(2), "stack": jnp.ones((2, 3, 2))}


def wrappers():
    subspace = adamr.make_subspace(
        params(), {"w": jnp.eye(3)[:, :1], "b": None, "stack": None}
    )
    tx = adamr.adamr(0.1, adamr.project_out(subspace), strength=0.5, weight_decay=0.1)
    label = {"w": "one", "b": "two", "stack": "one"}
    return {
        "alias": tx,
        "masked": optax.masked(optax.adam(0.1), {"w": True, "b": False, "stack": True}),
        "partition": optax.partition({"one": tx, "two": optax.sgd(0.1)}, label),
        "multi": optax.MultiSteps(tx, 2).gradient_transformation(),
        "injected": optax.inject_hyperparams(optax.adamw)(learning_rate=0.1),
        "finite": optax.apply_if_finite(tx, 3),
        "chain": optax.chain(
            optax.clip(1.0), optax.trace(0.9, accumulator_dtype="bfloat16")
        ),
    }


@pytest.mark.parametrize("name", wrappers())
def test_an_optimizer_goes_on_bit_by_bit(tmp_path, name):
    tx, start = wrappers()[name], params()

    @jax.jit
    def step(params, state, key):
        key, noise = jax.random.split(key)
        g = optax.tree.random_like(noise, params, jax.random.normal)
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state, key

    state = like = (start, tx.init(start), jax.random.key(0))
    for _ in range(3):
        state = step(*state)
    save_all(tmp_path, [state])
    found = restored(tmp_path, like).state
    for _ in range(3):
        state, found = step(*state), step(*found)
    assert_same(found, state)
    assert step._cache_size() == 1


def test_flax_and_buffers_come_back(tmp_path):
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    item = {"x": jnp.zeros(2), "y": jnp.zeros([], jnp.int32)}
    buffer = buffers.empty_reservoir(3, item, jax.random.key(1))
    batch = {"x": jnp.ones((5, 2)), "y": jnp.arange(5)}
    buffer = buffers.add_to_reservoir(buffer, batch)
    ring = buffers.empty_ring(2, 3, item, jax.random.key(2))
    subspace = adamr.empty_subspace({"w": jnp.ones((3, 2)), "b": jnp.zeros(2)})
    assert_round_trip(tmp_path, (nnx.state((model, optimizer)), buffer, ring, subspace))


def test_fields_may_change_places(tmp_path):
    class Before(NamedTuple):
        mu: float
        nu: float

    class After(NamedTuple):
        nu: float
        mu: float

    save_all(tmp_path, [Before(mu=1.0, nu=2.0)])
    assert restored(tmp_path, After(0.0, 0.0)).state == After(mu=1.0, nu=2.0)


def test_equal_names_are_told_apart(tmp_path):
    assert_round_trip(tmp_path, {"a": {"b": 1}, "a/b": 2, "c": ({"a": 3}, {"a": 4})})


@pytest.fixture
def held_back(monkeypatch):
    """The writer waits for this event."""
    event, write = threading.Event(), _contents.write

    def wait(*args):
        assert event.wait(60)
        write(*args)

    monkeypatch.setattr(_contents, "write", wait)
    return event


@pytest.mark.smoke
def test_a_save_is_a_copy(tmp_path, held_back):
    start = {"jax": jnp.arange(1000.0), "numpy": np.arange(1000), "plain": [1]}
    donate = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    state = jax.tree.map(lambda x: x.copy() if hasattr(x, "copy") else x, start)
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        state["jax"] = donate(state["jax"])
        state["numpy"][:] = -1
        state["plain"][0] = -1
        jax.block_until_ready(state["jax"])
        held_back.set()
    assert_same(restored(tmp_path, start).state, start)


def test_restored_buffers_may_be_donated(tmp_path):
    state = {"a": jnp.arange(4.0), "b": jnp.arange(4.0)}
    save_all(tmp_path, [state])
    found = restored(tmp_path, state).state
    jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(found)
    array = {"a": np.arange(3)}
    save_all(tmp_path / "numpy", [array])
    restored(tmp_path / "numpy", array).state["a"][0] = 1  # writable, too
    assert_same(restored(tmp_path, state).state, state)


def test_cadence_in_steps(tmp_path):
    with opened(tmp_path, every=10, keep=None) as checkpoints:
        assert checkpoints.restore({"a": 1}) is None
        due = [n for n in range(0, 50, 4) if checkpoints.save(n, {"a": n})]
        assert due == [12, 20, 32, 40]
        assert checkpoints.save(49, {"a": 49}, force=True)
        assert not checkpoints.save(49, {"a": 49})
    with opened(tmp_path, every=10, keep=None) as checkpoints:
        assert checkpoints.restore({"a": 1}).step == 49
        assert not checkpoints.save(49, {"a": 49})
        assert [n for n in range(50, 65) if checkpoints.save(n, {"a": n})] == [50, 60]


def test_cadence_in_time(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    minute = datetime.timedelta(minutes=1)
    with opened(tmp_path, every=minute) as checkpoints:
        due = []
        for n in range(10):
            now[0] += 25
            if checkpoints.save(n, {"a": n}):
                due.append(n)
    assert due == [2, 5, 8]


# Damage.


def flip(path, position, bit=0):
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def cut(path, size):
    os.truncate(path, size)


def big(value):
    return {"w": value + jnp.arange(2500.0).reshape(50, 50), "n": 3}


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def damages():
    """Twenty ways, each an operation on the files of a checkpoint."""

    def of(name, change):
        def damage(folder):
            found = [path for path in folder.rglob(name) if path.is_file()]
            change(max(found, key=lambda path: path.stat().st_size))

        return damage

    names = ("SHA256SUMS", "state.json", "manifest.ocdbt", "_METADATA", "[0-9a-f]*")
    for name in names:
        yield f"{name} missing", of(name, os.remove)
        yield f"{name} cut", of(name, lambda p: cut(p, p.stat().st_size // 2))
        yield f"{name} flipped", of(name, lambda p: flip(p, p.stat().st_size // 2, 3))
    yield "SHA256SUMS empty", of("SHA256SUMS", lambda p: cut(p, 0))
    yield "state.json empty", of("state.json", lambda p: cut(p, 0))
    yield "arrays missing", lambda folder: shutil.rmtree(folder / "arrays")
    yield "everything missing", lambda folder: [os.remove(p) for p in files(folder)]
    yield "a file", lambda folder: (shutil.rmtree(folder), folder.write_text("x"))


DAMAGES = dict(damages())


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_is_skipped_with_a_warning_and_stays(tmp_path, name):
    assert len(DAMAGES) == 20
    paths = save_all(tmp_path, [big(1.0), big(2.0)])
    DAMAGES[name](paths[1])
    left = [(path, path.read_bytes()) for path in files(tmp_path)]
    with pytest.warns(UserWarning, match=f"{paths[1].name} is damaged"):
        found = restored(tmp_path, big(0.0))
    assert found.step == 1
    assert_same(found.state, big(1.0))
    with pytest.raises(ValueError, match="is damaged: "):
        load(paths[1], big(0.0))
    # A run that goes on neither overwrites nor deletes nor counts it.
    with opened(tmp_path, keep=2) as checkpoints:
        for step in (2, 3, 4):
            checkpoints.save(step, big(float(step)))
    assert all(
        path.read_bytes() == data for path, data in left if path.parent == paths[1]
    )
    assert paths[1].exists()
    found = restored(tmp_path, big(0.0))
    assert found.step == 4
    good = [path for path in tmp_path.iterdir() if path.name.startswith("step")]
    assert sorted(path.name for path in good) == [
        "step-000000000002", "step-000000000003", "step-000000000004"
    ]  # fmt: skip


def test_any_flipped_bit_is_seen(tmp_path):
    (path,) = save_all(tmp_path, [big(1.0)])
    rng = np.random.default_rng(0)
    assert _folders.damage(path) is None
    for file in files(path):
        whole = file.read_bytes()
        for position in {0, len(whole) - 1, *rng.integers(0, len(whole), 20)}:
            flip(file, position, int(rng.integers(8)))
            assert _folders.damage(path), (file, position)
            file.write_bytes(whole)
    for size in range(len((path / "SHA256SUMS").read_bytes())):
        whole = (path / "SHA256SUMS").read_bytes()
        cut(path / "SHA256SUMS", size)
        assert _folders.damage(path)
        (path / "SHA256SUMS").write_bytes(whole)
    assert _folders.damage(path) is None


def test_files_that_others_leave_are_no_damage(tmp_path):
    (path,) = save_all(tmp_path, [big(1.0)])
    (path / ".DS_Store").write_text("x")
    (tmp_path / "notes.txt").write_text("x")
    assert restored(tmp_path, big(0.0)).step == 1


def test_the_step_of_a_damaged_one_is_saved_beside_it(tmp_path):
    (path,) = save_all(tmp_path, [big(1.0)])
    flip(path / "state.json", 10)
    with opened(tmp_path) as checkpoints:
        with pytest.warns(UserWarning, match="damaged"):
            assert checkpoints.restore(big(0.0)) is None
        for _ in range(2):
            checkpoints.save(1, big(2.0), force=True)
    names = sorted(p.name for p in tmp_path.iterdir() if p.is_dir())
    assert names == [path.name, f"{path.name}-2", f"{path.name}-3"]
    assert restored(tmp_path, big(0.0)).step == 1


def test_a_damaged_later_step_does_not_stop_the_run(tmp_path):
    paths = save_all(tmp_path, [big(1.0), big(2.0), big(3.0)])
    flip(paths[2] / "state.json", 10)
    flip(paths[1] / "state.json", 10)
    with opened(tmp_path) as checkpoints:
        with pytest.warns(UserWarning, match="damaged"):
            assert checkpoints.restore(big(0.0)).step == 1
        assert checkpoints.save(2, big(4.0))
    with pytest.warns(UserWarning, match="damaged"):
        assert_same(restored(tmp_path, big(0.0)).state, big(4.0))


def test_damage_does_not_count_as_kept(tmp_path):
    paths = save_all(tmp_path, [big(float(n)) for n in range(4)], keep=None)
    flip(paths[2] / "state.json", 10)
    flip(paths[0] / "state.json", 10)
    with opened(tmp_path, keep=3) as checkpoints:
        checkpoints.save(5, big(5.0))
        checkpoints.wait()
        kept = [1, 2, 3, 4, 5]
        assert sorted(int(p.name[5:]) for p in tmp_path.glob("step*")) == kept
        checkpoints.save(6, big(6.0))
    kept = [1, 3, 4, 5, 6]
    assert sorted(int(p.name[5:]) for p in tmp_path.glob("step*")) == kept


def test_what_a_kill_leaves_is_ignored_and_removed(tmp_path):
    save_all(tmp_path, [big(1.0)])
    left = _folders.temporary(tmp_path)
    (left / "state.json").write_text("{")
    assert restored(tmp_path, big(0.0)).step == 1
    assert not left.exists()


# Refusals.


def test_other_hyperparameters_are_refused_with_a_list(tmp_path):
    save_all(tmp_path, [{"a": 1}])
    other = {"rate": 0.2, "model": {"width": 32, "layers": [1]}, "new": 1}
    with pytest.raises(ValueError, match="is from another run") as caught:
        restored(tmp_path, {"a": 1}, config=other)
    lines = str(caught.value).splitlines()[1:-1]
    assert lines == [
        "  config/model/layers: [1, 2], [1]",
        "  config/name: null, absent",
        "  config/new: absent, 1",
        "  config/rate: 0.1, 0.2",
    ]


@pytest.mark.parametrize("name", ["adamr", "jax", "jaxlib", "optax"])
def test_other_versions_are_refused(tmp_path, monkeypatch, name):
    save_all(tmp_path, [{"a": 1}])
    here = sys.modules[name].__version__
    monkeypatch.setattr(sys.modules[name], "__version__", "99.0")
    with pytest.raises(ValueError, match=f'version/{name}: "{here}", "99.0"'):
        restored(tmp_path, {"a": 1})
    assert load(tmp_path / "step-000000000001", {"a": 0}).state == {"a": 1}


def test_other_settings_of_jax_are_refused(tmp_path):
    save_all(tmp_path, [{"a": 1}])
    with jax.default_matmul_precision("highest"):
        with pytest.raises(ValueError, match="setting/jax_default_matmul_precision"):
            restored(tmp_path, {"a": 1})


def test_other_structures_are_refused_with_a_list(tmp_path):
    state = {"w": jnp.ones((2, 3)), "k": jax.random.key(0), "n": 1, "old": 1, "x": 1.0}
    (path,) = save_all(tmp_path, [state])
    like = {
        "w": jnp.ones((3, 2)),
        "k": jax.random.key(0, impl="rbg"),
        "n": np.int32(1),
        "x": jnp.ones([], jnp.bfloat16),
    }
    for attempt in (lambda: restored(tmp_path, like), lambda: load(path, like)):
        with pytest.raises(ValueError, match="is from another run") as caught:
            attempt()
        assert str(caught.value).splitlines()[1:-1] == [
            '  state/k: "key<fry>[]", "key<rbg>[]"',
            '  state/n: "int", "int32[]"',
            '  state/old: "int", absent',
            '  state/w: "float32[2,3]", "float32[3,2]"',
            '  state/x: "float", "bfloat16[]"',
        ]


def test_a_state_that_could_not_be_restored_is_not_saved(tmp_path):
    with opened(tmp_path) as checkpoints:
        checkpoints.restore({"w": jnp.ones(2), "n": 1})
        with pytest.raises(
            ValueError, match=r'state/w: "float32\[2\]", "float32\[3\]"'
        ):
            checkpoints.save(1, {"w": jnp.ones(3), "n": 1})
    assert not list(tmp_path.glob("step*"))


def test_a_step_before_the_newest_is_refused(tmp_path):
    save_all(tmp_path, [{"a": 1}, {"a": 2}])
    with opened(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match="restore before saving"):
            checkpoints.save(1, {"a": 1})


class Odd:
    pass


@pytest.mark.parametrize(
    "leaf, what",
    [
        (Odd(), "Odd"),
        (b"x", "bytes"),
        (1j, "complex"),
        (np.array(["x"]), "ndarray <U1"),
        (np.ma.masked_array([1], [True]), "MaskedArray"),
        (np.array([None]), "object"),
        (np.array([1], "M8[s]"), "datetime"),
        (np.array([1], "m8[s]"), "timedelta"),
        (np.array([1], ">f4"), ">f4"),
        (np.array([1], np.longdouble), "float128"),
    ],
)
def test_leaves_that_cannot_be_stored(tmp_path, leaf, what):
    with opened(tmp_path) as checkpoints:
        with pytest.raises(TypeError, match=f"{what}.* at 'a/0'"):
            checkpoints.save(1, {"a": [leaf]})


def test_bad_arguments(tmp_path):
    with pytest.raises(TypeError, match="config/a/0 is a float32"):
        opened(tmp_path, {"a": [np.float32(1)]})
    with pytest.raises(TypeError, match="config has the key 1"):
        opened(tmp_path, {1: 2})
    with pytest.raises(TypeError, match="config is a list"):
        opened(tmp_path, [])
    with pytest.raises(ValueError, match="every must be positive, got 0"):
        opened(tmp_path, every=0)
    with pytest.raises(ValueError, match="every must be positive, got 0:00"):
        opened(tmp_path, every=datetime.timedelta(0))
    with pytest.raises(ValueError, match="keep must be at least 1"):
        opened(tmp_path, keep=0)
    with pytest.raises(ValueError, match="expected a local path"):
        opened("gs://bucket/run")
    with opened(tmp_path) as checkpoints:
        with pytest.raises(TypeError, match="metrics/loss is a ArrayImpl"):
            checkpoints.save(1, {"a": 1}, {"loss": jnp.ones(2)})
        with pytest.raises(ValueError, match="step must be at least 0, got -1"):
            checkpoints.save(-1, {"a": 1}, force=True)
    assert not list(tmp_path.glob("step*"))


def test_it_must_be_open(tmp_path):
    checkpoints = opened(tmp_path / "new")
    for _ in range(2):  # before and after
        with pytest.raises(RuntimeError, match="in a with statement"):
            checkpoints.restore({"a": 1})
        with pytest.raises(RuntimeError, match="in a with statement"):
            checkpoints.save(1, {"a": 1})
        with checkpoints:
            pass


# Failures of the disk, other processes, signals.


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="is a file"):
        opened(tmp_path / "file").__enter__()
    with pytest.raises(NotADirectoryError, match="cannot write into the directory"):
        opened(tmp_path / "file" / "below").__enter__()


def test_a_read_only_directory(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(_folders.Path, "mkdir", refuse)
    with pytest.raises(PermissionError, match=f"cannot write into.*{tmp_path}"):
        opened(tmp_path).__enter__()


def full(monkeypatch, part):
    def refuse(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(part[0], part[1], refuse)


@pytest.mark.parametrize(
    "part", [(os, "fsync"), (os, "rename"), (_contents, "orbax")], ids=lambda p: p[1]
)
def test_a_full_disk_is_told_and_earlier_checkpoints_stay(tmp_path, monkeypatch, part):
    save_all(tmp_path, [big(1.0)])
    with pytest.raises(OSError, match=r"step-0*2 could not be written: .*No space"):
        with opened(tmp_path) as checkpoints:
            full(monkeypatch, part)
            checkpoints.save(2, big(2.0))
    monkeypatch.undo()
    with pytest.raises(OSError, match="No space"):  # at the next save, not only on exit
        with opened(tmp_path) as checkpoints:
            full(monkeypatch, part)
            checkpoints.save(2, big(2.0))
            checkpoints._writer.shutdown()
            checkpoints.save(2, big(2.0), force=False)
            pytest.fail("went on")
    monkeypatch.undo()
    assert restored(tmp_path, big(0.0)).step == 1
    assert len(list(tmp_path.iterdir())) == 2  # the lock and step 1: nothing half done


def test_errors_of_the_loop_are_not_hidden_by_a_full_disk(tmp_path, monkeypatch):
    full(monkeypatch, (os, "fsync"))
    with pytest.warns(UserWarning, match="No space"), pytest.raises(ZeroDivisionError):
        with opened(tmp_path) as checkpoints:
            checkpoints.save(1, big(1.0))
            raise ZeroDivisionError
    with pytest.raises(OSError, match="No space"):  # an exit is no error
        with opened(tmp_path) as checkpoints:
            checkpoints.save(1, big(1.0))
            sys.exit()


def test_errors_of_the_loop_leave_a_good_checkpoint(tmp_path):
    with pytest.raises(ZeroDivisionError):
        with opened(tmp_path) as checkpoints:
            checkpoints.save(1, big(1.0))
            raise ZeroDivisionError
    assert restored(tmp_path, big(0.0)).step == 1


HOLD = """
import sys
from pathlib import Path
sys.path.insert(0, {path!r})
import _folders
with _folders.locked(Path({directory!r})):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_another_process_is_kept_out_until_it_ends(tmp_path):
    path = os.path.dirname(_folders.__file__)
    code = HOLD.format(path=path, directory=str(tmp_path))
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(RuntimeError, match="another process saves there"):
            opened(tmp_path).__enter__()
        holder.kill()
    assert restored(tmp_path, {"a": 1}) is None


def test_sigterm_saves_and_ends_the_loop(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with opened(tmp_path, every=100) as checkpoints:
        for step in range(1, 10):
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
                assert not checkpoints.stopping  # nothing is saved yet
            assert checkpoints.save(step, {"a": step}) == (step == 3)
            if checkpoints.stopping:
                break
        assert step == 3
        assert not checkpoints.save(4, {"a": 4})  # once is enough
    assert signal.getsignal(signal.SIGTERM) is before
    assert restored(tmp_path, {"a": 0}).state == {"a": 3}


def test_sigterm_after_the_last_save_is_passed_on(tmp_path):
    passed, before = [], signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *_: passed.append(1))
    try:
        with opened(tmp_path, every=100) as checkpoints:
            checkpoints.save(1, {"a": 1}, force=True)
            signal.raise_signal(signal.SIGTERM)
            assert not passed  # a save may still come
        assert passed == [1]
        with opened(tmp_path, every=100) as checkpoints:
            signal.raise_signal(signal.SIGTERM)
            checkpoints.save(2, {"a": 2})
        assert passed == [1]  # that one was seen
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_threads_leave_signals_alone(tmp_path):
    before, after = signal.getsignal(signal.SIGTERM), []

    def work():
        with opened(tmp_path) as checkpoints:
            after.append(signal.getsignal(signal.SIGTERM))
            checkpoints.save(1, {"a": 1})

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert after == [before]
    assert restored(tmp_path, {"a": 0}).step == 1


def test_saving_goes_on_beside_the_loop(tmp_path, held_back):
    with opened(tmp_path, every=2) as checkpoints:
        assert checkpoints.save(2, {"a": 2})
        assert not checkpoints.save(3, {"a": 3})
        assert not list(tmp_path.glob("step*"))
        held_back.set()
        checkpoints.wait()
        assert len(list(tmp_path.glob("step*"))) == 1


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs /proc")
def test_the_name_appears_last(tmp_path, monkeypatch):
    """At the rename the folder is whole and flushed: sums hold, nothing is open."""
    rename, flushed, seen = os.rename, [], []
    fsync = os.fsync

    def note_sync(handle):
        flushed.append(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    def note_rename(source, target):
        if str(target).endswith("step-000000000001"):
            seen.append(_folders.damage(source))
            inside = {str(p) for p in [source, *source.rglob("*")]}
            assert inside <= set(flushed)
            flushed.clear()
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "rename", note_rename)
    save_all(tmp_path, [big(1.0)])
    assert seen == [None]
    assert flushed == [str(tmp_path)]


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="needs sha256sum")
def test_sums_are_those_of_sha256sum(tmp_path):
    (path,) = save_all(tmp_path, [big(1.0)])
    check = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    assert subprocess.run(check, cwd=path).returncode == 0
    covered = (path / "SHA256SUMS").read_text().count("\n") - 1
    assert covered == len(files(path)) - 1
    assert json.loads((path / "state.json").read_text())["step"] == 1


def test_orbax_is_imported_late(tmp_path, monkeypatch):
    code = "import sys, adamr.checkpoint; sys.exit('orbax.checkpoint' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match=r"adamr-jax\[orbax\]"):
        opened(tmp_path).__enter__()
