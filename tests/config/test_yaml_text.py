"""What YAML changes is refused with the advice to quote it; what it leaves alone is read as it is written."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deca_ds.config import load_config, save_config
from deca_ds.errors import ConfigError

CHANGED = ["no", "Yes", "on", "OFF", "true", "010", "0x1F", "0b11", "12:30", "1:30.5", "1e3", "1.50", "1_000", ".5",
           ".inf", "~", "null"]  # fmt: skip
TEXTS = [
    "run: {output: %s}",
    "model: {path: %s}",
    "model: {revision: %s}",
    "data: {split: %s}",
    "data: {subset: %s}",
    "data: {prompt: %s}",
    "data: {label_column: %s}",
    "data: {partition_column: %s}",
    "data: {train: %s}",
    "data: {train: [a, %s]}",
    "data: {text_columns: [%s]}",
    "data: {column_names: [%s]}",
    "data: {label_names: {a: %s}}",
    "data: {label_names: {%s: a}}",
    "lora: {target_modules: [%s]}",
]
OPTIONAL = ("revision", "subset", "partition_column")  # null leaves these out


def load(tmp_path, text, *overrides):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return load_config(path, [*(() if "model:" in text and "path" in text else ("model.path=x",)), *overrides])


@pytest.mark.parametrize("number", range(len(TEXTS)), ids=TEXTS)
def test_what_yaml_changes_is_refused_for_every_text_key_unless_it_is_quoted(tmp_path, number):
    """With a third of the values each; every value is at a third of the texts."""
    text = TEXTS[number]
    for value in CHANGED[number % 3 :: 3]:
        if value in ("~", "null") and any(f"{key}:" in text for key in OPTIONAL):
            load(tmp_path, text % value)
            continue
        with pytest.raises(ConfigError, match=r"(?s)YAML reads .*run\.yaml, line 2.*quotes: '") as caught:
            load(tmp_path, "\n" + text % value)
        assert value in str(caught.value)
        load(tmp_path, text % f"'{value}'")
        key, _, written = text.removesuffix("}").replace(": {", ".", 1).partition(": ")
        with pytest.raises(ConfigError, match=r"(?s)YAML reads .*command line.*quotes"):
            load_config(None, ["model.path=x", f"{key}={written % value}"])


def test_what_yaml_leaves_alone_is_read_as_it_is_written(tmp_path):
    config = load(
        tmp_path,
        "model: {path: x, revision: 12345678}\n"
        "data: {label_names: {0: bad, 1: 'no', -1: 1.5, b: 2024-01-01}, train: 7, text_columns: [1, b]}\n",
    )
    assert config.data.label_names == {"0": "bad", "1": "no", "-1": "1.5", "b": "2024-01-01"}
    assert (config.model.revision, config.data.train, config.data.text_columns) == ("12345678", ["7"], ["1", "b"])


@pytest.mark.parametrize(
    ("key", "value"),
    [("run.seed", "010"), ("cluster.timeout_s", "10:00"), ("cluster.ranks", "[02, 010]"), ("cluster.clients", "yes"),
     ("optimizer.lr", "on"), ("cluster.clients", "2.0"), ("data.packing", "2"), ("gossip.wait_s", "1:30")],
)  # fmt: skip
def test_numbers_that_are_read_as_others_are_refused(tmp_path, key, value):
    section, name = key.split(".")
    for source in (
        lambda: load(tmp_path, f"{section}: {{{name}: {value}}}"),
        lambda: load(tmp_path, "", f"{key}={value}"),
    ):
        with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
            source()


@pytest.mark.parametrize(
    ("value", "number"), [("1e-4", 1e-4), ("1E-4", 1e-4), ("'1e-4'", 1e-4), ("1_000", 1000), ("0x10", 16), ("+.5", 0.5)]
)
def test_numbers_that_say_what_they_mean(tmp_path, value, number):
    assert load(tmp_path, f"optimizer: {{lr: {value}}}").optimizer.lr == number
    assert load(tmp_path, "", f"optimizer.lr={value}").optimizer.lr == number


def test_the_command_line_replaces_a_mapping_or_adds_to_it(tmp_path):
    file = "data: {label_names: {1: a, 2: b}}"
    assert load(tmp_path, file, "data.label_names={3: c, 4: d}").data.label_names == {"3": "c", "4": "d"}
    assert load(tmp_path, file, "data={label_names: {3: c}}").data.label_names == {"3": "c"}
    assert load(tmp_path, file, "data.label_names.2=c").data.label_names == {"1": "a", "2": "c"}
    assert load(tmp_path, file, "data.label_names={}").data.label_names == {}
    assert load(tmp_path, file, "data={packing: true}").data.label_names == {"1": "a", "2": "b"}


@pytest.mark.parametrize(
    ("argument", "message", "fix"),
    [
        ("optimizer.lr.x=3", "optimizer.lr is a single value", "'optimizer.lr=value'"),
        ("model.attention.x=3", "model.attention is a single value", "'model.attention=value'"),
        ("data.train.0=x", "data.train is a list", "'data.train=[value]'"),
        ("cluster.ranks[0]=3", "cluster.ranks is a list", "'cluster.ranks=[value]'"),
        ("data.label_names.x.y=3", "data.label_names has a single value for a name", "'data.label_names={x.y: 3}'"),
    ],
)
def test_a_key_that_continues_below_a_single_value_or_a_list_is_refused(tmp_path, argument, message, fix):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, "", argument)
    assert message in caught.value.what and argument in caught.value.where and fix in caught.value.fix
    if "{" in fix:  # what the fix says is understood
        assert load(tmp_path, "", fix.strip("'")).data.label_names == {"x.y": "3"}


@pytest.mark.parametrize(
    ("key", "written"),
    [
        ("data.train", "data: {train: ...}"),
        ("optimizer.lr", "optimizer: {lr: ...}"),
        ("data.label_names.a", "data: {label_names: {a: ...}}"),
    ],
)
def test_a_key_with_a_dot_in_a_file_is_refused_with_how_to_nest_it(tmp_path, key, written):
    with pytest.raises(ConfigError, match="in a file a dot does not part names") as caught:
        load(tmp_path, f"{key}: 1")
    assert caught.value.fix == f"write {written}" and caught.value.where.endswith("line 1")


@pytest.mark.parametrize("text", ["data: {label_names: {1: a, '1': b}}", "data: {packing: true, packing: false}"])
def test_a_name_that_stands_twice_is_refused(tmp_path, text):
    with pytest.raises(ConfigError, match=r"twice|duplicate"):
        load(tmp_path, text)


def test_one_name_for_two_spellings_of_a_number_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.label_names names '1\.0' twice"):
        load(tmp_path, "data: {label_names: {1: a, 1.0: b}}")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.label_names", "{a: [x, y], b: z}"),
        ("data.label_names", "{a: {x: y}, b: z}"),
        ("data.label_names", "['no', 'yes']"),
        ("data.text_columns", "[[a, b]]"),
        ("data.text_columns", "[a: b]"),
        ("data.train", "[[a, b]]"),
        ("data.train", "[a: b]"),
        ("data.prompt", "{text}"),
        ("model.revision", "[a]"),
        ("data", "a"),
        ("data", "null"),
    ],
)
def test_a_value_of_another_shape_names_its_key(tmp_path, key, value):
    section, _, name = key.partition(".")
    text = f"{section}: {{{name}: {value}}}" if name else f"{section}: {value}"
    for source in (lambda: load(tmp_path, text), lambda: load(tmp_path, "", f"{key}={value}")):
        with pytest.raises(ConfigError, match=rf"(?s){key}.*: there is (a|nothing).* where a .* belongs.*fix:   write"):
            source()


@pytest.mark.parametrize("value", ["a #1", "a\nb", "x "])
def test_the_command_line_has_no_comments_and_no_folded_lines(value):
    with pytest.raises(ConfigError, match=r"data\.prompt: YAML reads"):
        load_config(None, ["model.path=x", f"data.prompt={value}"])


def test_a_text_is_a_list_of_one(tmp_path):
    config = load(tmp_path, "data: {train: file.json, text_columns: title}\nlora: {target_modules: q_proj}")
    assert (config.data.train, config.data.text_columns, config.lora.target_modules) == (
        ["file.json"], ["title"], ["q_proj"])  # fmt: skip
    assert load(tmp_path, "", "data.per_client=a.json").data.per_client == ["a.json"]
    referred = load(tmp_path, "data: {train: [a, b], evaluation: '${data.train}'}")
    assert referred.data.evaluation == ["a", "b"]
    for wrong in ("data.train=null", "data.train={a: b}", "cluster.absent=x", "cluster.ranks=4"):
        with pytest.raises(ConfigError, match=wrong.split("=")[0]):
            load_config(None, ["model.path=x", wrong])


@settings(max_examples=60)
@given(
    text=st.sampled_from(CHANGED)
    | st.text(st.characters(exclude_characters="$", exclude_categories=["Cs"]), max_size=8)
)
def test_what_is_saved_is_read_back(tmp_path, text):
    config = load_config(None, ["model.path=x"])
    config.data.label_names, config.data.prompt, config.data.text_columns = {text: text}, text, [text]
    config.model.revision = text
    save_config(config, tmp_path / "saved.yaml")
    if text != "???":
        assert load_config(tmp_path / "saved.yaml") == config
