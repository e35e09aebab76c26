"""Every configuration key: its type, its default and the sentence that explains it. Each key works and is tested.

`Config` is an OmegaConf structured schema: `deca_ds.config.load` merges a YAML file and a dotlist into it and refuses
unknown keys and wrong types. `docs/make_reference.py` writes docs/configuration.md from it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Optional

from deca_ds.config.data import DataConfig
from deca_ds.config.key import at_least, inside, key, more_than, or_null
from deca_ds.config.monitoring import CheckpointConfig, EvaluationConfig, LoggingConfig

# OmegaConf reads the annotations at run time: Optional[...] and Literal[...] stay spelt out.
# ruff: noqa: RUF009, UP045


@dataclass
class RunConfig:
    """One run: where it writes, which device computes, and its seed."""

    output: str = key(
        "runs/deca", "New folder for metrics, tables, the resolved configuration and the trained shards.", "output.md"
    )
    resume: Literal["never", "auto", "require"] = key(
        "never",
        "Whether the run in `run.output` continues from its newest checkpoint: `never`; `auto`, if it has one; or "
        "`require`, which refuses to start without one.",
        "checkpoints.md",
    )
    seed: int = key(
        0,
        "Seed of the partition, the data order, random blocks, random graphs and random weights.",
        allowed=inside("[0, 2147483647]"),
    )
    device: Literal["auto", "cpu", "cuda"] = key(
        "auto", "Device that computes; `auto` takes `cuda` where torch sees a GPU and `cpu` elsewhere."
    )
    threads: Optional[int] = key(
        None,
        "CPU threads of a rank; `null`: `OMP_NUM_THREADS`, or its share of the cores.",
        allowed=or_null(at_least(1)),
    )


@dataclass
class ClusterConfig:
    """Who trains: n clients, each a ZeRO-3 world of its own, and what happens when one of them fails."""

    clients: int = key(
        1,
        "Number of clients n; it divides the number of launched ranks unless `cluster.ranks` is set.",
        allowed=at_least(1),
    )
    ranks: Optional[list[int]] = key(
        None,
        "Number of ranks of each client, in order, such as `[2, 1, 1]`; `null` divides the launched ranks equally.",
        "launching.md#clients-of-different-sizes",
    )
    transport: Literal["auto", "mpi", "torch"] = key(
        "auto",
        "What carries messages between clients; `auto` takes `mpi` if all ranks are in one MPI world and `torch` "
        "otherwise.",
        "launching.md#transports",
    )
    timeout_s: float = key(
        600.0,
        "Seconds after which a rank ends the job if neither it nor any rank that it waits for has made progress.",
        "failures.md#no-wait-is-silent-or-endless",
        allowed=more_than(0),
    )
    meet_s: float = key(
        60.0,
        "Seconds that the ranks that have started wait for the others at the start, until the job ends and names the "
        "hosts that are silent.",
        "launching.md#hosts-that-do-not-start",
        allowed=more_than(0),
    )
    on_failure: Literal["stop", "continue"] = key(
        "stop",
        "What the job does when a client dies or hangs during training: `stop`, or `continue` without that client, "
        "which not every launcher allows.",
        "failures.md#when-a-client-dies",
    )
    absent: list[int] = key(
        [],
        "With `cluster.on_failure=continue` over torch: clients that do not start with the others; each may come later "
        "with `--join`.",
        "failures.md#when-a-client-comes-late",
    )
    min_clients: int = key(
        2,
        "With `cluster.on_failure=continue`: with fewer clients than this, the job saves a checkpoint and stops.",
        allowed=at_least(1),
    )
    on_partition: Literal["stop", "continue"] = key(
        "stop",
        "With `cluster.on_failure=continue`: what the job does when the graph no longer connects the clients that are "
        "left: `stop` after a checkpoint, or `continue` with each part by itself.",
    )
    return_s: float = key(
        0.0,
        "With `cluster.on_failure=continue` over torch: seconds for which a client that was cut off, or is in the "
        "smaller part of a split network, tries to return by itself; with 0 the client ends and the part continues.",
        "failures.md#when-the-network-splits",
        allowed=at_least(0),
    )
    allow_mixed_versions: bool = key(
        False, "Only warn about ranks that run other versions of Python or of a library, instead of refusing to start."
    )


@dataclass
class ModelConfig:
    """The causal language model. [Models](models.md) says what is checked."""

    path: str = key("???", "A Hugging Face model directory or hub name.")
    revision: Optional[str] = key(None, "Revision on the hub.")
    tokenizer: Optional[str] = key(None, "A tokenizer directory or hub name; `null` takes the model's tokenizer.")
    init: Literal["pretrained", "random"] = key(
        "pretrained", "Where the weights come from; `random` reads only the architecture from `model.path`."
    )
    dtype: Literal["float32", "bfloat16"] = key(
        "float32", "Data type of the model; masters and moments are always float32."
    )
    masters: Literal["exact", "rounded"] = key(
        "exact",
        "For a bfloat16 model, what happens to a block's float32 masters between its activations: the host keeps them "
        "`exact`, for 2 bytes per parameter / k, or they are `rounded` to the model's values.",
        "algorithm.md#masters-of-a-bfloat16-model",
    )
    attention: Optional[str] = key(
        None, "`eager`, `sdpa`, `flash_attention_2` and so on; `null` leaves the choice to transformers."
    )
    gradient_checkpointing: bool = key(False, "Recompute activations in the backward pass.")
    trust_remote_code: bool = key(
        False, "Run the modelling code that comes with the model; only for authors whom you trust."
    )


@dataclass
class BlocksConfig:
    """How the parameters are split into disjoint blocks."""

    layers_per_block: Optional[int] = key(
        2, "Consecutive layers in a block; `null` makes the whole model one block.", allowed=or_null(at_least(1))
    )
    order: Literal["ascending", "descending", "random"] = key(
        "ascending", "Order of the blocks in a round; `random` shuffles them anew in every round."
    )
    outside: Literal["own", "joined", "frozen"] = key(
        "own",
        "Where parameters outside the layers belong (embeddings, final norm, head): in blocks of their `own`, `joined` "
        "to the first and the last block, or nowhere, because they are `frozen`.",
        "algorithm.md#blocks",
    )


@dataclass
class AlgorithmConfig:
    """The method and its inner step; the equations are in deca_ds/algorithm."""

    method: str = key("deca", "Training method.", "algorithm.md#methods")
    rounds: Optional[int] = key(
        None,
        "Number of rounds (T), in each of which every block is active once; `null` takes 4, or as many as "
        "`algorithm.epochs` needs.",
        allowed=or_null(at_least(1)),
    )
    epochs: Optional[float] = key(
        None,
        "Instead of `algorithm.rounds`: how often the clients go over their data, rounded up to whole rounds.",
        "algorithm.md#length",
        allowed=or_null(more_than(0)),
    )
    inner_steps: int = key(48, "Number of consecutive steps for which a block is active (R).", allowed=at_least(1))
    signal: str = key(
        "descent",
        "What Adam's moments take in from an averaging (block-wise moment approximation).",
        "algorithm.md#the-signal",
    )
    a1: float = key(0.9, "Decay of the first moment when it takes in the local gradient.", allowed=inside("[0, 1)"))
    a2: float = key(0.999, "Decay of the second moment when it takes in the local gradient.", allowed=inside("[0, 1)"))
    b1: float = key(0.9, "Decay of the first moment when it takes in the signal.", allowed=inside("[0, 1]"))
    b2: float = key(
        0.99,
        "Decay of the second moment when it takes in the signal.",
        allowed=inside("[0, 1)", "with 1 the second moment takes no signal and the run diverges"),
    )
    correction: float = key(
        0.9, "Part of what an averaging has changed that the next step repeats.", allowed=inside("[0, 1]")
    )
    eps: float = key(1e-8, "Number that Adam adds to the root of the second moment.", allowed=more_than(0))
    outer_lr: float = key(0.7, "Learning rate of the outer step.", allowed=more_than(0))
    outer_momentum: float = key(0.9, "Momentum of the outer step.", allowed=inside("[0, 1)"))


@dataclass
class LoraConfig:
    """The adapters of `algorithm.method=dec-lora`. A linear layer's weight W acts as W + alpha / rank B A.

    The method needs the extra `lora` and `blocks.layers_per_block=null`: all adapters together are the one block that
    trains and travels, and the model below them stays as it was loaded. `gossip.every` is the number of local steps.
    """

    rank: int = key(8, "Number of rows of A and of columns of B.", allowed=at_least(1))
    alpha: float = key(16.0, "Factor alpha in alpha / rank, which scales what an adapter adds.", allowed=more_than(0))
    target_modules: list[str] = key(
        [],
        "Linear layers that get an adapter, by their full names or by the ends of these (`q_proj`); an empty list "
        "means all linear layers inside the transformer's layers.",
    )
    dropout: float = key(0.0, "Dropout on the adapters' input during training.", allowed=inside("[0, 1)"))


@dataclass
class OptimizerConfig:
    """The local step: learning rate, its schedule, weight decay and gradient clipping."""

    lr: float = key(5e-5, "Peak learning rate.", allowed=at_least(0))
    schedule: Literal["constant", "linear", "cosine"] = key(
        "cosine", "How the learning rate changes over the inner steps of the run, after the warm-up."
    )
    warmup_steps: int = key(
        0, "Inner steps at the start of the run in which the learning rate rises linearly from 0.", allowed=at_least(0)
    )
    final_lr_ratio: float = key(
        0.0,
        "What the schedules `linear` and `cosine` fall to, as a multiple of `optimizer.lr`; they reach it one step "
        "after the last, so that no step has a rate of 0.",
        allowed=inside("[0, 1]"),
    )
    weight_decay: float = key(
        0.0,
        "Decoupled weight decay; it leaves out norms and biases (parameters of one dimension) and every parameter "
        "that gets no gradient in a step.",
        allowed=at_least(0),
    )
    clip_norm: float = key(
        1.0,
        "Largest 2-norm of the active block's gradient, which is scaled down to it; 0 switches clipping off.",
        allowed=at_least(0),
    )


@dataclass
class GossipConfig:
    """Which clients average with each other, how often and with which weights."""

    graph: Literal[
        "ring",
        "complete",
        "star",
        "torus",
        "hypercube",
        "exponential",
        "one_peer_exponential",
        "base",
        "random_pairs",
        "erdos_renyi",
        "bipartite",
        "edge_list",
        "isolated",
    ] = key(
        "base",
        "Communication graph of the clients; with `isolated` every client trains alone.",
        "algorithm.md#graphs",
    )
    degree: int = key(
        1,
        "For the graph `base`: largest number of neighbours that a client averages with at a time (k).",
        allowed=at_least(1),
    )
    weights: Literal["metropolis", "max_degree", "lazy_metropolis"] = key(
        "metropolis", "Rule that makes the mixing matrix W from the graph."
    )
    matrix: Optional[str] = key(
        None, "A file with a mixing matrix of your own, n lines of n numbers, which replaces graph and weights."
    )
    edges: Optional[str] = key(None, "For the graph `edge_list`: a file with two client numbers per line.")
    edge_probability: float = key(
        0.5,
        "For the graph `erdos_renyi`: the probability of each edge; the graph is drawn from `run.seed` until it is "
        "connected.",
        allowed=inside("(0, 1]"),
    )
    every: int = key(1, "Number of inner steps from one averaging to the next (s).", allowed=at_least(1))
    clip_radius: Optional[float] = key(
        None,
        "Largest 2-norm of the difference between a neighbour's block and the client's own, which is scaled down "
        "to it; `null` switches clipping off.",
        "algorithm.md#clipping",
        allowed=or_null(more_than(0)),
    )
    wait_s: Optional[float] = key(
        None,
        "Seconds for which a client waits for a late neighbour before both average without each other; `null` waits "
        "until `cluster.timeout_s` ends the job.",
        "failures.md#when-a-client-is-late",
        allowed=or_null(more_than(0)),
    )
    wire: str = key(
        "float32",
        "Data type of the values that clients send; a narrower one than `float32` saves traffic and preserves the "
        "clients' mean, but clients then agree at best to its bits of mantissa.",
        "algorithm.md#what-goes-over-the-wire",
    )
    checksums: bool = key(
        True,
        "Send a checksum with every message, so that a damaged message is never averaged.",
        "algorithm.md#damaged-and-diverged-messages",
    )
    chunk_mib: float = key(
        4.0,
        "Size of a chunk in MiB of float32 values: one chunk travels while the next is computed; larger chunks mean "
        "fewer messages, smaller ones stay in the CPU's cache between passes over them.",
        allowed=inside("(0, 1024]"),
    )


@dataclass
class Config:
    """The whole configuration."""

    run: RunConfig = field(default_factory=RunConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    blocks: BlocksConfig = field(default_factory=BlocksConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    gossip: GossipConfig = field(default_factory=GossipConfig)
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    deepspeed: Optional[str] = key(
        None,
        "A ZeRO-3 JSON file, such as those in ds_configs/; `null` takes DeepSpeed's defaults.",
        "launching.md#zero-3",
    )
