"""The plan's tables for people: what a rank holds, and how long steps and the run take on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from deca_ds.planning.estimate import BlockMemory, Estimate
from deca_ds.planning.fits import Setting, nearest
from deca_ds.planning.memory import ACTIVATIONS, BETWEEN_PASSES, MOMENTS, PASSES, Part, Place, peak
from deca_ds.planning.roofline import ARITHMETIC, LINK, MEMORY, USABLE, Gpu, StepTime
from deca_ds.plural import several
from deca_ds.printing import print_line
from deca_ds.tools.report.wording import rough_duration


def print_memory(console: Console, estimate: Estimate) -> None:
    """Print what the fullest rank holds while the block is active that takes most, and what the estimate leaves out."""
    block = estimate.worst
    console.print(memory_table(block, estimate))
    for line in _notes(estimate):
        print_line(console, line)


def memory_table(block: BlockMemory, estimate: Estimate) -> Table:
    """Return the table of one block while it is active, a row a part. Memory of the GPU has a column of its own where
    there is one."""
    k = estimate.ranks
    table = Table(
        title=f"memory of a rank, {several(k, 'rank')} a client, block {block.index} ({block.label}) active",
        show_footer=True,
    )
    places: tuple[Place, ...] = ("gpu", "host") if estimate.gpu else ("host",)
    most = {where: peak(block.parts, where) for where in places}
    table.add_column("what", "most at a time")
    table.add_column("when")
    for where in places:
        moment, size = most[where]
        table.add_column("GPU" if where == "gpu" else where, f"{decimal(size)}\n({moment})", justify="right")
    for part in block.parts:
        table.add_row(part.name, _when(part), *(decimal(part.bytes) if part.where == at else "" for at in places))
    return table


def _when(part: Part) -> str:
    if part.when == MOMENTS:
        return "always"
    return {PASSES: "passes", BETWEEN_PASSES: "between passes"}.get(part.when, part.when[0])


def _notes(estimate: Estimate) -> Iterator[str]:
    if not estimate.passes_are_known:
        yield (
            "WARNING: activations, logits and gradients are not in the table: this model does not run on "
            "tensors without values"
        )
    kept = next((part.bytes for part in estimate.worst.parts if part.name == ACTIVATIONS), 0)
    if (other := estimate.other_activations()) is not None:
        word = "false" if estimate.config.model.gradient_checkpointing else "true"
        yield (
            f"activations: {decimal(kept)} kept for backward; model.gradient_checkpointing={word} would keep "
            f"{decimal(other)}"
        )
    if estimate.gpu:
        kept_freed = "what CUDA's allocator keeps of freed memory, which was never measured"
    else:
        kept_freed = (
            "what glibc keeps of freed memory beyond that row, because it does not fit what is asked for next: 1 to "
            "14 % of the peak with one rank, 5 to 30 % with two; up to 3 % with MALLOC_MMAP_THRESHOLD_=65536 in the "
            "environment, which takes more CPU time"
        )
    yield f"Not in the table: {kept_freed}; and cached pages of the data"
    if not estimate.gpu:
        yield "The table is for computing on CPUs; --gpu NAME or run.device=cuda shows it for GPUs"


def print_fit(console: Console, estimate: Estimate, name: str, gpu: Gpu) -> None:
    """Print whether the fullest rank fits the GPU, and if not, what would."""
    usable, needed = USABLE * gpu.memory, estimate.worst.at_most("gpu")
    room = f"{decimal(needed)} of {decimal(gpu.memory)} on an {name}, of which {USABLE:.0%} count"
    if needed <= usable:
        print_line(console, f"fits: {room}")
        return
    print_line(console, f"WARNING: does not fit: {room}")
    found = nearest(Setting(estimate.config, estimate.ranks), lambda setting: _needs(estimate, setting) <= usable)
    if found is None:
        told = (
            "none of smaller passes, gradient checkpointing, more ranks a client, smaller blocks and bfloat16 is enough"
        )
    else:
        setting, moves = found
        told = f"nearest setting that fits: {', '.join(moves)} ({decimal(_needs(estimate, setting))})"
    print_line(console, told)


def _needs(estimate: Estimate, setting: Setting) -> int:
    return estimate.changed(setting.config, setting.ranks).worst.at_most("gpu")


@dataclass(frozen=True)
class RunTime:
    """Seconds. step: the mean over blocks. evaluation: None where it is not known what it scores. steps, evaluations:
    how many the run has; None where its length is not known."""

    step: StepTime
    evaluation: StepTime | None
    steps: int | None
    evaluations: int

    @property
    def run(self) -> float | None:
        """Of steps and evaluations, as far as both are known."""
        if self.steps is None:
            return None
        return self.steps * self.step.step + self.evaluations * (
            0.0 if self.evaluation is None else self.evaluation.step
        )


def print_times(console: Console, estimate: Estimate, name: str, gpu: Gpu, net: float | None, time: RunTime) -> None:
    """Print the times of a step, of an evaluation and of the run, and what the roofline assumes and leaves out."""
    table = Table(title=f"time on {name}: a roofline, never checked on a GPU")
    for column in ("", "time", "share"):
        table.add_column(column, justify="left" if not column else "right")
    step = time.step
    parts = {"compute": step.compute, "ZeRO-3, where compute does not hide it": step.zero3, "gossip": step.gossip}
    for part, seconds in parts.items():
        table.add_row(part, rough_duration(seconds), f"{seconds / step.step:.0%}")
    table.add_row("a step, mean over blocks", rough_duration(step.step), "")
    if time.evaluation is not None:
        table.add_row("an evaluation", rough_duration(time.evaluation.step), "")
    if (run := time.run) is not None and time.steps is not None:
        table.add_section()
        table.add_row(
            f"{time.steps:,} steps", rough_duration(time.steps * step.step), f"{time.steps * step.step / run:.0%}"
        )
        if time.evaluation is not None:
            scored = time.evaluations * time.evaluation.step
            table.add_row(f"{time.evaluations:,} evaluations", rough_duration(scored), f"{scored / run:.0%}")
        table.add_row(
            "the run" if time.evaluation is not None else "the run, without evaluations", rough_duration(run), ""
        )
    console.print(table)
    dtype = estimate.config.model.dtype
    rate = gpu.bf16 if dtype == "bfloat16" else gpu.fp32
    links = {"between GPUs": gpu.link, "to the host": gpu.pcie} | ({} if net is None else {"between hosts": net})
    told = [f"{dtype} {rate / 1e12:g} TFLOP/s x {ARITHMETIC}", f"memory {decimal(round(gpu.bandwidth))}/s x {MEMORY}"]
    told += [f"{where} {decimal(round(speed))}/s x {LINK}" for where, speed in links.items()]
    print_line(console, f"assumed: {', '.join(told)}; all sequences are full")
    print_line(
        console,
        "left out: loading, writing checkpoints, waiting for slower ranks, and what the host and small kernels take, "
        "which is most of the time where models or batches are small",
    )
    if net is None and estimate.max_partners:
        print_line(console, "Without --net, messages between hosts take no time here")
