"""What each format does with each field of a row: rendered, obeyed, refused by name, or named as not used."""

import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_samples import answer_of, chats, make_config, targets_of, write_jsonl
from format_contract import CONTRACT
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deca_ds.data import load_client_data
from deca_ds.data.encoding import Encoder
from deca_ds.data.formats import FORMATS, ExampleRules
from deca_ds.data.formats.labels import normal_label
from deca_ds.errors import ConfigError, DataError

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "yo"}
ROWS = {
    "alpaca": {"instruction": "i", "output": "o"},
    "messages": {"messages": [USER, ANSWER]},
    "sharegpt": {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
}


def read(format, row, **rules):
    """The example of a row, and the names of its fields that are not used."""
    unused = set()
    return FORMATS[format].example(row, ExampleRules(format, **rules), "file, line 3", unused), unused


def refuses(tokenizer, tmp_path, format, row, message, **options):
    path = write_jsonl(tmp_path / "a.jsonl", [ROWS.get(format, {"text": "t", "label": "x"}), row])
    with pytest.raises(DataError, match=message) as error:
        load_client_data(make_config(train=[path], format=format, **options), tokenizer, 0)
    assert error.value.where.startswith(f"{path}, line 2")


@pytest.mark.parametrize("promise", CONTRACT, ids=lambda promise: promise.__name__)
@pytest.mark.parametrize("format", FORMATS)
def test_a_format_keeps_the_contract(tokenizer, format, promise):
    promise(FORMATS[format], tokenizer)


def test_a_format_that_there_is_not_is_refused_with_those_that_there_are(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "t"}])
    with pytest.raises(ConfigError, match=r"data.format = 'json' is not known[\s\S]*one of text, alpaca, messages"):
        load_client_data(make_config(train=[path], format="json"), tokenizer, 0)


@pytest.mark.parametrize("format", ["alpaca", "messages", "sharegpt"])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("label", False), ("kto_tag", "false"), ("images", ["a.png"]), ("audio", "a.wav"), ("videos", ["v"]),
        ("chosen", "x"), ("rejected", {"role": "assistant"}), ("weight", 0), ("train", False), ("loss_mask", [0, 1]),
        ("sample_weight", 0.5),
    ],
)  # fmt: skip
def test_a_field_with_a_meaning_that_is_not_obeyed_is_refused(tokenizer, tmp_path, format, field, value):
    refuses(tokenizer, tmp_path, format, {**ROWS[format], field: value}, f"the field '{field}'")


@pytest.mark.parametrize(
    "fields", [{"label": True}, {"label": "news"}, {"images": []}, {"images": None, "chosen": ""}, {"weight": 1.0}]
)
@pytest.mark.parametrize("format", ["alpaca", "messages", "sharegpt"])
def test_a_field_without_a_consequence_is_let_pass(tokenizer, tmp_path, format, fields):
    path = write_jsonl(tmp_path / "a.jsonl", [{**ROWS[format], **fields}] * 3)
    assert load_client_data(make_config(train=[path], format=format), tokenizer, 0).summary["examples"]


