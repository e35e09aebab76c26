"""The plan's numbers for a configuration: memory while each block is active, traffic and work of a step."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from functools import cached_property
from math import ceil, prod
from typing import Any

from transformers import PretrainedConfig

from deca_ds.algorithm import BlockPlan, Rule, Schedule, parameter_shapes
from deca_ds.config import Config
from deca_ds.engine.adapters import add_adapters
from deca_ds.engine.architecture import find_blocks, meta_model
from deca_ds.engine.dry_pass import DryModel, NotWithoutValues, PassMemory
from deca_ds.engine.load import zero3_config
from deca_ds.gossip import MixingSchedule
from deca_ds.gossip.codec import CODECS
from deca_ds.gossip.gossip import chunk_elements
from deca_ds.planning.gathered import Gathered, peak_gathered
from deca_ds.planning.memory import Part, Place, Shape, page_locked, parts, peak, totals
from deca_ds.planning.roofline import Gpu, StepTime, Work, pass_flops, step_time
from deca_ds.training.chosen_method import build_schedule, rule_of
from deca_ds.training.length import ANY_ROUNDS

_FLOAT32 = 4


@dataclass(frozen=True)
class BlockMemory:
    """What the fullest rank holds while one block is active. index: of the block."""

    index: int
    label: str
    numel: int
    parts: tuple[Part, ...]

    def at_most(self, where: Place) -> int:
        """Return the most bytes that are held there at a time."""
        return peak(self.parts, where)[1]


class Estimate:
    """The estimate for a configuration whose smallest client has `ranks` ranks.

    It runs passes without values for the first two and the last two blocks, and interpolates between them linearly,
    because layers are alike.
    """

    def __init__(self, config: Config, architecture: PretrainedConfig, mixing: MixingSchedule, ranks: int, gpu: bool):
        self.config, self.architecture, self.mixing, self.ranks, self.gpu = config, architecture, mixing, ranks, gpu
        self.model = meta_model(config.model, architecture)
        add_adapters(config, self.model)
        self.plan: BlockPlan = find_blocks(config, self.model)
        self.rule: Rule = rule_of(config)
        self.schedule: Schedule = build_schedule(config, len(self.plan.blocks), config.algorithm.rounds or ANY_ROUNDS)
        self._shapes = parameter_shapes(self.model)
        self._numels = {name: prod(shape) for name, shape in self._shapes.items()}

    @cached_property
    def by_block(self) -> list[BlockMemory]:
        """The memory while each block is active, in model order."""
        return self._by_block()

    @cached_property
    def dry(self) -> DryModel | None:
        """The model without values; None if it does not run without them."""
        try:
            return DryModel(self.config, self.architecture, self.gpu)
        except NotWithoutValues:
            return None

    def changed(self, config: Config, ranks: int) -> Estimate:
        """Return the estimate for another configuration of the same model, without repeating passes that are known."""
        other = Estimate(config, self.architecture, self.mixing, ranks, self.gpu)
        if config.model.dtype == self.config.model.dtype:
            other.dry = self.dry
        return other

    @property
    def passes_are_known(self) -> bool:
        """Whether the memory of passes is known, and so part of `by_block`."""
        return self.dry is not None

    @cached_property
    def _calls(self) -> Sequence[Sequence[str]]:
        """The parameters of each module in a forward pass or, where these are not known, of each block."""
        return self.dry.calls if self.dry is not None else [block.names for block in self.plan.blocks]

    def other_activations(self) -> int | None:
        """Return the bytes that `worst` would keep for the backward pass with gradient checkpointing the other way."""
        if self.dry is None or not self.model.supports_gradient_checkpointing:
            return None
        names = self.plan.blocks[self.worst.index].names
        other = not self.config.model.gradient_checkpointing
        return self.dry.training(names, self.rows, self.config.data.max_length, other).saved

    @property
    def width(self) -> int:
        """Bytes of an element of the model."""
        return 2 if self.config.model.dtype == "bfloat16" else _FLOAT32

    @property
    def max_partners(self) -> int:
        """The most clients that a client sends to, or receives from, in an averaging: a link carries both at a time."""
        clients = range(self.config.cluster.clients)
        return max(
            (
                max(len(self.mixing.sources(client, t)), len(self.mixing.destinations(client, t)))
                for client in clients
                for t in range(self.mixing.period)
            ),
            default=0,
        )

    @property
    def worst(self) -> BlockMemory:
        """The block that, while active, takes most memory where it computes."""
        return max(self.by_block, key=lambda block: block.at_most("gpu" if self.gpu else "host"))

    @property
    def rows(self) -> int:
        """The number of sequences in a rank's pass."""
        data = self.config.data
        return max(1, min(data.micro_batch_size, data.batch_size // self.ranks))

    def message_bytes(self, numel: int) -> int:
        """Return the bytes that one averaging of a block sends from a client to each neighbour."""
        return CODECS[self.config.gossip.wire].bytes * len(self.rule.travels) * numel

    def averagings_a_step(self) -> float:
        """Return how many averagings there are for each inner step, on average."""
        steps = self.schedule.activation_steps
        return ceil(steps / self.config.gossip.every) / steps

    def step_times(self, gpu: Gpu, net: float | None, spans: bool, sharing: float) -> StepTime:
        """Return the mean over blocks, of full sequences. net: bytes a second between hosts. spans: whether a client
        spans hosts. sharing: clients that one host's network serves; half a client where one spans two hosts."""
        blocks = range(len(self.plan.blocks))
        times = [step_time(self.work(index, spans, sharing), gpu, net, self.config.model.dtype) for index in blocks]
        return StepTime(*(sum(getattr(time, part.name) for time in times) / len(times) for part in fields(StepTime)))

    def work(self, index: int, spans: bool, sharing: float) -> Work:
        """Return the work of a rank in an inner step with this block active."""
        block, again = self.plan.blocks[index], self.config.model.gradient_checkpointing
        of_block = set(block.names)
        first = next((k for k, call in enumerate(self._calls) if not of_block.isdisjoint(call)), 0)
        above = {name for call in self._calls[first:] for name in call} - of_block
        k, w = self.ranks, self.width
        passes = max(1, ceil(self.config.data.batch_size / self.ranks / self.rows))
        every = sum(self._numels.values())
        back = block.numel + sum(self._numels[name] for name in above)
        read = w * passes * (every + back * (2 if again else 1))
        optimizer = 3 * self.rule.bytes_per_parameter * block.numel / k
        received = read * (k - 1) / k + 4 * passes * block.numel * (k - 1) / k
        sent = self.message_bytes(block.numel) * self.max_partners * self.averagings_a_step()
        fetched = read / k if self._offload else 0.0
        return Work(
            flops=self._pass_flops(of_block, above),
            moved=read + optimizer,
            gathered=received,
            fetched=fetched,
            spans=spans,
            messages=sent * sharing,
            copied=2 * sent / k,
        )

    def _pass_flops(self, block: Collection[str], above: Collection[str]) -> float:
        """Return the floating-point operations of a rank's passes in an inner step. block, above: parameters of the
        active block, and those that the backward pass goes through to reach it."""
        multiplied, tokens = self._multiplied, self.config.data.batch_size * self.config.data.max_length
        part = sum(multiplied.get(name, 0) for name in block)
        over = sum(multiplied.get(name, 0) for name in above)
        total = sum(multiplied.values())
        share = (part + over) / total if total else 0.0
        return pass_flops(
            total,
            above=over,
            block=part,
            attention=self._scores,
            attention_above=self._scores * share,
            tokens=tokens / self.ranks,
            again=self.config.model.gradient_checkpointing,
        )

    def evaluation_time(
        self, gpu: Gpu, net: float | None, spans: bool, sharing: float, *, own: int, common: int
    ) -> StepTime:
        """Return the time of one evaluation, of full sequences. own, common: sequences of the client's own set and of
        the common one. net, spans, sharing: see `step_times`."""
        config, k, n = self.config, self.ranks, self.config.cluster.clients
        rows, length = config.evaluation.batch_size, config.data.max_length
        passes = sum(ceil(sequences / (rows * k)) for sequences in (own, common))
        averaged = 0.0
        if config.evaluation.mean_model and n > 1:
            passes += ceil(common / (rows * k * n)) if common else ceil(own / (rows * k))
            averaged = 2 * (n - 1) / n * _FLOAT32 * sum(block.numel for block in self.plan.blocks)
        flops = passes * rows * length * (2 * sum(self._multiplied.values()) + self._scores)
        read = self.width * passes * sum(self._numels.values())
        work = Work(
            flops=flops,
            moved=read,
            gathered=read * (k - 1) / k,
            fetched=read / k if self._offload else 0.0,
            spans=spans,
            messages=averaged * sharing,
            copied=averaged / k,
        )
        return step_time(work, gpu, net, config.model.dtype)

    @cached_property
    def _scores(self) -> float:
        """Operations a token of the attention's scores: of two products of causal attention, half of each."""
        text = self.architecture.get_text_config()
        layers, hidden = getattr(text, "num_hidden_layers", 0) or 0, getattr(text, "hidden_size", 0) or 0
        return 2.0 * layers * hidden * self.config.data.max_length

    @cached_property
    def _zero(self) -> Mapping[str, Any]:
        section: Mapping[str, Any] = zero3_config(self.config)["zero_optimization"]
        return section

    @property
    def _offload(self) -> bool:
        """Whether the model's shard is on the host of a GPU."""
        return self.gpu and (self._zero.get("offload_param") or {}).get("device", "none") != "none"

    @property
    def _rounding(self) -> int:
        """Bytes that page-locking adds to the model's shard on the host: DeepSpeed page-locks each parameter's part by
        itself, through torch, and by default (Init._partition_param in runtime/zero/partition_parameters.py)."""
        if not self._offload or not self._zero["offload_param"].get("pin_memory", True):
            return 0
        slices = [self.width * ceil(numel / self.ranks) for numel in self._numels.values()]
        return sum(page_locked(size) - size for size in slices)

    @cached_property
    def _multiplied(self) -> dict[str, int]:
        """Elements of the matrices that every token is multiplied with, by name."""
        outputs, inputs = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        tied = outputs is not None and outputs.weight is inputs.weight
        looked_up = set() if tied else {id(parameter) for parameter in inputs.parameters()}
        text = self.architecture.get_text_config()
        chosen = getattr(text, "num_experts_per_tok", None) or getattr(text, "moe_topk", None)
        found = {}
        for name, parameter in self.model.named_parameters():
            if parameter.ndim > 1 and id(parameter) not in looked_up:
                found[name] = self._numels[name]
                if parameter.ndim == 3 and chosen is not None:  # of all experts, of which a token takes some
                    found[name] = found[name] * chosen // parameter.shape[0]
        return found

    def at_rest(self, where: Place) -> int:
        """Return the bytes held between steps while the largest block is active: a lower bound that needs no pass."""
        largest = max(block.numel for block in self.plan.blocks)
        return totals(parts(self._shape, largest, PassMemory(0, 0, 0, 0, 0), Gathered(0, 0, 0), 0, 0), where)["rest"]

    @cached_property
    def _shape(self) -> Shape:
        gossip = self.config.gossip
        late, committed = gossip.wait_s is not None, self.config.cluster.on_failure == "continue"
        return Shape(
            ranks=self.ranks,
            gpu=self.gpu,
            width=self.width,
            trained=sum(block.numel for block in self.plan.blocks),
            frozen=sum(self._numels[name] for name in self.plan.frozen),
            buffers=sum(buffer.nbytes for buffer in self.model.buffers()),
            state_bytes=self.rule.bytes_per_parameter,
            low_halves=self.width == 2 and self.config.model.masters == "exact",
            offload=self._offload,
            rounding=self._rounding,
            sources=self.mixing.max_sources,
            travels=len(self.rule.travels),
            wire=CODECS[gossip.wire].bytes,
            chunk=chunk_elements(gossip.chunk_mib),
            whole=late or committed or gossip.clip_radius is not None,
            kept=committed,
            copied=self.gpu or late or not CODECS[gossip.wire].exact,
            mean_model=self.config.evaluation.mean_model and self.config.cluster.clients > 1,
        )

    def _by_block(self) -> list[BlockMemory]:
        length, rows = self.config.data.max_length, self.rows
        dry, again = self.dry, self.config.model.gradient_checkpointing
        kept, beside = (0, 0) if dry is None else dry.scoring(self.config.evaluation.batch_size, length)
        blocks = self.plan.blocks
        known = sorted({0, min(1, len(blocks) - 1), max(0, len(blocks) - 2), len(blocks) - 1})
        measured = {
            index: PassMemory(0, 0, 0, 0, 0) if dry is None else dry.training(blocks[index].names, rows, length, again)
            for index in known
        }
        largest = max(sum(self._numels[name] for name in call) for call in self._calls)
        calls, sizes = self._calls, self._numels
        gathered = {
            index: peak_gathered(calls, sizes, set(blocks[index].names), self._zero, self.ranks) for index in known
        }
        found = []
        for index, block in enumerate(blocks):
            passes = PassMemory(*_between(index, {k: astuple(m) for k, m in measured.items()}))
            layers = Gathered(*_between(index, {k: astuple(g) for k, g in gathered.items()}))
            scoring = beside + max(0, kept - passes.kept)
            held = parts(self._shape, block.numel, passes, layers, scoring, largest)
            found.append(BlockMemory(index, block.label, block.numel, tuple(held)))
        return found


def _between(index: int, known: Mapping[int, tuple[int, ...]]) -> list[int]:
    """Interpolate linearly between the known values on both sides."""
    low = max(place for place in known if place <= index)
    high = min(place for place in known if place >= index)
    share = 0.0 if low == high else (index - low) / (high - low)
    return [round(before + share * (after - before)) for before, after in zip(known[low], known[high], strict=True)]


def memory_json(estimate: Estimate) -> dict[str, object]:
    """Return, for each active block, the parts of its memory, and the totals by moment and place; all in bytes."""
    return {
        "ranks_per_client": estimate.ranks,
        "device": "gpu" if estimate.gpu else "cpu",
        "fullest_block": estimate.worst.index,
        "passes_are_known": estimate.passes_are_known,
        "blocks": [
            {
                "block": block.index,
                "label": block.label,
                "parameters": block.numel,
                "parts": [asdict(part) for part in block.parts],
                "gpu": totals(block.parts, "gpu"),
                "host": totals(block.parts, "host"),
            }
            for block in estimate.by_block
        ],
    }
