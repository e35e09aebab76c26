"""Going on after a death is refused where it cannot be kept."""

from __future__ import annotations

import pytest

from deca_ds.cluster.launch import Launch
from deca_ds.cluster.world import check_on_failure
from deca_ds.config.schema import Config
from deca_ds.errors import ConfigError, LaunchError


def config(clients: int, on_failure: str = "continue") -> Config:
    made = Config()
    made.cluster.clients, made.cluster.on_failure = clients, on_failure
    return made


DEEPSPEED = Launch("deepspeed", 0, 4, 0, 4, ("127.0.0.1", 1))


def test_torch_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("OMPI_MCA_mpi_ft_enable", "1")
    with pytest.raises(LaunchError, match="mpirun --with-ft ulfm"):
        check_on_failure(config(2), DEEPSPEED, edges=True)
    check_on_failure(config(2, "stop"), DEEPSPEED, edges=True)


@pytest.mark.parametrize(("clients", "edges"), [(1, False), (4, False)])
def test_clients_that_do_not_average_are_refused(clients, edges):
    with pytest.raises(ConfigError, match="no clients that average with each other"):
        check_on_failure(config(clients), DEEPSPEED, edges=edges)
