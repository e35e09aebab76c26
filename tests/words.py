"""A tiny model whose tokenizer knows words, and data of such words."""

from __future__ import annotations

import json
import random
from pathlib import Path


def make_tokenizer(folder: Path) -> None:
    """A word-level tokenizer of the words below, as a Hugging Face folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(40)), "Label", ":", "red", "green", "blue"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def make_tiny_model(folder: Path) -> Path:
    """A random Llama of three layers with a word-level tokenizer, in a folder in `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    made = folder / "tiny-llama"
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=51,
            hidden_size=24,
            intermediate_size=29,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_hidden_layers=3,
            max_position_embeddings=64,
            initializer_range=0.2,
        )
    ).save_pretrained(made)
    make_tokenizer(made)
    return made


def make_word_files(folder: Path) -> list[Path]:
    """Three text files (JSON Lines) with different words each: one client's data each."""
    files = []
    for client in range(3):
        draw = random.Random(client)
        words = [f"w{i}" for i in range(client * 12, client * 12 + 16)]
        rows = [{"text": " ".join(draw.choices(words, k=draw.randint(6, 14)))} for _ in range(40)]
        path = folder / f"client{client}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files.append(path)
    return files
