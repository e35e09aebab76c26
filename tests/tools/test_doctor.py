"""`deca doctor` as a user runs it: agents on this machine, by themselves or behind an `ssh` that runs them here."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import pytest
from jobs import free_port

from deca_ds.cli import main
from deca_ds.config import load_config
from deca_ds.config.schema import GossipConfig
from deca_ds.gossip.schedule import build_mixing
from deca_ds.launch.launcher import ClientLayout
from deca_ds.tools.doctor import examine
from deca_ds.tools.doctor.hosts import Host, Unreachable, command, is_this_machine
from deca_ds.tools.doctor.needs import names_of, pairs_of, paths_of


@pytest.fixture(autouse=True)
def _without_mpi(monkeypatch):
    """A world of MPI processes costs more than all the rest, and is not what is tested here."""
    monkeypatch.setattr(examine, "tool", lambda name: None)
    for name in ("MASTER_PORT", "SLURM_JOB_NODELIST", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)


# starts one task on the host that it is told, as the last of its options says
SRUN = """#!/bin/sh
while [ "$1" != "${1#-}" ]; do given="$given $1"; host=${1#--nodelist=}; shift; done
[ "${given% *}" = " --overlap --nodes=1 --ntasks=1 --ntasks-per-node=1 --mpi=none" ] || exit 9
[ "$host" = 127.0.0.3 ] && { echo 'srun: error: Unable to create step' >&2; exit 1; }
exec "$@"
"""


def put(program: Path, text: str) -> None:
    program.write_text(text)
    program.chmod(0o755)


def doctor(capsys, *arguments: str) -> tuple[int, dict[tuple[str, str], dict[str, str]], str]:
    """Exit code, (check, host) -> finding, and all that was printed."""
    code = main(["doctor", "--port", str(free_port()), "--json", *arguments])
    printed = capsys.readouterr().out
    return code, {(each["check"], each["host"]): each for each in json.loads(printed)["findings"]}, printed


def test_every_host_is_asked_over_ssh(tmp_path, with_ssh, monkeypatch, capsys):
    monkeypatch.setenv("DS_ENV_FILE", ".test_env")
    (tmp_path / ".test_env").write_text("HF_TOKEN=hf_s3cret\n")
    (tmp_path / "hosts").write_text("".join(f"127.0.0.{i} slots=1\n" for i in (1, 2, 3)))
    code, found, printed = doctor(capsys, "--hostfile", "hosts")
    assert code == 2 and "s3cret" not in printed
    for host in ("127.0.0.1", "127.0.0.2"):
        for check in ("name", "ssh", "python", "packages", "deca_ds", "clock"):
            assert found[check, host]["state"] == "ok", found[check, host]
    assert found["ssh", "127.0.0.3"]["state"] == "fail" and "ssh-copy-id" in found["ssh", "127.0.0.3"]["fix"]
    (link,) = json.loads(printed)["links"]
    assert (link["from"], link["to"]) == ("127.0.0.1", "127.0.0.2") and link["bytes_per_s"] > 0 < link["round_trip_s"]
    assert "HF_TOKEN" in found[".deepspeed_env", "here"]["what"]


def test_on_one_machine_the_paths_of_a_configuration_are_checked_and_nothing_is_left_behind(
    tmp_path, tiny_model, word_files, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(
        f"run: {{output: runs/x, device: cpu}}\ncluster: {{clients: 2}}\nmodel: {{path: {tiny_model}}}\n"
        f"data: {{per_client: [{word_files[0]}, {word_files[1]}], batch_size: 2, micro_batch_size: 1}}\n"
    )
    code, found, _ = doctor(capsys, "--config", "run.yaml")
    assert code == 0, found
    needed = {check: of["what"] for (check, _), of in found.items()}
    assert needed["files"] == "4 paths" and needed["output"] == str(tmp_path) and needed["disk"].endswith("needed")
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"], "nothing is left behind"
    code, found, _ = doctor(capsys, "--config", "run.yaml", f"data.per_client=[{word_files[0]},gone.jsonl]")
    wrong = {check: of["what"] for (check, _), of in found.items() if of["state"] == "fail"}
    assert code == 2 and wrong == {"files": "data.per_client: gone.jsonl is not there"}
    code, found, _ = doctor(capsys, "--config", "run.yaml", "model.path=./gone", "data.per_client=[a.csv,b.csv]")
    wrong = {check: of["what"] for (check, _), of in found.items() if of["state"] == "fail"}
    assert code == 2 and wrong["plan"] == "there is no folder './gone' (model.path)"
    for path in ("model.path: ./gone", "data.per_client: a.csv", "data.per_client: b.csv"):
        assert f"{path} is not there" in wrong["files"], "the rest is looked for nevertheless"
    assert "needed" not in next(of["what"] for (check, _), of in found.items() if check == "disk")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "notes").touch()
    for keys, why in (
        (["run.output=old"], "the output folder 'old' is already used"),
        (["run.output=old", "run.resume=auto"], "there is no run to continue in 'old': it has no config.yaml"),
        (["run.output=old/notes"], "cannot write to 'old/notes': it is a file"),
    ):
        code, found, _ = doctor(capsys, "--config", "run.yaml", *keys)
        wrong = {check: of["what"] for (check, _), of in found.items() if of["state"] == "fail"}
        assert code == 2 and wrong == {"output": why}
    code = main(["doctor", "--config", "run.yaml", "cluster.ranks=[1]", "--port", str(free_port())])
    shown = capsys.readouterr().out
    assert code == 2 and "FAIL plan" in shown and "cluster.ranks" in shown and "fix:" in shown
    assert all(len(line) <= 80 for line in shown.splitlines() if line.startswith(("│", "┏")))


def test_a_name_of_the_hub_is_looked_for_on_each_host(tmp_path, tiny_model, with_ssh, monkeypatch, capsys):
    """Each with its own cache; here both hosts are this machine, which may not ask the hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "hub/datasets--owner--kept/snapshots").mkdir(parents=True)
    (tmp_path / ".deepspeed_env").write_text(f"HF_HUB_CACHE={tmp_path}/hub\nHF_TOKEN=hf_s3cret\n")
    (tmp_path / "hosts").write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
    (tmp_path / "run.yaml").write_text(
        f"cluster: {{clients: 2}}\nmodel: {{path: {tiny_model}}}\ndata: {{train: [owner/kept, 'owner/gone:test']}}\n"
    )
    code, found, printed = doctor(capsys, "--hostfile", "hosts", "--config", "run.yaml")
    assert code == 2 and "s3cret" not in printed
    for host in ("127.0.0.1", "127.0.0.2"):
        told = found["files", host]
        assert told["state"] == "fail" and told["what"].startswith("data.train: owner/gone: the hub's cache (")
        assert "owner/kept" not in told["what"] and "hf download owner/gone --repo-type dataset" in told["fix"]
    code, found, _ = doctor(capsys, "--hostfile", "hosts", "--config", "run.yaml", "data.train=[owner/kept]")
    assert found["files", "127.0.0.2"]["what"] == "2 paths, 1 name of the hub"


