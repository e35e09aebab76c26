"""The one day that chat templates write: the same on all ranks, and the first start's after a resume."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import HashStore

from deca_ds.config import load_config, save_config
from deca_ds.config.resume import check_folder
from deca_ds.errors import ConfigError
from deca_ds.launch import Launch
from deca_ds.launch.store import JobStore
from deca_ds.training import template_date


def agreed(run: Path, todays: list[str], monkeypatch: pytest.MonkeyPatch, *changes: str) -> list[str | None]:
    """data.date of each rank, where rank i takes todays[i] for today and only rank 0 sees what is in `run`."""
    store = JobStore(HashStore(), None, timedelta(seconds=100))
    own = iter(todays)
    monkeypatch.setattr(template_date, "today", lambda: next(own))

    def rank(number: int) -> str | None:
        folder = run if number == 0 else run / "another host"
        config = load_config(None, ["model.path=x", f"run.output={folder}", *changes])
        launch = Launch("python", number, len(todays), 0, None)
        return template_date.agree_on_date(config, launch, JobStore(store.store, None, store.timeout)).data.date

    with ThreadPoolExecutor(len(todays)) as pool:
        return list(pool.map(rank, range(len(todays))))


def test_all_ranks_have_one_day(tmp_path, monkeypatch):
    days = agreed(tmp_path, ["2026-03-01", "2026-03-02"], monkeypatch)
    assert len(set(days)) == 1 and days[0] in ("2026-03-01", "2026-03-02")
    assert agreed(tmp_path, ["2026-03-01"], monkeypatch, "data.date=2020-02-02") == ["2020-02-02"]


def test_a_run_that_continues_keeps_its_day(tmp_path, monkeypatch):
    base = ["model.path=x", f"run.output={tmp_path}"]
    save_config(load_config(None, [*base, "data.date=2026-03-01"]), tmp_path / "config.yaml")
    resumed = "run.resume=require"
    assert agreed(tmp_path, ["2026-04-01"] * 2, monkeypatch, resumed) == ["2026-03-01"] * 2
    check_folder(load_config(None, [*base, resumed]))
    with pytest.raises(ConfigError, match=r"data\.date = '2026-04-01'"):
        check_folder(load_config(None, [*base, resumed, "data.date=2026-04-01"]))
