"""Make the demo's model folder: a tokenizer trained on the demo's texts and the config.json of a very small Llama.

`python examples/demo/make_model.py [FOLDER]` writes both into FOLDER (model/ beside this file when left out), the same
bytes every time. There are no weights: the demo trains from random ones.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

HERE = Path(__file__).parent
VOCABULARY = 640
POSITIONS = 64
SPECIAL = ["<pad>", "<s>", "</s>"]


def training_texts() -> list[str]:
    """The training texts as the trainer prompts with them, answers included: so every label becomes one token."""
    lines = (HERE / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    return [f"{row['text']}\nLabel: {row['label']}" for row in map(json.loads, lines)]


def byte_level_bpe(texts: Iterable[str], vocabulary: int, special: list[str]) -> Tokenizer:
    """Byte-level BPE with so many tokens, the special ones among them and first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A text is started with <s>, the trainer ends its answer with </s>."""
    tokenizer = byte_level_bpe(training_texts(), VOCABULARY, SPECIAL)
    start = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", start)]
    )
    pad, bos, eos = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        model_max_length=POSITIONS,
        padding_side="right",
    )


def four_layers(
    tokenizer: PreTrainedTokenizerFast, hidden_size: int, intermediate_size: int, positions: int, spread: float
) -> LlamaConfig:
    """A Llama of four layers with tied embeddings. spread: standard deviation of its random weights."""
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        initializer_range=spread,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def main(folder: Path) -> None:
    """Write tokenizer and configuration into `folder`."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    four_layers(tokenizer, 64, 176, POSITIONS, spread=0.1).save_pretrained(folder)  # 0.23 million parameters


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "model")
