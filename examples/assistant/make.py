"""Write what the two small recipes need: instructions and chats of a service desk, and a model folder.

`python examples/assistant/make.py [FOLDER]` writes data/instructions.jsonl, data/chats.jsonl and model/ into FOLDER
(beside this file when left out), the same bytes every time. The messages are the demo's; the answers are templates, so
that a very small model can learn them: an answer depends on the desk that a message is for, and on what is asked.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from deca_ds.data.formats.plain import ALPACA_WITH_INPUT

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "demo"))
from make_data import REQUESTS, make  # noqa: E402
from make_model import byte_level_bpe, four_layers  # noqa: E402

SEED = 33209
MESSAGES_PER_DESK = 45
VOCABULARY = 1000
POSITIONS = 160
SPECIAL = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# desk: its first question, who comes back to the customer, and when
DESKS = {
    "billing": ("Could you tell me the number of your invoice?", "an accountant", "within two days"),
    "booking": ("For how many people should it be?", "our front desk", "before noon"),
    "delivery": ("What is the number of your parcel?", "the courier", "by tomorrow evening"),
    "hardware": ("Which model do you have?", "a technician", "this afternoon"),
    "login": ("What is your user name?", "our account team", "in ten minutes"),
    "network": ("Since when has it been so?", "a network engineer", "within the hour"),
    "praise": ("May we show your words to the whole team?", "our manager", "next week"),
    "refund": ("When did you buy it?", "our returns team", "within five days"),
}


def instructions(rows: Iterable[dict[str, str]]) -> Iterator[dict[str, str]]:
    """Three tasks with each message."""
    for row in rows:
        desk = row["label"]
        question, who, when = DESKS[desk]
        for instruction, output in (
            ("Which desk should get this message?", f"The {desk} desk."),
            ("Ask the customer for what is missing.", question),
            ("Tell the customer who will answer.", f"Thank you. You will hear from {who} {when}."),
        ):
            yield {"instruction": instruction, "input": row["text"], "output": output, "desk": desk}


def chats(rows: Iterable[dict[str, str]]) -> Iterator[dict[str, Any]]:
    """Two turns, of which the second can only be answered from the first."""
    rng = random.Random(SEED)
    for row in rows:
        desk = row["label"]
        question, who, when = DESKS[desk]
        asked = rng.choice(("Who will answer me?", "And who takes care of it?", "When will I hear from you?"))
        turns = (row["text"], f"This is for our {desk} desk. {question}", asked, f"You will hear from {who} {when}.")
        roles = ("user", "assistant") * 2
        yield {"messages": [{"role": r, "content": c} for r, c in zip(roles, turns, strict=True)], "desk": desk}


def make_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the texts as the trainer prompts with them, and a chat template of two special tokens."""
    tokenizer = byte_level_bpe(texts, VOCABULARY, SPECIAL)
    pad, bos, eos, *_ = SPECIAL
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos, model_max_length=POSITIONS
    )
    made.chat_template = TEMPLATE
    return made


def main(folder: Path) -> None:
    """Write data and model into `folder`."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    assert DESKS.keys() == REQUESTS.keys()
    taken: set[str] = set()
    asked, told = (make(SEED + more, MESSAGES_PER_DESK, taken) for more in (0, 1))
    texts: list[str] = []
    for name, rows in (("instructions", [*instructions(asked)]), ("chats", [*chats(told)])):
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / "data" / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")
        texts += [text for row in rows for text in _texts_of(row)]
    tokenizer = make_tokenizer(texts)
    tokenizer.save_pretrained(folder / "model")
    four_layers(tokenizer, 96, 256, POSITIONS, spread=0.08).save_pretrained(folder / "model")  # 0.5 million parameters


def _texts_of(row: dict[str, Any]) -> list[str]:
    if "messages" in row:
        return [turn["content"] for turn in row["messages"]]
    return [ALPACA_WITH_INPUT.format(**row), row["output"]]


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
