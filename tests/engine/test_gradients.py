"""What lives of a block's gradients during the backward pass, and what they come to, on two ranks."""

import pytest
from jobs import launch, whole_lines


@pytest.mark.multiprocess
def test_gradients_go_to_shards_as_they_are_made(tmp_path):
    """Whatever order modules are declared in, experts, norms, what never runs and what is larger than a bucket."""
    path = tmp_path / "found.jsonl"
    finished = launch("hand", 2, [], script="tests/engine/gradients_worker.py", FOUND=str(path))
    assert finished.code == 0, finished.output[-4000:]
    *found, left = whole_lines(path)
    assert [case["checkpointing"] for case in found] == [False, True]
    for case in found:
        bucket, largest = case["bucket_bytes"], case["largest_bytes"]
        assert largest > bucket  # a parameter that buckets split
        assert case["wrong"] == []
        assert case["again"] == []  # the same bits
        assert case["buckets"] > 20
        assert case["bucket_sizes"][:-1] == [bucket] * (case["buckets"] - 1)
        # a bucket that is being filled and one that is on its way; norms, biases and what belongs to one leaf may wait
        waiting = case["small_bytes"] + case["leaf_bytes"]
        assert case["bytes_after_hooks"]["all"] <= 2 * bucket + waiting
        assert case["bytes_after_hooks"]["outside leaves"] <= 2 * bucket + case["small_bytes"]
        assert case["bytes_in_hooks"]["all"] <= 2 * bucket + waiting + largest  # which autograd has just made
        # what never runs, and what its layer uses at any time, goes at the end
        assert case["sent_before_the_last_hook"] >= case["buckets"] - case["at_the_end_bytes"] // bucket - 2
        assert case["saved_by_frozen"] == 6 * ["weight", "bias"]  # linear layers above the block: not their inputs
    assert left == {"left": [True, True, False]}  # a gradient is gone when the bucket with its last part is sent
