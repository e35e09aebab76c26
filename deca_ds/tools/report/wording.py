"""Numbers and texts for people. What could let somebody in is left out of every text that comes from a run's files."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any

NONE = "–"  # noqa: RUF001 (a dash in a table)
HIDDEN = "***"
_SECRET_KEY = re.compile(r"(token|secret|passw|credential|api_?key|private_?key)(?!i[sz]er|s_per)", re.IGNORECASE)
_SECRETS = (
    (re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^\s/@]+@", re.IGNORECASE), rf"\1{HIDDEN}@"),  # user:password@host
    (
        re.compile(r"([?&;][\w.-]*(?:token|secret|passw|credential|signature|key|sig)[\w.-]*=)[^&;\s]+", re.IGNORECASE),
        rf"\1{HIDDEN}",
    ),
    (re.compile(r"\b(?:hf_|sk-|gh[pousr]_|github_pat_|glpat-|xox[a-z]-|AKIA|ASIA)[\w-]{12,}"), HIDDEN),
    (re.compile(r"\b(Bearer|Basic)\s+[\w.~+/=-]{8,}", re.IGNORECASE), rf"\1 {HIDDEN}"),
)


def redact(text: str) -> str:
    """Return the text without passwords in addresses, secrets in queries, and what looks like an access token."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def setting(key: str, value: Any) -> str:
    """Return a configuration's value as it could stand in YAML."""
    if value is not None and value != "" and _SECRET_KEY.search(key.rpartition(".")[2]):
        return HIDDEN
    return redact(_plain(value))


def _plain(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(map(_plain, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_plain(of)}" for key, of in value.items()) + "}"
    return str(value)


def loss(value: float | None) -> str:
    """Write a loss with four digits behind the point, or as many significant ones where that shows nothing."""
    if value is None:
        return NONE
    return f"{value:.4f}" if abs(value) >= 0.01 or value == 0 else f"{value:.3g}"


def percent(value: float | None) -> str:
    """Write a share as a percentage."""
    return NONE if value is None else f"{value:.1%}"


def significant(value: float | None, digits: int = 3) -> str:
    """Write a number without an exponent where people need none."""
    if value is None:
        return NONE
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    text = f"{value:.{digits}g}"
    return f"{value:,.0f}" if "e" in text or abs(value) >= 10**digits else text


def count(value: float | None) -> str:
    """Write a whole number with its thousands apart."""
    return NONE if value is None else f"{value:,.0f}"


def short_count(value: float | None) -> str:
    """Write a count as in "1.2 million"."""
    if value is None:
        return NONE
    for size, name in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:.3g} {name}"
    return count(value)


def size(value: float | None) -> str:
    """Write a number of bytes, in powers of ten."""
    if value is None:
        return NONE
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= unit:
            return f"{value / unit:.3g} {name}" if value < 1000 * unit else f"{value / unit:,.0f} {name}"
    return f"{value:.0f} B"


def rough_duration(seconds: float | None) -> str:
    """Write a time with three digits, in the unit that people would use."""
    if seconds is None:
        return NONE
    for limit, unit, size in (
        (1e-3, "us", 1e-6),
        (1, "ms", 1e-3),
        (120, "s", 1),
        (7200, "min", 60),
        (172_800, "h", 3600),
    ):
        if seconds < limit:
            return f"{significant(seconds / size)} {unit}"
    return f"{significant(seconds / 86_400)} days"


def moment(time: float | None) -> str:
    """Write the moment so many seconds after 1970 began."""
    if time is None:
        return NONE
    try:
        return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, ValueError, OSError):
        return NONE


def short(number: int) -> str:
    """Write a number in five characters at most: 1234, 56k, 1.2M."""
    for unit, name in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= 10 * unit or (number >= unit and unit > 10**3):
            return f"{number / unit:.1f}{name}" if number < 10 * unit else f"{number / unit:.0f}{name}"
    return str(number)
