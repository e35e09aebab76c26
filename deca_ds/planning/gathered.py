"""How many elements ZeRO-3 has gathered at a time on a rank during a pass of one micro-batch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

# of DeepSpeed, where the user's JSON says nothing else
_PREFETCH, _REUSE = 50_000_000, 1_000_000_000


def peak_gathered(
    calls: Sequence[Sequence[str]], sizes: Mapping[str, int], trained: Collection[str], zero: Mapping[str, Any]
) -> int:
    """Elements. calls: the parameters of every module, in the order of the forward pass. sizes: elements by parameter.
    trained: of the active block, below which no backward pass goes. zero: DeepSpeed's section zero_optimization.

    A parameter stays if a module within the next stage3_max_reuse_distance elements uses it again; of those to come,
    stage3_prefetch_bucket_size elements are gathered ahead.
    """
    reuse = _whole(zero.get("stage3_max_reuse_distance"), _REUSE)
    prefetch = _whole(zero.get("stage3_prefetch_bucket_size"), _PREFETCH)
    first = next((k for k, call in enumerate(calls) if not set(call).isdisjoint(trained)), len(calls))
    steps = [*calls, *reversed(calls[first:])]
    live: set[str] = set()
    now = most = 0
    for place, call in enumerate(steps):
        now += sum(sizes[name] for name in call if name not in live)
        live.update(call)
        most = max(most, now)
        released, passed = set(call), 0
        for later in steps[place + 1 :]:
            if passed >= reuse or not released:
                break
            released -= set(later)
            passed += sum(sizes[name] for name in later)
        live -= released
        now -= sum(sizes[name] for name in released)
    return min(most + prefetch, sum(sizes[name] for name in {name for call in calls for name in call}))


def _whole(value: object, default: int) -> int:
    return int(value) if isinstance(value, int | float) else default  # else "auto"