def test_in_a_job_of_slurm_the_hosts_are_those_of_the_job(tmp_path, tiny_model, with_ssh, monkeypatch, capsys):
    for name, value in (("JOB_NODELIST", "127.0.0.[1-3]"), ("NTASKS", "6"), ("TASKS_PER_NODE", "2(x3)")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / ".deepspeed_env").write_text("export WRONG\n")
    (tmp_path / "run.yaml").write_text(
        f"model: {{path: {tiny_model}}}\ndata: {{train: [rows.jsonl], batch_size: 24, micro_batch_size: 1}}\n"
    )
    keys = ["--config", "run.yaml", "run.output=out", "run.device=cpu"]
    code, found, printed = doctor(capsys, *keys, "cluster.clients=3")
    assert (code, json.loads(printed)["scheduler"]) == (0, "Slurm"), printed
    assert found["plan", "here"]["state"] == found["files", "127.0.0.2"]["state"] == "ok"
    assert found["ssh", "127.0.0.3"]["state"] == "warn" and "Slurm" in found["ssh", "127.0.0.3"]["what"]
    assert not any(check == ".deepspeed_env" for check, _ in found), "srun does not read it"
    code, found, _ = doctor(capsys, *keys, "cluster.clients=4")
    assert code == 2 and "6 ranks cannot be divided among 4 clients" in found["plan", "here"]["what"]
    monkeypatch.delenv("SLURM_NTASKS")
    code, found, _ = doctor(capsys, *keys, "cluster.clients=4")
    assert code == 0 and found["plan", "here"]["state"] == "ok", "one rank a client"
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    code, found, printed = doctor(capsys, *keys, "--hostfile", "hosts", "cluster.clients=2")
    assert (code, json.loads(printed)["hosts"]) == (0, ["localhost"])
    put(tmp_path / "bin" / "srun", SRUN)
    (tmp_path / "bin" / "ssh").unlink()
    code, found, printed = doctor(capsys, *keys, "cluster.clients=3")
    away = found["srun", "127.0.0.3"]
    assert code == 2 and away["what"].endswith("srun: error: Unable to create step"), printed
    assert away["state"] == "fail" and "srun --overlap --nodelist=127.0.0.3" in away["fix"]
    assert not any(check == "ssh" for check, _ in found)
    for name in ("srun", "python", "files", "output"):
        assert found[name, "127.0.0.1"]["state"] == found[name, "127.0.0.2"]["state"] == "ok", printed
    assert len(json.loads(printed)["links"]) == 1


