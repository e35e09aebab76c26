"""A finished run's folder with tiny models, as the trainer leaves it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from saved_states import make_models, model_state, save_clients
from tokenizers import Tokenizer, models
from transformers import PreTrainedModel, PreTrainedTokenizerFast


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., tuple[Path, list[PreTrainedModel]]]:
    """make_run(architecture, clients=1, ranks=1, dtype=float32) -> (run folder, each client's model)."""

    def make(
        architecture: str = "llama", *, clients: int = 1, ranks: int = 1, dtype: torch.dtype = torch.float32
    ) -> tuple[Path, list[PreTrainedModel]]:
        run = tmp_path / "run"
        trained = make_models(architecture, clients, dtype)
        trained[0].config.save_pretrained(run / "hf")
        trained[0].generation_config.save_pretrained(run / "hf")
        words = {"<unk>": 0, "a": 1, "story": 2}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(run / "hf")
        save_clients(run / "model", [model_state(model) for model in trained], ranks=ranks)
        (run / "DONE").touch()
        return run, trained

    return make
