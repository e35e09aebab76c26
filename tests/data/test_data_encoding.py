"""Where the loss falls, what is cut, how sequences are packed."""

import pytest
from data_samples import CHAT_TEMPLATE, answer_of, chats, flat, make_byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import normalizers

from deca_ds.data.encoding import SEQUENCES, Encoder, pack
from deca_ds.errors import DataError

EOS = "</s>"
CHAT = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "no"},
]


def rows(batch):
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def pairs(*examples):
    prompts, answers = [prompt for prompt, _ in examples], [answer for _, answer in examples]
    return {"prompt": prompts, "answer": answers, "place": ["file, line 1"] * len(examples)}


def test_text_is_learned_whole(tokenizer):
    (row,) = rows(Encoder(tokenizer, max_length=9).sequences({"text": ["hello"]}))
    assert tokenizer.decode(row["input_ids"]) == "hello" + EOS
    assert row["labels"] == row["input_ids"] and row["targets"] == 5 and row["length"] == len(row["input_ids"])
    (row,) = rows(Encoder(tokenizer, max_length=3).sequences({"text": ["hello"]}))
    assert tokenizer.decode(row["input_ids"]) == "hel" and row["length"] > len(row["input_ids"])


def test_special_tokens_follow_the_tokenizer():
    both = Encoder(make_byte_tokenizer(bos_token="<s>", eos_token=EOS), max_length=9)
    assert both.sequences({"text": ["a"]})["input_ids"] == [
        [1, both.tokenizer("a", add_special_tokens=False).input_ids[0], 2]
    ]
    none = Encoder(make_byte_tokenizer(), max_length=9)
    assert len(none.sequences({"text": ["ab"]})["input_ids"][0]) == 2


