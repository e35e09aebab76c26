"""What the manual and the headers of examples tell their readers to type."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

NO_TEST = "no test"  # marks commands that no test runs or parses, where readers of the page do not see it


def commands(text: str) -> list[list[str]]:
    """The words of each command, as a shell has them."""
    return [words for words, _ in marked_commands(text)]


def marked_commands(text: str) -> Iterator[tuple[list[str], bool]]:
    """The words of each command in bash blocks, or in the `#   ` lines of an example's header, and whether it carries
    the mark: of a block behind the opening fence, for all of its commands or, after a colon, for those that begin so;
    of a header's command at its end. What is indented further in a header is no command."""
    blocks = re.findall(r"^```bash([^\n]*)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    for info, block in blocks:
        mark, _, beginnings = info.strip().partition(": ")
        for command in _split(block):
            named = not beginnings or command.startswith(tuple(beginnings.split("; ")))
            yield shlex.split(command, comments=True), mark == NO_TEST and named
    if not blocks:
        header = "\n".join(re.findall(r"^#   (.*)$", text, flags=re.MULTILINE))
        for command in _split(header):
            if not command.startswith(" "):
                yield shlex.split(command, comments=True), command.endswith(f"({NO_TEST})")


def _split(block: str) -> Iterator[str]:
    """The commands of a block, with their comments; a text in quotes may have several lines."""
    lines = block.replace("\\\n", " ").splitlines()
    while lines:
        command = lines.pop(0)
        while lines and command.count('"') % 2:
            command += f"\n{lines.pop(0)}"
        if shlex.split(command, comments=True):
            yield command
