"""From the configuration to a client's sequences: formats, partition, held-out sets, labels, caching, privacy."""

import json
import os
from collections import Counter

import datasets
import pytest
from data_samples import answer_of, flat, make_byte_tokenizer, make_config, write_jsonl

from deca_ds.data import load_client_data, sources
from deca_ds.data.rows import Work
from deca_ds.errors import ConfigError, DataError

EOS = "</s>"
LABELED = [{"text": f"t{i:03}", "label": "abc"[i % 3], "topic": f"k{i % 5}"} for i in range(90)]
CLASSIFICATION = {"format": "classification", "max_length": 64}


@pytest.fixture
def labeled(tmp_path):
    return write_jsonl(tmp_path / "labeled.jsonl", LABELED)


def texts(tokenizer, dataset):
    return [tokenizer.decode(ids).removesuffix(EOS) for ids in dataset["input_ids"]]


def load_all(tokenizer, clients, **options):
    return [load_client_data(make_config(clients=clients, **options), tokenizer, client) for client in range(clients)]


@pytest.mark.parametrize(
    "options",
    [
        {"partition": "iid"},
        {"partition": "key", "partition_column": "topic"},
        {"partition": "dirichlet", "partition_column": "label", "alpha": 0.5},
    ],
)
def test_the_clients_share_out_the_pool(tokenizer, labeled, options):
    loaded = load_all(tokenizer, 3, train=[labeled], common_holdout=0.1, client_holdout=0.2, **options)
    common = [texts(tokenizer, one.common_evaluation) for one in loaded]
    assert common[0] == common[1] == common[2] and len(common[0]) == 9
    shares = [texts(tokenizer, part) for one in loaded for part in (one.train, one.own_evaluation)]
    assert sorted(sum(shares, common[0])) == sorted(row["text"] for row in LABELED)
    for one in loaded:
        json.dumps(one.summary)
        examples = one.summary["train"] + one.summary["own_evaluation"]
        assert one.summary["own_evaluation"] == round(0.2 * examples) and one.train.column_names == [
            "input_ids",
            "labels",
        ]
        if "partition_column" in options:
            assert sum(one.summary["labels"].values()) == one.summary["train"]


def test_a_key_partition_never_splits_a_value(tokenizer, labeled):
    loaded = load_all(tokenizer, 2, train=[labeled], partition="key", partition_column="topic", client_holdout=0.0)
    topics = [set(one.summary["labels"]) for one in loaded]
    assert topics[0].isdisjoint(topics[1]) and topics[0] | topics[1] == {f"k{i}" for i in range(5)}
    assert all(one.own_evaluation is None and one.common_evaluation is None for one in loaded)


def test_the_seed_alone_decides_who_gets_which_examples(tokenizer, labeled):
    def train_of(seed, **options):
        config = make_config(clients=2, seed=seed, train=[labeled], **options)
        return texts(tokenizer, load_client_data(config, tokenizer, 0).train)

    assert train_of(0) == train_of(0) != train_of(1)
    assert len(train_of(0, max_examples=10, client_holdout=0.0)) == 5
    assert train_of(0, max_examples=10) != train_of(1, max_examples=10)


def test_without_label_names_the_labels_of_all_clients_data_are_the_answers(tokenizer, labeled):
    config = make_config(clients=2, train=[labeled], evaluation=[labeled], max_evaluation=7, **CLASSIFICATION)
    loaded = load_client_data(config, tokenizer, 1)
    assert loaded.label_names == ["a", "b", "c"]
    assert set(loaded.summary["labels"]) <= {"a", "b", "c"}
    row = loaded.train[0]
    assert "\nLabel: " in tokenizer.decode(row["input_ids"]) and answer_of(tokenizer, row)[1] in "abc"
    assert len(loaded.common_evaluation) == 21 and loaded.summary["common_evaluation"] == 7
    for place, row in enumerate(loaded.common_evaluation):
        assert (row["example"], row["candidate"]) == divmod(place, 3)
        assert answer_of(tokenizer, row) == f" {loaded.label_names[row['candidate']]}{EOS}"
        number = int(tokenizer.decode(row["input_ids"])[1:4])
        assert row["label"] == "abc".index(LABELED[number]["label"])


