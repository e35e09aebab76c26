"""Make the base models of the `learnable` studies from public text: small Llamas with a tokenizer of their own.

    python examples/ablation/make_bases.py --data FOLDER --out bases

Reads the training files of AG News and SST-2 (FOLDER/ag_news, FOLDER/sst2), without their labels, and writes to --out:

    news.csv        the whole rows of AG News' training file: label, title, description
    sentiment.tsv   SST-2's training file
    small, medium   models of 1.3 and 5.8 million parameters that have read both, as Hugging Face folders

The same seed, libraries and processor give the same models. `small` took ten minutes on one thread of a busy machine.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY, PAD, END = 4096, "<pad>", "<eos>"
LABELS = ["World", "Sports", "Business", "Science", "negative", "positive"]  # a token each
SHAPES = {
    "small": {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4},
    "medium": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6},
}
LENGTH, ROWS, LR, WARMUP = 64, 32, 2e-3, 50


def news_rows(path: Path) -> list[list[str]]:
    """The file's rows of three columns; a last one that is cut off is left out."""
    text = path.read_text(encoding="utf-8", errors="ignore")
    return [row for row in csv.reader(text[: text.rindex("\n")].splitlines()) if len(row) == 3 and row[0] in "1234"]


def sentences(path: Path) -> list[str]:
    """The sentences of an SST-2 file, tab-separated with a header."""
    return [line.split("\t")[0] for line in path.read_text(encoding="utf-8").splitlines()[1:]]


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE learned from the texts; each label is one token, with and without a space before it."""
    learner = ByteLevelBPETokenizer()
    learner.train_from_iterator(
        texts, vocab_size=VOCABULARY - 2 * len(LABELS), special_tokens=[PAD, END], show_progress=False
    )
    learner.add_tokens([space + label for label in LABELS for space in ("", " ")])
    return PreTrainedTokenizerFast(tokenizer_object=learner._tokenizer, pad_token=PAD, eos_token=END)


def encode(texts: list[str], tokenizer: PreTrainedTokenizerFast, seed: int) -> Tensor:
    """All texts in a drawn order, each with its end, as one row of tokens."""
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    return torch.tensor([token for i in order for token in [*tokenizer(texts[i]).input_ids, tokenizer.eos_token_id]])


def make_model(tokenizer: PreTrainedTokenizerFast, **shape: int) -> LlamaForCausalLM:
    """A Llama of random weights. shape: a row of SHAPES."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            num_attention_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **shape,
        )
    )


def batches(tokens: Tensor, seed: int) -> Iterator[Tensor]:
    """[ROWS, LENGTH] of the text from random places, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(tokens) - LENGTH, (ROWS, 1), generator=generator)
        yield tokens[starts + torch.arange(LENGTH)]


def train(model: LlamaForCausalLM, tokens: Tensor, steps: int, seed: int) -> None:
    """AdamW on next tokens, with a cosine after the warm-up."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1 / WARMUP, total_iters=WARMUP),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - WARMUP), eta_min=LR / 10),
        ],
        milestones=[WARMUP],
    )
    started = time.perf_counter()
    for step, ids in zip(range(1, steps + 1), batches(tokens, seed), strict=False):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0 or step == steps:
            print(f"step {step} of {steps}: loss {loss:.3f}, {time.perf_counter() - started:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the base models of the learnable studies.")
    parser.add_argument("--data", type=Path, required=True, help="folder with ag_news/ and sst2/")
    parser.add_argument("--out", type=Path, default=Path("bases"))
    parser.add_argument("--only", choices=SHAPES, nargs="*", default=list(SHAPES), help="these models")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    news = news_rows(arguments.data / "ag_news" / "train_first_2560KiB.csv")
    with open(arguments.out / "news.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(news)
    sentiment = arguments.data / "sst2" / "train_first_12000.tsv"
    (arguments.out / "sentiment.tsv").write_bytes(sentiment.read_bytes())
    texts = [f"{title} {description}" for _, title, description in news] + sentences(sentiment)
    tokenizer = make_tokenizer(texts)
    tokens = encode(texts, tokenizer, arguments.seed)
    for name in arguments.only:
        torch.manual_seed(arguments.seed)
        model = make_model(tokenizer, **SHAPES[name])
        print(f"{name}: {model.num_parameters() / 1e6:.1f} M parameters, {len(tokens)} tokens of text", flush=True)
        train(model, tokens, arguments.steps, arguments.seed)
        model.save_pretrained(arguments.out / name)
        tokenizer.save_pretrained(arguments.out / name)


if __name__ == "__main__":
    main()