def test_a_hostfile_of_this_machine_alone_needs_no_ssh(tmp_path, sh_alone, monkeypatch, capsys):
    (tmp_path / "hosts").write_text(f"{socket.gethostname()} slots=1\n")
    monkeypatch.setenv("PATH", sh_alone)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    code, found, _ = doctor(capsys, "--hostfile", "hosts")
    assert code == 0 and not any(check == "hosts" for check, _ in found)
    assert [is_this_machine(name, 10.0) for name in ("127.0.0.1", "localhost", "192.0.2.77", "no.such.invalid")] == [
        True,
        True,
        False,
        False,
    ]


def test_in_a_job_whose_hosts_nothing_tells_this_machine_is_not_all(monkeypatch, capsys):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    code, found, printed = doctor(capsys)
    (told,) = [told for (check, _), told in found.items() if check == "hosts"]
    assert (code, told["state"], len(json.loads(printed)["hosts"])) == (0, "warn", 1)
    assert "a job of Slurm (SLURM_JOB_ID=7) without SLURM_JOB_NODELIST" in told["what"] and "--hostfile" in told["fix"]
    main(["doctor", "--port", str(free_port())])
    assert "all well" not in capsys.readouterr().out


def test_a_host_that_hangs_costs_the_time_of_one_answer():
    for silent in (["sleep", "60"], [sys.executable, "-S", "-c", "import time; time.sleep(60)"]):
        host = Host(silent, 0.2)
        with pytest.raises(Unreachable, match="no answer within"):
            host.ask("clock")
        with pytest.raises(Unreachable):
            host.ask("clock")
    dead = Host(["sh", "-c", "echo why >&2; exit 3"], 60)
    with pytest.raises(Unreachable, match="ended with 3") as caught:
        dead.ask("clock")
    assert caught.value.said == "why"


def test_an_agent_ends_with_its_connection_and_takes_its_files_along(tmp_path):
    host = Host(command(None), 60)
    assert host.ask("write", folder=str(tmp_path / "new"), name=".probe")["at"] == str(tmp_path)
    assert host.ask("see", folder=str(tmp_path), names=[".probe", "x"]) == [".probe"]
    with pytest.raises(OSError, match="Cannot assign requested address"):
        host.ask("listen", address="192.0.2.77", token="t", within_s=1.0)
    port = host.ask("listen", address="127.0.0.1", token="right", within_s=100.0)
    strange = host.ask("measure", address="127.0.0.1", port=port, token="wrong", seconds=0.01, within_s=100.0)
    assert "lost the connection" in strange["error"]
    right = host.ask("measure", address="127.0.0.1", port=port, token="right", seconds=0.01, within_s=100.0)
    assert right["bytes_per_s"] > 0
    again = host.ask("measure", address="127.0.0.1", port=port, token="right", seconds=0.01, within_s=100.0)
    assert "error" in again, "a listener takes one visit"
    host.close()
    assert not list(tmp_path.iterdir())


def test_hosts_are_paired_whose_ranks_send_each_other_messages():
    ring = build_mixing(GossipConfig(graph="ring"), 4, 0)
    apart = pairs_of(ClientLayout.of([1] * 4), ring, ["a", "b", "c", "d"])
    assert apart == [("a", "b"), ("a", "c"), ("a", "d"), ("b", "c"), ("c", "d")], "the ring, and the store on a"
    two = pairs_of(ClientLayout.of([2] * 4), ring, ["a"] * 4 + ["b"] * 4)
    assert two == [("a", "b")]
    spread = pairs_of(ClientLayout.of([2] * 4), ring, list("abcdefgh"))
    assert ("c", "d") in spread and ("c", "e") in spread and ("c", "f") not in spread, "shard 0 meets shard 0"


def test_names_of_the_hub_are_no_paths_and_clients_files_are_for_their_own_hosts():
    keys = ["model.path=Qwen/Qwen2.5-0.5B", "model.tokenizer=./tokens", "cluster.clients=2"]
    train = load_config(None, [*keys, "data.train=[owner/rows:train,rows.jsonl,/d/*.csv]"])
    everywhere = [("model.tokenizer", "./tokens"), ("data.train", "rows.jsonl"), ("data.train", "/d/*.csv")]
    assert names_of(train) == [("model.path", "model", "Qwen/Qwen2.5-0.5B"), ("data.train", "dataset", "owner/rows")]
    assert paths_of(train, ClientLayout.of([1, 1]), ["a", "b"]) == {"a": everywhere, "b": everywhere}
    own = paths_of(train, ClientLayout.of([1, 1]), ["a", "b"], Path("run.yaml"))
    assert own["b"] == [("--config", "run.yaml"), *everywhere], "each rank reads it on its own host"
    apart = paths_of(
        load_config(None, [*keys, "data.per_client=[x.csv,y.csv]"]), ClientLayout.of([2, 1]), ["a", "b", "c"]
    )
    own = {host: [path for key, path in paths if key == "data.per_client"] for host, paths in apart.items()}
    assert own == {"a": ["x.csv"], "b": ["x.csv"], "c": ["y.csv"]}
