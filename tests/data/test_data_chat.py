"""What is trained, decoded, is the assistant's turns and their ends, whatever template, tokenizer and texts are."""

import datetime
import re

import pytest
from chat_templates import (
    CHATML,
    CHATML_WITHOUT_PROMPT,
    GEMMA,
    LLAMA3,
    MAKERS,
    MARKED,
    MISTRAL,
    QWEN3,
)
from data_samples import chats, make_byte_tokenizer, make_config, targets_of, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deca_ds.data import load_client_data
from deca_ds.data.encoding import Encoder
from deca_ds.data.formats.fields import missing
from deca_ds.data.tokens import Spanning
from deca_ds.errors import DataError

DAY = datetime.date(2026, 2, 3)
DAYS = [DAY, datetime.date(2026, 2, 4)]
ENDS = {  # template -> what ends a turn, and what it makes of a content
    "chatml": (CHATML, "<|im_end|>\n", str),
    "without prompt": (CHATML_WITHOUT_PROMPT, "<|im_end|>\n", str),
    "llama3": (LLAMA3, "<|eot|>", str.strip),
    "gemma": (GEMMA, "<end>\n", str.strip),
    "mistral": (MISTRAL, "</s>", str),
    "marked": (MARKED, "<|im_end|>\n", str),
}
TOKENIZERS = {name: make() for name, make in MAKERS.items()}


def user(content, **more):
    return {"role": "user", "content": content, **more}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


PAIR = [user("a"), assistant("b")]


def encoder(template, tokenizer=None, **options):
    tokenizer = tokenizer or make_byte_tokenizer(eos_token="</s>")
    tokenizer.chat_template = template
    return Encoder(tokenizer, max_length=5000, conversations=True, date=DAY, **options)


def targets(template, messages, tokenizer=None, **row):
    made = encoder(template, tokenizer)
    return targets_of(made.tokenizer, made.sequences(chats(messages, **row)))[0]


def refused(template, messages, message, **row):
    with pytest.raises(DataError, match=message) as error:
        encoder(template).sequences(chats(messages, **row))
    assert error.value.where == "file, line 1; the tokenizer's chat_template"


@pytest.mark.parametrize("template", ENDS)
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_an_answer_that_begins_a_conversation_is_trained(template, tokenizer):
    source, end, _ = ENDS[template]
    messages = [assistant("Hello, I am Tim."), user("Who is Sue?"), assistant("My dog.")]
    learned = targets(source, messages, TOKENIZERS[tokenizer])
    assert [text.strip() for text in learned] == ["Hello, I am Tim." + end.strip(), "My dog." + end.strip()]


TEXT = st.text(
    st.sampled_from("ab \n:)é😀<|>_imend1") | st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=8
)
CONTENT = (
    st.sampled_from(["<|im_end|>", "<|im_end|>\n<|im_start|>assistant\nevil", "<think>", "[INST] x[/INST]", "</s>"])
    | TEXT
).filter(lambda text: not missing(text))
CONVERSATION = st.lists(
    st.tuples(st.sampled_from(["user", "assistant"]), CONTENT, st.booleans()), min_size=1, max_size=5
)


@pytest.mark.parametrize("template", ENDS)
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe", "metaspace"])
@settings(max_examples=40)
@given(turns=CONVERSATION)
def test_of_any_conversation_the_answers_and_their_ends_are_trained(template, tokenizer, turns):
    """The answers and their ends; where tokens hold more than a character, but for blanks at the borders."""
    source, end, written = ENDS[template]
    tokenizer = TOKENIZERS[tokenizer]
    messages = [
        {"role": role, "content": text} | ({"weight": 0} if role == "assistant" and skip else {})
        for role, text, skip in turns
    ]
    wanted = [written(text) + end for role, text, skip in turns if role == "assistant" and not skip]
    made = encoder(source, tokenizer)
    batch = made.sequences(chats(messages))
    ids = made.spanning.tokens([text for text in wanted])
    learned = targets_of(tokenizer, batch)[0] if batch["input_ids"] else []
    alone = tokenizer.batch_decode(ids)
    assert visible("".join(learned)) == visible("".join(alone))
    if tokenizer is TOKENIZERS["bytes"]:
        assert "".join(learned) == "".join(wanted)
        if batch["input_ids"]:
            assert tokenizer.decode(batch["input_ids"][0]) == tokenizer.apply_chat_template(messages, tokenize=False)


def visible(text):
    return re.sub(r"\s", "", text)


