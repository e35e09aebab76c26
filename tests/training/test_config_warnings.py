"""What is said of a configuration that is allowed and hardly meant."""

import pytest

from deca_ds.config import load_config
from deca_ds.config.flat import flat
from deca_ds.config.schema import Config
from deca_ds.training.config_warnings import READ, config_warnings, length_warnings
from deca_ds.training.template_date import today

DILOCO, CLASSES = ["algorithm.method=diloco", "gossip.every=4"], ["data.format=classification"]
CONTINUE, HUB = ["cluster.on_failure=continue"], ["data.train=owner/name"]
# key and value, and what makes it count
CASES = [
    ("algorithm.a1=0.5", []),  # every method takes it
    ("algorithm.a2=0.9", []),
    ("algorithm.eps=1e-7", []),
    ("algorithm.signal=trivial", []),
    ("algorithm.b1=0.5", []),
    ("algorithm.b2=0.5", []),
    ("algorithm.correction=0.5", ["algorithm.method=deca-ed"]),
    ("algorithm.outer_lr=0.5", DILOCO),
    ("algorithm.outer_momentum=0.5", DILOCO),
    ("lora.rank=4", ["algorithm.method=dec-lora"]),
    ("lora.alpha=4", ["algorithm.method=dec-lora"]),
    ("lora.target_modules=[q_proj]", ["algorithm.method=dec-lora"]),
    ("lora.dropout=0.1", ["algorithm.method=dec-lora"]),
    ("blocks.order=random", ["blocks.layers_per_block=1"]),
    ("cluster.min_clients=1", CONTINUE),
    ("cluster.on_partition=continue", CONTINUE),
    ("data.alpha=3", ["data.partition=dirichlet"]),
    ("data.answers_only=false", ["data.format=alpaca"]),
    ("data.client_holdout=0.2", []),
    ("data.column_names=[text]", ["data.train={csv}"]),
    ("data.label_column=class", CLASSES),
    ("data.label_names={0: a, 1: b}", CLASSES),
    ("data.prompt='{text} is'", CLASSES),
    ("data.split=test", HUB),
    ("data.subset=small", HUB),
    ("data.text_columns=[body]", CLASSES),
    ("gossip.degree=2", []),
    ("gossip.edge_probability=0.9", ["gossip.graph=erdos_renyi"]),
    ("gossip.graph=complete", []),
    ("gossip.weights=max_degree", ["gossip.graph=ring"]),
    ("logging.progress_s=5", []),
    ("logging.project=ours", ["logging.tracker=trackio"]),
    ("model.masters=rounded", ["model.dtype=bfloat16"]),
    ("model.revision=v2", ["model.path=owner/name"]),
    ("optimizer.final_lr_ratio=0.1", []),
]
# what makes a key count for nothing, where that is not the usual configuration
WITHOUT = {
    "algorithm.signal": ["algorithm.method=gossip-adam"],
    "algorithm.b1": DILOCO,
    "algorithm.b2": ["algorithm.signal=none"],
    "blocks.order": ["blocks.layers_per_block=null"],
    "data.client_holdout": ["data.per_client_evaluation=[{jsonl}]"],
    "data.text_columns": ["data.format=alpaca"],
    "gossip.degree": ["gossip.graph=ring"],
    "gossip.graph": ["gossip.matrix=w.txt"],
    "gossip.weights": ["gossip.matrix=w.txt"],
    "logging.progress_s": ["logging.progress=false"],
    "optimizer.final_lr_ratio": ["optimizer.schedule=constant"],
}
ALWAYS = {"algorithm.a1", "algorithm.a2", "algorithm.eps"}


@pytest.fixture
def told(tmp_path):
    files = {kind: tmp_path / f"rows.{kind}" for kind in ("csv", "jsonl")}
    for file in files.values():
        file.write_text("x\n")

    def warnings_of(*keys: str) -> list[str]:
        given = [f"model.path={tmp_path}", f"data.train={files['jsonl']}", *keys]
        for kind, file in files.items():
            given = [key.replace(f"{{{kind}}}", str(file)) for key in given]
        return config_warnings(load_config(None, given))

    return warnings_of


@pytest.mark.parametrize(("assigned", "read"), CASES)
def test_a_value_that_nothing_reads_is_told(told, assigned, read):
    key = assigned.partition("=")[0]
    assert told(assigned, *read) == []
    if key not in ALWAYS:
        (warning,) = (line for line in told(assigned, *WITHOUT.get(key, [])) if line.startswith(f"{key} = "))
        assert "has no effect: " in warning


@pytest.mark.parametrize(
    ("keys", "why"), [([], "the graph base has its own"), (["gossip.matrix=w.txt"], "gossip.matrix")]
)
def test_weights_without_effect_are_told_with_what_takes_their_place(told, keys, why):
    (warning,) = told("gossip.weights=lazy_metropolis", *keys)
    assert f"has no effect: {why}" in warning


def test_what_a_start_adds_is_not_told_as_the_user_s(told):
    assert told(f"data.date='{today()}'") == []


def test_every_rule_has_its_case():
    assert {assigned.partition("=")[0] for assigned, _ in CASES} == READ.keys() <= flat(Config()).keys()


@pytest.mark.parametrize(
    ("text", "warned"),
    [
        (r"'{text}\nLabel:'", True),
        (r"'{text}\tLabel:'", True),
        (r'"{text}\nLabel:"', False),
        (r"'a \\ b {text}'", False),
    ],
)
def test_a_backslash_that_yaml_leaves_as_it_is_gets_a_warning(told, text, warned):
    assert [line.split(" = ")[0] for line in told(*CLASSES, f"data.prompt={text}")] == ["data.prompt"] * warned
    names = f"data.label_names={{1: {text.replace('{text}', '')}, 2: b}}"
    assert [line.split(" = ")[0] for line in told(*CLASSES, names)] == ["data.label_names.1"] * warned


def test_what_a_run_is_too_short_for_is_told():
    keys = ["optimizer.warmup_steps", "logging.every", "evaluation.every", "checkpoint.every"]
    config = load_config(None, ["model.path=x", *(f"{key}=12" for key in keys)])
    assert length_warnings(config, 12) == []
    told = length_warnings(config, 11)
    assert [line.split(" = 12, but the run has 11 inner steps: ")[0] for line in told] == keys