@pytest.mark.parametrize("field", ["system", "history", "tools"])
def test_alpaca_has_no_place_for_a_context(tokenizer, tmp_path, field):
    refuses(tokenizer, tmp_path, "alpaca", {**ROWS["alpaca"], field: [["q", "a"]]}, f"(?s)'{field}'.*format=messages")
    path = write_jsonl(tmp_path / "b.jsonl", [{**ROWS["alpaca"], field: empty} for empty in (None, "", [], "[]")])
    assert load_client_data(make_config(train=[path], format="alpaca"), tokenizer, 0).summary["examples"] == 3


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"function_call": {"name": "f"}}, "'function_call'"),
        ({"images": ["a.png"]}, "'images'"),
        ({"mask": [0, 1]}, "'mask'"),
        ({"train_detail": [{"begin": 0}]}, "'train_detail'"),
        ({"refusal": "no"}, "'refusal'"),
        ({"weight": 0.5}, "'weight' is 0.5"),
        ({"train": "no"}, "'train' is 'no'"),
        ({"weight": 1, "train": False}, "weight and train contradict"),
        ({"content": None}, r"'content' is empty \(null\)"),
        ({"content": " \n"}, "'content' is empty"),
        ({"content": [{"type": "image_url", "image_url": "x"}]}, "is no text: 'image_url'"),
        ({"content": [{"type": "text", "text": "x", "weight": 0}]}, "the field 'weight' in a part"),
        ({"content": ["x"]}, "is no text: 'x'"),
        ({"content": {"text": "x"}}, "is a dict, not text"),
        ({"tool_calls": [{"function": {"arguments": {}}}]}, "without a function's name"),
        ({"tool_calls": [{"function": {"name": "f", "arguments": "{x"}}]}, "cannot be read as JSON"),
        ({"tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}, "are no object"),
        ({"reasoning_content": "a", "thinking": "b"}, "reasoning_content and thinking"),
        ({"role": "user", "train": True}, "asks to train a turn of the user"),
        ({"role": "user", "tool_calls": [{"name": "f"}]}, "tool_calls in a turn of the user"),
        ({"role": "tool", "tool_call_id": "b"}, None),
        ({"role": "wizard"}, "unknown role 'wizard'"),
    ],
)
def test_a_turn_that_cannot_be_meant_names_its_place(tokenizer, tmp_path, turn, message):
    if message is None:
        calls = {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f"}}]}
        row = {"messages": [USER, calls, {**ANSWER, **turn}]}
        refuses(tokenizer, tmp_path, "messages", row, "'b' is that of no call before")
        return
    row = {"messages": [USER, {**ANSWER, **turn}]}
    refuses(tokenizer, tmp_path, "messages", row, message)


@pytest.mark.parametrize(
    "switch", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": False}, {"loss_mask": 0}]
)
def test_a_turn_that_says_not_to_train_it_carries_no_loss(tokenizer, switch):
    batch = chats([USER, {**ANSWER, **switch}, USER, {**ANSWER, "content": "no", "weight": 1}])
    only = Encoder(tokenizer, max_length=200, conversations=True).sequences(batch)
    assert targets_of(tokenizer, only) == [["no</assistant>"]]
    whole = Encoder(tokenizer, max_length=200, conversations=True, answers_only=False).sequences(batch)
    assert targets_of(tokenizer, whole) == [
        ["<user>hi</user><assistant>", "<user>hi</user><assistant>no</assistant>"]
    ], "prompts are trained, the turn is not"


def test_text_parts_are_joined_and_a_rows_system_prompt_comes_first(tokenizer):
    parts = [{"type": "text", "text": "y"}, {"type": "text", "text": "o"}]
    batch = chats([USER, {"role": "assistant", "content": parts}], system="S")
    (ids,) = Encoder(tokenizer, max_length=200, conversations=True).sequences(batch)["input_ids"]
    assert tokenizer.decode(ids) == "<system>S</system><user>hi</user><assistant>yo</assistant>"
    with pytest.raises(DataError, match="a system turn beside"):
        chats([{"role": "system", "content": "T"}, USER, ANSWER], system="S")
    assert chats([{"role": "system", "content": ""}, USER, ANSWER]) == chats([USER, ANSWER])


def test_sharegpt_calls_are_trained_and_observations_are_answers_of_tools(tokenizer):
    tokenizer.chat_template = (
        "{{ tools | tojson }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}"
        "[{{ c.function | tojson }}]{% endfor %}</{{ m.role }}>{% endfor %}"
    )
    turns = [
        {"from": "human", "value": "hi", "id": 7},
        {"from": "function_call", "value": '{"name": "f", "arguments": "{\\"x\\": \\"1\\"}"}'},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "yo", "weight": 1.0},
    ]
    row = {"conversations": turns, "system": "S", "tools": '[{"name": "f", "description": "d"}]'}
    example, unused = read("sharegpt", row)
    assert unused == {"conversations[].id"}
    batch = {"conversation": [example["conversation"]], "place": ["p"]}
    batch = Encoder(tokenizer, max_length=500, conversations=True).sequences(batch)
    call = '[{"name": "f", "arguments": {"x": "1"}}]</assistant>'
    assert targets_of(tokenizer, batch) == [[call, "yo</assistant>"]]
    assert '"description": "d"' in tokenizer.decode(batch["input_ids"][0])
    for value, message in (("{f", "cannot be read as JSON"), ('{"arguments": {}}', "without a function's name")):
        with pytest.raises(DataError, match=message):
            read("sharegpt", {"conversations": [{"from": "function_call", "value": value}]})


