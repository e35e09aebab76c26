"""The page: runs, their figures and tables, put into page.html with everything that a browser needs."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from deca_ds import __version__
from deca_ds.config import Config
from deca_ds.config.flat import flat
from deca_ds.errors import ConfigError
from deca_ds.run_folder import DONE
from deca_ds.tools.report import charts, curves, figures, tables
from deca_ds.tools.report.charts import Figure
from deca_ds.tools.report.compare_runs import differences
from deca_ds.tools.report.network import Network, network
from deca_ds.tools.report.records import Run
from deca_ds.tools.report.summary import figures_of, sentences, state
from deca_ds.tools.report.tables import Table
from deca_ds.tools.report.wording import redact

_HERE = Path(__file__).parent
MARK = '<meta name="generator" content="deca report'  # near the beginning of every report


@dataclass(frozen=True)
class Part:
    """A section of the page: tables and figures under a heading. folded: tables that the reader has to open."""

    title: str
    figures: Sequence[Figure]
    tables: Sequence[Table]
    folded: Sequence[Table] = ()


@cache
def library() -> str:
    """Return Vega, Vega-Lite and Vega-Embed in one script, about 0.9 MB. Raises ConfigError where the extra `report` is
    not installed."""
    try:
        import vl_convert
    except ImportError as error:
        raise _not_installed() from error
    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    assert "</script" not in bundle and "<!--" not in bundle
    return bundle


def render(runs: Sequence[Run], draws: Callable[[], str] = library) -> str:
    """Render the whole page; the same for the same runs. Raises ConfigError where the extra `report` is not
    installed.

    draws: makes the script that defines window.vegaEmbed(element, spec, options), which draws a chart.
    """
    template, drawing = _template(), draws()
    nets = [network(run) for run in runs]
    defaults = flat(Config())
    views = [_view(run, net, defaults, place) for place, (run, net) in enumerate(zip(runs, nets, strict=True))]
    comparison = _comparison(runs, nets, defaults) if len(runs) > 1 else []
    places = _Places()
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    pieces = {
        "title": runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        "version": __version__,
        "runs": views,
        "comparison": comparison,
        "style": (_HERE / "page.css").read_text(encoding="utf-8"),
        "scripts": [drawing, script],
        "script_hashes": " ".join(f"'{_hash(text)}'" for text in (drawing, script)),
        "place_of": places.of,
        "mark_class": _mark_class,
        "charts": places.script,  # called where all figures have been given their places
    }
    page: str = template.render(**pieces)
    return page.encode("utf-8", "replace").decode()  # JSON may have halves of characters


class _Places:
    """Gives each figure its place in the page, and keeps the specifications of the charts."""

    def __init__(self) -> None:
        self._specs: dict[str, charts.Spec] = {}

    def of(self, figure: Figure) -> str:
        name = f"chart{len(self._specs)}"
        self._specs[name] = {"description": f"{figure.title}. {figure.text}", **figure.spec}
        return name

    def script(self) -> str:
        """Return all specifications as JSON that cannot end the script element around it."""
        value = {"config": charts.CONFIG, "charts": self._specs}
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _view(run: Run, net: Network, defaults: dict[str, Any], place: int) -> dict[str, Any]:
    word, meaning = state(run)
    return {
        "name": run.name,
        "anchor": f"run{place}",
        "state": word,
        "meaning": "" if word == DONE and "\n" not in meaning else meaning,
        "sentences": sentences(run),
        "numbers": figures_of(run),
        "lost": [(client, redact(text)) for client, text in sorted(run.lost.items())],
        "notes": [redact(note) for note in run.notes],
        "parts": [part for part in _parts(run, net, defaults) if part.figures or part.tables or part.folded],
    }


def _parts(run: Run, net: Network, defaults: dict[str, Any]) -> Iterator[Part]:
    yield Part("Scores", (), [tables.scores(run, kind) for kind in run.kinds])
    yield Part("Learning", curves.learning(run), ())
    yield Part("Data and labels", [*figures.partition(run), *figures.recall(run), *figures.confusion(run)], ())
    data = [tables.data(run)] if run.data else []
    edges = [table for table in (tables.edges(net),) if table is not None]
    yield Part("Clients and graph", figures.graph(run, net), data, edges)
    happened = [table for table in (tables.happenings(run), tables.latecomers(run)) if table is not None]
    course = [*figures.timeline(run), *figures.membership(run), *curves.pace(run)]
    yield Part("Course", course, happened)
    yield Part("Time and memory", [*figures.time(run), *figures.memory(run), *curves.speed(run)], ())
    own, every = tables.settings(run, defaults)
    versions = [table for table in (tables.versions(run),) if table is not None]
    yield Part("Configuration and versions", (), [own, *versions], [every])


def _comparison(runs: Sequence[Run], nets: Sequence[Network], defaults: dict[str, Any]) -> list[Part]:
    rows = [[key, *values] for key, values in differences(runs, defaults)]
    head = ["key", *(run.name for run in runs)]
    unlike = [Table("What differs in the configuration", head, rows, frozenset(range(len(head))))] if rows else []
    return [Part("Comparison", curves.overlaid(runs), [tables.overview(runs, nets), *unlike])]


def _mark_class(series: str) -> str:
    """Return the style sheet's class for the colour of a series: c12, a client, or r3, a run."""
    return f"m{int(series[1:]) % charts.COLOURS}" if series[1:].isdigit() else "mm"


def _hash(script: str) -> str:
    """Return the hash of a script, by which the page's content security policy allows it alone to run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _template() -> Any:
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        raise _not_installed() from error
    options: dict[str, Any] = {
        "autoescape": True,
        "undefined": StrictUndefined,
        "trim_blocks": True,
        "lstrip_blocks": True,
    }
    return Environment(loader=FileSystemLoader(_HERE), **options).get_template("page.html")


def _not_installed() -> ConfigError:
    return ConfigError(
        "deca report needs the extra `report`, which is not installed",
        where="deca report",
        fix="pip install 'deca_ds[report]'",
    )
