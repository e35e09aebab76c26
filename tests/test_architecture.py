"""The rules that keep the code readable: imports point one way, deepspeed stays in engine/, an object's attributes are
its own business, errors say how to mend them, and tests give time limits as arguments and read no frames."""

import ast
import re
from collections.abc import Iterable, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from deca_ds import errors, run_folder
from deca_ds.errors import in_words

PACKAGE = Path(__file__).parent.parent / "deca_ds"
MODULES = sorted(PACKAGE.rglob("*.py"))
# What a part may import, beside itself and those that every part may.
MAY_IMPORT = {
    "errors": set(),
    "plural": set(),
    "printing": set(),
    "run_folder": set(),
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
MAY_IMPORT["planning"] = {"config", "algorithm", "engine", "transport", "gossip", "training"}
MAY_IMPORT["tools"] = {*MAY_IMPORT["training"] - {"transport"}, "training", "planning"}
MAY_IMPORT["launchers"] = {"tools", "training"}
MAY_IMPORT["cli"] = {"launchers", "training"}  # and the module of a command, by its name


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


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


def imported_modules(path: Path) -> set[str]:
    """Of the package, wherever in the file: `from deca_ds.a import b` is of the module b where there is one."""
    known, found = {module_of(module) for module in MODULES}, set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else node.module for name in names} & known
    return found - {module_of(path)}


def test_no_module_imports_itself_by_way_of_others_and_be_it_for_types():
    TopologicalSorter({module_of(path): imported_modules(path) for path in MODULES}).prepare()


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_what_its_folder_may(path):
    part = part_of(path)
    own = {name.split(".")[1] for name in imports(path) if name.startswith("deca_ds.")}
    if part != "__init__":
        assert own <= MAY_IMPORT[part] | {part, "errors", "plural", "printing", "run_folder"}
    if part == "algorithm":
        others = {name.split(".")[0] for name in imports(path)}
        assert not others & {"transformers", "deepspeed", "datasets", "mpi4py", "omegaconf"}
    if part != "engine":
        assert not any(name.split(".")[0] == "deepspeed" for name in imports(path))
    assert path.stem not in ("utils", "helpers", "misc", "common")


