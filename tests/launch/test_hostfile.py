"""Any hostfile is hosts with slots, as the launcher reads them, or one error that names the file and the line."""

from __future__ import annotations

import pytest
from deepspeed.launcher.runner import fetch_hostfile
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deca_ds.errors import LaunchError
from deca_ds.launch.hostfile import hosts_of_clients, read_hostfile
from deca_ds.launch.launcher import ClientLayout

LINES = st.lists(
    st.sampled_from(["a slots=2", "b slots=1", "  c  slots=3 # its GPUs", "# no host", "", "d slots=2 max_slots=4"])
    | st.text(max_size=12)
    | st.builds("{} slots={}".format, st.text(max_size=3), st.integers(-1, 10**7)),
    max_size=5,
)


@settings(max_examples=200)
@given(content=st.binary(max_size=40) | LINES.map(lambda lines: "\n".join(lines).encode()))
@example(content=b"a slots=4x\n")
@example(content=b"a slots=2\na slots=2\n")
@example(content="a slots=\u0663\n".encode())
@example(content=b"\0\xc2\xa0 slots=1")
@example(content=b"a slots=1 # one\x1cb slots=1")
def test_any_hostfile_is_read_as_deepspeed_reads_it_or_refused_with_its_name(tmp_path, content):
    path = tmp_path / "hosts"
    path.write_bytes(content)
    try:
        slots = read_hostfile(path)
    except LaunchError as error:
        assert str(path) in str(error)
        return
    assert slots == dict(fetch_hostfile(str(path)))
    assert all(count > 0 for count in slots.values())


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("a slots=2\nb slots=4x\n", "'b slots=4x' is no host.*hosts:2"),
        ("a slots=2\n\na slots=1\n", "a is there twice.*hosts:3"),
        ("a slots=0\n", "a has no slots.*hosts:1"),
        ("node1:2\n", "'node1:2' is no host.*HOST slots=RANKS"),
        ("# all of them\n", "there are no hosts in it"),
        (None, "cannot read the hostfile '.*hosts': there is no such file.*check the path"),
    ],
)
def test_what_is_no_hostfile_is_named(tmp_path, content, what):
    if content is not None:
        (tmp_path / "hosts").write_text(content)
    with pytest.raises(LaunchError, match=f"(?s){what}"):
        read_hostfile(tmp_path / "hosts")


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.data())
def test_every_rank_is_on_the_host_of_its_slot(counts, data):
    slots = {f"host{i}": count for i, count in enumerate(counts)}
    total = sum(counts)
    clients = data.draw(st.sampled_from([n for n in range(1, total + 1) if total % n == 0]))
    hosts = hosts_of_clients(slots, ClientLayout(clients, total // clients))
    ranks_on = [host for host, count in slots.items() for _ in range(count)]
    for client, names in enumerate(hosts):
        ranks = range(client * total // clients, (client + 1) * total // clients)
        assert set(names) == {ranks_on[rank] for rank in ranks}
        assert names == sorted(names, key=list(slots).index)


def test_hosts_follow_clients_of_different_sizes():
    assert hosts_of_clients({"a": 2, "b": 2}, ClientLayout.of([2, 1, 1])) == [["a"], ["b"], ["b"]]
