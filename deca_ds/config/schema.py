"""Every configuration key, its type, its default and what it means. What stands here works and is tested.

`Config` is an OmegaConf structured schema: `deca_ds.config.load` merges a YAML file and a dotlist into it and refuses
unknown keys and wrong types.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Optional

# OmegaConf reads the annotations at run time, on Python 3.10 too: Optional[...] and Literal[...] stay spelt out.
# ruff: noqa: UP045


@dataclass
class RunConfig:
    """One run: where it writes, on what it computes, what it is seeded with."""

    output: str = "runs/deca"  # new folder for metrics, tables, the resolved config and the trained shards
    # continue the run in `output` from its newest checkpoint: never; require: there must be one; auto: if there is one
    resume: Literal["never", "auto", "require"] = "never"
    seed: int = 0  # of the partition, the data order, random blocks, random graphs and random weights
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where torch sees one, else cpu
    threads: Optional[int] = None  # CPU threads per rank; null: the host's cores divided by its ranks


@dataclass
class ClusterConfig:
    """Who trains: n clients, each a ZeRO-3 world of its own."""

    clients: int = 1  # number of clients n
    ranks: Optional[list[int]] = None  # of each client in order, [2, 1, 1]; null: those launched, divided equally
    transport: Literal["auto", "mpi", "torch"] = "auto"  # auto: mpi if every rank is in one MPI world, else torch
    timeout_s: float = 600.0  # seconds that a rank may wait while none of those that it waits for moves on
    # when a client dies: stop the job; continue: the others go on without it (where the launcher lets them)
    on_failure: Literal["stop", "continue"] = "stop"
    # for continue over torch: clients that are not started with the others; each may come later, with --join
    absent: list[int] = field(default_factory=list)
    min_clients: int = 2  # for continue: with fewer clients left the job saves a checkpoint and stops
    # for continue, where those who are left are not joined by the graph: stop in the same way; continue: part by part
    on_partition: Literal["stop", "continue"] = "stop"
    # for continue over torch: seconds that a client that was cut off, or is in the smaller part of a network that fell
    # apart, tries to come back by itself; 0: it ends, or its part goes on by itself
    return_s: float = 0.0
    allow_mixed_versions: bool = False  # warn about ranks with other versions of Python or a library, and go on


@dataclass
class ModelConfig:
    """The causal language model."""

    path: str = "???"  # Hugging Face model directory or hub name
    revision: Optional[str] = None  # hub revision
    tokenizer: Optional[str] = None  # tokenizer directory or hub name; null: the model's
    init: Literal["pretrained", "random"] = "pretrained"  # random: only the architecture is read from `path`
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the model; masters and moments are always float32
    # for bfloat16, what becomes of masters between a block's turns: kept, on the host; rounded to the model's values
    masters: Literal["exact", "rounded"] = "exact"
    attention: Optional[str] = None  # eager, sdpa, flash_attention_2, ...; null: what transformers chooses
    gradient_checkpointing: bool = False  # recompute activations in the backward pass
    trust_remote_code: bool = False  # run modelling code that comes with the model; only for authors you trust


@dataclass
class BlocksConfig:
    """How the parameters are split into disjoint blocks."""

    layers_per_block: Optional[int] = 2  # consecutive layers in a block; null: the whole model is one block
    order: Literal["ascending", "descending", "random"] = "ascending"  # of the blocks in a round; random is reshuffled
    # parameters outside the layers (embeddings, final norm, head): blocks of their own, parts of the first and the last
    # block, or never trained
    outside: Literal["own", "joined", "frozen"] = "own"


@dataclass
class AlgorithmConfig:
    """The method and its inner step; the equations are in deca_ds/algorithm."""

    method: Literal[
        "deca", "gossip-adam", "local-adam", "qg-adam", "gt-adam", "diloco", "dec-lora", "badam", "adamw"
    ] = "deca"
    rounds: int = 4  # T: every block is active once a round
    inner_steps: int = 48  # R: consecutive steps of a block
    # for deca: what gossip tells Adam's moments (block-wise moment approximation)
    signal: Literal[
        "none", "descent", "transcribed", "disagreement", "quasi_global", "quasi_global_norm", "trivial"
    ] = "descent"
    a1: float = 0.9  # decay of the first moment, local gradient
    a2: float = 0.999  # decay of the second moment, local gradient
    b1: float = 0.9  # for deca: decay of the first moment, signal
    b2: float = 0.99  # for deca: decay of the second moment, signal
    eps: float = 1e-8  # added to the root of the second moment
    outer_lr: float = 0.7  # for diloco: rate of the outer Nesterov step
    outer_momentum: float = 0.9  # for diloco: momentum of the outer Nesterov step


@dataclass
class LoraConfig:
    """For dec-lora: the adapters. A linear layer's weight W acts as W + alpha / rank * B A."""

    rank: int = 8  # rows of A, columns of B
    alpha: float = 16.0  # alpha / rank scales what the adapter adds
    # linear layers that get an adapter, by full name or its end (q_proj); empty: all those in the transformer's layers
    target_modules: list[str] = field(default_factory=list)
    dropout: float = 0.0  # of the adapters' input while training


