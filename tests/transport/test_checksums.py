"""Messages with checksums, over a network that damages some."""

from __future__ import annotations

import pytest
import torch
from gossip_worker import mix
from hypothesis import given
from hypothesis import strategies as st

from deca_ds.config.schema import GossipConfig
from deca_ds.errors import MessageError
from deca_ds.gossip.gossip import Gossip
from deca_ds.gossip.schedule import build_mixing
from deca_ds.gossip.strategies import begin
from deca_ds.transport.checksums import checksum
from deca_ds.transport.local import LocalNetwork, LocalTransport

TAG = 5


def pair(checksums: bool = True) -> tuple[LocalNetwork, LocalTransport, LocalTransport]:
    network = LocalNetwork(2, timeout_s=100)
    ends = network.transport(0), network.transport(1)
    for end in ends:
        end.checksums = checksums
    return network, *ends


@given(
    numel=st.integers(1, 50),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8]),
    bits=st.sets(st.integers(0, 1_000_000), max_size=3),
)
def test_any_damage_of_up_to_three_bits_is_found_and_its_sender_named(numel, dtype, bits):
    network, sender, receiver = pair()
    sent, buffer = torch.arange(numel).to(dtype), torch.empty(numel, dtype=dtype)
    sender.exchange(sent, [1], {}, TAG).wait()
    values = network.mailboxes[0, 1, TAG].messages[0].view(torch.uint8)
    flipped = {bit % (8 * values.numel()) for bit in bits}
    for bit in flipped:
        values[bit // 8] ^= 1 << bit % 8
    started = receiver.exchange(buffer[:0], [], {0: buffer}, TAG)
    if flipped:
        with pytest.raises(MessageError, match=r"message from rank 0 .client 0. was damaged.*tag 5"):
            started.wait()
        with pytest.raises(MessageError, match="client 0"):  # nor does it count when it is asked again
            started.test()
    else:
        assert started.test()
        started.wait()
        assert torch.equal(buffer, sent)


def test_a_damaged_checksum_is_a_damaged_message():
    network, sender, receiver = pair()
    sender.exchange(torch.zeros(3), [1], {}, TAG)
    network.mailboxes[0, 1, TAG].messages[1] += 1
    with pytest.raises(MessageError, match="client 0"):
        receiver.exchange(torch.empty(0), [], {0: torch.empty(3)}, TAG).wait()


def test_an_averaging_refuses_a_damaged_chunk_that_would_pass_for_a_finite_one():
    for checksums in (True, False):
        network, sender, receiver = pair(checksums)
        mixing = build_mixing(GossipConfig(), 2, seed=0)
        there = Gossip(sender, mixing)
        begin(there, 0).send(there.chunks([4])[0], "x", torch.ones(4))
        (message,) = (box.messages[0] for (source, *_), box in network.mailboxes.items() if source == 0)
        message[0] += 1
        if checksums:
            with pytest.raises(MessageError, match="client 0"):
                mix(Gossip(receiver, mixing), 0, torch.ones(4))
        else:
            assert mix(Gossip(receiver, mixing), 0, torch.ones(4)).tolist() == [1.5, 1, 1, 1]


def test_nothing_is_added_where_nobody_is_on_the_other_end():
    network, sender, _ = pair()
    sender.exchange(torch.zeros(3), [], {}, TAG).wait()
    assert sender.bytes_sent == 0 and not network.mailboxes


def test_the_checksum_is_xxh3_of_the_memory():
    """Known values of XXH3 with 64 bits and no seed, in the order of bytes that is the same on all hosts."""
    assert checksum(torch.empty(0)).hex() == "2d06800538d394c2"
    assert checksum(torch.tensor(list(b"a"), dtype=torch.uint8)).hex() == "e6c632b61e964e1f"
    assert checksum(torch.tensor([97.0], dtype=torch.bfloat16)) == checksum(torch.tensor([0xC2, 0x42]).to(torch.uint8))
