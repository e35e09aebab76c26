"""The data formats. A `Format` that is listed here is all that one is: checks, reading and the manual follow."""

from __future__ import annotations

from deca_ds.data.formats.chat import MESSAGES, SHAREGPT
from deca_ds.data.formats.fields import ExampleRules, Format, Use
from deca_ds.data.formats.plain import ALPACA, CLASSIFICATION, TEXT_FORMAT

FORMATS: dict[str, Format] = {
    format.name: format for format in (TEXT_FORMAT, ALPACA, MESSAGES, SHAREGPT, CLASSIFICATION)
}

__all__ = ["FORMATS", "ExampleRules", "Format", "Use"]
