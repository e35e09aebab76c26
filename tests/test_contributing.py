"""The diffs of CONTRIBUTING.md, applied: what they add keeps the contract, and nothing else had to change for it."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import get_args, get_type_hints

import format_contract
import method_contract
import pytest
import torch
from data.data_samples import make_byte_tokenizer, make_config, write_jsonl

from deca_ds.algorithm.methods import METHODS, build_rule
from deca_ds.config.schema import Config
from deca_ds.data import load_client_data
from deca_ds.data.formats import FORMATS
from deca_ds.gossip.codec import CODECS
from deca_ds.training.chosen_method import check_method, rule_of

REPOSITORY = Path(__file__).parents[1]


def patched(section: str) -> dict[str, str]:
    """File -> its text after the diff of that section; new files come first."""
    guide = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    diff = re.search(rf"^## {section}$.*?^```diff\n(.*?)^```$", guide, re.M | re.S)[1]
    texts = {}
    for file, hunks in re.findall(r"^\+\+\+ b/([^\n]*)\n(.*?)(?=^--- |\Z)", diff, re.M | re.S):
        path = REPOSITORY / file
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        for sizes, hunk in re.findall(r"^@@ (.*?) @@\n(.*?)(?=^@@ |\Z)", hunks, re.M | re.S):
            lines = [line if line.strip() else " \n" for line in hunk.splitlines(keepends=True)]
            sides = [[line[1:] for line in lines if line[0] in signs] for signs in (" -", " +")]
            said = [int(size.partition(",")[2] or 1) for size in sizes.split()]
            assert said == list(map(len, sides)), f"in CONTRIBUTING.md, {section!r}, {file}, count anew: @@ {sizes} @@"
            old, new = map("".join, sides)
            assert text.count(old) == 1 or not path.exists(), (
                f"in CONTRIBUTING.md, {section!r}, write the diff of {file} anew: the file as it is has this "
                f"{text.count(old)} times\n{old}"
            )
            text = text.replace(old, new) if old else new
        texts[file] = text
    return dict(sorted(texts.items(), key=lambda item: (REPOSITORY / item[0]).exists()))


def load(file: str, text: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module that the file would be, in the place of the one that is there."""
    name = file.removesuffix(".py").removeprefix("tests/").removesuffix("/__init__").replace("/", ".")
    module = ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(text, file, "exec"), module.__dict__)
    return module


def test_the_method_of_contributing_keeps_the_contract(monkeypatch) -> None:
    modules = {file: load(file, text, monkeypatch) for file, text in patched("Adding a method").items()}
    changed = modules["deca_ds/algorithm/methods.py"].METHODS
    (name,) = changed.keys() - METHODS.keys()
    monkeypatch.setitem(METHODS, name, changed[name])
    for promise in method_contract.CONTRACT:
        promise(build_rule(name))
    for graph, every in (("ring", 1), ("erdos_renyi", 3)):
        reference = modules["tests/dense_reference.py"]
        method_contract.equals_the_dense_reference(name, "descent", graph, every, reference)
    config = Config()
    config.algorithm.method = name
    check_method(config)
    assert type(rule_of(config)) is changed[name].rule
    table = runpy.run_path(str(REPOSITORY / "docs/make_reference.py"))["algorithm"]()
    assert f"| `{name}` | {changed[name].about} (arXiv {changed[name].papers[0]}) | 12 | the block |" in table


def test_the_data_format_of_contributing_keeps_the_contract(monkeypatch, tmp_path) -> None:
    modules = {file: load(file, text, monkeypatch) for file, text in patched("Adding a data format").items()}
    changed = modules["deca_ds/data/formats/__init__.py"].FORMATS
    (name,) = changed.keys() - FORMATS.keys()
    format = changed[name]
    sys.modules[format.example.__module__].__file__ = __file__  # by whose content the cache tells its code
    monkeypatch.setitem(FORMATS, name, format)
    tokenizer = make_byte_tokenizer(eos_token="</s>")
    for promise in format_contract.CONTRACT:
        promise(format, tokenizer)
    rows = [{**format.sample, "answer": str(number)} for number in range(10)]
    files = [write_jsonl(tmp_path / "rows.jsonl", rows)]
    data = load_client_data(make_config(train=files, format=name, cache=str(tmp_path)), tokenizer, 0)
    assert data.summary["examples"] + data.summary["own_evaluation"] == 10
    assert format.sample["question"] in tokenizer.decode(data.train[0]["input_ids"])
    table = runpy.run_path(str(REPOSITORY / "docs/make_reference.py"))["formats"]()
    assert f"| `{name}` |" in table and f"| {name} | `question` |" in table


def test_the_codec_of_contributing_can_be_chosen_and_rounds(monkeypatch) -> None:
    ((file, text),) = patched("Adding a codec").items()
    changed = load(file, text, monkeypatch).CODECS
    (name,) = changed.keys() - CODECS.keys()
    codec, x = changed[name], torch.linspace(-3, 3, 50)
    coded = codec.coded(x)
    assert codec.bytes == 2 and coded.dtype == torch.float32 and torch.equal(codec.coded(coded), coded)
    assert 0 < (coded - x).abs().max() <= 3 * 2**-11
    monkeypatch.setitem(CODECS, name, codec)
    config = Config()
    config.gossip.wire = name
    check_method(config)


def test_the_failure_policy_of_contributing_passes_its_test(monkeypatch) -> None:
    texts = patched("Adding a failure policy")
    modules = {file: load(file, text, monkeypatch) for file, text in texts.items() if not file.startswith("tests/")}
    tests = load("tests/elastic/test_policy.py", texts["tests/elastic/test_policy.py"], monkeypatch)
    assert tests.decide is modules["deca_ds/elastic/policy.py"].decide
    tests.test_a_majority_continues()
    values = get_args(get_type_hints(modules["deca_ds/config/schema.py"].ClusterConfig)["on_partition"])
    assert values == ("stop", "continue", "majority")
