"""`deca` without a command that there is: what it says, and its exit code."""

from __future__ import annotations

import pytest

from deca_ds.cli import main


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["trian", "--config", "run.yaml"], "deca has no command 'trian'\n  fix:   did you mean deca train?"),
        (["reprot"], "did you mean deca report?"),
        (["--config", "run.yaml"], "deca has no command '--config'\n  fix:   deca --help lists the commands"),
        (["xyz"], "deca --help lists the commands"),
        ([], "have a job save a checkpoint and stop"),
    ],
)
def test_an_unknown_command_is_refused_with_the_likeliest_one(given, told, capsys):
    assert main(given) == 2
    printed = capsys.readouterr()
    assert told in printed.err and not printed.out


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0 and "  train " in capsys.readouterr().out
