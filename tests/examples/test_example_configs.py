"""Examples, DeepSpeed files and documents fit the code: they load, and what they name exists."""

from __future__ import annotations

import re
import runpy
from argparse import Namespace
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from manual import NO_TEST, commands, marked_commands

from deca_ds.algorithm.methods import METHODS, Method
from deca_ds.algorithm.rule import Rule
from deca_ds.cli import parse
from deca_ds.config.checks import check_world
from deca_ds.config.deepspeed import read_deepspeed_json
from deca_ds.config.load import load_config
from deca_ds.config.schema import Config
from deca_ds.data import sources, validate_data_config
from deca_ds.gossip.schedule import build_mixing
from deca_ds.tools.doctor.facts import INTERFACE_VARIABLES
from deca_ds.tools.train_arguments import parser
from deca_ds.training.config_warnings import config_warnings, gossip_warnings

REPOSITORY = Path(__file__).parents[2]
FOLDERS_OF_EXAMPLES = ("examples", "examples/assistant", "examples/demo", "examples/recipes")
EXAMPLES = sorted(path for folder in FOLDERS_OF_EXAMPLES for path in (REPOSITORY / folder).glob("*.yaml"))
README = REPOSITORY / "README.md"
PAGES = ("*.md", "docs/*.md", "examples/**/*.md", "benchmarks/**/*.md")
DOCUMENTS = [path for pages in PAGES for path in sorted(REPOSITORY.glob(pages))]
FOLDERS = "benchmarks|deca_ds|docs|ds_configs|examples|launchers|tests"
SCRIPT = "launchers/train.py"
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
TEMPLATES = sorted((REPOSITORY / "examples/clusters").iterdir())


