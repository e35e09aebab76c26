"""How long a step takes on a GPU: a roofline of arithmetic, memory and links. It has never been checked on a GPU."""

from __future__ import annotations

import re
from dataclasses import dataclass

from deca_ds.errors import ConfigError

# assumed shares of the vendor's rates that large products, memory and links reach, and of memory that tensors can have
ARITHMETIC, MEMORY, LINK, USABLE = 0.4, 0.8, 0.8, 0.95


@dataclass(frozen=True)
class Gpu:
    """What the vendor promises, dense and without sparsity. memory: bytes that nvidia-smi shows. bf16, fp32: operations
    a second of tensor cores with float32 sums, and of float32 without TF32. bandwidth: of memory, bytes a second. link:
    between GPUs of a host, in one direction, bytes a second: NVLink, or PCIe where there is none. pcie: to the host."""

    memory: int
    bf16: float
    fp32: float
    bandwidth: float
    link: float
    pcie: float


_MIB = 2**20
# docs/memory.md names the sheets
# memory: nvidia-smi's output, as people post it
GPUS: dict[str, Gpu] = {
    "H200": Gpu(143_771 * _MIB, 989e12, 67e12, 4.8e12, 450e9, 64e9),
    "H100": Gpu(81_559 * _MIB, 989e12, 67e12, 3.35e12, 450e9, 64e9),
    "H100-PCIe": Gpu(81_559 * _MIB, 756e12, 51e12, 2.0e12, 64e9, 64e9),
    "A100": Gpu(81_920 * _MIB, 312e12, 19.5e12, 2.039e12, 300e9, 32e9),
    "A100-40GB": Gpu(40_960 * _MIB, 312e12, 19.5e12, 1.555e12, 300e9, 32e9),
    "L40S": Gpu(46_068 * _MIB, 362e12, 91.6e12, 864e9, 32e9, 32e9),
    "L4": Gpu(23_034 * _MIB, 121e12, 30.3e12, 300e9, 32e9, 32e9),
    "RTX4090": Gpu(24_564 * _MIB, 165.2e12, 82.6e12, 1.008e12, 32e9, 32e9),
    "RTX3090": Gpu(24_576 * _MIB, 71e12, 35.6e12, 936e9, 32e9, 32e9),
}


def find_gpu(name: str) -> tuple[str, Gpu]:
    """Return a GPU, and its name as it is written here. Raises ConfigError for an unknown name."""
    for known, gpu in GPUS.items():
        if known.lower() == name.lower():
            return known, gpu
    raise ConfigError(f"the plan does not know a GPU {name!r}", where="--gpu", fix=f"give one of {', '.join(GPUS)}")


def read_rate(text: str) -> float:
    """Convert a rate in bits, such as 10G, 400M or 2.5G, to bytes a second. Raises ConfigError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([MGT])(?:bit/s|bps)?", text.strip(), re.IGNORECASE)
    if found is None or not float(found[1]):
        raise ConfigError(f"{text!r} is no rate of a network", where="--net", fix="give bits a second, such as 10G")
    return float(found[1]) * {"m": 1e6, "g": 1e9, "t": 1e12}[found[2].lower()] / 8


@dataclass(frozen=True)
class Work:
    """The work of one rank in one inner step. flops: operations. moved: the least bytes that its GPU's memory reads and
    writes. gathered: bytes that ZeRO-3 brings from other ranks. fetched: bytes that it brings from the host, with
    offload. spans: whether a client spans hosts, so that gathered bytes cross the network. messages: bytes of gossip
    that leave the client's host, averaged over steps. copied: bytes of gossip between this GPU and its host."""

    flops: float
    moved: float
    gathered: float
    fetched: float
    spans: bool
    messages: float
    copied: float


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step. compute: the longer of arithmetic and memory. zero3, gossip: the part not hidden behind it."""

    compute: float
    zero3: float
    gossip: float

    @property
    def step(self) -> float:
        return self.compute + self.zero3 + self.gossip


def step_time(work: Work, gpu: Gpu, net: float | None, dtype: str) -> StepTime:
    """Estimate the time of a step. net: bytes a second between hosts; with None gossip takes no time, and ZeRO-3's
    messages stay on a host.

    ZeRO-3 gathers while the previous layer computes, so only what takes longer than that counts.
    """
    peak = gpu.bf16 if dtype == "bfloat16" else gpu.fp32
    compute = max(work.flops / (ARITHMETIC * peak), work.moved / (MEMORY * gpu.bandwidth))
    link = net if work.spans and net is not None else gpu.link
    gathering = work.gathered / (LINK * link) + work.fetched / (LINK * gpu.pcie)
    gossip = work.copied / (LINK * gpu.pcie) + (0.0 if net is None else work.messages / (LINK * net))
    return StepTime(compute, max(0.0, gathering - compute), gossip)


def pass_flops(
    matrices: float, *, above: float, block: float, attention: float, attention_above: float, tokens: float, again: bool
) -> float:
    """Count the operations of a forward and a backward pass over `tokens`.

    matrices: elements of all matrices that multiply a token. block, above: the same of the active block, and of the
    layers after it, through which gradients of activations pass. attention, attention_above: operations per token for
    attention scores in the forward pass, of all layers and of those from the block on. again: whether the forward pass
    from the block on is computed twice (gradient checkpointing).
    """
    forward = 2 * matrices + attention
    back = 2 * above + 4 * block + 2 * attention_above
    repeated = 2 * (above + block) + attention_above if again else 0.0
    return tokens * (forward + back + repeated)
