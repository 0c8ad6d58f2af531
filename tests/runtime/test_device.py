"""Devices by name, seeds, and random state that comes back."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.networks import tiny

from advalign.errors import UserError
from advalign.runtime.device import autocast, pick_device, to_device
from advalign.runtime.environment import environment
from advalign.runtime.seeds import derive_seed, seeded


def machine(monkeypatch: pytest.MonkeyPatch, *, gpus: int = 0, mps: bool = False) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("gpus", "mps", "name", "device"),
    [
        (0, False, "auto", "cpu"),
        (2, False, "auto", "cuda"),
        (0, True, "auto", "mps"),
        (2, False, "cpu", "cpu"),
        (2, False, "cuda:1", "cuda:1"),
        (1, False, "cuda", "cuda"),
        (0, True, "mps", "mps"),
    ],
)
def test_pick_device(gpus: int, mps: bool, name: str, device: str, monkeypatch: pytest.MonkeyPatch):
    machine(monkeypatch, gpus=gpus, mps=mps)
    assert pick_device(name) == torch.device(device)


@pytest.mark.parametrize(
    ("gpus", "name", "words"),
    [
        (0, "cuda", "device 'cuda' is not available on this machine; use 'auto' or 'cpu'"),
        (0, "cuda:0", "'cuda:0' is not available"),
        (0, "mps", "'mps' is not available"),
        (2, "cuda:2", "device 'cuda:2' does not exist: this machine has 2 GPUs"),
        (1, "gpu", "unknown device 'gpu': did you mean 'cpu'? choose from auto, cpu, cuda, mps"),
        (1, "", "unknown device ''"),
        (1, "tpu", "choose from auto, cpu, cuda, mps"),
        (1, "cuda:", "unknown device 'cuda:'"),
        (1, "cpu:", "unknown device 'cpu:'"),
        (1, "cuda:one", "unknown device 'cuda:one'"),
        (1, "cuda:-1", "unknown device 'cuda:-1'"),
        (1, "cuda:²", "unknown device 'cuda:²'"),
        (1, "auto:0", "unknown device 'auto:0'"),
    ],
)
def test_pick_device_refuses(gpus: int, name: str, words: str, monkeypatch: pytest.MonkeyPatch):
    machine(monkeypatch, gpus=gpus)
    with pytest.raises(UserError) as caught:
        pick_device(name)
    assert words in str(caught.value)


def test_mixed_seeds_differ_in_every_part_and_place():
    parts = [0, 1, 2, 10, 12, "", "0", "1", "pgd", "pgd(steps=20)"]
    tuples = [(), *itertools.chain.from_iterable(itertools.product(parts, repeat=n) for n in (1, 2, 3))]
    seeds = [derive_seed(*each) for each in tuples]
    assert len(set(seeds)) == len(tuples)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_derived_seeds_are_the_same_on_every_machine():
    """Golden: another hash, or Python's own salted one, would change every run."""
    assert derive_seed(0, 0, 0) == 7519334944260373035
    assert derive_seed(1, 2, "pgd(steps=20)") == 3952752627770021351


@given(st.integers(0, 2**40))
def test_neighbouring_seeds_are_unrelated(seed: int):
    changed = bin(derive_seed(seed) ^ derive_seed(seed + 1)).count("1")
    assert 8 <= changed <= 55  # of 63 bits; 31.5 +- 4 by chance


def test_seeded_draws_by_its_parts_and_leaves_the_global_state():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    draws = {}
    for parts in [(0, "pgd"), (1, "pgd"), (0, "mim"), (0, "pgd")]:
        with seeded(*parts):
            drawn = torch.rand(4)
        assert torch.equal(draws.setdefault(parts, drawn), drawn)
        assert torch.equal(torch.get_rng_state(), before)
    assert len({tuple(drawn.tolist()) for drawn in draws.values()}) == 3


def test_seeded_leaves_the_global_state_after_an_error():
    before = torch.get_rng_state()

    def fail() -> None:
        with seeded(0):
            torch.rand(4)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_seeded_leaves_every_gpu_as_it_was():
    before = torch.cuda.get_rng_state_all()
    with seeded(0):
        torch.rand(4, device="cuda")
    assert all(torch.equal(now, then) for now, then in zip(torch.cuda.get_rng_state_all(), before, strict=True))


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision(precision: str, dtype: torch.dtype):
    with autocast(torch.device("cpu"), precision):
        assert tiny(0)(torch.rand(2, 3, 8, 8)).dtype == dtype


def test_place_changes_the_layout_and_not_the_function():
    net, x = tiny(0).eval(), torch.rand(2, 3, 8, 8)
    before = net(x)
    placed = to_device(net, torch.device("cpu"))
    assert placed is net
    assert net.get_parameter("layer2.0.weight").is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(net(x), before)


def test_environment_names_the_versions():
    found = environment()
    assert found["torch"] == torch.__version__
    assert all(isinstance(value, str) for value in found.values())
    assert found["advalign"]
    assert found["device"]
