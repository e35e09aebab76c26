"""What the manual and the headers of examples tell their readers to type."""

from __future__ import annotations

import re
import shlex


def commands(text: str) -> list[list[str]]:
    """The words of each command in bash blocks, or in the `#   ` lines of an example's header; as a shell has them."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks or re.findall(r"^#   (.*)$", text, flags=re.MULTILINE)).replace("\\\n", " ").splitlines()
    found: list[list[str]] = []
    while lines:
        command = lines.pop(0)
        while lines and command.count('"') % 2:  # a text of several lines
            command += f"\n{lines.pop(0)}"
        found.append(shlex.split(command, comments=True))
    return found