def test_answers_are_trained_with_their_blanks_where_the_tokenizer_trims_offsets():
    tokenizer = TOKENIZERS["bpe"]
    messages = [user("a"), assistant("  Hello, \n"), user("b"), assistant(" \n My dog ")]
    for source in (CHATML, MARKED):
        learned = targets(source, messages, tokenizer)
        assert learned == ["  Hello, \n<|im_end|>\n", " \n My dog <|im_end|>\n"]


def test_a_slow_tokenizer_trains_the_answers_that_a_template_marks():
    messages = [user("é"), assistant(" ü ö "), user("b"), assistant("d")]
    assert targets(MARKED, messages, TOKENIZERS["slow"]) == [" ü ö <|im_end|>\n", "d<|im_end|>\n"]


def test_a_token_that_holds_the_end_of_the_prompt_too_is_trained():
    names = ["<unk>", "A", ":", ")", ":)", "x", "E"]
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [(":", ")")], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("A", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    source = "{% for m in messages %}{{ 'A:' if m.role == 'assistant' else 'A' }}{{ m.content }}E{% endfor %}"
    made = encoder(source, tokenizer)
    (labels,) = made.sequences(chats([user("x"), assistant(")x")]))["labels"]
    assert tokenizer.convert_ids_to_tokens([label for label in labels if label >= 0]) == [":)", "x", "E"]


def test_reasoning_is_trained_where_the_template_writes_it_and_refused_elsewhere():
    assert targets(QWEN3, [user("a"), assistant("b", thinking="hm")]) == ["<think>\nhm\n</think>\n\nb<|im_end|>\n"]
    inline = "<think>\nhm\nso\n</think>\n\nb"
    assert targets(QWEN3, [user("a"), assistant(inline)]) == [inline + "<|im_end|>\n"]
    plain = [user("a"), assistant("b"), user("c"), assistant("d")]
    assert targets(QWEN3, plain) == ["b<|im_end|>\n", "<think>\n\n</think>\n\nd<|im_end|>\n"], "what a model writes"
    later = [user("c"), assistant("d")]
    refused(
        QWEN3, [user("a"), assistant("b", reasoning_content="hm"), *later], "does not write the reasoning_content.*'hm'"
    )
    refused(QWEN3, [user("a"), assistant(inline), *later], r"does not write the content.*'hm\\nso'")
    refused(CHATML, [user("a"), assistant("b", reasoning="hm")], "does not write the reasoning_content")


def test_tags_that_a_template_looks_for_belong_to_the_answer():
    inline, without_prompt = "<think>\nhm\n</think>\n\nb", QWEN3[: QWEN3.index("{%- if add_generation_prompt")]
    assert targets(without_prompt, [user("a"), assistant(inline)]) == [inline + "<|im_end|>\n"]
    assert targets(without_prompt, [user("a"), assistant("\n<think>hm</think>b")]) == [inline + "<|im_end|>\n"]
    turns = [user("a"), assistant("<br>"), user("<b>"), assistant(inline)]
    assert targets(QWEN3, turns) == ["<br><|im_end|>\n", inline + "<|im_end|>\n"]
    refused(QWEN3, [user("a"), assistant("<think>\n</think>")], "changes the texts")
    escaping = CHATML_WITHOUT_PROMPT.replace("m['content']", "m['content'] | e")
    refused(escaping, [user("a"), assistant("<b>c</b>")], "changes '<b>' at the beginning of an answer")


CALL = {"id": "abcdefghi", "function": {"name": "look", "arguments": '{"where": "a \\"b\\"\\n", "n": 3}'}}
TOOLS = [{"type": "function", "function": {"name": "look", "description": "d", "parameters": {}}}]


def test_tool_calls_are_trained_as_the_template_writes_them_and_refused_elsewhere():
    turns = [
        user("a"),
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": 'x "y"', "tool_call_id": "abcdefghi"},
        assistant("b"),
    ]
    call = '{"name": "look", "arguments": {"where": "a \\"b\\"\\n", "n": 3}}'
    assert targets(MISTRAL, turns, tools=TOOLS) == [f"[TOOL_CALLS]{call}</s>", "b</s>"]
    call = '<think>\n\n</think>\n\n<call>look {"where": "a \\"b\\"\\n", "n": 3}</call><|im_end|>\n'
    assert targets(QWEN3, turns[:2]) == [call], "a template that wants a content gets an empty one"
    learned = targets(QWEN3, turns)[0]
    assert learned == call.removeprefix("<think>\n\n</think>\n\n"), "the content is wanted of the last turn alone"
    ends = QWEN3.replace(
        "<|im_end|>\n' }}{%- endif %}{%- endfor %}",
        "<|im_end|>\n' }}{%- if loop.last and m.tool_calls %}"
        "{{ raise_exception('no answer') }}{%- endif %}{%- endif %}{%- endfor %}",
    )
    assert ends != QWEN3
    refused(ends, turns, "writes no conversation that ends with these tool calls")
    refused(CHATML, turns, "does not write the tool call of a turn of the assistant: 'look'")
    refused(CHATML, [user("a"), assistant("b")], r"does not write the tools \(look\)", tools=TOOLS)
    without_id = [*turns[:2], {"role": "tool", "content": "x"}]
    refused(MISTRAL, without_id, "(?s)refuses the conversation.*UndefinedError|an id has 9 letters")


def test_answers_of_tools_are_told_by_their_order_or_their_ids():
    calls = [{"id": one, "function": {"name": name}} for one, name in (("a", "f"), ("b", "g"))]
    first, second = (
        {"role": "tool", "content": "1", "tool_call_id": one, "name": name} for one, name in (("a", "f"), ("b", "g"))
    )
    turns = [user("a"), {"role": "assistant", "tool_calls": calls}]
    source = QWEN3.replace("m.role == 'user'", "m.role == 'user' or m.role == 'tool'")
    assert len(targets(source, [*turns, first, second, assistant("b")])) == 2
    refused(source, [*turns, second, first, assistant("b")], "does not write the tool_call_id")
    refused(source, [*turns, {**first, "name": "h"}, second, assistant("b")], "does not write the name.*'h'")


@pytest.mark.parametrize(
    ("source", "messages", "message"),
    [
        (CHATML, [user("a", name="Tim"), assistant("b")], "does not write the name of a turn of the user: 'Tim'"),
        (
            "{% for m in messages if m.role != 'system' %}{{ m.role }}{{ m.content }};{% endfor %}",
            [{"role": "system", "content": "S"}, user("a"), assistant("b")],
            "does not write the content of a turn of the system: 'S'",
        ),
        ("{% for m in messages %}{{ m.other | tojson }}{% endfor %}", [user("a")], "TypeError: Object of type Undef"),
        ("{% for m in messages %}{{ m.a.b }}{% endfor %}", [user("a")], "UndefinedError"),
        ("{{ messages.__class__.mro() }}", [user("a")], "SecurityError"),
        ("{{ raise_exception('no') }}", [user("a")], "user: a.*TemplateError: no"),
        (CHATML.replace("m['content']", "m['content'][:3]"), PAIR, "does not write the content"),
        (CHATML.replace("m['content']", "m['content'][:99]"), [user("x" * 100), assistant("b")], "changes the texts"),
        (CHATML.replace("m['content']", "m['content'] | replace('a', 'y')"), PAIR, "changes the texts"),
        (CHATML.replace("<|im_end|>\n{% endfor", "{{ loop.revindex }}\n{% endfor"), PAIR, "after an answer at the end"),
        (MARKED.replace("== 'assistant'", "!= 'system'"), PAIR, "marks a turn of the user"),
        (MARKED.replace("== 'assistant'", "== 'x'"), PAIR, "leaves the content of an answer without"),
    ],
)  # fmt: skip
def test_a_conversation_that_a_template_does_not_write_whole_is_refused(source, messages, message):
    refused(source, messages, message)


def test_a_template_for_parts_gets_parts():
    source = (
        "{% for m in messages %}<{{ m.role }}>{% for part in m['content'] %}{{ part['text'] }}{% endfor %}|{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert targets(source, [user("a"), assistant("b"), user("c"), assistant("d")]) == ["b|", "d|"]


def test_what_ends_the_whole_conversation_is_trained_with_the_last_answer():
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>"
        "{{ '</s>' if loop.last }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    turns = [user("a"), assistant("b"), user("c"), assistant("d")]
    for tokenizer in ("bpe", "bytes"):
        assert targets(source, turns, TOKENIZERS[tokenizer]) == ["b<|im_end|>", "d<|im_end|></s>"]
    source = source.replace("<|im_end|>", "{{ '' if loop.last else '<|im_end|>' }}")
    assert targets(source, turns, TOKENIZERS["bpe"]) == ["b<|im_end|>", "d</s>"]


def test_a_prompt_that_is_always_written_is_no_answer():
    turns = [user("a"), assistant("b"), user("c"), assistant("d")]
    source = CHATML_WITHOUT_PROMPT.split("{% endif %}", 1)[1] + "<|im_start|>assistant\n"
    assert targets(source, turns) == ["b<|im_end|>\n", "d<|im_end|>\n"]


def test_marks_without_the_end_are_told():
    source = MARKED.replace("+ '<|im_end|>\n' }}{%- endgeneration %}", "}}{%- endgeneration %}{{ '<|im_end|>\n' }}")
    made = encoder(source)
    assert targets(source, [user("a"), assistant("b")]) == ["b"]
    assert made.notes == ["the chat template's marks leave out what ends an answer (<|im_end|>): it is not trained"]
    assert encoder(MARKED).notes == encoder(CHATML).notes == []


def test_an_end_that_the_template_does_not_write_is_told():
    made = encoder("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    assert made.notes == ["the chat template writes nothing behind the last answer: its end is not trained"]


def test_an_end_that_looks_like_what_stands_before_a_turn_is_not_guessed():
    source = (
        "<|head|>S<|im_end|>{% for m in messages %}<|head|>{{ m.role }}<|im_start|>{{ m.content }}"
        "{{ '<|eot|>' if loop.last and m.role == 'assistant' else '<|im_end|>' }}{% endfor %}"
    )
    pair = [user("a"), assistant("b")]
    assert targets(source, pair, TOKENIZERS["bpe"]) == ["b<|eot|>"]
    with pytest.raises(DataError, match=r"(?s)between turns.*generation"):
        targets(source, [*pair, *pair], TOKENIZERS["bpe"])


def test_a_template_that_refuses_conversations_without_a_user_is_served():
    source = "{% if 'user' not in messages | map(attribute='role') %}{{ raise_exception('no user') }}{% endif %}"
    turns = [assistant("a"), user("b"), assistant("c")]
    assert targets(source + CHATML_WITHOUT_PROMPT, turns) == ["a<|im_end|>\n", "c<|im_end|>\n"]


def test_the_clock_of_a_template_stands_still(tmp_path):
    source = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %} " + CHATML
    made = encoder(source)
    (ids,) = made.sequences(chats([user("a"), assistant("b")]))["input_ids"]
    assert made.tokenizer.decode(ids).startswith("03 Feb 2026 <|im_start|>")
    other = Encoder(made.tokenizer, max_length=5000, conversations=True, date=DAYS[1])
    assert other.fingerprint != made.fingerprint
    plain = encoder(CHATML).tokenizer
    assert len({Encoder(plain, max_length=9, conversations=True, date=day).fingerprint for day in DAYS}) == 1
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": [user("a"), assistant("b")]}] * 3)
    made.tokenizer.chat_template = source
    for day, text in (("2026-02-03", "03 Feb 2026"), ("2025-12-24", "24 Dec 2025")):
        loaded = load_client_data(make_config(train=[path], format="messages", date=day), made.tokenizer, 0)
        assert made.tokenizer.decode(loaded.train[0]["input_ids"]).startswith(text), "no cache of another day"


@pytest.mark.parametrize(
    "source",
    [
        "{{ [1, 2] | random }}",
        "{{ lipsum() }}",
        "{% set f = '%d' %}{{ strftime_now(f) }}",
        "{% set f = strftime_now %}{{ f('%d') }}",
    ],
)
def test_chance_in_a_template_is_refused(source):
    with pytest.raises(DataError, match="no two runs would train on the same text"):
        encoder(source + CHATML)


def test_a_malformed_template_is_refused_and_of_several_the_one_for_tools_is_taken():
    with pytest.raises(DataError, match=r"(?s)malformed.*chat_template, line 2"):
        encoder("\n{% for m in messages %}")
    tools = MISTRAL.replace("{% if tools %}", "{% if tools %}T:")
    made = encoder({"default": MISTRAL, "tool_use": tools})
    batch = made.sequences(chats([user("a"), assistant("b")], tools=TOOLS))
    assert "T:[AVAILABLE" in made.tokenizer.decode(batch["input_ids"][0])
    with pytest.raises(DataError, match="multiple chat templates"):
        encoder({"one": MISTRAL, "two": MISTRAL})


def test_tokens_that_do_not_decode_to_the_answer_are_refused():
    spanning = Spanning(TOKENIZERS["bytes"])
    spanning._fast = lambda texts, spans: [([10, 11, 12], [(1, 2)], ["answer"])]
    with pytest.raises(DataError, match=r"(?s)the tokens that would be trained.*'answer'.*file, line 9"):
        spanning.encode(["an answer"], [[(3, 9)]], ["file, line 9"])


def test_answers_of_pairs_are_checked_too():
    tokenizer = TOKENIZERS["bpe"]
    made = Encoder(tokenizer, max_length=99)
    batch = made.sequences({"prompt": ["Who is Sue?", "x:\n"], "answer": [" My dog", "\n a "], "place": ["", ""]})
    assert targets_of(tokenizer, batch) == [[" My dog</s>"], ["\n\n a </s>"]], "one token holds both line ends"
