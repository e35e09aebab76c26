"""The one date that chat templates may write, for all ranks of a run and all its starts."""

from __future__ import annotations

import datetime
from dataclasses import replace
from pathlib import Path

from deca_ds.config import Config, load_config
from deca_ds.launch import Launch
from deca_ds.launch.store import JobStore
from deca_ds.run_folder import SAVED_CONFIG


def agree_on_date(config: Config, launch: Launch, store: JobStore) -> Config:
    """Return the configuration with a date: if data.date is null, that of the run that is resumed, or else the first
    rank's day. All ranks that are started together call this."""
    saved = Path(config.run.output) / SAVED_CONFIG  # where the host of the run's first rank wrote it
    known = config.data.date
    if known is None and config.run.resume != "never" and saved.is_file():
        known = load_config(saved).data.date
    every = store.gather(launch, "day", [known, today()])
    day = next((day for day, _ in every.values() if day is not None), every[launch.first][1])
    return replace(config, data=replace(config.data, date=day))


def with_date(config: Config, day: str | None) -> Config:
    """Return the configuration with `day` as its data.date, if that is null."""
    return replace(config, data=replace(config.data, date=config.data.date or day))


def today() -> str:
    """Return the day in UTC, as 2026-11-26."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()
