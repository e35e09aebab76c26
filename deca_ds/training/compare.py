"""Do all clients start from the same? Their data as far as counts and labels tell, and the values of their models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from deca_ds.engine.client import Client
from deca_ds.errors import DataError
from deca_ds.launch import ClientLayout
from deca_ds.launch.digests import digest
from deca_ds.training.model_digest import whole_digest


def compare_data(summaries: Sequence[dict[str, Any]], label_names: Sequence[list[str]]) -> None:
    """Raise DataError unless all clients number the same labels alike and hold equally large common evaluation sets."""
    first = summaries[0]["client"]
    for summary, names in zip(summaries, label_names, strict=True):
        client = summary["client"]
        if names != label_names[0]:
            raise DataError(
                f"client {first} has the labels {label_names[0]}, client {client} has {names}",
                where="data.label_names",
                fix="name all labels in data.label_names, so that every client knows the same ones",
            )
        if summary["common_evaluation"] != summaries[0]["common_evaluation"]:
            raise DataError(
                f"the common evaluation set has {summaries[0]['common_evaluation']} examples at client {first} and "
                f"{summary['common_evaluation']} at client {client}",
                where="data.evaluation",
                fix="give every client the same files",
            )


def digest_of_start(client: Client, layout: ClientLayout) -> str:
    """Of the initial parameters and buffers that this rank holds; where clients differ in size, of the whole client,
    the same on all of its ranks."""
    if not layout.even:
        return whole_digest(client)
    names = tuple(name for block in client.plan.blocks for name in block.names) + client.plan.frozen
    held = [values for *_, values in client.shards(names)]
    held += [bits for *_, bits in client.low_bits(names)]
    held += [buffer for _, buffer in client.buffers()]
    return digest(_memory(values) for values in held)


def _memory(values: torch.Tensor) -> memoryview:
    """The memory of a tensor, on the host."""
    flat = values.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data
