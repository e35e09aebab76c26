"""A wait for a slow client lasts while it works, over both transports, and ends the job when it does not."""

from pathlib import Path

import pytest
from jobs import BIN, run_command
from preloaded import PYTHON

from deca_ds.tools.status import look

WORKER = str(Path(__file__).with_name("patience_worker.py"))


@pytest.mark.multiprocess
def test_a_client_at_work_is_waited_for_and_a_stalled_one_ends_the_job(tmp_path):
    if not (BIN / "mpirun").exists():
        pytest.skip("no mpirun")
    finished = run_command([str(BIN / "mpirun"), "-n", "2", *PYTHON, WORKER, str(tmp_path)])
    assert finished.code != 0
    for rank in (0, 1):
        for transport in ("MpiTransport", "GlooTransport"):
            assert f"rank {rank} passed {transport}" in finished.output, finished.output[-3000:]
    marker = (tmp_path / "FAILED").read_text()
    assert marker.startswith("rank 0 on ") and "the end" in marker.splitlines()[0]
    assert "waits for rank 1 on" in marker and "(client 1): gradient, step 99, " in marker
    assert finished.output.count("no progress for") == 1
    assert look(tmp_path).beats[1].doing == "gradient"
