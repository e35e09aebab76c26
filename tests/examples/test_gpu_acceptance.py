"""benchmarks/gpu_acceptance.py on a CPU: that its checks run, and what it says of those that need a GPU."""

import json
import signal
import sys
import time

import gpu_acceptance
import preloaded
import pytest
from jobs import preloaded_server


@pytest.mark.multiprocess
def test_on_cpus_the_small_form_passes_what_needs_no_gpu_and_covers_nothing_else(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_acceptance, "PYTHON", preloaded.PYTHON)
    monkeypatch.setenv(preloaded.ADDRESS, preloaded_server().address)
    report = tmp_path / "report.json"
    code = gpu_acceptance.main(["--small", "--output", str(report)])
    told = capsys.readouterr().out
    assert code == 0, told
    outcomes = {each["check"]: each["status"] for each in json.loads(report.read_text())["outcomes"]}
    passes = {"hardware", "transports", "simulator", "resume", "exact_masters"}
    not_covered = {"placement", "write_order", "memory", "speed", "offload", "gossip", "several_gpus"}
    assert outcomes == dict.fromkeys(passes, "PASS") | dict.fromkeys(not_covered, "NOT COVERED")
    assert "MPI and torch: the same bits" in told


def test_a_check_that_breaks_fails_and_the_others_continue(tmp_path, monkeypatch, capsys):
    def breaks(run):
        raise RuntimeError("no such kernel")

    checks = {"first": breaks, "second": lambda run: "well"}
    monkeypatch.setattr(gpu_acceptance, "CHECKS", checks)
    assert gpu_acceptance.main(["--small", "--only", "first,second", "--output", str(tmp_path / "report.json")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("FAIL") and "RuntimeError: no such kernel" in lines[0]
    assert lines[1].startswith("PASS") and lines[2].startswith("1 PASS, 1 FAIL, 0 NOT COVERED")


def test_gossip_is_told_by_transport_and_checksums_and_of_later_steps_alone(tmp_path, monkeypatch):
    """A step that opens a block takes longer."""

    def job(run, name, launcher, *overrides):
        seconds = 0.5 + 0.25 * (launcher == "mpi") + 0.125 * ("gossip.checksums=true" in overrides)
        (metrics := tmp_path / name / "metrics").mkdir(parents=True)
        steps = [{"inner": inner, "seconds": seconds + (inner == 0)} for inner in range(3)]
        (metrics / "client_000.jsonl").write_text(
            "".join(json.dumps({"kind": "step", "gossip_wait_seconds": 0.25, **step}) + "\n" for step in steps)
        )
        return tmp_path / name

    monkeypatch.setattr(gpu_acceptance.Run, "job", job)
    told = gpu_acceptance.gossip(gpu_acceptance.Run(small=False, folder=tmp_path, ends=0.0))
    assert told.split(", ") == [
        "mpi 0.88 (0.25) s",
        "mpi without checksums 0.75 (0.25) s",
        "hand 0.62 (0.25) s",
        "hand without checksums 0.50 (0.25) s",
    ]


def test_a_worker_may_print_more_when_it_ends_and_one_that_fails_is_not_started_again(tmp_path, monkeypatch):
    started = []

    def start(run, command, more):
        started.append(command[-1])
        code = (
            f"print('{{\"seconds\": 1.5}}'); print('a library says goodbye'); raise SystemExit({started[-1] == 'ill'})"
        )
        return start_process(run, [sys.executable, "-c", code], more)

    start_process = gpu_acceptance.Run._start
    monkeypatch.setattr(gpu_acceptance.Run, "_start", start)
    run = gpu_acceptance.Run(small=False, folder=tmp_path, ends=time.monotonic() + 100.0)
    assert run.worker("well") == run.worker("well") == {"seconds": 1.5}
    for _ in range(2):
        with pytest.raises(AssertionError, match="ill ended with code 1"):
            run.worker("ill")
    assert started == ["well", "ill"] and run.figures == {"well": {"seconds": 1.5}}


def test_where_one_rank_fails_the_other_one_is_ended(tmp_path, monkeypatch):
    started = []

    def start(run, command, more):
        code = "import time; time.sleep(1000)" if started else "raise SystemExit(7)"
        started.append(start_process(run, [sys.executable, "-c", code], more))
        return started[-1]

    start_process = gpu_acceptance.Run._start
    monkeypatch.setattr(gpu_acceptance.Run, "_start", start)
    run = gpu_acceptance.Run(small=True, folder=tmp_path, ends=time.monotonic() + 100.0)
    with pytest.raises(AssertionError, match="two ended with code 7"):
        run.job("two", "hand")
    assert [process.poll() for process in started] == [7, -signal.SIGKILL]


def test_the_report_is_written_after_every_check(tmp_path, monkeypatch):
    report = tmp_path / "report.json"

    def second(run):
        assert [each["check"] for each in json.loads(report.read_text())["outcomes"]] == ["first"]
        return "well"

    monkeypatch.setattr(gpu_acceptance, "CHECKS", {"first": lambda run: "well", "second": second})
    assert gpu_acceptance.main(["--small", "--only", "first,second", "--output", str(report)]) == 0
    assert len(json.loads(report.read_text())["outcomes"]) == 2


def test_settings_of_open_mpi_are_kept_and_those_of_a_job_are_not(monkeypatch):
    kept = ("OMPI_MCA_smsc", "PMIX_MCA_gds", "PATH")
    assert not [key for key in kept if gpu_acceptance._of_a_job(key)]
    assert gpu_acceptance._of_a_job("OMPI_COMM_WORLD_RANK") and gpu_acceptance._of_a_job("PMIX_RANK")


def test_what_has_no_time_left_is_not_covered(tmp_path):
    late = gpu_acceptance.Run(small=True, folder=tmp_path, ends=0.0)
    assert gpu_acceptance.check(late, "hardware").status == "NOT COVERED"


@pytest.mark.parametrize(("seconds", "status"), [(0.0, "NOT COVERED"), (1000.0, "FAIL")])
def test_a_job_that_is_cut_off_fails_only_if_its_own_time_is_over(tmp_path, monkeypatch, seconds, status):
    waits = [sys.executable, "-c", "import time; time.sleep(1000)"]

    def slow(run):
        run.ends = time.monotonic() + seconds
        return run._end(run._start(waits, {}), "the job")

    monkeypatch.setattr(gpu_acceptance, "CHECKS", {"slow": slow})
    run = gpu_acceptance.Run(small=True, folder=tmp_path, ends=time.monotonic() + 1000.0, job_s=0.1)
    outcome = gpu_acceptance.check(run, "slow")
    assert outcome.status == status and "the job" in outcome.text


def test_what_gossip_has_measured_is_told_though_time_is_over(tmp_path, monkeypatch):
    measured = []

    def job(run, name, launcher, *overrides):
        if measured:
            raise gpu_acceptance.NotCovered("time is over")
        measured.append(name)
        (metrics := tmp_path / name / "metrics").mkdir(parents=True)
        step = {"kind": "step", "inner": 1, "seconds": 0.5, "gossip_wait_seconds": 0.25}
        (metrics / "client_000.jsonl").write_text(json.dumps(step) + "\n")
        return tmp_path / name

    monkeypatch.setattr(gpu_acceptance.Run, "job", job)
    run = gpu_acceptance.Run(small=False, folder=tmp_path, ends=time.monotonic() + 1000.0)
    outcome = gpu_acceptance.check(run, "gossip")
    assert (outcome.status, outcome.text) == ("NOT COVERED", "mpi 0.50 (0.25) s; time is over")