@pytest.mark.parametrize(("values", "names"), [([10, 9, 2], ["2", "9", "10"]), (["10", "9", "b"], ["10", "9", "b"])])
def test_unnamed_labels_are_ordered(tokenizer, tmp_path, values, names):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x", "label": value} for value in values * 3])
    assert load_client_data(make_config(train=[path], **CLASSIFICATION), tokenizer, 0).label_names == names


def test_labels_columns_and_prompt_are_those_that_the_configuration_names(tokenizer, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("3,Head,Body\n4,Top,Rest\n5,Up,Down\n" * 4)
    options = {
        "column_names": ["class", "title", "words"],
        "text_columns": ["title", "words"],
        "label_column": "class",
        "label_names": {3: "Sports", "4": "Tech", 5: "Tech"},
        "prompt": "Q {text} {no} A",
    }
    config = make_config(train=[path], client_holdout=0.0, **CLASSIFICATION, **options)
    loaded = load_client_data(config, tokenizer, 0)
    assert loaded.label_names == ["Sports", "Tech"] and loaded.summary["labels"] == {"Sports": 4, "Tech": 8}
    assert sorted(set(texts(tokenizer, loaded.train))) == [
        "Q Head Body {no} A Sports", "Q Top Rest {no} A Tech", "Q Up Down {no} A Tech",
    ]  # fmt: skip


def test_an_unknown_label_and_a_single_label_are_refused(tokenizer, tmp_path, labeled):
    with pytest.raises(DataError, match=r"(?s)unknown label 'b'.*labeled\.jsonl, line 2"):
        load_client_data(make_config(train=[labeled], label_names={"a": "x", "c": "z"}, **CLASSIFICATION), tokenizer, 0)
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": "x", "label": "new"}])
    with pytest.raises(DataError, match=r"(?s)unknown label 'new'; the labels are a, b, c.*other\.jsonl, line 1"):
        load_client_data(make_config(train=[labeled], evaluation=[other], **CLASSIFICATION), tokenizer, 0)
    same = write_jsonl(tmp_path / "same.jsonl", [{"text": "x", "label": "one"}] * 4)
    with pytest.raises(DataError, match=r"(?s)one label 'one'.*'label'"):
        load_client_data(make_config(train=[same], **CLASSIFICATION), tokenizer, 0)


def test_an_alpaca_row_becomes_stanfords_prompt_and_its_output_the_answer(tokenizer, tmp_path):
    rows = [
        {"instruction": "Add {x}", "input": "1 and 2", "output": "3"},
        {"instruction": "Greet", "input": "", "output": "hello"},
        {"instruction": "Leave", "output": "bye"},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    config = make_config(train=[path], format="alpaca", client_holdout=0.0)
    train = load_client_data(config, tokenizer, 0).train
    first, second, _ = texts(tokenizer, train)
    assert first.startswith("Below is an instruction that describes a task, paired with an input")
    assert first.endswith("### Instruction:\nAdd {x}\n\n### Input:\n1 and 2\n\n### Response:\n3")
    assert "Input:" not in second and second.endswith("### Instruction:\nGreet\n\n### Response:\nhello")
    assert [answer_of(tokenizer, row) for row in train] == [f"{answer}{EOS}" for answer in ("3", "hello", "bye")]


def test_messages_and_sharegpt_make_the_same_sequences(tokenizer, tmp_path):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    conversations = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
    first = write_jsonl(tmp_path / "a.jsonl", [{"messages": messages, "id": 1}])
    second = write_jsonl(tmp_path / "b.jsonl", [{"conversations": conversations}])
    loaded = [
        load_client_data(make_config(train=[path], format=name), tokenizer, 0).train
        for path, name in ((first, "messages"), (second, "sharegpt"))
    ]
    assert texts(tokenizer, loaded[0]) == texts(tokenizer, loaded[1]) == ["<user>hi</user><assistant>yo</assistant>"]
    assert answer_of(tokenizer, loaded[0][0]) == "yo</assistant>"


@pytest.mark.parametrize(
    ("format", "row", "message"),
    [
        ("text", {"body": "x", "id": 1}, "no column 'text'; there are: body, id"),
        ("text", {"text": 3, "id": 1}, "'text' is a int, not text; columns: text, id"),
        ("text", {"text": None}, r"'text' is empty \(null\)"),
        ("alpaca", {"instruction": "x"}, "no column 'output'; there are: instruction"),
        ("classification", {"text": "x"}, "no column 'label'; there are: text"),
        ("classification", {"text": "x", "label": [1]}, "'label' is a list"),
        ("messages", {"messages": "x"}, "'messages' is no list of messages"),
        ("messages", {"messages": [{"role": "user"}]}, "no column 'content'"),
        ("messages", {"messages": [{"role": "wizard", "content": "x"}]}, "unknown role 'wizard'"),
        ("sharegpt", {"conversations": [{"from": "tools", "value": "x"}]}, "unknown role 'tools'"),
    ],
)
def test_rows_that_are_wrong_name_file_and_line(tokenizer, tmp_path, format, row, message):
    fine = {
        "text": {"text": "x"},
        "alpaca": {"instruction": "x", "output": "y"},
        "classification": {"text": "x", "label": 1},
        "messages": {"messages": [{"role": "user", "content": "x"}]},
        "sharegpt": {"conversations": [{"from": "human", "value": "x"}]},
    }[format]
    path = write_jsonl(tmp_path / "a.jsonl", [fine, row])
    with pytest.raises(DataError, match=message) as error:
        load_client_data(make_config(train=[path], format=format), tokenizer, 0)
    assert error.value.where.startswith(f"{path}, line 2")


def test_a_missing_partition_column_names_the_line(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x", "kind": 1}, {"text": "x"}])
    with pytest.raises(DataError, match=r"(?s)no column 'kind'.*line 2"):
        load_client_data(make_config(train=[path], partition="key", partition_column="kind"), tokenizer, 0)


@pytest.mark.parametrize(
    ("name", "format", "options", "message", "fix"),
    [
        ("a.csv", "classification", {}, "no column 'text'; there are: sports, Two goals", "in data.column_names; else"),
        ("a.tsv", "text", {}, "no column 'text'", "no header, list its columns in data.column_names"),
        ("a.csv", "alpaca", {}, "no column 'instruction'", "data.column_names; else rename the columns"),
        ("a.jsonl", "text", {}, "no column 'text'", "name it in data.text_columns, or choose"),
        (
            "a.jsonl",
            "classification",
            {"text_columns": ["sports"]},
            "no column 'label'",
            "data.text_columns or data.label",
        ),
        ("a.jsonl", "sharegpt", {}, "no column 'conversations'", "rename the columns, or choose the data.format"),
        (
            *("a.jsonl", "text", {"text_columns": ["sports"], "partition": "key", "partition_column": "k"}),
            *("no column 'k'", "name one of them in data.partition_column"),
        ),
        (
            *("a.jsonl", "text", {"text_columns": ["sports"], "partition": "key", "partition_column": "label"}),
            *("no column 'label'", "name one of them in data.partition_column"),
        ),
    ],
)
def test_a_source_that_does_not_fit_names_the_keys(tokenizer, tmp_path, name, format, options, message, fix):
    lines = [["sports", "Two goals " + "and more " * 9], ["world", "A treaty"]]
    if name.endswith("jsonl"):
        write_jsonl(tmp_path / name, [dict([line]) for line in lines])
    else:
        part = "," if name.endswith("csv") else "\t"
        (tmp_path / name).write_text("".join(part.join(line) + "\n" for line in lines))
    with pytest.raises(DataError, match=message) as error:
        load_client_data(make_config(train=[tmp_path / name], format=format, **options), tokenizer, 0)
    assert fix in error.value.fix and error.value.where.startswith(str(tmp_path / name))
    assert len(error.value.what) < 120, "the texts of a row that is taken for names are cut"


def test_files_with_different_columns_and_odd_texts_go_together(tokenizer, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(["caf\u00e9 \u00e2\u20ac\u2122", "half \ud83d escape"]))
    write_jsonl(tmp_path / "b.jsonl", [{"text": "x", "meta": {"k": 1}}, {"text": "y", "meta": "z"}])
    loaded = load_client_data(make_config(train=[tmp_path], client_holdout=0.0), tokenizer, 0)
    assert texts(tokenizer, loaded.train) == ["caf\u00e9 \u00e2\u20ac\u2122", "half \ufffd escape", "x", "y"]


def test_a_text_file_is_cut_into_sequences_for_all_clients(tokenizer, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("".join(chr(97 + i % 26) for i in range(100)))
    loaded = load_all(tokenizer, 3, train=[path], max_length=10, client_holdout=0.0)
    pieces = flat(list(one.train["input_ids"]) for one in loaded)
    assert [one.summary["examples"] for one in loaded] == [4, 4, 3]
    assert sum(one.summary["dropped"] for one in loaded) == 1, "the last piece is the EOS alone: nothing to predict"
    assert {len(piece) for piece in pieces} == {10}
    starts = {path.read_text()[start : start + 10] for start in range(0, 100, 10)}
    assert {tokenizer.decode(piece) for piece in pieces} == starts


@pytest.mark.parametrize("format", ["text", "alpaca", "messages", "classification"])
def test_packing_trains_the_same_tokens_in_at_most_half_as_many_sequences(tokenizer, tmp_path, format):
    rows = [
        {
            "text": "t" * (i % 7 + 1),
            "label": i % 2,
            "instruction": "i",
            "output": "o" * (i % 5 + 1),
            "messages": [
                {"role": "user", "content": "u" * (i + 1)},
                {"role": "assistant", "content": "a" * (i % 4 + 1)},
            ],
        }
        for i in range(40)
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    options = {"train": [path], "format": format, "max_length": 400}
    plain = load_client_data(make_config(**options), tokenizer, 0)
    packed = load_client_data(make_config(packing=True, **options), tokenizer, 0)
    same = ("train_tokens", "target_tokens", "examples", "own_evaluation")
    assert [packed.summary[key] for key in same] == [plain.summary[key] for key in same]
    assert packed.summary["train"] <= plain.summary["train"] / 2
    assert len(packed.own_evaluation) == len(plain.own_evaluation), "evaluation is not packed"
    assert Counter(flat(packed.train["input_ids"])) == Counter(flat(plain.train["input_ids"]))


def test_packing_needs_an_end_token(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}] * 4)
    with pytest.raises(DataError, match=r"(?s)end-of-text.*data\.packing"):
        load_client_data(make_config(train=[path], packing=True), make_byte_tokenizer(), 0)


def test_without_answers_only_every_token_is_trained(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"instruction": "x", "output": "y"}] * 3)
    config = make_config(train=[path], format="alpaca", answers_only=False)
    train = load_client_data(config, tokenizer, 0).train
    assert all(row["labels"] == row["input_ids"] for row in train)


def test_private_files_are_opened_by_their_client_alone(tokenizer, tmp_path):
    own, evaluation = (
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name}{i}", "label": i % 2} for i in range(6)])
        for name in ("own", "evaluation")
    )
    options = {
        "clients": 2,
        "per_client": ["/other/host/a.jsonl", own],
        "label_names": {0: "no", 1: "yes"},
        **CLASSIFICATION,
    }
    loaded = load_client_data(make_config(**options, client_holdout=0.5), tokenizer, 1)
    assert loaded.summary["train"] == loaded.summary["own_evaluation"] == 3 and loaded.label_names == ["no", "yes"]
    given = make_config(**options, per_client_evaluation=["/other/host/b.jsonl", evaluation])
    loaded = load_client_data(given, tokenizer, 1)
    assert loaded.summary["train"] == loaded.summary["own_evaluation"] == 6
    assert all(text.startswith("evaluation") for text in texts(tokenizer, loaded.own_evaluation))
    assert loaded.common_evaluation is None
    with pytest.raises(DataError, match=r"/other/host/a\.jsonl"):
        load_client_data(given, tokenizer, 0)