@dataclass
class OptimizerConfig:
    """The local step: learning rate, its schedule, decay and clipping."""

    lr: float = 5e-5  # peak learning rate
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # over all inner steps of the run
    warmup_steps: int = 0  # inner steps of linear warm-up from 0 at the start of the run
    final_lr_ratio: float = 0.0  # linear and cosine end at lr times this
    weight_decay: float = 0.0  # decoupled; not on norms and biases (parameters of one dimension)
    clip_norm: float = 1.0  # 2-norm that the active block's gradient is clipped to; 0: no clipping


@dataclass
class GossipConfig:
    """Who averages with whom, how often and with which weights."""

    graph: Literal[
        "ring",
        "complete",
        "star",
        "torus",
        "hypercube",
        "exponential",
        "one_peer_exponential",
        "erdos_renyi",
        "bipartite",
        "edge_list",
        "isolated",
    ] = "ring"  # isolated: every client trains alone
    weights: Literal["metropolis", "max_degree", "lazy_metropolis"] = "metropolis"  # rule that makes W from the graph
    matrix: Optional[str] = None  # file with your own W, n lines of n numbers; replaces graph and weights
    edges: Optional[str] = None  # for graph edge_list: file with two client numbers a line
    edge_probability: float = 0.5  # for graph erdos_renyi; drawn again until connected, from run.seed
    every: int = 1  # s: inner steps between two averagings
    clip_radius: Optional[float] = None  # a neighbour's block counts as at most this 2-norm away; null: as it is
    # seconds that a client waits for a neighbour that is late, before both average without each other; null: for ever
    wait_s: Optional[float] = None
    checksums: bool = True  # every message carries one; a damaged one is not averaged
    chunk_mib: float = 4.0  # size of a message; a chunk travels while the next one is computed


@dataclass
class DataConfig:
    """What is trained on, and how it is shared out among the clients."""

    # files (globs allowed), folders or a hub name (owner/name or owner/name:split), shared out by `partition`
    train: list[str] = field(default_factory=list)
    # instead of train: client i's own file, folder or glob at place i; only client i's ranks open it
    per_client: list[str] = field(default_factory=list)
    evaluation: list[str] = field(default_factory=list)  # the common evaluation set, the same for every client
    # with per_client: each client's own evaluation file at place i; else client_holdout of its data is held out
    per_client_evaluation: list[str] = field(default_factory=list)
    common_holdout: float = 0.0  # share of `train` taken out before the partition as the common evaluation set
    client_holdout: float = 0.1  # share of each client's examples held out as its own evaluation set
    subset: Optional[str] = None  # hub data set's configuration name
    split: str = "train"  # hub data set's split
    format: Literal["text", "alpaca", "messages", "sharegpt", "classification"] = "text"
    column_names: list[str] = field(default_factory=list)  # names for the columns of a CSV or TSV file without a header
    text_columns: list[str] = field(default_factory=lambda: ["text"])  # for text and classification; joined by a blank
    label_column: str = "label"  # for classification
    # for classification: label value -> the word the model learns to answer; empty: the values themselves
    label_names: dict[str, str] = field(default_factory=dict)
    prompt: str = "{text}\nLabel:"  # for classification; {text} is replaced, the answer follows after a blank
    partition: Literal["iid", "dirichlet", "key"] = "iid"  # how `train` is shared out
    alpha: float = 0.25  # for dirichlet: concentration; smaller is more skewed
    partition_column: Optional[str] = None  # for dirichlet and key: column that skews; null: the label column
    max_examples: Optional[int] = None  # use at most this many of `train` (seeded choice)
    # for chat templates that write the day, YYYY-MM-DD; null: the day of the run's first start, the same for all ranks
    date: Optional[str] = None
    cache: Optional[str] = None  # folder of tokenised data; null: deca_ds in the cache of the datasets library
    max_length: int = 512  # tokens of a sequence; longer ones are cut
    packing: bool = False  # fill sequences of max_length with several examples
    answers_only: bool = True  # loss on answers only, not on prompts (text has no prompts)
    batch_size: int = 16  # sequences per client and inner step, over all its ranks
    micro_batch_size: int = 4  # sequences per rank and forward pass; the rest is gradient accumulation


@dataclass
class EvaluationConfig:
    """When and on how much the models are scored."""

    every: int = 0  # inner steps between evaluations; 0: only before the first and after the last step
    batch_size: int = 8  # sequences per rank and forward pass
    max_examples: Optional[int] = 512  # of each evaluation set (seeded choice); null: all
    mean_model: bool = True  # also score the mean of all clients' models (every client takes a part)


@dataclass
class CheckpointConfig:
    """When the state of the run is saved, to go on from there. A preemption (SIGTERM) saves it in any case."""

    every: int = 0  # inner steps between checkpoints; 0: only when the job is told to stop
    keep: int = 2  # complete checkpoints that stay on the disk, the newest ones


@dataclass
class LoggingConfig:
    """The JSON Lines in metrics/ are always written; this is the rest."""

    every: int = 1  # inner steps between metric lines
    tensorboard: bool = False  # write TensorBoard event files too (needs the tensorboard extra)
    progress: bool = True  # progress bar on rank 0


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
    deepspeed: Optional[str] = None  # ZeRO-3 JSON file, see ds_configs/; null: DeepSpeed's defaults
