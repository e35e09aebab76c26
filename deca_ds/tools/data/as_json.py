"""`deca data --json`: everything, for programs."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from deca_ds.tools.data.look import Client, Found


def as_json(found: Found) -> str:
    """Write all that was found as JSON, texts in full."""
    return json.dumps(
        {
            "sample": found.sample,
            "max_length": found.config.data.max_length,
            "files": found.files,
            "clients": [_client(client) | asdict(found.repeats.clients[client.number]) for client in found.clients],
            "elsewhere": found.elsewhere,
            "repeats": {key: value for key, value in asdict(found.repeats).items() if key != "clients"},
        },
        ensure_ascii=False,
        indent=1,
    )


def _client(client: Client) -> dict[str, Any]:
    masked = client.data.summary["train_tokens"] - client.data.summary["target_tokens"]
    return {
        **client.data.summary,
        "masked_tokens": masked,
        "lengths": client.data.lengths,
        "labels": client.labels or client.data.summary["labels"],
        "notes": client.data.notes,
        "sequences": [asdict(each) for each in client.shown],
    }
