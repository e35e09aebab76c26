"""What the manual and the headers of examples tell their readers to type."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

NO_TEST = "(no test)"  # ends the comment behind a command that no test runs or parses


def commands(text: str) -> list[list[str]]:
    """The words of each command, as a shell has them."""
    return [words for words, _ in marked_commands(text)]


def marked_commands(text: str) -> Iterator[tuple[list[str], bool]]:
    """The words of each command in bash blocks, or in the `#   ` lines of an example's header, and whether it carries
    the mark. What is indented further in a header is no command."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks or re.findall(r"^#   (.*)$", text, flags=re.MULTILINE)).replace("\\\n", " ").splitlines()
    while lines:
        command = lines.pop(0)
        while lines and command.count('"') % 2:  # a text of several lines
            command += f"\n{lines.pop(0)}"
        words = shlex.split(command, comments=True)
        if words and (blocks or not command.startswith(" ")):
            yield words, command.endswith(NO_TEST)
