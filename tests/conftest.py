"""What all tests share: tiny models, and real data where it is at hand."""

from __future__ import annotations

import gc

gc.disable()  # while a worker imports what all tests need: looking for garbage among it takes more than a second

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from jobs import REPOSITORY
from words import make_tiny_model, make_word_files

# no test's outcome depends on how busy the machine is, nor on the day; `--hypothesis-profile=search` looks further
HealthCheck = hypothesis.HealthCheck  # too_slow goes by the clock; a folder may serve all examples of a test
TIMELESS = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]}
hypothesis.settings.register_profile("search", **TIMELESS)
hypothesis.settings.register_profile("same", **TIMELESS, derandomize=True)
hypothesis.settings.load_profile("same")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


# Files come by how long they take, and then those that start real jobs, before the others: with one file at a time for
# each worker, the last ones are short.
LONGEST = (
    "integration/test_numbers.py", "integration/test_lost_hosts.py", "integration/test_dying_clients.py",
    "integration/test_several_hosts.py", "integration/test_resume.py", "integration/test_failing_jobs.py",
    "engine/test_loading.py", "integration/test_launching.py", "integration/test_different_sizes.py",
    "integration/test_late_clients.py", "integration/test_dec_lora.py",
)  # fmt: skip
TESTS = Path(__file__).parent
assert all((TESTS / name).exists() for name in LONGEST)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {TESTS / name: place for place, name in enumerate(LONGEST)}
    real = {item.path for item in items if item.get_closest_marker("multiprocess")}
    items.sort(key=lambda item: places.get(item.path, len(LONGEST) + (item.path not in real)))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[object]:
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """A folder with real models and data sets, which the project does not ship."""
    folder = Path(os.environ.get("DECA_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (folder / "stories260k").is_dir():
        pytest.skip(f"no real data at {folder}; set DECA_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A random Llama of three layers with a word-level tokenizer."""
    return make_tiny_model(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def word_files(tmp_path_factory) -> list[Path]:
    """Three text files (JSON Lines) with different words each: one client's data each."""
    return make_word_files(tmp_path_factory.mktemp("words"))
