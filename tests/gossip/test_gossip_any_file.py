"""Whatever a file of edges or weights holds, it gives a usable mixing matrix or one GossipError that names the file."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deca_ds.config.schema import GossipConfig
from deca_ds.errors import GossipError
from deca_ds.gossip.schedule import build_mixing

LIGHT = settings(max_examples=100)
NUMBERS = st.sampled_from(
    ["0", "1", "2", "3", "-1", "0.5", "1/3", "1/2", "1/0", "nan", "inf", "1e309", "x", "#", ",", ";"]
)
LINES = st.lists(st.lists(NUMBERS, max_size=4).map(" ".join), max_size=5).map("\n".join)


@pytest.mark.parametrize("key", ["edges", "matrix"])
@LIGHT
@given(content=st.binary(max_size=60) | LINES.map(str.encode))
@example(content=b"0 1\n1 2\n")
@example(content=b"1/2 1/2 0\n1/2 1/4 1/4\n0 1/4 3/4\n")
@example(content=b"9" * 5000 + b" 1")
@example(content=b"1/" + b"9" * 5000)
def test_any_file_is_a_usable_matrix_or_one_error_that_names_it(tmp_path, key, content):
    path = tmp_path / "file.txt"
    path.write_bytes(content)
    config = GossipConfig(graph="edge_list", edges=str(path)) if key == "edges" else GossipConfig(matrix=str(path))
    try:
        mixing = build_mixing(config, 3, 0)
    except GossipError as error:
        assert str(path) in str(error)
    else:
        for matrix in mixing.matrices:
            assert (matrix >= 0).all() and np.allclose(matrix.sum(axis=0), 1) and np.allclose(matrix.sum(axis=1), 1)
        assert 0 < mixing.spectral_gap <= 1
