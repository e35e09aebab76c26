import pytest
from hypothesis import given
from hypothesis import strategies as st

from deca_ds.errors import LaunchError
from deca_ds.launch.launcher import ClientLayout, Launch, read_launch
from deca_ds.launch.world import choose_transport

OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
MASTER = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
# the shell that an sbatch script runs in: every process that another launcher starts from it inherits these
BATCH = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"}
SRUN = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"}
FLUX = {"FLUX_TASK_RANK": "6", "FLUX_JOB_SIZE": "8", "FLUX_TASK_LOCAL_ID": "2"}
PALS = {"PMI_RANK": "5", "PMI_SIZE": "8", "PALS_RANKID": "5", "PALS_LOCAL_RANKID": "1"}
LAUNCHERS = {
    "python": ({}, Launch("python", 0, 1, 0, None)),
    "deepspeed": (
        {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", **MASTER},
        Launch("deepspeed", 3, 4, 1, ("10.0.0.1", 29500)),
    ),
    "torchrun": (
        {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", **MASTER},
        Launch("deepspeed", 1, 2, 1, ("10.0.0.1", 29500)),
    ),
    "by hand": ({"RANK": "1", "WORLD_SIZE": "2", **MASTER}, Launch("deepspeed", 1, 2, None, ("10.0.0.1", 29500))),
    "deepspeed in an MPI job": (
        {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", **MASTER, **OPEN_MPI},
        Launch("deepspeed", 3, 4, 1, ("10.0.0.1", 29500)),
    ),
    "Open MPI": (OPEN_MPI, Launch("openmpi", 2, 4, 0, None)),
    "Open MPI from a batch script": (BATCH | OPEN_MPI, Launch("openmpi", 2, 4, 0, None)),
    "MPICH": ({"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1"}, Launch("mpich", 2, 4, 1, None)),
    "MPICH from a batch script": (BATCH | {"PMI_RANK": "2", "PMI_SIZE": "4"}, Launch("mpich", 2, 4, None, None)),
    "PMI with a rank on the host": (
        {"PMI_RANK": "6", "PMI_SIZE": "8", "PMI_LOCAL_RANK": "2", "PMI_LOCAL_SIZE": "4"},
        Launch("mpich", 6, 8, 2, None, spans_hosts=True),
    ),
    "Cray PALS": (PALS, Launch("mpich", 5, 8, 1, None)),
    "srun --mpi=pmi2": (
        {"PMI_RANK": "3", "PMI_SIZE": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4"},
        Launch("mpich", 3, 4, 1, None),
    ),
    "srun": (SRUN, Launch("slurm", 1, 4, 1, None)),
    "Flux": (FLUX, Launch("flux", 6, 8, 2, None)),
    "Flux with PMI": (FLUX | {"PMI_RANK": "6", "PMI_SIZE": "8"}, Launch("mpich", 6, 8, 2, None)),
}


def test_ranks_on_other_hosts_are_known_from_the_number_on_this_one_or_that_of_hosts(tmp_path):
    (nodes := tmp_path / "nodes").write_text("x1\nx2\n")
    (one := tmp_path / "one").write_text("x1\nx1\n")
    deepspeed = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", **MASTER}
    for own, number, spans in (
        (deepspeed, {"LOCAL_SIZE": "1"}, True),
        (deepspeed, {"LOCAL_SIZE": "2"}, False),
        (OPEN_MPI, {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, True),
        (OPEN_MPI, {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, False),
        (deepspeed, OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, False),  # of the job around it
        (deepspeed, {}, False),
        (SRUN, {"SLURM_STEP_NUM_NODES": "2"}, True),
        (SRUN, {"SLURM_STEP_NUM_NODES": "1"}, False),
        (deepspeed, SRUN | {"SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "0"}, False),  # of the step around it
        (FLUX, {"FLUX_JOB_NNODES": "2"}, True),
        (FLUX, {"FLUX_JOB_NNODES": "1"}, False),
        (PALS, {"PALS_NODEID": "1"}, True),  # only the first host has the list
        (PALS, {"PALS_NODEID": "0", "PBS_NODEFILE": str(nodes)}, True),
        (PALS, {"PALS_NODEID": "0", "PBS_NODEFILE": str(one)}, False),
        (PALS, {"PALS_NODEID": "0", "PBS_NODEFILE": str(tmp_path / "gone")}, False),
    ):
        assert read_launch(own | number).spans_hosts == spans


@pytest.mark.parametrize("name", LAUNCHERS)
def test_rank_host_and_world_are_read_from_each_launchers_variables(name):
    environ, launch = LAUNCHERS[name]
    assert read_launch(environ) == launch


def test_the_shell_of_a_slurm_batch_script_is_one_rank():
    assert read_launch({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}).world_size == 1


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        ({"RANK": "x"}, "RANK=x "),
        ({"RANK": "2"}, "RANK=2 is not below WORLD_SIZE=2"),
        ({"RANK": "-1"}, "RANK=-1 "),
        ({"RANK": ""}, "RANK= "),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two "),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 "),
        ({"LOCAL_RANK": "1.0"}, "LOCAL_RANK=1.0 "),
        *(({"MASTER_PORT": port}, f"MASTER_PORT={port} ") for port in ("abc", "", "0", "65536", "-1", "29500.0")),
    ],
)
def test_variables_that_make_no_sense_are_named(broken, named):
    whole = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    with pytest.raises(LaunchError, match=named):
        read_launch(whole | broken)


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_ranks_that_are_told_half_of_it_do_not_train_alone(missing):
    whole = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    with pytest.raises(LaunchError, match=missing):
        read_launch({key: value for key, value in whole.items() if key != missing})
    assert read_launch({"RANK": "0", "WORLD_SIZE": "1"}).world_size == 1
    assert read_launch({"WORLD_SIZE": "1"}).launcher == "python"


@pytest.mark.parametrize("address", ["::1", "[::1]", "fd00::7"])
def test_an_address_of_ipv6_has_no_brackets(address):
    whole = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": address, "MASTER_PORT": "29500"}
    assert read_launch(whole).master == (address.strip("[]"), 29500)


def test_absent_clients_are_left_out_of_the_launch():
    layout, launch = ClientLayout.of([2, 1, 2]), Launch("deepspeed", 3, 5, 0, ("127.0.0.1", 1))
    assert (launch.ranks, launch.first) == ([0, 1, 2, 3, 4], 0)
    without = launch.without([0], layout)
    assert (without.ranks, without.first) == ([2, 3, 4], 2)
    with pytest.raises(LaunchError, match=r"(?s)rank 3 is of client 2, which cluster.absent names.*--join"):
        launch.without([2], layout)


@given(clients=st.integers(1, 20), ranks=st.integers(1, 20))
def test_every_rank_has_one_place(clients, ranks):
    layout = ClientLayout(clients, ranks)
    places = [(layout.client_of(r), layout.shard_of(r)) for r in range(clients * ranks)]
    assert places == [(c, s) for c in range(clients) for s in range(ranks)]
    assert [layout.leader_of(c) for c in range(clients)] == [places.index((c, 0)) for c in range(clients)]


def test_mpi_without_an_mpi_world_fails_at_once_and_names_the_flags():
    launch = Launch("deepspeed", 0, 4, 0, ("127.0.0.1", 29500))
    assert choose_transport("auto", launch) == "torch"
    with pytest.raises(LaunchError, match=r"--launcher openmpi --force_multi(.|\n)*transport=torch"):
        choose_transport("mpi", launch)


@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=6))
def test_clients_of_different_sizes_follow_each_other(sizes):
    layout = ClientLayout.of(sizes)
    places = [(client, shard) for client, size in enumerate(sizes) for shard in range(size)]
    assert layout.even == (len(set(sizes)) == 1) and layout.clients == len(sizes)
    assert [(layout.client_of(r), layout.shard_of(r)) for r in range(sum(sizes))] == places
    for client, size in enumerate(sizes):
        assert [places[rank] for rank in layout.ranks_of(client)] == [(client, shard) for shard in range(size)]
        assert layout.leader_of(client) == places.index((client, 0))
        for rank in range(sum(sizes)):
            wanted = [(client, layout.shard_of(rank))] if layout.even else [(client, shard) for shard in range(size)]
            assert [places[partner] for partner in layout.partners(rank, client)] == wanted
