"""What one rank holds, part by part: bytes, where they are, and at which moments of a run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from deca_ds.engine.client import BUCKET_NUMEL
from deca_ds.engine.dry_pass import PassMemory
from deca_ds.gossip.strategies import WINDOW
from deca_ds.planning.gathered import Gathered
from deca_ds.transport.collectives import PIECES_AT_A_TIME, REDUCE_PIECE

Place = Literal["gpu", "host"]
# of a block's activation, in order: between steps; the passes of a micro-batch, during which layers arrive; the
# reduction of the last gradients; and what comes after it
MOMENTS = (
    "rest", "forward", "loss", "backward", "arrival", "reduction", "gossip", "evaluation", "mean model", "checkpoint",
)  # fmt: skip
PASSES = ("forward", "loss", "backward", "arrival")

BETWEEN_PASSES = tuple(moment for moment in MOMENTS if moment not in PASSES)

ACTIVATIONS = "activations kept for backward"
KEPT = "freed by passes, kept by the C library"

PROCESS = 470_000_000  # host memory of a process with its libraries, measured: benchmarks/results/client_memory.json
CONTEXT = 1 << 30  # assumed: a GPU's context and the workspaces of cuBLAS and NCCL


@dataclass(frozen=True)
class Part:
    """A part of a rank's memory. where: "gpu" or "host"; all parts of a run on CPUs are on the host. when: the moments
    of MOMENTS at which it is there."""

    name: str
    bytes: int
    where: Place
    when: tuple[str, ...] = MOMENTS


@dataclass(frozen=True)
class Shape:
    """What the memory of a rank depends on, in a client of k = `ranks` ranks, over which parameters are divided.

    trained, frozen: elements of the client. width: bytes of an element of the model. state_bytes: bytes of state of an
    element of the active block. low_halves: whether the host keeps the low halves of masters. offload: whether the
    model's shard is on the host. rounding: bytes that page-locking adds to it there. sources: the most clients that an
    averaging receives from. travels, wire: the number of tensors that an averaging sends, and bytes of an element.
    chunk: elements. whole: whether a rank receives all of an averaging before it makes the means. kept: whether it
    keeps all means. copied: whether it copies what it sends. buffers: bytes.
    """

    ranks: int
    gpu: bool
    width: int
    trained: int
    frozen: int
    buffers: int
    state_bytes: int
    low_halves: bool
    offload: bool
    rounding: int
    sources: int
    travels: int
    wire: int
    chunk: int
    whole: bool
    kept: bool
    copied: bool
    mean_model: bool


def parts(
    shape: Shape, block: int, passes: PassMemory, gathered: Gathered, scoring: int, largest_call: int
) -> list[Part]:
    """List the parts while a block of `block` elements is active. gathered: in a training pass. largest_call: the
    fewest elements that ZeRO-3 has to gather at a time in an evaluation. scoring: bytes of an evaluation's pass."""
    k = shape.ranks
    near: Place = "gpu" if shape.gpu else "host"
    shard = _share(block, k)
    model = shape.width * _share(shape.trained + shape.frozen, k)
    low = 2 * _share(shape.trained, k) if shape.low_halves else 0
    found = [
        Part("model shard", model + shape.rounding, "host" if shape.offload else near),
        Part("model buffers", shape.buffers, near),
        Part("active block: float32 state", shape.state_bytes * shard, near),
        Part("low halves of masters", low, "host"),
        Part(ACTIVATIONS, passes.saved, near, PASSES),
        Part("temporaries of the forward pass", passes.forward - passes.saved, near, ("forward", "arrival")),
        Part("logits, loss and their gradients", passes.loss - passes.saved, near, ("loss",)),
        Part("gradients and temporaries", max(0, passes.backward - passes.saved), near, ("backward",)),
        Part("evaluation: activations, logits", scoring, near, ("evaluation", "mean model")),
        Part(KEPT, passes.kept, "host", BETWEEN_PASSES),
    ]
    if k > 1 or shape.offload:
        found += [
            Part("gathered layers", shape.width * gathered.most, near, PASSES),
            Part("layers that are still gathered", shape.width * gathered.end, near, ("reduction",)),
            Part("evaluation: gathered layers", shape.width * largest_call, near, ("evaluation", "mean model")),
        ]
    if k > 1:
        found += _buckets(shape, block, near)
    if k > 1 and not shape.gpu:
        arriving = shape.width * (gathered.arriving - gathered.most)
        found.append(Part("gloo: copies of layers that arrive", arriving, "host", ("arrival",)))
    found += _gossip(shape, shard, near)
    if shape.mean_model:
        trained = _share(shape.trained, k)
        pieces = 4 * PIECES_AT_A_TIME * min(REDUCE_PIECE, trained)
        found.append(Part("mean model: copy and pieces", shape.width * trained + pieces, "host", ("mean model",)))
    written = shape.state_bytes * shard + shape.width * _share(shape.trained, k) + low
    found.append(Part("checkpoint: copies to write", written, "host", ("checkpoint",)))
    found.append(Part("process", PROCESS, "host"))
    if shape.gpu:
        found.append(Part("CUDA and its libraries (assumed)", CONTEXT, "gpu"))
    return [part for part in found if part.bytes]


def _buckets(shape: Shape, block: int, near: Place) -> list[Part]:
    """List the buckets: the backward pass fills one while the previous one travels; the last one travels alone, when
    activations are gone."""
    first = min(BUCKET_NUMEL, block)
    filling = min(BUCKET_NUMEL, block - first) or first
    travels = ("backward", "reduction") if block > first else ("reduction",)
    found = [
        Part("gradient bucket that is filled", 4 * filling, near, ("backward",)),
        Part("gradient bucket under way, its sum", 4 * (first + first // shape.ranks), near, travels),
    ]
    if not shape.gpu:
        found.append(Part("gloo: copy of the bucket under way", 4 * first, "host", travels))
    return found


def _gossip(shape: Shape, shard: int, near: Place) -> list[Part]:
    if not shape.sources:
        return []
    full, rest = divmod(shard, shape.chunk)
    messages = ([shape.chunk] * full + [rest] * (rest > 0)) * shape.travels
    under_way = messages if shape.whole else sorted(messages, reverse=True)[:WINDOW]
    buffers = sum(page_locked(shape.wire * numel) if shape.gpu else shape.wire * numel for numel in under_way)
    received = buffers * (shape.sources + shape.copied)
    means = sum(messages) if shape.kept else min(shape.chunk, shard)
    found = [
        Part("gossip: receive buffers", received, "host"),
        Part("gossip: means", 4 * means, near),
    ]
    if shape.gpu:  # a chunk's values, of the neighbours and of the client itself
        terms = 4 * min(shape.chunk, shard) * (1 + shape.sources)
        found.append(Part("gossip: a chunk's terms", terms, near, ("gossip",)))
    return found


def page_locked(size: int) -> int:
    """Return the bytes of host memory that torch takes for `size` bytes of a page-locked tensor: the next power of two
    (CachingHostAllocatorImpl::allocate in ATen/core/CachingHostAllocator.h)."""
    return 1 << (size - 1).bit_length() if size else 0


def totals(found: Iterable[Part], where: Place) -> dict[str, int]:
    """Add up the bytes at each moment."""
    here = [part for part in found if part.where == where]
    return {moment: sum(part.bytes for part in here if moment in part.when) for moment in MOMENTS}


def peak(found: Iterable[Part], where: Place) -> tuple[str, int]:
    """Return the moment that takes most, and its bytes."""
    return max(totals(found, where).items(), key=lambda item: item[1])


def _share(elements: int, ranks: int) -> int:
    return -(-elements // ranks)