def test_columns_that_are_not_used_are_named(tokenizer, tmp_path):
    rows = [{"text": "x", "label": i % 2, "id": i, "source": None, "topic": "t"} for i in range(6)]
    path = write_jsonl(tmp_path / "a.jsonl", [*rows, {"text": "x", "label": 1, "topic": "t", "when": 3}])
    options = {"format": "classification", "partition": "key", "partition_column": "topic"}
    loaded = load_client_data(make_config(train=[path], client_holdout=0.0, **options), tokenizer, 0)
    assert loaded.notes == ["not used: id, when"]
    assert "id" not in str(loaded.summary), "what all clients see names no column"
    row = {"messages": [{**USER, "timestamp": 1}, ANSWER], "id": 3}
    path = write_jsonl(tmp_path / "b.jsonl", [row, row])
    loaded = load_client_data(make_config(train=[path], format="messages"), tokenizer, 0)
    assert loaded.notes == ["not used: id, messages[].timestamp"]


@pytest.mark.parametrize(
    ("format", "row", "column"),
    [
        ("text", {"text": None}, "text"),
        ("text", {"text": math.nan}, "text"),
        ("classification", {"text": " ", "label": 1}, "text"),
        ("classification", {"text": "x", "label": ""}, "label"),
        ("classification", {"text": "x", "label": None}, "label"),
        ("classification", {"text": "x", "label": math.nan}, "label"),
        ("classification", {"text": "x", "label": "NaN"}, "label"),
        ("alpaca", {"instruction": "", "output": "o"}, "instruction"),
        ("alpaca", {"instruction": "i", "output": "\n"}, "output"),
        ("alpaca", {"instruction": "i", "output": None}, "output"),
        ("alpaca", {"instruction": "i", "output": "\u200b\ufeff \x00"}, "output"),  # nothing of it shows
        ("classification", {"text": "x", "label": "\u2060"}, "label"),
    ],
)
def test_a_missing_value_is_refused_by_its_column(tokenizer, tmp_path, format, row, column):
    refuses(tokenizer, tmp_path, format, row, f"column '{column}' is empty")


@pytest.mark.parametrize(
    ("format", "line"),
    [("classification", "the car sat,"), ("classification", ",a"), ("alpaca", "i,")],
)
def test_an_empty_cell_of_a_table_is_refused_as_a_missing_value(tokenizer, tmp_path, format, line):
    names = "instruction,output" if format == "alpaca" else "text,label"
    path = tmp_path / "a.csv"
    path.write_text(f"{names}\nx,y\nx,z\n{line}\n")
    with pytest.raises(DataError, match="is empty") as error:
        load_client_data(make_config(train=[path], format=format), tokenizer, 0)
    assert error.value.where == f"{path}, line 4"


