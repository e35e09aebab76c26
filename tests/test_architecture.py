"""The rules that keep the code readable: imports point one way, modules stay short, deepspeed stays in engine/."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "deca_ds"
MODULES = sorted(PACKAGE.rglob("*.py"))
# What a part may import, beside itself and errors.
MAY_IMPORT = {
    "errors": set(),
    "config": set(),
    "algorithm": set(),
    "data": {"config"},
    "launch": {"config"},
    "engine": {"config", "algorithm", "data", "launch"},
    "checkpoint": {"config", "algorithm", "engine"},
    "watchdog": {"launch"},
    "transport": {"launch"},
    "gossip": {"config", "algorithm", "transport"},
    "elastic": {"config", "algorithm", "launch", "engine", "watchdog", "transport", "gossip"},
}
MAY_IMPORT["training"] = {*MAY_IMPORT["elastic"], "data", "checkpoint", "elastic"}
MAY_IMPORT["simulation"] = {"config", "algorithm", "data", "gossip", "engine", "training"}
MAY_IMPORT["tools"] = {*MAY_IMPORT["training"] - {"transport"}, "training"}
MAY_IMPORT["cli"] = {"config", "checkpoint", "simulation", "tools", "training"}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path) -> set[str]:
    """Absolute names of all modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_module(path):
    part = part_of(path)
    own = {name.split(".")[1] for name in imports(path) if name.startswith("deca_ds.")}
    if part != "__init__":
        assert own <= MAY_IMPORT[part] | {part, "errors"}
    if part == "algorithm":
        others = {name.split(".")[0] for name in imports(path)}
        assert not others & {"transformers", "deepspeed", "datasets", "mpi4py", "omegaconf"}
    if part != "engine":
        assert not any(name.split(".")[0] == "deepspeed" for name in imports(path))
    assert len(path.read_text().splitlines()) <= 400, "split it: one idea per module"
    assert path.stem not in ("utils", "helpers", "misc", "common")


def test_every_part_has_its_rule():
    assert {part_of(path) for path in MODULES} == MAY_IMPORT.keys() | {"__init__"}
