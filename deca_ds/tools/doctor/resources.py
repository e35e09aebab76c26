"""Checks of what a job takes on each host: files, disk, memory, limits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.filesize import decimal

from deca_ds.config.resume import already_used, holds_more
from deca_ds.errors import UserError
from deca_ds.plural import several
from deca_ds.tools.doctor.facts import Facts, Needs
from deca_ds.tools.doctor.findings import HERE, Verdict, check, fail, ok, warn
from deca_ds.tools.doctor.sights import Folder

_SHARED_PER_RANK = 128 * 2**20  # of /dev/shm, for NCCL and DeepSpeed
_FILES, _FILES_PER_RANK = 512, 16  # open at once: libraries and data, and connections to each other rank
_UNLIMITED = -1


@check("plan")
def plan(facts: Facts) -> Iterator[Verdict]:
    """Check whether the configuration has a plan at all for these hosts."""
    host = HERE if facts.remote else next(iter(facts.hosts))
    mistake = facts.mistake or (None if facts.needs is None else facts.needs.unplanned)
    if mistake is not None:
        where = f" ({mistake.where})" if mistake.where else ""
        yield fail(host, mistake.what + where, mistake.fix or "see deca plan with this configuration")
    elif facts.needs is not None:
        yield ok(host, "the configuration fits the hosts")


@check("files")
def files(facts: Facts) -> Iterator[Verdict]:
    """Check what the configuration names and ranks on a host read."""
    if facts.needs is None:
        return
    for host in facts.seen:
        of, wrong = facts.needs.paths.get(host, ()), facts.hosts[host].wrong_paths
        missing = [f"{key}: {path} {wrong[path]}" for key, path in of if wrong.get(path)]
        lacking = facts.hosts[host].not_on_hub
        not_had = [f"{key}: {name}: {lacking[name][0]}" for key, _, name in facts.needs.names if name in lacking]
        if missing or not_had:
            fixes = ["copy it there, or name a folder that all hosts share"] * bool(missing)
            fixes += dict.fromkeys(fix for _, fix in lacking.values())
            yield fail(host, "; ".join([*missing, *not_had]), "; ".join(fixes))
        else:
            names = f", {several(len(facts.needs.names), 'name')} of the hub" * bool(facts.needs.names)
            yield ok(host, several(len(of), "path") + names)


@check("output")
def output(facts: Facts) -> Iterator[Verdict]:
    """Check whether ranks can write run.output, a start would take it, and which hosts share it."""
    needs = facts.needs
    if needs is None:
        return
    first = next(iter(facts.hosts))
    everybody = {host for host, of in facts.hosts.items() if of.output is not None and not of.output["error"]}
    for host in facts.seen:
        of = facts.hosts[host]
        if of.output is None:
            continue
        if of.output["error"]:
            fix = "name a run.output that every host can write, or mend the mount"
            yield fail(host, f"cannot write in {of.output['at']}: {of.output['error']}", fix)
        elif (refused := _refused(needs, of.output, host == first and facts.sees_first)) is not None:
            yield fail(host, refused.what, refused.fix or "name another folder in run.output")
        elif len(everybody) > 1 and 1 < len(of.sees) < len(everybody):
            what = f"{of.output['at']} is shared with {', '.join(sorted(of.sees - {host}))} only"
            yield warn(host, what, "let all hosts share run.output, or none: deca export wants all parts in one place")
        elif len(everybody) > 1:
            yield ok(host, "shared by all" if len(of.sees) == len(everybody) else "a disk of its own")
        else:
            yield ok(host, of.output["at"])


def _refused(needs: Needs, folder: Folder, seen_here: bool) -> UserError | None:
    """Return why a start would refuse a host's run.output, if so. seen_here: this machine sees the same folder."""
    if needs.refused is not None and seen_here:
        return needs.refused
    return already_used(Path(needs.output)) if needs.resume == "never" and holds_more(folder["holds"]) else None


@check("disk")
def disk(facts: Facts) -> Iterator[Verdict]:
    """Free space at run.output for all who write on one disk."""
    if facts.needs is None:
        return
    for host in facts.seen:
        of = facts.hosts[host]
        if of.output is None or of.output["error"]:
            continue
        need = sum(facts.needs.disk.get(other, 0) for other in of.sees)
        free = of.output["free"]
        if free < need:
            fix = "make room, lower checkpoint.keep, or name another run.output"
            yield fail(host, f"{decimal(free)} free at {of.output['at']}, the plan needs {decimal(need)}", fix)
        else:
            yield ok(host, f"{decimal(free)} free" + (f", {decimal(need)} needed" if need else ""))


@check("memory")
def memory(facts: Facts) -> Iterator[Verdict]:
    """Free memory of the host and of its GPUs against what its ranks hold at least, without their passes."""
    needs = facts.needs
    for host, sight in facts.seen.items():
        on_gpus = bool(sight["gpus"]) and not (needs is not None and needs.device == "cpu")
        wanted = [("memory", sight["memory"], needs and (needs.beside_gpus if on_gpus else needs.memory))]
        if on_gpus:
            wanted.insert(0, ("GPU memory", sum(map(_gpu_bytes, sight["gpus"])), needs and needs.gpu_memory))
        told = []
        for kind, free, held in wanted:
            need = held.get(host, 0) if held else 0
            if free and free < need:
                what = f"{decimal(free)} of {kind} free, the ranks there hold at least {decimal(need)}"
                yield fail(host, what, "more ranks a client on more hosts, or model.dtype=bfloat16; see deca plan")
                break
            told.append(f"{decimal(free)} {kind}" + (f", at least {decimal(need)} needed" if need else ""))
        else:
            yield ok(host, "; ".join(told))


def _gpu_bytes(gpu: str) -> int:
    """Return the memory in a line of nvidia-smi, which reads name, driver, "81559 MiB"; 0 if there is none."""
    size = gpu.rsplit(",", 1)[-1].split()
    return int(size[0]) * 2**20 if len(size) == 2 and size[0].isdigit() else 0


@check("limits")
def limits(facts: Facts) -> Iterator[Verdict]:
    """/dev/shm, open files, and memory that may be locked where a fabric wants that."""
    ranks = sum(of.slots for of in facts.hosts.values())
    for host, sight in facts.seen.items():
        shared, opened = _SHARED_PER_RANK * facts.hosts[host].slots, _FILES + _FILES_PER_RANK * ranks
        wrong = []
        if sight["shared"] < shared:
            fix = f"give it {decimal(shared)} or more: docker run --shm-size, or remount it with size="
            what = f"/dev/shm has {decimal(sight['shared'])} for {several(facts.hosts[host].slots, 'rank')}"
            wrong.append(warn(host, what, fix))
        if sight["files"] != _UNLIMITED and sight["files"] < opened:
            what = f"{sight['files']} files may be open at once, {several(ranks, 'rank')} may want {opened}"
            wrong.append(warn(host, what, "raise it: ulimit -n, or nofile in /etc/security/limits.conf"))
        if sight["fabric"] and sight["locked"] != _UNLIMITED:
            what = f"{decimal(sight['locked'])} of memory may be locked, and {sight['fabric'][0]} needs more"
            wrong.append(warn(host, what, "set memlock to unlimited in /etc/security/limits.conf"))
        yield from wrong or [ok(host, f"{decimal(sight['shared'])} /dev/shm, {sight['files']} open files")]
