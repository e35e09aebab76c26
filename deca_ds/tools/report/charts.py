"""Vega-Lite specifications of the kinds of charts that a report has.

Colours are variables of the page's style sheet (page.css), so that a chart follows the reader's light or dark theme and
prints in dark ink; SVG takes them where it takes colours. Names that come from a run are data, never field names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Spec = dict[str, Any]
Value = float | int | str | None

COLOURS = 10  # --c0 .. --c9 in page.css
_SOLID = 5  # as many colours, which differ in lightness too, come with the same dashes
DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3])
MOST_POINTS = 300  # of a curve
_MOST_VALUES = 40  # that a tooltip lists
STEPS: Spec = {"format": ",d", "tickMinStep": 1, "tickCount": 6, "labelFlush": False, "labelOverlap": "greedy"}
# what all charts share
CONFIG: Spec = {
    "background": "transparent",
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": "var(--muted)", "titleColor": "var(--muted)", "gridColor": "var(--grid)",
        "domainColor": "var(--line)", "tickColor": "var(--line)", "labelFontSize": 11, "titleFontSize": 11,
        "titleFontWeight": "normal", "labelLimit": 110, "gridWidth": 1,
    },
    "legend": {
        "labelColor": "var(--ink)", "orient": "bottom", "title": None, "labelFontSize": 11, "columns": 2,
        "symbolType": "square", "labelLimit": 220,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """A chart with its title and what the reader has to know. legend: of lines. size: small, half or wide, a third, a
    half or all of a wide page."""

    title: str
    text: str
    spec: Spec
    legend: Sequence[Series] = ()
    size: str = "half"


@dataclass(frozen=True)
class Series:
    """A line of a chart: its field in the rows, its name for people, and its place in the colours; None: the ink."""

    key: str
    name: str
    place: int | None
    band: bool = False  # whether the rows have key + "_low" and key + "_high"

    @property
    def colour(self) -> str:
        return "var(--ink)" if self.place is None else f"var(--c{self.place % COLOURS})"

    @property
    def dash(self) -> list[int]:
        return DASHES[0] if self.place is None else DASHES[self.place // _SOLID % len(DASHES)]


def lines(
    rows: Sequence[Mapping[str, Value]],
    series: Sequence[Series],
    title: str,
    *,
    numbers: str = ".4~g",
    axis: str | None = None,
    points: bool = False,
    zero: bool = False,
) -> Spec:
    """Return the chart of curves over inner steps, with the values of all of them where the reader points. rows: by
    "x", the step. title: of the y axis. numbers, axis: formats of the values and of the axis. points: mark every
    value."""
    x: Spec = {"field": "x", "type": "quantitative", "title": "inner step", "scale": {"nice": False, "zero": False}}
    x["axis"] = {"grid": False, **STEPS}
    y: Spec = {"field": "value", "type": "quantitative", "title": title, "scale": {"zero": zero}}
    y["axis"] = {"tickCount": 5, **({"format": axis} if axis else {})}
    bands = [_band(line, x, title) for line in series if line.band]
    return {
        **_wide(220),
        "data": {"values": [dict(row) for row in rows]},
        "params": [{"name": "picked", "value": ""}],
        "layer": [*bands, _curves(series, x, y, points), _values_at_pointer(series, x, numbers)],
    }


def _curves(series: Sequence[Series], x: Spec, y: Spec, points: bool) -> Spec:
    """Return the layer of the lines themselves; they fade beside the one that is "picked" in the legend."""
    keys = [line.key for line in series]
    colours = {"domain": keys, "range": [line.colour for line in series]}
    dashes = {"domain": keys, "range": [line.dash for line in series]}
    of_series: Spec = {"field": "series", "type": "nominal", "legend": None}
    strong = " || ".join(f"datum.series == '{line.key}'" for line in series if line.place is None)
    width = {"condition": {"test": strong, "value": 2.6}, "value": 1.5} if strong else {"value": 1.6}
    return {
        "transform": [{"fold": keys, "as": ["series", "value"]}, {"filter": "isValid(datum.value)"}],
        "mark": {"type": "line", "interpolate": "linear", **({"point": {"size": 22}} if points else {})},
        "encoding": {
            "x": x,
            "y": y,
            "color": {**of_series, "scale": colours},
            "strokeDash": {**of_series, "scale": dashes},
            "strokeWidth": width,
            "opacity": {"condition": {"test": "picked && datum.series != picked", "value": 0.1}, "value": 1},
        },
    }


def _values_at_pointer(series: Sequence[Series], x: Spec, numbers: str) -> Spec:
    """Return the layer of the rule at the step where the reader points, which tells the values of the lines there."""
    shown = [{"field": "x", "type": "quantitative", "title": "inner step", "format": ",d"}]
    shown += [
        {"field": line.key, "type": "quantitative", "title": line.name, "format": numbers}
        for line in series[:_MOST_VALUES]
    ]
    select = {"type": "point", "on": "pointermove", "nearest": True, "fields": ["x"], "clear": "pointerleave"}
    return {
        "params": [{"name": "pointed", "select": select}],
        "mark": {"type": "rule", "stroke": "var(--line)"},
        "encoding": {
            "x": x,
            "opacity": {"condition": {"param": "pointed", "empty": False, "value": 1}, "value": 0},
            "tooltip": shown,
        },
    }


def _band(series: Series, x: Spec, title: str) -> Spec:
    return {
        "transform": [{"filter": f"isValid(datum.{series.key}_low)"}],
        "mark": {"type": "area", "color": series.colour, "opacity": 0.14},
        "encoding": {
            "x": x,
            "y": {"field": f"{series.key}_low", "type": "quantitative", "title": title},
            "y2": {"field": f"{series.key}_high"},
        },
    }


def heat_map(
    cells: Sequence[Mapping[str, Value]],
    *,
    across: str,
    down: str,
    columns: Sequence[str],
    rows: Sequence[str],
    shown: Mapping[str, str],
    step: int = 34,
) -> Spec:
    """Return a chart with a cell for each of `cells`, which have "column", "row", "share" (0 to 1: how strong its
    colour is) and "text". across, down: titles of the axes. shown: what a cell says where the reader points, field ->
    title."""
    x: Spec = {"field": "column", "type": "nominal", "sort": None, "title": across, "scale": {"domain": list(columns)}}
    x["axis"] = {"labelAngle": -40, "ticks": False, "domain": False, "orient": "bottom", "labelLimit": 90}
    y: Spec = {"field": "row", "type": "nominal", "sort": None, "title": down, "scale": {"domain": list(rows)}}
    y["axis"] = {"ticks": False, "domain": False, "labelLimit": 110, "labelPadding": 6}
    strength = {"field": "share", "type": "quantitative", "legend": None,
                "scale": {"domain": [0, 1], "range": [0.03, 0.9], "clamp": True}}  # fmt: skip
    tooltip = [{"field": field, "type": "nominal", "title": title} for field, title in shown.items()]
    return {
        "width": {"step": step},
        "height": {"step": 26},
        "data": {"values": [dict(cell) for cell in cells]},
        "encoding": {"x": x, "y": y, "tooltip": tooltip},
        "layer": [
            {
                "mark": {"type": "rect", "color": "var(--heat)", "stroke": "var(--paper)"},
                "encoding": {"fillOpacity": strength},
            },
            {
                "mark": {"type": "text", "fontSize": 11},
                "encoding": {"text": {"field": "text", "type": "nominal"}, "color": {"value": "var(--ink)"}},
            },
        ],
    }


def bars(values: Sequence[Mapping[str, Value]], *, parts: Sequence[str], title: str, numbers: str = ".3~g") -> Spec:
    """Return a chart of bars to the right, one a "row", each made of "part"s of "value". parts: in the order in which
    they are stacked. A legend stands below them where there are several."""
    rows = list(dict.fromkeys(str(value["row"]) for value in values))
    place = {part: number for number, part in enumerate(parts)}
    legend: Spec = {} if len(parts) > 1 else {"legend": None}
    return {
        **_wide(24 * len(rows)),
        "data": {"values": [{**value, "order": place[str(value["part"])]} for value in values]},
        "mark": {"type": "bar", "height": {"band": 0.7}},
        "encoding": {
            "y": {"field": "row", "type": "nominal", "sort": None, "title": None, "scale": {"domain": rows},
                  "axis": {"ticks": False, "domain": False, "labelPadding": 6}},
            "x": {"field": "value", "type": "quantitative", "title": title, "stack": "zero",
                  "axis": {"tickCount": 5}},
            "color": {"field": "part", "type": "nominal", **legend,
                      "scale": {"domain": list(parts), "range": [f"var(--p{number})" for number in range(len(parts))]}},
            "order": {"field": "order", "type": "quantitative"},
            "tooltip": [
                {"field": "row", "type": "nominal", "title": "who"},
                {"field": "part", "type": "nominal", "title": "what"},
                {"field": "value", "type": "quantitative", "title": title, "format": numbers},
            ],
        },
    }  # fmt: skip


def timeline(spans: Sequence[Mapping[str, Value]], *, rows: Sequence[str], shown: Mapping[str, str], last: int) -> Spec:
    """Return a chart of spans of inner steps, from "from" to "to", one line a "row"; "share" (0 to 1) is how strong its
    colour is."""
    return {
        **_wide(24 * len(rows)),
        "data": {"values": [dict(span) for span in spans]},
        "mark": {"type": "bar", "color": "var(--heat)", "height": {"band": 0.72}, "stroke": "var(--paper)"},
        "encoding": {
            "y": {"field": "row", "type": "nominal", "sort": None, "title": None, "scale": {"domain": list(rows)},
                  "axis": {"ticks": False, "domain": False, "grid": False, "labelPadding": 6}},
            "x": {"field": "from", "type": "quantitative", "title": "inner step", "axis": STEPS,
                  "scale": {"domain": [0, last], "nice": False}},
            "x2": {"field": "to"},
            "fillOpacity": {"field": "share", "type": "quantitative", "legend": None,
                            "scale": {"domain": [0, 1], "range": [0.25, 0.95]}},
            "tooltip": [{"field": field, "type": "nominal", "title": title} for field, title in shown.items()],
        },
    }  # fmt: skip


def graph(
    nodes: Sequence[Mapping[str, Value]], edges: Sequence[Mapping[str, Value]], *, shown: Mapping[str, str],
    shown_of_edge: Mapping[str, str],
) -> Spec:  # fmt: skip
    """Return a chart of nodes at "x", "y" with a "name", a "colour" and a "size", and edges from "x", "y" to "x2", "y2"
    of a "width"."""
    hidden = {"axis": None, "scale": {"domain": [-1.25, 1.25]}}
    at = {"x": {"field": "x", "type": "quantitative", **hidden}, "y": {"field": "y", "type": "quantitative", **hidden}}
    to = {"x2": {"field": "x2"}, "y2": {"field": "y2"}}
    colour = {"field": "colour", "type": "nominal", "scale": None}
    of_edge = [{"field": field, "type": "nominal", "title": title} for field, title in shown_of_edge.items()]
    of_node = [{"field": field, "type": "nominal", "title": title} for field, title in shown.items()]
    layers: list[Spec] = [
        {
            "data": {"values": [dict(edge) for edge in edges]},
            "mark": {"type": "rule", "stroke": "var(--edge)", "strokeCap": "round"},
            "encoding": {**at, **to, "strokeWidth": {"field": "width", "type": "quantitative", "scale": None}},
        },
        {  # wide enough for a finger
            "data": {"values": [dict(edge) for edge in edges]},
            "mark": {"type": "rule", "stroke": "transparent", "strokeWidth": 16},
            "encoding": {**at, **to, "tooltip": of_edge},
        },
        {
            "data": {"values": [dict(node) for node in nodes]},
            "mark": {"type": "circle", "opacity": 1, "stroke": "var(--paper)", "strokeWidth": 2},
            "encoding": {
                **at, "fill": colour, "tooltip": of_node,
                "size": {"field": "size", "type": "quantitative", "scale": None},
            },
        },
        {
            "data": {"values": [dict(node) for node in nodes]},
            "mark": {"type": "text", "fontSize": 12, "fontWeight": "bold", "fill": "var(--on-colour)"},
            "encoding": {**at, "text": {"field": "name", "type": "nominal"}},
        },
    ]  # fmt: skip
    return {"width": 300, "height": 280, "layer": layers}


def thin(rows: Sequence[Mapping[str, Value]]) -> list[dict[str, Value]]:
    """Return at most MOST_POINTS rows: means of as many neighbouring ones as that takes, at the last one's x."""
    if len(rows) <= MOST_POINTS:
        return [_rounded(row) for row in rows]
    size = -(-len(rows) // MOST_POINTS)
    found = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        mean: dict[str, Value] = {"x": part[-1]["x"]}
        for key in dict.fromkeys(key for row in part for key in row if key != "x"):
            values = [value for row in part if isinstance(value := row.get(key), int | float)]
            mean[key] = sum(values) / len(values) if values else None
        found.append(_rounded(mean))
    return found


def _rounded(row: Mapping[str, Value]) -> dict[str, Value]:
    """Round the numbers of a row to the digits that a chart can show."""
    return {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in row.items()}


def _wide(height: int) -> Spec:
    """Return the part of a chart's specification that makes it as wide as the page allows."""
    return {"width": "container", "height": height, "autosize": {"type": "fit-x", "contains": "padding"}}
