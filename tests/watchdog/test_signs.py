"""What counts as a sign that a process works."""

from __future__ import annotations

import mmap
import subprocess
import sys
import time
from pathlib import Path

import torch

from deca_ds.watchdog.signs import Signs


def test_waiting_is_no_work():
    signs = Signs()
    time.sleep(0.05)
    signs.seen()
    time.sleep(0.05)
    assert not signs.seen()


def compute() -> None:
    until = time.process_time() + 0.3
    while time.process_time() < until:
        pass


def seen_by_a_watcher(work) -> bool:
    """Whether another thread than the one that works sees it: its own CPU time does not count."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as watcher:
        signs = watcher.submit(Signs).result()
        watcher.submit(signs.seen).result()
        kept = work()
        result = watcher.submit(signs.seen).result()
        del kept
    return result


def fresh_memory() -> mmap.mmap:
    """Pages that nobody has touched before, as an allocator that uses freed memory again does not give them."""
    memory = mmap.mmap(-1, 2**22)
    memory.write(b"x" * 2**22)
    return memory


def test_cpu_time_counts_until_a_gpu_is_in_use(monkeypatch):
    assert seen_by_a_watcher(compute)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert not seen_by_a_watcher(compute), "a thread that waits for a GPU spins"


def test_bytes_and_memory_count_on_a_gpu_too(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    path = tmp_path / "weights"
    assert seen_by_a_watcher(lambda: path.write_bytes(b"x" * 2**20))
    assert seen_by_a_watcher(path.read_bytes)
    assert seen_by_a_watcher(fresh_memory)


def test_a_child_s_work_counts_as_long_as_it_is_there(tmp_path: Path):
    done = tmp_path / "done"
    code = "import time, pathlib\nend = time.process_time() + 0.5\nwhile time.process_time() < end: pass\n"
    code += f"pathlib.Path({str(done)!r}).touch()\ninput()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as child:
        signs = Signs()
        while not done.exists():
            time.sleep(0.05)
        assert signs.seen()
        signs.seen()
        time.sleep(0.05)
        assert not signs.seen()
        child.communicate(b"\n")
