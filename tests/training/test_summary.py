"""Scores in words: one line an evaluation, and a table at the end."""

import json
import re

from deca_ds.training.next_commands import next_commands, stopped_commands
from deca_ds.training.scores import Evaluation, evaluations
from deca_ds.training.summary import print_summary


def scores(loss, accuracy=None):
    return {"loss": loss, "examples": 5} | ({} if accuracy is None else {"accuracy": accuracy, "recall": {"red": 1.0}})


def job(mean, *clients):
    return {
        "consensus_distance": 0.1234,
        "mean": scores(mean, 0.5),
        "clients": {str(i): {"own": scores(own, 0.25), "common": scores(common, 0.75)} for i, own, common in clients},
    }


def test_an_evaluation_is_one_line():
    line = Evaluation.of(24, 0, {"own": scores(1.0, 0.25), "seconds": 2.0}, job(0.5, (0, 1, 2), (1, 3, 2))).line(
        48, 2.0
    )
    assert line == (
        "evaluation after step 24 of 48 (2.0 s): own set, clients: loss 1.000 to 3.000, accuracy 25.0%; "
        "common set, clients: loss 2.000, accuracy 75.0%; mean model: loss 0.500, accuracy 50.0%; "
        "consensus distance 0.123"
    )
    assert "client 3: loss 1.000" in Evaluation.of(24, 3, {"own": scores(1.0)}, {}).line(48, 2.0)
    assert "no set to score" in Evaluation.of(24, 3, {"seconds": 1.0}, {}).line(48, 2.0)


def write(run, name, lines):
    (run / "metrics").mkdir(exist_ok=True)
    (run / "metrics" / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_table_has_every_client_and_the_mean_before_and_after(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    steps = ((0, job(6.0, (0, 6, 6), (11, 6, 6))), (24, job(0.5, (0, 1, 1), (11, 1, 1))), (48, job(0.75, (11, 2, 3))))
    write(tmp_path, "job.jsonl", [{"kind": "evaluation", "step": step, **line} for step, line in steps])
    own = [{"kind": "evaluation", "step": step, "own": scores(step / 10), "seconds": 1.0} for step in (0, 24, 48)]
    write(tmp_path, "client_011.jsonl", [{"kind": "step", "step": 1, "loss": 9.0}, *own])
    print_summary(evaluations(tmp_path, 11))
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80 and "\x1b" not in said
    rows = {line.split()[0] + line.split()[1]: line for line in said.splitlines() if " -> " in line}
    assert "client0" not in rows, "who is gone at the end has no score there"
    assert "6.000 -> 2.000" in rows["client11"] and "6.000 -> 3.000" in rows["client11"]
    assert "6.000 -> 0.750" in rows["meanmodel"] and "50.0% -> 50.0%" in rows["meanmodel"]
    assert "best evaluation: after step 24 of 48; loss of the mean model: 0.500" in said


def test_the_mean_model_on_the_sets_of_other_clients_is_not_compared(tmp_path, capsys):
    """Client 0 leaves with the examples that the model was worst on."""
    there = {0: {"0": {"own": scores(7.0)}, "1": {"own": scores(1.0)}}, 24: {"1": {"own": scores(1.0)}}}
    lines = [{"step": step, "clients": sets, "mean": scores(4.0 if step == 0 else 5.0)} for step, sets in there.items()]
    write(tmp_path, "job.jsonl", [{"kind": "evaluation", **line} for line in lines])
    own = [{"kind": "evaluation", "step": step, "own": scores(1.0)} for step in there]
    write(tmp_path, "client_001.jsonl", own)
    print_summary(evaluations(tmp_path, 1))
    said = capsys.readouterr().out
    assert "? -> 5.000" in said and "1.000 -> 1.000" in said
    assert "best evaluation: the last one; loss of the mean model: 5.000" in said


def test_clients_that_tell_each_other_nothing_have_a_table_of_one(tmp_path, capsys):
    own = [{"kind": "evaluation", "step": step, "common": scores(loss)} for step, loss in ((0, 3.0), (9, 1.0))]
    write(tmp_path, "client_000.jsonl", own)
    print_summary(evaluations(tmp_path, 0))
    said = capsys.readouterr().out
    assert "3.000 -> 1.000" in said and "mean model" not in said
    assert said.startswith("scores before and after: step 0 -> 9\n"), "however narrow the table is"
    assert "best evaluation: the last one; loss of the client: 1.000" in said


def test_a_run_without_sets_has_no_table(tmp_path, capsys):
    write(tmp_path, "client_000.jsonl", [{"kind": "evaluation", "step": 0, "seconds": 1.0}])
    print_summary(evaluations(tmp_path, 0))
    assert not capsys.readouterr().out


def test_the_next_commands_can_be_pasted(tmp_path):
    of_two, of_one = (next_commands(tmp_path.__class__("a b"), clients) for clients in (2, 1))
    assert "deca export 'a b' MODEL    the mean model as a folder" in of_two
    assert "MODEL    the model as a folder" in of_one and "mean" not in of_one


def test_where_clients_were_lost_the_first_command_says_how_the_job_ended(tmp_path):
    """The launcher's exit code says how the worst rank ended, so that a job that is done looks like one that failed."""
    for of_run in (
        lambda lost: next_commands(tmp_path, 3, lost=lost),
        lambda lost: stopped_commands(tmp_path, best=False, lost=lost),
    ):
        first, *others = of_run(True).split("\n")
        assert first.split("  ")[1] == f"deca status {tmp_path}" and "the launcher's exit code" in first
        assert others == of_run(False).split("\n")
        assert first.index("how the job") == re.search(r"\S {4,}\S", others[0]).end() - 1, "one below the other"


def test_an_evaluation_that_a_killed_process_has_not_written_to_its_end_is_left_out(tmp_path):
    write(tmp_path, "client_001.jsonl", [{"kind": "evaluation", "step": 8, "own": scores(1.0)}])
    with open(tmp_path / "metrics" / "client_001.jsonl", "a") as file:
        file.write('{"kind": "evaluation", "step": 16, "own": {"loss": 2}')
    assert [each.step for each in evaluations(tmp_path, 1)] == [8]