def test_max_examples_limits_each_private_file(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"t{i}"} for i in range(30)])
    loaded = load_all(tokenizer, 2, per_client=[path, path], max_examples=10, client_holdout=0.2)
    assert [(one.summary["train"], one.summary["own_evaluation"]) for one in loaded] == [(8, 2)] * 2


def test_a_client_without_anything_to_learn_is_named(tokenizer, tmp_path):
    asked, answered = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
    rows = [{"messages": [asked], "owner": "a"}] * 3 + [{"messages": [asked, answered], "owner": "b"}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    options = {"train": [path], "format": "messages", "partition": "key", "partition_column": "owner"}
    config = make_config(clients=2, client_holdout=0.0, **options)
    with pytest.raises(DataError, match=r"(?s)client 0 has nothing to train on: none of its 3 examples.*data\.train"):
        load_client_data(config, tokenizer, 0)
    assert load_client_data(config, tokenizer, 1).summary["train"] == 1


def test_an_empty_file_and_a_wrong_value_are_refused(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [])
    with pytest.raises(DataError, match=r"(?s)no examples.*a\.jsonl"):
        load_client_data(make_config(train=[path]), tokenizer, 0)
    with pytest.raises(ConfigError, match=r"data\.alpha"):
        load_client_data(make_config(train=[path], alpha=-1.0), tokenizer, 0)


def test_hub_data_sets_are_loaded_by_name_subset_and_split(tokenizer, monkeypatch):
    def load(name, subset, split):
        assert (name, subset) == ("owner/name", "small")
        return datasets.Dataset.from_list(LABELED if split == "train" else LABELED[:3])

    monkeypatch.setattr(sources, "why_not_on_hub", lambda *_: None)
    monkeypatch.setattr(sources, "load_dataset", load)
    config = make_config(train=["owner/name"], evaluation=["owner/name:test"], subset="small", client_holdout=0.0)
    loaded = load_client_data(config, tokenizer, 0)
    assert loaded.summary["train"] == 90 and loaded.summary["common_evaluation"] == 3
    assert texts(tokenizer, loaded.train)[:2] == ["t000", "t001"]
    config = make_config(train=["owner/name"], subset="small", text_columns=["body"])
    with pytest.raises(DataError, match=r"(?s)no column 'body'.*owner/name on the hub, row 1"):
        load_client_data(config, tokenizer, 0)


def test_a_changed_file_is_read_anew(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "old"}] * 2)
    config = make_config(train=[path], client_holdout=0.0)
    assert texts(tokenizer, load_client_data(config, tokenizer, 0).train) == ["old"] * 2
    write_jsonl(path, [{"text": "new"}] * 2)
    os.utime(path, ns=(1, 1))
    assert texts(tokenizer, load_client_data(config, tokenizer, 0).train) == ["new"] * 2


def test_every_batch_that_is_tokenised_is_a_sign_of_life(tokenizer, tmp_path):
    """A batch is 1000 examples, read and then tokenised; what lies in the cache needs none."""
    path = write_jsonl(tmp_path / "many.jsonl", [{"text": f"t{i}"} for i in range(2500)])
    config, ticks = make_config(train=[path], client_holdout=0.0, common_holdout=0.0), []
    for _ in range(2):
        load_client_data(config, tokenizer, 0, work=Work(tick=lambda: ticks.append(None)))
        assert len(ticks) == 3 + 3
