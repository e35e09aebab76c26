"""When two labels are one, and when they merely look alike."""

from __future__ import annotations

import re
import unicodedata

_WHOLE = re.compile(r"(-?(?:0|[1-9]\d*))\.0+")
_EXACT = 2.0**53  # below it every whole number is a float of its own


def normal_label(value: str | int | float | bool) -> str:
    """Return a label as text: without blanks around it; a whole number without decimals, so that 1, 1.0, "1" and "1.0 "
    are one label; true and false as JSON writes them. Anything else stays as it is written: "01" and "1e3" too."""
    if isinstance(value, bool):
        return "true" if value else "false"
    whole_float = isinstance(value, float) and value.is_integer() and abs(value) < _EXACT
    text = str(int(value)) if whole_float else str(value).strip()
    whole = _WHOLE.fullmatch(text)
    text = whole[1] if whole else text
    return "0" if text == "-0" else text


def look_of(label: str) -> str:
    """Return the same for labels that differ in nothing but letter case, invisible characters and how characters are
    made."""
    shown = (char for char in unicodedata.normalize("NFKC", label) if unicodedata.category(char) != "Cf")
    return "".join(shown).casefold()