@pytest.mark.parametrize("split", [False, True])
def test_the_name_of_a_special_token_in_a_text_is_read_as_the_tokenizer_reads_it(split):
    tokenizer = make_byte_tokenizer(eos_token=EOS, split_special_tokens=split)
    made = Encoder(tokenizer, max_length=20)
    (ids,) = made.sequences({"text": ["a</s>b"]})["input_ids"]
    assert ids == [*tokenizer("a</s>b", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    assert len(ids) == (7 if split else 4)
    other = make_byte_tokenizer(eos_token=EOS, split_special_tokens=not split)
    assert made.fingerprint != Encoder(other, max_length=20).fingerprint


def test_a_text_that_has_its_special_tokens_gets_no_second_ones():
    tokenizer = make_byte_tokenizer(bos_token="<s>", eos_token=EOS)
    made = Encoder(tokenizer, max_length=20)
    texts = {"text": ["<s>a</s>", "a</s>", "<s>", "</s><s>"]}
    assert tokenizer.batch_decode(made.sequences(texts)["input_ids"]) == ["<s>a</s>"] * 2 + [
        "<s></s>",
        "<s></s><s></s>",
    ]
    batch = made.sequences(pairs(("<s>ask: ", "so</s>"), ("ask: ", "so")))
    assert tokenizer.batch_decode(batch["input_ids"]) == ["<s>ask: so</s>"] * 2
    assert [answer_of(tokenizer, row) for row in rows(batch)] == ["so</s>"] * 2
    document = {"text": ["<s>a</s>"], "document": [True], "group": [""]}
    assert tokenizer.batch_decode(made.pieces(document)["ids"]) == ["<s>a</s>"]


def test_answers_carry_the_loss(tokenizer):
    (row,) = rows(Encoder(tokenizer, max_length=20).sequences(pairs(("ask: ", "so"))))
    assert tokenizer.decode(row["input_ids"]) == "ask: so" + EOS
    assert answer_of(tokenizer, row) == "so" + EOS and row["targets"] == 3
    (row,) = rows(Encoder(tokenizer, max_length=20, answers_only=False).sequences(pairs(("ask: ", "so"))))
    assert row["labels"] == row["input_ids"]


@pytest.mark.parametrize(
    ("prompt", "answer", "kept", "learned"),
    [
        ("0123456789", "ab", "56789ab" + EOS, "ab" + EOS),  # the prompt gives way
        ("0123456789", "abcdefgh", "6789abcd", "abcd"),  # down to half, then the answer does
        ("01", "abcdefgh", "01abcdef", "abcdef"),  # a short prompt stays whole
    ],
)
def test_the_prompt_is_cut_down_to_half_before_the_answer_is(tokenizer, prompt, answer, kept, learned):
    (row,) = rows(Encoder(tokenizer, max_length=8).sequences(pairs((prompt, answer))))
    assert tokenizer.decode(row["input_ids"]) == kept
    assert answer_of(tokenizer, row) == learned and row["length"] > len(row["input_ids"])


@given(st.text("xy", max_size=30), st.text("ab", max_size=30), st.integers(2, 20), st.booleans())
def test_cutting_always_keeps_an_answer(prompt, answer, max_length, bos):
    tokenizer = TOKENIZERS[bos]
    found = rows(Encoder(tokenizer, max_length=max_length).sequences(pairs((prompt, answer))))
    if not prompt and not bos and not answer:
        assert not found, "nothing but the first token, which is never predicted"
        return
    (row,) = found
    assert len(row["input_ids"]) <= max_length and row["targets"] >= 1
    assert not bos or row["input_ids"][0] == 1
    assert row["length"] == len(prompt) + len(answer) + 1 + bos
    assert set(answer_of(tokenizer, row)) <= set("ab" + EOS)


TOKENIZERS = {False: make_byte_tokenizer(eos_token=EOS), True: make_byte_tokenizer(bos_token="<s>", eos_token=EOS)}


def test_examples_without_a_target_are_left_out(tokenizer):
    assert rows(Encoder(make_byte_tokenizer(), max_length=8).sequences(pairs(("ask", "")))) == []
    batch = Encoder(tokenizer, max_length=30).sequences({"text": ["", "ab"]})
    assert batch["targets"] == [2]
    assert rows(Encoder(tokenizer, max_length=99, conversations=True).sequences(chats(CHAT[:2]))) == []


def test_only_assistant_turns_are_learned(tokenizer):
    (row,) = rows(Encoder(tokenizer, max_length=200, conversations=True).sequences(chats(CHAT)))
    assert tokenizer.decode(row["input_ids"]) == tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert answer_of(tokenizer, row) == "yo</assistant>no</assistant>"
    (row,) = rows(Encoder(tokenizer, max_length=200, conversations=True).sequences(chats(CHAT[2:])))
    assert answer_of(tokenizer, row) == "yo</assistant>no</assistant>", "the prompt of the first turn is no answer"


def test_a_long_conversation_keeps_its_first_answer(tokenizer):
    chat = [{"role": "user", "content": "x" * 100}, *CHAT[2:]]
    (row,) = rows(Encoder(tokenizer, max_length=30, conversations=True).sequences(chats(chat)))
    assert tokenizer.decode(row["input_ids"]) == "ser><assistant>yo</assistant><"
    assert answer_of(tokenizer, row) == "yo</assistant>" and row["length"] > len(row["input_ids"])


def test_a_template_that_marks_answers_is_believed(tokenizer):
    # The last turn is written differently from earlier ones, so prefixes would not do.
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}:{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
        "{% if loop.last %}!{% endif %}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %};{% endfor %}"
    )
    (row,) = rows(Encoder(tokenizer, max_length=200, conversations=True).sequences(chats(CHAT)))
    assert tokenizer.decode(row["input_ids"]) == "system:S;user:hi;assistant:yo;user:more;assistant:no!;"
    assert answer_of(tokenizer, row) == "yono!"


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    tokenizer.chat_template = CHAT_TEMPLATE.replace("{{ m['content'] }}", "{{ m['content'] }}{{ loop.revindex }}")
    with pytest.raises(DataError, match=r"(?s)user: hi.*generation"):
        Encoder(tokenizer, max_length=99, conversations=True).sequences(chats(CHAT))
    whole = Encoder(tokenizer, max_length=200, conversations=True, answers_only=False).sequences(chats(CHAT))
    assert whole["labels"] == whole["input_ids"]


def test_what_a_template_refuses_is_shown(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"(?s)user: hi.*roles must alternate"):
        Encoder(tokenizer, max_length=99, conversations=True).sequences(chats(CHAT))


def test_a_missing_template_is_explained():
    with pytest.raises(DataError, match=r"(?s)no chat template.*chat_template\.jinja"):
        Encoder(make_byte_tokenizer(eos_token=EOS), max_length=99, conversations=True)


WORDS = {"0": "bad", "1": "great", "2": "bad"}


def test_every_label_is_a_candidate_after_the_same_prompt(tokenizer):
    encoder = Encoder(tokenizer, max_length=16, words=WORDS)
    assert encoder.label_names == ["bad", "great"]
    batch = pairs(("a film:", "1"), ("x" * 40 + ":", "2"))
    found = rows(encoder.candidates(batch, [7, 8]))
    assert [(row["example"], row["candidate"], row["label"]) for row in found] == [
        (7, 0, 1),
        (7, 1, 1),
        (8, 0, 0),
        (8, 1, 0),
    ]
    assert [answer_of(tokenizer, row) for row in found] == [" bad" + EOS, " great" + EOS] * 2
    prompts = [tokenizer.decode(row["input_ids"]).split(" bad")[0].split(" great")[0] for row in found]
    assert prompts[:2] == ["a film:"] * 2
    assert prompts[2:] == ["x" * 8 + ":"] * 2, "all candidates see the same part of the prompt"
    (trained, _) = rows(encoder.sequences(batch))
    assert trained["labels"] == found[1]["labels"]


def test_an_answer_must_fit(tokenizer):
    with pytest.raises(DataError, match=r"(?s)'great' has 7 tokens.*data\.max_length.*13"):
        Encoder(tokenizer, max_length=12, words=WORDS)
    Encoder(tokenizer, max_length=13, words=WORDS)


def test_an_answer_that_the_tokenizer_changes_is_told_and_two_that_become_one_are_refused():
    tokenizer = make_byte_tokenizer(eos_token=EOS)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert Encoder(tokenizer, max_length=16, words={"0": "bad", "1": "great"}).notes == []
    (note,) = Encoder(tokenizer, max_length=16, words={"0": "Bad", "1": "great"}).notes
    assert note == "the tokenizer reads the answer 'Bad' as 'bad': so the model answers"
    with pytest.raises(DataError, match=r"(?s)the same tokens of the answers 'US' and 'us'.*data\.label_names"):
        Encoder(tokenizer, max_length=16, words={"0": "US", "1": "us"})
    assert Encoder(make_byte_tokenizer(), max_length=16, words={"0": "US", "1": "us"}).notes == []


def test_documents_are_cut_without_a_gap(tokenizer):
    encoder = Encoder(tokenizer, max_length=4)
    pieces = encoder.pieces({"text": ["abcdefghij", "row"], "document": [True, False], "group": ["", ""]})
    assert [len(ids) for ids in pieces["ids"]] == [4, 4, 3, 0]
    batch = encoder.sequences(pieces)
    assert [tokenizer.decode(ids) for ids in batch["input_ids"]] == ["abcd", "efgh", "ij" + EOS, "row" + EOS]


@given(st.lists(st.tuples(st.text("xy", max_size=9), st.text("ab", max_size=9)), min_size=1, max_size=20))
def test_packing_loses_nothing(examples):
    tokenizer = TOKENIZERS[False]
    single = Encoder(tokenizer, max_length=20).sequences(pairs(*examples))
    packed = pack(single, max_length=20)
    assert flat(packed["input_ids"]) == flat(single["input_ids"])
    assert sum(packed["targets"]) == sum(single["targets"])
    assert all(len(ids) <= 20 for ids in packed["input_ids"])
    for row in rows(packed):
        assert sum(label != -100 for label in row["labels"]) == row["targets"]
        assert all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))
    pairwise = zip(packed["input_ids"], packed["input_ids"][1:], strict=False)
    starts = [len(ids) for ids in single["input_ids"]]
    assert all(len(a) + min(starts) <= 20 + len(b) for a, b in pairwise)


def test_packing_fills_sequences_in_order_and_trains_no_first_token(tokenizer):
    single = Encoder(tokenizer, max_length=10).sequences({"text": ["abc", "def", "ghijk", "l"]})
    packed = pack(single, max_length=10)
    assert [tokenizer.decode(ids) for ids in packed["input_ids"]] == [f"abc{EOS}def{EOS}", f"ghijk{EOS}l{EOS}"]
    assert packed["labels"][0][0] == packed["labels"][0][4] == -100
    assert list(packed) == list(SEQUENCES)


def test_the_fingerprint_names_tokenizer_and_settings(tokenizer):
    def fingerprint(made=tokenizer, **options):
        return Encoder(made, **{"max_length": 16, **options}).fingerprint

    before = fingerprint()
    tokenizer(["a", "bb"], padding=True, truncation=True, max_length=1)
    assert fingerprint() == before, "calls that pad or truncate leave a trace in the tokenizer"
    others = [
        fingerprint(max_length=17),
        fingerprint(answers_only=False),
        fingerprint(words=WORDS),
        fingerprint(conversations=True),
        fingerprint(make_byte_tokenizer(bos_token="<s>", eos_token=EOS)),
    ]
    assert len({before, *others}) == 6