def name(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def config_keys() -> set[str]:
    keys = set()
    for section in fields(Config):
        default = getattr(Config(), section.name)
        keys |= {f"{section.name}.{f.name}" for f in fields(default)} if is_dataclass(default) else {section.name}
    return keys


def reference() -> dict[str, str]:
    """Key -> default, from the configuration reference."""
    text = (REPOSITORY / "docs/configuration.md").read_text(encoding="utf-8")
    entries = re.findall(r"^- \*\*`([\w.]+)`\*\* \(.*?; (?:default\s`(.+?)`|(required))\): \S", text, re.M | re.S)
    assert len(entries) == len({key for key, *_ in entries}), "a key stands twice"
    return {key: re.sub(r"\s+", " ", default) or required for key, default, required in entries}


def without_code(text: str) -> str:
    """A document without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    """The anchors that the headings of a document get where it is shown."""
    headings = re.findall(r"^#+ (.*)$", without_code(path.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


@pytest.mark.parametrize("path", EXAMPLES, ids=name)
def test_example_loads_and_is_free_of_contradictions(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "why_not_on_hub", lambda *_: None)  # it has the data sets of the large ones
    config = load_config(path)
    validate_data_config(config)  # without a client: nobody's own files are looked for
    mixing = build_mixing(config.gossip, config.cluster.clients, config.run.seed)
    ranks = list(config.cluster.ranks or [1] * config.cluster.clients)
    assert check_world(config, sum(ranks)) == ranks
    assert not config.model.trust_remote_code
    assert config.data.per_client or not config_warnings(config)
    assert not gossip_warnings(config, mixing, weight_scale=0.02)


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("ds_configs/*.json")), ids=name)
def test_deepspeed_file_is_accepted(path: Path) -> None:
    assert read_deepspeed_json(path)["zero_optimization"]["stage"] == 3


def test_the_hosts_of_the_large_example_fit_its_clients() -> None:
    slots = [int(line.split("slots=")[1]) for line in (REPOSITORY / "examples/hosts").read_text().splitlines()]
    assert check_world(load_config(REPOSITORY / "examples/llama_7b_multinode.yaml"), sum(slots))[0] == 2


@pytest.mark.parametrize(
    ("script", "function", "file"),
    [
        ("make_reference.py", "page", "configuration.md"),
        ("make_reference.py", "algorithm", "algorithm.md"),
        ("make_reference.py", "formats", "formats.md"),
        ("draw_pictures.py", "idea", "idea.svg"),
        ("draw_pictures.py", "client_states", "client_states.svg"),
        ("draw_screens.py", "doctor", "screen_doctor.svg"),
        ("draw_screens.py", "status", "screen_status.svg"),
        ("draw_screens.py", "progress", "screen_progress.svg"),
    ],
)
def test_what_make_docs_writes_is_up_to_date(script: str, function: str, file: str) -> None:
    written = runpy.run_path(str(REPOSITORY / "docs" / script))[function]()
    assert written == (REPOSITORY / "docs" / file).read_text(encoding="utf-8"), "run make docs"


def test_every_key_has_one_sentence() -> None:
    for section in (Config, *(f.default_factory for f in fields(Config) if f.name != "deepspeed")):
        for field in fields(section):
            if not is_dataclass(getattr(section(), field.name)):
                meaning = field.metadata.get("meaning", "")
                assert re.fullmatch(r"[A-Z`][^.]*(\.\S[^.]*)*\.", meaning), f"{field.name}: {meaning}"


def test_reference_names_the_fewer_of_those_that_use_a_key_and_those_that_do_not(monkeypatch) -> None:
    monkeypatch.setitem(METHODS, "plain", Method(Rule, "a rule without coefficients"))
    page = " ".join(runpy.run_path(str(REPOSITORY / "docs/make_reference.py"))["page"]().split())
    assert "**`algorithm.eps`** (number, more than 0; not for `plain`; default" in page
    assert "**`algorithm.b1`** (number, in [0, 1]; for `deca` and `deca-ed`; default" in page
    assert "**`algorithm.outer_momentum`** (number, in [0, 1); for `diloco`, `noloco` and `gasloc`; default" in page


def test_reference_lists_every_key_once() -> None:
    assert reference().keys() == config_keys()


def test_reference_has_the_defaults() -> None:
    defaults = reference()
    assert defaults.pop("model.path") == "required"
    written = load_config(None, ["model.path=x", *(f"{key}={value}" for key, value in defaults.items())])
    assert written == load_config(None, ["model.path=x"])


@pytest.mark.parametrize("path", [*DOCUMENTS, *EXAMPLES], ids=name)
def test_what_a_document_names_exists(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    named = set(re.findall(rf"(?<![\w./~-])(?:{FOLDERS})/[\w./-]*\w", text))
    targets = {target for target in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in target}
    missing = [file for file in named if not (REPOSITORY / file).exists()]
    missing += [target for target in targets if not (path.parent / target).exists()]
    assert not missing
    sections = {section.name for section in fields(Config) if is_dataclass(getattr(Config(), section.name))}
    shown = {
        "data.json",
        "data.md",
        "model.safetensors",
        "run.yaml",
        "algorithm.md",
        "optimizer.lrr",
    }  # files, and a mistake that is shown
    keys = set(re.findall(rf"(?<![\w./])(?:{'|'.join(sections)})\.[a-z]\w*", text)) - shown
    assert keys <= config_keys()


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_a_document_says_something_and_its_anchors_lead_to_headings(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ") and len(text) > 500
    for target, anchor in re.findall(r"\]\(([^):#\s]*)#([\w-]+)\)", text):
        assert anchor in anchors(path.parent / target if target else path), f"{target}#{anchor}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_code_of_a_document_is_fenced(path: Path) -> None:
    """A block that is only indented, or has a fence of another name, would hide its commands from the test of marks."""
    text = path.read_text(encoding="utf-8")
    assert not indented_blocks(without_code(text))
    assert not re.findall(r"^[ \t]*(?:~~~|```(?:sh|shell|console)\b)|^[ \t]+```bash", text, re.M)


def indented_blocks(text: str) -> list[str]:
    """The first lines of blocks that four spaces make code; under an item of a list they make its next paragraph."""
    found, item, before = [], False, ""
    for line in text.splitlines():
        if line.startswith("    ") and not before.strip() and not item:
            found.append(line)
        if line.strip() and not line.startswith(" "):
            item = re.match(r"([-*+]|\d+\.) ", line) is not None
        before = line
    return found


def test_an_indented_block_is_noticed() -> None:
    assert indented_blocks("Run\n\n    make demo\n\nand read.\n") == ["    make demo"]
    assert not indented_blocks("1. Run it.\n\n    Then read.\n")


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_lines_of_a_document_are_short(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if len(line) > 120 and not line.startswith("|")]  # a row of a table is one line
    assert path != README or len(lines) <= 200


@pytest.mark.parametrize("path", [*DOCUMENTS, *EXAMPLES, *TEMPLATES], ids=name)
def test_commands_are_understood_or_carry_a_mark(path: Path) -> None:
    """Those that start the trainer, and those of `deca`, also where one starts the other. Others are run by tests, or
    whoever changes the page sees that they are not."""
    for words, marked in marked_commands(path.read_text(encoding="utf-8")):
        understood = understand(words)
        for arguments in understood:
            if getattr(arguments, "config", None) is not None and arguments.config.exists():
                load_config(arguments.config, arguments.overrides)
        assert marked != bool(understood or is_run(words)), f"{' '.join(words)}: {NO_TEST} if no test knows it"


@pytest.mark.parametrize(
    ("mark", "commands"),
    [
        ("", "make demo"),
        (" no test", "make test"),
        (" no test", "deca plan --config x.yaml"),
        (" no test: make demo; make", "make demo\nmake test"),
        (" no test: make test", "make demo"),
    ],
)
def test_a_command_with_neither_or_both_is_noticed(tmp_path: Path, mark: str, commands: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"```bash{mark}\n{commands}\n```\n")
    with pytest.raises(AssertionError, match="if no test knows it"):
        test_commands_are_understood_or_carry_a_mark(page)


def understand(words: list[str]) -> list[Namespace]:
    """The arguments of the commands of this package in a command line."""
    understood = [parse(words[1:])] if words[0] == "deca" else []
    for place, word in enumerate(words):
        if word.endswith((SCRIPT, "where)/train.py")):  # $(deca where)
            understood.append(parser().parse_intermixed_args(words[place + 1 :]))
    return understood


def is_run(words: list[str]) -> bool:
    """Whether it runs the tests, or is run by one (test_clusters.py), or sets what the ranks read."""
    if words[0] == "export":
        return {word.partition("=")[0] for word in words[1:]} <= {*LAUNCHER, *INTERFACE_VARIABLES}
    scripts = [path for path in TEMPLATES if path.suffix == ".sh"]
    return words == ["make", "test"] or "pytest" in words or any(Path(word).resolve() in scripts for word in words)


def test_readme_first_run_is_a_configuration(tmp_path: Path) -> None:
    (block,) = re.findall(r"^```yaml\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    path = tmp_path / "my_run.yaml"
    path.write_text(block)
    config = load_config(path, ["optimizer.lr=2e-5", "gossip.graph=exponential"])
    assert set(check_world(config, 4)) == {1}
    (tmp_path / "my_data.jsonl").write_text('{"text": "a", "label": "b"}\n')
    config.data.train = [str(tmp_path / "my_data.jsonl")]
    validate_data_config(config)


@pytest.mark.parametrize("path", EXAMPLES, ids=name)
def test_example_starts_with_its_command(path: Path) -> None:
    header = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    if path.parent.name != "demo":  # started by demo.py
        assert any(SCRIPT in words and name(path) in words for words in commands(header))
