"""A bfloat16 value and 16 bits are a float32 master, of whatever value."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from deca_ds.engine.masters import LowBits, add_into, join, join_into, low_bits, round_into, rounded
from deca_ds.errors import ModelError

ALL_16 = torch.arange(2**16, dtype=torch.int32)
EDGES = [0, 1, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF]  # lower halves: ties, and what lies around them
UPPER = [0x0000, 0x0001, 0x007F, 0x0080, 0x3F7F, 0x3F80, 0x7F7E, 0x7F7F, 0x7F80]  # zeros, subnormals, 1, largest, inf


def patterns() -> torch.Tensor:
    """Float32 bits: every upper half with the edges, both signs, and every lower half with some upper ones."""
    upper = torch.tensor(UPPER + [half | 0x8000 for half in UPPER], dtype=torch.int32)
    every_upper = (ALL_16[:, None] << 16) + torch.tensor(EDGES, dtype=torch.int32)
    every_lower = (upper[:, None] << 16) + ALL_16
    return torch.cat([every_upper.flatten(), every_lower.flatten()])


def nearest(bits: torch.Tensor) -> torch.Tensor:
    """What a bfloat16 should be, as its 16 bits: half of its last place is added to the magnitude, the rest cut off."""
    magnitude = bits.long() & 0x7FFFFFFF
    return ((magnitude + 0x8000) >> 16) | (bits.long() >> 16 & 0x8000)


def test_every_kind_of_master_comes_back_bit_for_bit():
    bits = patterns()
    master = bits.view(torch.float32)
    value, low = rounded(master), low_bits(master)
    nan = master.isnan()
    assert 0 < nan.sum() < bits.numel() and torch.equal(value.isnan(), nan)
    back = join(value, low)
    assert torch.equal(back[~nan].view(torch.int32), bits[~nan]) and back[nan].isnan().all()
    stored = value.view(torch.int16).long() & 0xFFFF
    assert torch.equal(stored[~nan], nearest(bits)[~nan])
    # torch's own rounding takes another value at every second tie and nowhere else
    other = (master.to(torch.bfloat16).view(torch.int16) != value.view(torch.int16)) & ~nan
    assert torch.equal(other, ((bits & 0x1FFFF) == 0x8000) & ~nan)


def test_every_value_with_every_low_half_is_another_master():
    """Of the values next to 1, each way from it: 16 bits are used up."""
    value = torch.tensor([0x3F7F, 0x3F80, 0x3F81, -0x4080, -0x407F], dtype=torch.int16).view(torch.bfloat16)
    low = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    master = join(value.repeat_interleave(2**16), low.repeat(5))
    assert torch.equal(rounded(master), value.repeat_interleave(2**16)) and torch.equal(low_bits(master), low.repeat(5))
    assert master.unique().numel() == 5 * 2**16


def test_values_without_low_bits_and_other_types_are_copied():
    master = torch.randn(7)
    value = torch.empty(7)
    round_into(value, master)
    assert torch.equal(value, master) and torch.equal(join(value, None), master)
    half = master.to(torch.bfloat16)
    into = torch.empty(7)
    join_into(into, half, None)
    assert torch.equal(into, half.float())
    assert rounded(torch.randn(4, 3).T).shape == (3, 4)


def test_the_low_bits_of_slices_lie_side_by_side_and_some_are_empty():
    held = LowBits({"a": 5, "b": 0, "c": 3}, pinned=False)
    held["a"].fill_(1)
    held["c"].copy_(low_bits(torch.tensor([1.5, 1 / 3, -2.0])))
    assert list(held) == ["a", "b", "c"] and held["b"].numel() == 0
    assert held["a"].tolist() == [1] * 5 and held["c"][1] == (torch.tensor(1 / 3).view(torch.int32) & 0xFFFF) - 2**16
    assert not LowBits({}, pinned=False)


def test_memory_for_a_gpu_is_page_locked_until_it_goes_or_refused_in_words(monkeypatch):
    locked: dict[int, int] = {}

    def register(address, size, flags):
        if size > 6:
            return 2
        assert flags == 0 and locked.setdefault(address, size) == size
        return 0

    runtime = SimpleNamespace(
        cudaHostRegister=register, cudaHostUnregister=locked.pop, cudaGetErrorString=lambda status: f"error {status}"
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    held = LowBits({"a": 2, "b": 1}, pinned=True)
    assert locked == {held["a"].data_ptr(): 6}
    LowBits({}, pinned=True)
    del held
    assert not locked
    with pytest.raises(ModelError, match=r"(?s)cannot page-lock 0.00 GB .*: error 2.*model.masters.*=rounded"):
        LowBits({"a": 4}, pinned=True)


@pytest.mark.parametrize("size", [1, 2**16 - 1, 2**16 + 1])
def test_values_of_any_size_are_split_and_joined_piece_by_piece(size):
    master = torch.randn(size, generator=torch.Generator().manual_seed(size))
    assert torch.equal(join(rounded(master), low_bits(master)), master)


def test_bfloat16_values_are_added_without_a_float32_copy_of_all():
    generator = torch.Generator().manual_seed(0)
    total, more = torch.randn(3, 70_001, generator=generator), torch.randn(3, 70_001, generator=generator).bfloat16()
    wanted = total + more
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        add_into(total, more)
    allocated = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert torch.equal(total, wanted)
    assert allocated and max(allocated) < total.nbytes / 2