def test_blank_texts_are_left_out_and_counted(tokenizer, tmp_path):
    rows = [
        {"title": title, "text": text}
        for title, text in (("a", "b"), (" ", "c"), ("d", ""), ("", "\n"), ("", "\u200b"))
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    config = make_config(train=[path], text_columns=["title", "text"], client_holdout=0.0)
    loaded = load_client_data(config, tokenizer, 0)
    assert [answer_of(tokenizer, row) for row in loaded.train] == ["a b</s>", "c</s>", "d</s>"]
    assert (loaded.summary["examples"], loaded.summary["dropped"]) == (5, 2)
    (tmp_path / "b.txt").write_text(" \n\n")
    (tmp_path / "c.txt").write_text("x")
    documents = make_config(train=[tmp_path / "b.txt", tmp_path / "c.txt"], client_holdout=0.0)
    summary = load_client_data(documents, tokenizer, 0).summary
    assert (summary["train"], summary["dropped"]) == (1, 1)


def test_a_class_that_looks_like_a_missing_label_is_one_if_it_is_named(tokenizer, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\nx,NA\ny,None\nz,null\n")
    options = {"format": "classification", "client_holdout": 0.0}
    assert load_client_data(make_config(train=[path], **options), tokenizer, 0).label_names == ["NA", "None", "null"]
    path.write_text("text,label\nx,nan\ny,bread\n")
    with pytest.raises(DataError, match=r"(?s)'label' is empty \(nan\).*listed in data\.label_names"):
        load_client_data(make_config(train=[path], **options), tokenizer, 0)
    named = make_config(train=[path], label_names={"nan": "naan", "bread": "bread"}, **options)
    assert load_client_data(named, tokenizer, 0).summary["labels"] == {"naan": 1, "bread": 1}
    path = tmp_path / "b.jsonl"
    path.write_text('{"text": "x", "label": 1.5}\n{"text": "x", "label": Infinity}\n')
    with pytest.raises(DataError, match=r"(?s)'label' is inf, no text or number.*line 2"):
        load_client_data(make_config(train=[path], **options), tokenizer, 0)


def test_labels_that_look_alike_are_told(tokenizer, tmp_path):
    labels = [True, "True", "caf\u00e9", "cafe\u0301", "a", "a\u200b", "b"]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x", "label": label} for label in labels])
    loaded = load_client_data(make_config(train=[path], format="classification"), tokenizer, 0)
    assert loaded.notes == [
        "labels of their own, though they look alike: 'True', 'true'",
        "labels of their own, though they look alike: 'a', 'a\\u200b'",
        "labels of their own, though they look alike: 'cafe\u0301', 'caf\u00e9'",
    ]


@pytest.mark.parametrize("format", ["alpaca", "messages", "sharegpt"])
def test_a_label_that_says_neither_true_nor_false_is_named(tokenizer, tmp_path, format):
    path = write_jsonl(tmp_path / "a.jsonl", [{**ROWS[format], "label": label} for label in (0, "news", True)])
    loaded = load_client_data(make_config(train=[path], format=format), tokenizer, 0)
    assert loaded.notes == ["not used: label"]
    refuses(tokenizer, tmp_path, format, {**ROWS[format], "kto_tag": 0}, "the field 'kto_tag' is false")
    refuses(tokenizer, tmp_path, format, {**ROWS[format], "system_prompt": "S"}, "the field 'system_prompt'")


def test_text_that_the_tokenizer_does_not_know_is_told(tmp_path):
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a b"}, {"text": "a a c"}])
    loaded = load_client_data(make_config(train=[path], client_holdout=0.0), words, 0)
    assert loaded.notes == ["2 of 7 tokens to learn are <unk>, in the place of text that the tokenizer does not know"]


def test_a_gap_in_a_column_of_floats_is_a_missing_label(tokenizer, tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x", "y", "z"], "label": [1.0, 0.0, None]}), path)
    with pytest.raises(DataError, match=r"(?s)'label' is empty.*row 3"):
        load_client_data(make_config(train=[path], format="classification"), tokenizer, 0)


@pytest.mark.parametrize(
    ("values", "label"),
    [
        ((1, 1.0, "1", "1 ", " 1.0", "1.00"), "1"),
        ((0, -0.0, "0", "-0"), "0"),
        ((1e3, 1000), "1000"),
        ((1e300,), "1e+300"),
        (("01",), "01"),
        (("1e3",), "1e3"),
        (("1.10",), "1.10"),
        ((0.5, "0.5"), "0.5"),
        ((True, "true"), "true"),
        ((" a b\n",), "a b"),
    ],
)
def test_one_label_has_one_spelling(values, label):
    assert {normal_label(value) for value in values} == {label}


def test_spellings_of_a_label_are_one_class(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x", "label": value} for value in (1, 1.0, "1 ", 2, "2.0")])
    config = make_config(train=[path], format="classification", client_holdout=0.0)
    loaded = load_client_data(config, tokenizer, 0)
    assert loaded.label_names == ["1", "2"] and loaded.summary["labels"] == {"1": 3, "2": 2}
    assert {answer_of(tokenizer, row) for row in loaded.train} == {" 1</s>", " 2</s>"}
    named = make_config(train=[path], format="classification", label_names={"1.0": "no", 2: "yes"}, client_holdout=0.0)
    assert load_client_data(named, tokenizer, 0).summary["labels"] == {"no": 3, "yes": 2}
    twice = make_config(train=[path], format="classification", label_names={"1.0": "no", 1: "yes"})
    with pytest.raises(ConfigError, match=r"(?s)'1' has two words.*data\.label_names"):
        load_client_data(twice, tokenizer, 0)


def test_the_partition_sees_one_label_too(tokenizer, tmp_path):
    rows = [{"text": "x", "kind": value} for value in (1, "1 ", 1.0, "b", " b")]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    options = {"partition": "key", "partition_column": "kind", "client_holdout": 0.0}
    loaded = [load_client_data(make_config(clients=2, train=[path], **options), tokenizer, c) for c in range(2)]
    assert sorted(str(one.summary["labels"]) for one in loaded) == ["{'1': 3}", "{'b': 2}"]


@pytest.mark.parametrize(
    ("format", "row"),
    [
        ("alpaca", {"instruction": "i", "output": " "}),
        ("messages", {"messages": [USER, {"role": "assistant", "content": None}]}),
        ("messages", {"messages": [{"role": "system", "content": ""}]}),
        ("sharegpt", {"conversations": [{"from": "human", "value": ""}, {"from": "gpt", "value": "yo"}]}),
        ("classification", {"text": "t", "label": None}),
        ("classification", {"text": "", "label": "x"}),
    ],
)
def test_rows_without_a_value_are_refused_or_left_out_and_counted(tokenizer, tmp_path, format, row):
    refuses(tokenizer, tmp_path, format, row, r"data.incomplete=leave_out")
    whole = [ROWS.get(format, {"text": f"t{i}", "label": "xy"[i % 2]}) for i in range(8)]
    path = write_jsonl(tmp_path / "a.jsonl", [row, *whole[:4], row, row, *whole[4:], row])
    options = {"format": format, "client_holdout": 0.0, "max_length": 512}
    loaded = load_client_data(make_config(train=[path], incomplete="leave_out", **options), tokenizer, 0)
    assert loaded.summary["train"] == 8 and loaded.summary["dropped"] == 0
    places = "; ".join(f"{path}, line {number}" for number in (1, 6, 7))
    assert loaded.notes[0] == f"left out, for want of a value: 4 rows ({places} and 1 more)"


def test_a_file_of_nothing_but_rows_without_a_value_has_no_examples(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"instruction": "i", "output": ""}] * 3)
    with pytest.raises(DataError, match="no examples: all 3 rows lack a value that the format needs"):
        load_client_data(make_config(train=[path], format="alpaca", incomplete="leave_out"), tokenizer, 0)


def test_what_is_wrong_in_another_way_is_refused_all_the_same(tokenizer, tmp_path):
    row = {"instruction": "i", "output": 3}
    refuses(tokenizer, tmp_path, "alpaca", row, "is a int, not text", incomplete="leave_out")