def defined(path: Path) -> set[str]:
    """Names at the top of a module, those under `if TYPE_CHECKING` too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
    return found


def test_what_benchmarks_and_examples_import_is_there():
    """No test runs most of them."""
    known = {module_of(path): path for path in MODULES}
    for folder in ("benchmarks", "examples", "docs", "offline"):
        for path in (PACKAGE.parent / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "deca_ds":
                    assert node.module in known, f"{path}: no {node.module}"
                    for alias in node.names:
                        there = f"{node.module}.{alias.name}" in known or alias.name in defined(known[node.module])
                        assert there, f"{path}: no {alias.name} in {node.module}"


def exports(part: str) -> set[str]:
    """What the package of a part names in __all__."""
    found: set[str] = set()
    for node in ast.parse((PACKAGE / part / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            found |= set(ast.literal_eval(node.value))
    return found


def test_what_a_package_exports_other_packages_import_from_there():
    doors = {part: exports(part) for part in MAY_IMPORT if (PACKAGE / part).is_dir()}
    assert doors["gossip"] and doors["transport"] and doors["algorithm"]
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom):
                continue
            part, _, module = node.module.removeprefix("deca_ds.").partition(".")
            if module and part != part_of(path):
                behind = doors.get(part, set()) & {alias.name for alias in node.names}
                assert not behind, f"{path}: import {behind} from deca_ds.{part}"


def test_every_part_has_its_rule():
    assert {part_of(path) for path in MODULES} == MAY_IMPORT.keys() | {"__init__"}


# Attributes that are set on other objects than self, and why: module -> targets.
SET_FROM_OUTSIDE = {
    "objects of libraries, which offer no other way": {
        "checkpoint/generation.py": ["config._from_model_config", "config.eos_token_id", "setattr(config, name)"],
        "data/tokens.py": ["plain.post_processor", "plain.encode_special_tokens"],
        "engine/adapters.py": ["a.data", "b.data"],
        "engine/chunked_loss.py": ["ctx.grads"],
        "engine/compare_weights.py": ["buffer.data"],
        "engine/architecture.py": ["setattr(part, name)"],
        "engine/dry_pass.py": [
            "logger.disabled",
            "masking_utils.fast_all",
            "masking_utils.is_tracing",
            "parameter.grad",
        ],
        "engine/gradients.py": ["parameter.grad"],
        "engine/internals.py": [
            "linear.LinearFunctionForZeroStage3",
            "module._parameters",
            "torch.nn.functional.linear",
        ],
        "engine/masters.py": ["weakref.finalize(self, runtime.cudaHostUnregister, flat.data_ptr()).atexit"],
        "engine/output_head.py": ["model._modules", "self.linear.forward"],
        "engine/weight_files.py": ["part.tie_word_embeddings"],
        "simulation/stacked.py": ["parameter.data", "parameter.grad"],
        "training/terminal.py": ["setattr(sys, name)"],
    },
    "the configuration, while it is being loaded": {
        "config/load.py": ["config.algorithm.rounds"],
        "config/paths.py": ["setattr(section, name)"],
    },
    "parts of one thing that a module is about, which nobody else sets": {
        "elastic/protocol.py": ["peer.known", "peer.ready", "self._rejoining[rank].store"],
        "engine/client.py": ["self._state.reached"],
        "gossip/averaging.py": ["gossip.bytes_sent", "gossip.wait_seconds"],
        "gossip/strategies.py": ["gossip.wait_seconds", "message.staged", "message.weights"],
        "transport/local.py": ["self._expected.popleft().message"],
    },
    "the state of training, moved on and put back": {
        "engine/state.py": ["self.client.active.local_steps.made", "setattr(self.traffic, key)"],
        "training/loop.py": ["self.state.best", "self.state.done", "self.state.stopping"],
    },
    "one note of progress for two numberings": {"elastic/reconnect_gloo.py": ["progress.moved"]},
}


def set_from_outside(path: Path) -> set[str]:
    """Attributes that a module sets on anything but self, cls and what the same function has got by calling a class."""
    return set(_set_in(ast.parse(path.read_text()), {"self", "cls"}))


def _set_in(node: ast.AST, own: set[str]) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef):
        own = own | _made_in(node)
    for child in ast.iter_child_nodes(node):
        is_set = isinstance(child, ast.Attribute) and not isinstance(child.ctx, ast.Load)
        if is_set and not (isinstance(child.value, ast.Name) and child.value.id in own):
            yield ast.unparse(child)
        elif isinstance(child, ast.Call) and _name(child.func) in ("setattr", "delattr", "__setattr__"):
            yield f"setattr({', '.join(map(ast.unparse, child.args[:2]))})"
        yield from _set_in(child, own)


def _made_in(function: ast.FunctionDef) -> set[str]:
    """Names of what a function makes: those that it binds to what a class, by its capital, returns."""
    made = set()
    for node in ast.walk(function):
        if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)):
            continue
        if _name(node.value.func).lstrip("_")[:1].isupper():
            made |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return made


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def test_no_module_sets_attributes_of_objects_that_are_not_its_own():
    """Collaborators are given to the constructor, or subscribe."""
    allowed: dict[str, set[str]] = {}
    for modules in SET_FROM_OUTSIDE.values():
        for module, targets in modules.items():
            allowed.setdefault(module, set()).update(targets)
    found = {str(path.relative_to(PACKAGE)): set_from_outside(path) for path in MODULES}
    assert {module: targets for module, targets in found.items() if targets} == allowed


def test_attributes_that_are_set_from_outside_are_seen(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        "class Made:\n"
        "    def __init__(self, other):\n"
        "        self.other, other.me = other, self\n"
        "        self.other.name = 'x'\n"
        "def build(given):\n"
        "    made = Made(given)\n"
        "    made.done = given.done = True\n"
        "    for given.place in range(3):\n"
        "        given.count += 1\n"
        "    with open('x') as given.file:\n"
        "        setattr(given, 'text', '')\n"
    )
    expected = {"other.me", "self.other.name", "given.done", "given.place", "given.count", "given.file"}
    assert set_from_outside(path) == expected | {"setattr(given, 'text')"}


def set_after_construction(paths: Iterable[Path]) -> set[str]:
    """Class.attribute, of those that a method sets on self though neither a class's body nor a constructor does."""
    classes = [
        node for path in paths for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)
    ]

    def known(made: ast.ClassDef) -> set[str]:
        bases = {_name(base) for base in made.bases}
        found = set().union(*(known(other) for other in classes if other.name in bases and other is not made))
        for node in made.body:
            if isinstance(node, ast.FunctionDef) and node.name in ("__init__", "__post_init__"):
                found |= _set_on_self(node)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                found |= {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
        return found

    found = set()
    for made in classes:
        methods = [node for node in made.body if isinstance(node, ast.FunctionDef)]
        late = set().union(*map(_set_on_self, methods)) - known(made)
        found |= {f"{made.name}.{name}" for name in late}
    return found


def _set_on_self(function: ast.FunctionDef) -> set[str]:
    attributes = [node for node in ast.walk(function) if isinstance(node, ast.Attribute)]
    return {
        node.attr for node in attributes if not isinstance(node.ctx, ast.Load) and ast.unparse(node.value) == "self"
    }


def test_objects_are_whole_when_they_are_made():
    assert set_after_construction(MODULES) == set()


def test_attributes_that_are_set_later_are_seen(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        "class Base:\n"
        "    kind: str\n"
        "    count = 0\n"
        "    def __init__(self): self.own = 1\n"
        "class Made(Base):\n"
        "    def __init__(self, given): self.given, (self.other, _) = given, given\n"
        "    def begin(self):\n"
        "        self.kind, self.count, self.own, self.given, self.other = range(5)\n"
        "        for self.place in range(3): self.given.name = 'x'\n"
        "        self.late: int = 1\n"
    )
    assert set_after_construction([path]) == {"Made.place", "Made.late"}


# All but plain words such as model, which name other things, too.
IN_A_RUN = {name for key, name in vars(run_folder).items() if key.isupper() and not (name.isalpha() and name.islower())}


def names_in_a_run(path: Path) -> list[str]:
    """Texts in a module that are names of run_folder.py, or what comes there before a number."""
    texts = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
    before = tuple(name.partition("{")[0] for name in IN_A_RUN if "{" in name)
    return [text for text in texts if isinstance(text, str) and (text in IN_A_RUN or text.endswith(before))]


def test_names_in_a_runs_folder_are_written_in_one_place():
    found = {str(path): names_in_a_run(path) for path in MODULES if path.stem != "run_folder"}
    assert {path: names for path, names in found.items() if names} == {}


def test_a_name_in_a_runs_folder_is_seen(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        '"""A STOP."""\nrun / "STOP"\nrun / f"a/client_{client:03d}.json"\nrun / "model" / "adapters.json"\n'
    )
    assert sorted(names_in_a_run(path)) == ["STOP", "a/client_", "adapters.json"]


TESTS = Path(__file__).parent
TIME_LIMIT = re.compile(r"_?[A-Z][A-Z0-9_]*_S")
FRAMES = {"f_locals", "f_globals", "gi_frame", "tb_frame", "_getframe", "currentframe"}


def reached_into(path: Path) -> set[str]:
    """Time limits of modules that a file replaces, and stack frames that it reads."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if (isinstance(node, ast.Attribute) and node.attr in FRAMES) or (
            isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load) and TIME_LIMIT.fullmatch(node.attr)
        ):
            found.add(node.attr)
        elif isinstance(node, ast.Call) and _name(node.func) == "setattr":
            texts = {part.value for part in node.args if isinstance(part, ast.Constant) and isinstance(part.value, str)}
            found |= {text for text in texts if TIME_LIMIT.fullmatch(text.rpartition(".")[2])}
    return found


def test_tests_replace_no_time_limit_and_read_no_frame():
    """A limit is an argument of what waits. The planted mistakes of the membership protocol are what they replace."""
    paths = [*TESTS.rglob("*.py"), *(PACKAGE.parent / "benchmarks").rglob("*.py")]
    found = {path.name: reached_into(path) for path in paths if path.name != "test_mistakes.py"}
    assert {name: names for name, names in found.items() if names} == {}


def test_replaced_time_limits_and_frames_are_seen(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        "module._PAUSE_S = 0.1\n"
        "monkeypatch.setattr(module, '_WAIT_S', 0.1)\n"
        "patch.setattr('deca_ds.module.LOOK_S', 0.1)\n"
        "state = run.gi_frame.f_locals['state']\n"
        "given.timeout_s = seconds = module._KEPT_S\n"
        "monkeypatch.setattr(module, 'BATCH', 10)\n"
    )
    assert reached_into(path) == {"_PAUSE_S", "_WAIT_S", "deca_ds.module.LOOK_S", "gi_frame", "f_locals"}


# All but MessageError: where messages are given up, they are sent again, or the first failure is told with its fix.
TOLD = {
    name
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, errors.UserError) and kind is not errors.MessageError
}


def fixless(path: Path) -> list[int]:
    """Lines that make an error that users read and do not say how to mend it."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    made = [call for call in calls if _name(call.func) in TOLD]
    return [call.lineno for call in made if not {"fix", None} & {keyword.arg for keyword in call.keywords}]


def test_every_error_that_users_read_says_how_to_mend_it():
    found = {str(path): fixless(path) for path in PACKAGE.rglob("*.py")}
    assert {path: lines for path, lines in found.items() if lines} == {}


def raw(path: Path) -> list[int]:
    """Lines that write an error of the system as Python does, with its number and in quotes; in_words has the words."""
    handlers = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ExceptHandler) and n.name]
    return [
        value.lineno
        for handler in handlers
        if handler.type is not None and "OSError" in {n.id for n in ast.walk(handler.type) if isinstance(n, ast.Name)}
        for value in ast.walk(handler)
        if isinstance(value, ast.FormattedValue)
        and isinstance(value.value, ast.Name)
        and value.value.id == handler.name
    ]


def test_what_the_system_refuses_is_told_in_words():
    found = {str(path): raw(path) for path in PACKAGE.rglob("*.py")}
    assert {path: lines for path, lines in found.items() if lines} == {}
    assert in_words(FileNotFoundError(2, "No such file", "a")) == "No such file"
    assert in_words(PermissionError(13, "Denied", "a"), named=True) == "Denied (a)"
    assert in_words(OSError("[Errno 5] Input/output error: 'a'")) == "Input/output error: 'a'"
    assert in_words(UnicodeDecodeError("utf-8", b"a", 0, 1, "b")) == "it is no text in UTF-8"


def test_a_raw_error_is_seen(tmp_path):
    path = tmp_path / "raw.py"
    path.write_text(
        'try:\n    a\nexcept (OSError, ValueError) as error:\n    print(f"no: {error}", f"{error.strerror}")\n'
        'except KeyError as error:\n    print(f"{error}")\n'
    )
    assert raw(path) == [4]


def test_an_error_without_a_fix_is_seen(tmp_path):
    path = tmp_path / "module.py"
    path.write_text('ConfigError("a", where="b")\nDataError("a", fix="c")\nerrors.LaunchError("a")\nOSError("a")\n')
    assert fixless(path) == [1, 3]
