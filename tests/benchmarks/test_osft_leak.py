"""The leak of OSFT: on a tiny Llama, from its files to the table."""

import json

import jax
import numpy as np
import pytest

import adamr
from benchmarks import osft_leak
from examples.llm.tiny import write_tiny
from examples.streams.domains import DataError, Domain


def text(seed, size):
    return np.random.default_rng(seed).integers(97, 123, size).astype(np.uint8)


@pytest.fixture
def installed(monkeypatch):
    """Text that is there at once."""

    def load(names):
        return [Domain(n, text(1, 4000), text(2, 3000), n, {}) for n in names], []

    monkeypatch.setattr(osft_leak, "load_installed", load)


@pytest.mark.filterwarnings("default::DeprecationWarning")  # of Tunix
def test_what_peft_leaks_and_osft_does_not(installed, tmp_path):
    pytest.importorskip("tunix")
    pytest.importorskip("tokenizers")
    config = osft_leak.Config(
        model=write_tiny(tmp_path / "tiny"),
        steps=3,
        batch=2,
        context=16,
        lr_grid=(1e-2,),
        methods=("peft", "osft"),
        out=tmp_path / "leak.json",
    )
    with jax.numpy_rank_promotion("allow"):
        found = osft_leak.main(config)
    assert json.loads(config.out.read_text())["rows"] == found["rows"]
    assert found["kernels"] == 14  # seven a layer, and neither embedding nor norm
    peft, osft = found["rows"]
    assert min(peft[key] for key in ("leak", "leak_inside", "leak_outside")) > 0.05
    assert max(osft[key] for key in ("leak", "leak_inside", "leak_outside")) < 1e-5
    assert osft["moved"] < 1e-5 < 1e-3 < peft["moved"]
    for row in found["rows"]:
        assert row["learned"] != found["before"]["learned"]


def test_a_method_that_is_not_known(installed):
    kernels = osft_leak.Kernels({}, {}, [], lambda *_: None)
    config = osft_leak.Config(methods=("osft", "lora"))
    with pytest.raises(DataError, match="--methods: got 'lora', expected some"):
        list(osft_leak.methods(kernels, (adamr.Subspace((), ()),) * 2, config))
