"""The page of all error messages, from the code that raises them: literal text, with an ellipsis for what varies."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

VARIES = "…"


def literal(node: ast.expr | None) -> str:
    """The text that an expression makes."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(map(literal, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return literal(node.left) + literal(node.right)
    return VARIES


def texts(package: Path) -> Iterator[str]:
    """All texts in the code."""
    for path in sorted(package.rglob("*.py")):
        yield from (literal(node) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if _is_text(node))


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp)


def errors(package: Path) -> Iterator[tuple[str, str, str]]:
    """(what, fix, module) of every error that says what, where and how to fix it, as far as `what` has words."""
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and node.args and {word.arg for word in node.keywords} & {"where", "fix"}:
                fixes = [literal(word.value) for word in node.keywords if word.arg == "fix"]
                what = literal(node.args[0])
                if len(what.replace(VARIES, "").split()) > 1:
                    yield what, "".join(fixes), str(path.relative_to(package.parent))


def page(package: Path) -> str:
    """In the order of the first word that does not vary."""
    lines = [
        "# All messages",
        "",
        f"What the program says when it refuses or fails, by the first words; {VARIES} stands for what varies.",
        "[When something fails](../failures.md) explains those that a running job meets.",
    ]
    for what, fix, module in sorted(set(errors(package)), key=lambda error: error[0].lower().lstrip(f"{VARIES} '(,:=")):
        lines += ["", f"``{what}``", f": {_prose(fix)} (`{module}`)"]
    return "\n".join(lines) + "\n"


def _prose(text: str) -> str:
    """As text that has no markup."""
    return "".join(f"\\{letter}" if letter in "\\`*_{}[]<>#|$~" else letter for letter in text)
