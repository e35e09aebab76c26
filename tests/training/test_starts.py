"""starts.json: an entry a start, and no more than that depends on it."""

import json
from types import SimpleNamespace

import torch

from deca_ds.launch.launcher import ClientLayout
from deca_ds.training.starts import FILE, record_start


def test_every_start_has_its_entry(tmp_path):
    blocks = [SimpleNamespace(label="embeddings", numel=6), SimpleNamespace(label="layers 0-1", numel=4)]
    shapes = {"embedding": (2, 3), "weight": (2, 2), "frozen": (5,)}
    client = SimpleNamespace(model=torch.nn.Linear(1, 1), shapes=shapes, plan=SimpleNamespace(blocks=blocks))
    cluster = SimpleNamespace(layout=ClientLayout.of([2, 1]), clients=2, transport="torch", device=torch.device("cpu"))
    (tmp_path / FILE).write_text("[{torn")
    for done in (0, 12):
        record_start(tmp_path, client, cluster, done, {"torch": "2.13.0"})
    first, second = json.loads((tmp_path / FILE).read_text())
    assert (first["step"], second["step"]) == (0, 12) and first["time"] <= second["time"]
    assert first["ranks"] == [2, 1] and first["device"] == "CPU" and first["transport"] == "torch"
    assert first["software"]["torch"] == "2.13.0" and "deca_ds" in first["software"]
    model = {"architecture": "Linear", "parameters": 15, "blocks": [["embeddings", 6], ["layers 0-1", 4]]}
    assert first["model"] == model
    assert [path.name for path in tmp_path.iterdir()] == [FILE], "nothing in part is left"
