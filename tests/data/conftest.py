"""Fixtures of the data part: a datasets cache of its own, and a tokenizer whose tokens are bytes."""

from __future__ import annotations

import datasets
import pytest
from data_samples import CHAT_TEMPLATE, make_byte_tokenizer
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """No test reads or leaves anything in the user's datasets cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets_cache"))
        yield


@pytest.fixture(autouse=True)
def no_progress_bars():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes with an EOS (id 2) and a chat template, without a BOS."""
    made = make_byte_tokenizer(eos_token="</s>")
    made.chat_template = CHAT_TEMPLATE
    return made
