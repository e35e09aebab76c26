"""Continuing after a death is refused where it cannot be kept."""

from __future__ import annotations

import pytest

from deca_ds.config.schema import Config
from deca_ds.errors import ConfigError, LaunchError
from deca_ds.launch import world
from deca_ds.launch.launcher import Launch
from deca_ds.launch.world import check_on_failure


def config(clients: int, on_failure: str = "continue") -> Config:
    made = Config()
    made.cluster.clients, made.cluster.on_failure = clients, on_failure
    return made


def launched(launcher: str) -> Launch:
    return Launch(launcher, 0, 4, 0, 4, ("127.0.0.1", 1))


@pytest.mark.parametrize(
    ("launcher", "variable", "what"),
    [
        ("openmpi", None, "started without fault tolerance \\(ULFM\\)"),
        ("deepspeed", ("CROSS_SIZE", "1"), "deepspeed ends all ranks of a host"),
        ("deepspeed", ("TORCHELASTIC_RUN_ID", "x"), "torchrun ends all ranks"),
    ],
)
def test_launchers_that_end_all_ranks_are_refused_with_what_to_do(monkeypatch, launcher, variable, what):
    made = config(2)
    made.cluster.transport = "torch"
    for name in ("OMPI_MCA_mpi_ft_enable", "CROSS_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    check_on_failure(made, launched("deepspeed"), edges=True)
    if variable:
        monkeypatch.setenv(*variable)
    with pytest.raises(LaunchError, match=f"(?s){what}.*mpirun --with-ft ulfm.*by itself"):
        check_on_failure(made, launched(launcher), edges=True)
    made.cluster.on_failure = "stop"
    check_on_failure(made, launched(launcher), edges=True)


def test_coming_back_by_itself_over_mpi_is_refused(monkeypatch):
    monkeypatch.setenv("OMPI_MCA_mpi_ft_enable", "true")
    monkeypatch.setattr(world, "choose_transport", lambda *_: "mpi")  # without starting MPI in this process
    made = config(2)
    check_on_failure(made, launched("openmpi"), edges=True)
    made.cluster.return_s = 60.0
    with pytest.raises(LaunchError, match=r"cluster\.return_s = 60, but over MPI no process can join"):
        check_on_failure(made, launched("openmpi"), edges=True)


def test_absent_clients_over_mpi_are_refused(monkeypatch):
    monkeypatch.setenv("OMPI_MCA_mpi_ft_enable", "true")
    monkeypatch.setattr(world, "choose_transport", lambda *_: "mpi")
    made = config(3)
    made.cluster.absent = [2]
    with pytest.raises(LaunchError, match=r"cluster\.absent = \[2\], but over MPI no process can join"):
        check_on_failure(made, launched("openmpi"), edges=True)


@pytest.mark.parametrize(("clients", "edges"), [(1, False), (4, False)])
def test_clients_that_do_not_average_are_refused(clients, edges):
    with pytest.raises(ConfigError, match="no clients that average with each other"):
        check_on_failure(config(clients), launched("deepspeed"), edges=edges)
