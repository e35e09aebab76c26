"""Generation stops at what training taught the model to end with."""

import json

import pytest
from transformers import AutoTokenizer, GenerationConfig
from words import make_tokenizer

from deca_ds.checkpoint.export import export_model
from deca_ds.checkpoint.generation import adapt, turn_end

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
)
PARTS = (
    "{% for m in messages %}{{ m['role'] + ': ' }}{% for part in m['content'] if part is mapping %}"
    "{{ part['text'] }}{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
)
EOS = "{% for m in messages %}{{ m['content'] | trim + ' ' + eos_token }}{% endfor %}"
PLAIN = "{% for m in messages %}{{ m['content'] + '\n\n' }}{% endfor %}"
REFUSES = "{{ raise_exception('a system message first') }}"
SYSTEM = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('a system message first') }}{% endif %}" + CHATML
UNKNOWN = "{% for m in messages %}{{ m['content'] + ' END' }}{% endfor %}"  # an end that is no token
FAILS = "{{ 1 / 0 }}"
TEMPLATES = {
    CHATML: 50, PARTS: 50, EOS: 2, SYSTEM: 50, PLAIN: None, REFUSES: None, UNKNOWN: None, FAILS: None, None: None
}  # fmt: skip


@pytest.fixture
def tokenizer(tmp_path):
    """Words 0 to 48 with </s> = 2, <|im_start|> = 49 and <|im_end|> = 50."""
    make_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_token_that_ends_an_assistants_turn_is_read_from_the_template(tokenizer, template):
    tokenizer.chat_template = template
    assert turn_end(tokenizer) == TEMPLATES[template]


@pytest.mark.parametrize(
    ("own", "template", "stops"),
    [
        (2, CHATML, [2, 50]),
        ([2, 7], CHATML, [2, 7, 50]),
        (7, None, [7, 2]),  # the model's end of text is not the tokenizer's
        (None, None, 2),
        (2, EOS, 2),
        ([2], PLAIN, 2),
    ],
)
def test_every_end_stops_generation_and_is_told(tokenizer, own, template, stops):
    tokenizer.chat_template = template
    config = GenerationConfig(eos_token_id=own, bos_token_id=9, temperature=0.6)
    note = adapt(config, tokenizer)
    assert (config.eos_token_id, config.bos_token_id, config.pad_token_id) == (stops, 1, 0)
    assert config.temperature == 0.6
    if isinstance(stops, int):
        assert note is None
    else:
        assert all(f"({token})" in note for token in stops)
    assert adapt(config, tokenizer) == note  # a second time changes nothing


def test_the_export_has_both_ends(tmp_path, make_run, tokenizer):
    run, _ = make_run()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(run / "hf")
    own = json.loads((run / "hf" / "generation_config.json").read_text())["eos_token_id"]
    report = export_model(run, tmp_path / "out")
    exported = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert exported["eos_token_id"] == [*dict.fromkeys([own, 2, 50])]
    assert "<|im_end|> (50)" in report.stops
