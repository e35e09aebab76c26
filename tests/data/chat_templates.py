"""Chat templates in the manner of well-known models, and tokenizers of several kinds."""

from __future__ import annotations

from data_samples import make_byte_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|eot|>", "[INST]", "[/INST]", "<unk>"]
_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are kind.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}" + _PROMPT
)
CHATML_WITHOUT_PROMPT = CHATML.removesuffix(_PROMPT)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|head|>' + m['role'] + '<|/head|>\n\n' + m['content'] | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start>' + role + '\n' + m.content | trim + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% elif m.role == 'tool' %}"
    "{% if m.tool_call_id | length != 9 %}{{ raise_exception('an id has 9 letters') }}{% endif %}"
    "[TOOL_RESULTS]{{ {'content': m.content, 'call_id': m.tool_call_id} | tojson }}[/TOOL_RESULTS]"
    "{% elif m.tool_calls %}[TOOL_CALLS]{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}</s>"
    "{% elif m.role == 'assistant' %} {{ m.content }}</s>"
    "{% else %}{{ raise_exception('only user, assistant and tool') }}{% endif %}{% endfor %}"
)
MARKED = (
    "{% for m in messages %}\n{{ '<|im_start|>' + m['role'] }}\n"
    "{%- if m['role'] == 'assistant' %}\n{{ '\n' }}"
    "{%- generation -%}\n{{ m['content'] + '<|im_end|>\n' }}{%- endgeneration %}\n"
    "{%- else %}{{ '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}\n"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Like Qwen3: reasoning is written after the last user turn only, an empty one too, and taken out of contents.
QWEN3 = (
    "{%- set ns = namespace(last=0) %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{%- if m.role != 'assistant' %}"
    "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- else %}"
    "{%- set content = m.content %}{%- set reason = '' %}"
    "{%- if m.reasoning_content is string %}{%- set reason = m.reasoning_content %}"
    "{%- elif '</think>' in content %}"
    "{%- set reason = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{- '<|im_start|>assistant\n' }}"
    "{%- if loop.index0 > ns.last and (loop.last or reason) %}"
    "{{- '<think>\n' + reason.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{%- else %}{{- content }}{%- endif %}"
    "{%- for c in m.tool_calls or [] %}"
    "{{- '<call>' + c.function.name + ' ' + c.function.arguments | tojson + '</call>' }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
TEXTS = ["Hello, I am Tim. Who is Sue? My dog, my cat.\n\n", "system user assistant model\n", " a  b\n", ":) 1 2 3"] * 9


def make_bpe() -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges, whose post-processor trims offsets."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["</s>", *SPECIAL]
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", extra_special_tokens=SPECIAL)


def make_metaspace() -> PreTrainedTokenizerFast:
    """Like sentencepiece: a mark for a blank, one put in front of every text, bytes for what is unknown."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])
    special = ["</s>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", extra_special_tokens=SPECIAL)


def make_slow() -> PreTrainedTokenizerBase:
    """Bytes in plain Python: without offsets."""
    return ByT5Tokenizer(extra_special_tokens=SPECIAL)


MAKERS = {
    "bytes": lambda: make_byte_tokenizer(eos_token="</s>"),
    "bpe": make_bpe,
    "metaspace": make_metaspace,
    "slow": make_slow,
}
