"""A tokenizer's chat template, made to write the same text on every rank and every day, with its answers marked."""

from __future__ import annotations

import ast
import datetime
import json
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any, cast

from jinja2 import Environment, nodes
from jinja2.exceptions import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from deca_ds.errors import DataError

BEGIN, END = "\ue0f0", "\ue0f1"  # private-use characters around what {% generation %} encloses
# What a template may raise: it is a program, and Jinja lets the errors of the values that it handles pass.
ERRORS = (TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError)
_GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
_CLOCK = re.compile(r"""\bstrftime_now\(\s*(?:format\s*=\s*)?("[^"\\]*"|'[^'\\]*')\s*\)""")
_WHERE = "the tokenizer's chat_template"


class ChatTemplate:
    """Renders conversations, {"messages", "tools"}, as the tokenizer's template does on the day `date`.

    Raises DataError if there is no template, or one that writes something else each time.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, date: datetime.date):
        self.tokenizer, self.date = tokenizer, date
        given = getattr(tokenizer, "chat_template", None)
        self.sources = {tools: self._source(tools) for tools in (False, True)} if given else {}
        if not given:
            raise DataError(
                "the tokenizer has no chat template, which data.format messages and sharegpt need",
                where="model.tokenizer, or model.path",
                fix="name an instruction-tuned model's tokenizer, or put a chat_template.jinja into the folder",
            )

    @cached_property
    def marks_answers(self) -> bool:
        return any(_GENERATION.search(source) for source in self.sources.values())

    def render(
        self, messages: Sequence[dict[str, Any]], tools: Any = None, *, marked: bool = False, prompt: bool = False
    ) -> str:
        """Return the text of a conversation. marked: with BEGIN and END around what {% generation %} encloses. prompt:
        with the prompt of the next answer. Raises what ERRORS lists."""
        source = self.sources[bool(tools)]
        marks = (BEGIN, END) if marked else ("", "")
        source = _GENERATION.sub(lambda tag: f'{{%{tag[1]} print "{marks[bool(tag[2])]}" {tag[3]}%}}', source)
        text = self.tokenizer.apply_chat_template(
            list(messages), tools=tools or None, chat_template=source, tokenize=False, add_generation_prompt=prompt
        )
        return cast(str, text)  # as it is not tokenised

    def _source(self, tools: bool) -> str:
        try:
            source = self.tokenizer.get_chat_template(tools=[{}] if tools else None)
        except ValueError as error:  # several templates, none of which is the default
            raise DataError(str(error), where=_WHERE, fix="name one of them 'default'") from error
        moment = datetime.datetime.combine(self.date, datetime.time())
        source = _CLOCK.sub(lambda call: json.dumps(moment.strftime(ast.literal_eval(call[1]))), source)
        _refuse_chance(source)
        return source


def _refuse_chance(source: str) -> None:
    """Raise DataError for a template that is no template, or asks for the time or for random values."""
    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        tree = environment.parse(_GENERATION.sub(r'{%\1 print "" \3%}', source))
    except TemplateSyntaxError as error:
        raise DataError(
            f"the chat template is malformed: {error.message}",
            where=f"{_WHERE}, line {error.lineno}",
            fix="repair it in the tokenizer's folder, or name another model.tokenizer",
        ) from error
    asked = {id(test.node) for test in tree.find_all(nodes.Test) if test.name in ("defined", "undefined", "callable")}
    found = [name.name for name in tree.find_all(nodes.Name) if id(name) not in asked and name.ctx == "load"]
    found += [f"|{found.name}" for found in tree.find_all(nodes.Filter)]
    for name, what in (("strftime_now", "the time"), ("lipsum", "random text"), ("|random", "a random choice")):
        if name in found:
            raise DataError(
                f"the chat template asks for {what} ({name.lstrip('|')}), so no two runs would train on the same text",
                where=_WHERE,
                fix='write what it is to be into the template; strftime_now("%d %b %Y") with a constant gets data.date',
            )
