"""The model card of an export: what was done and how the model scores, without what only the clients should know.

It has numbers, choices among names that the package knows, and versions: no path, host, label, text or time. So the
same export has the same card, byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

from huggingface_hub import ModelCardData

from deca_ds.data.formats import FORMATS
from deca_ds.plural import several
from deca_ds.run_folder import DONE, SAVED_CONFIG
from deca_ds.tools.report.reading import read_runs
from deca_ds.tools.report.records import Run
from deca_ds.tools.report.summary import Row, length, rounds_of, score_rows
from deca_ds.tools.report.wording import count, percent, significant
from deca_ds.training.scores import MEAN_MODEL

_SOFTWARE = ("deca_ds", "deepspeed", "transformers", "torch")
_SETS = {"common": "the common evaluation set", "own": "held-out examples of the client"}
_POOLED = "held-out examples of all clients"


class Card:
    """Of the model that an export makes of the run in `folder`: of one client, or of the mean model (client None).

    missing: clients that the mean leaves out. base_model: name on the hub of the model that was trained, if it may be
    told. step: of the checkpoint that is exported, else the run's last. chat: whether the tokenizer has a chat
    template. A folder without the run's configuration gives a card without the training. Raises CheckpointError for a
    configuration that cannot be read.
    """

    def __init__(
        self,
        folder: Path,
        client: int | None = None,
        missing: Sequence[int] = (),
        base_model: str | None = None,
        step: int | None = None,
    ):
        self.run = read_runs([folder])[0] if (folder / SAVED_CONFIG).is_file() else None
        if self.run is not None and step is not None:
            self.run = _after(self.run, step)
        self.step = step
        self.client, self.missing, self.base_model = client, list(missing), base_model

    def text(self, *, parameters: int, dtype: str, chat: bool) -> str:
        """Write the content of README.md."""
        data = ModelCardData(
            base_model=self.base_model,
            library_name="transformers",
            pipeline_tag="text-generation",
            tags=["deca", "decentralized-training"],
        )
        parts = [f"---\n{data.to_yaml()}\n---", "# Model trained with deca_ds", self._about(parameters, dtype)]
        if self.run is not None:
            parts += [f"## Training\n\n{_table(('setting', 'value'), list(_settings(self.run, self.step)))}"]
            parts += [f"## Data\n\n{said}" for said in _data(self.run)]
            parts += [f"## Evaluation\n\n{said}" for said in self._scores(self.run)]
            parts += [f"## Software\n\n{said}" for said in _software(self.run)]
        return "\n\n".join([*parts, f"## How to load\n\n{self._how(chat)}"]) + "\n"

    def _how(self, chat: bool) -> str:
        trained = None if self.run is None else self.run.config.get("data.format")
        known = FORMATS.get(str(trained))
        if chat and (known is None or known.turns):
            return _CHAT
        why = f"The training, in the format `{trained}`, did not go through the chat template: prompt as it did."
        return f"{_COMPLETION}\n\n{why if chat else _WITHOUT_TEMPLATE}"

    def _about(self, parameters: int, dtype: str) -> str:
        which = "a causal language model" if self.base_model is None else f"`{self.base_model}`"
        said = f"This is {which} of {count(parameters)} parameters ({dtype}), "
        if self.run is None:
            return f"{said}trained with deca_ds."
        how = "trained from random weights" if self.run.config.get("model.init") == "random" else "fine-tuned"
        clients, gone = self.run.clients, len(self.missing)
        if clients == 1:
            said += f"{how} with deca_ds."
        else:
            said += f"{how} with deca_ds by {clients} clients, without a central server. Its weights are "
            if self.client is None:
                without = f", without {several(gone, 'client')} that left before the end" if gone else ""
                said += f"the mean of the models of {several(clients - gone, 'client')}{without}."
            else:
                said += f"those of client {self.client} of {clients}."
        if self.run.end is None or self.run.end[0] != DONE:
            said += " The run had not come to its end."
        return said

    def _scores(self, run: Run) -> Iterator[str]:
        client = 0 if run.clients == 1 else self.client
        model = MEAN_MODEL if client is None else f"client {client}"
        said = []
        for kind in run.kinds:
            for row in score_rows(run, kind):
                if row.model == model:
                    where = _POOLED if client is None and kind == "own" else _SETS[kind]
                    said.append(f"On {where}:\n\n{_score_table(row)}")
        if said:
            yield "\n\n".join(said)


def _after(run: Run, step: int) -> Run:
    """Return the run as it was after `step`, with the scores of the weights at that step, if there are any."""
    scored = {each.step for of in run.evaluations.values() for each in of}
    seen = {0, step} if step in scored else set()
    return replace(
        run,
        steps={client: [each for each in steps if each.step <= step] for client, steps in run.steps.items()},
        evaluations={client: [each for each in of if each.step in seen] for client, of in run.evaluations.items()},
        together=[each for each in run.together if each.step in seen],
        end=run.end if step == length(run) else None,
    )


def _settings(run: Run, step: int | None) -> Iterator[tuple[str, str]]:
    value = run.config.get
    yield "method", _method(run)
    yield "clients", str(run.clients)
    if run.clients > 1:
        graph = "a mixing matrix of the authors" if value("gossip.matrix") else str(value("gossip.graph"))
        yield "graph", graph.replace("_", " ")
        yield "averaging", f"every {several(int(value('gossip.every', 1)), 'inner step')}, {value('gossip.wire')}"
    blocks = len(run.starts[-1].blocks) if run.starts else 0
    if blocks:
        yield "parameters trained at a time", f"1 of {several(blocks, 'block')}" if blocks > 1 else "all of the block"
    yield "rounds, inner steps per block", f"{rounds_of(run)}, {value('algorithm.inner_steps')}"
    total, done = length(run), run.reached if step is None else step
    yield "inner steps", f"{count(done)} of {count(total)}" if total else count(done)
    yield "sequences per client and step", f"{value('data.batch_size')}, of at most {value('data.max_length')} tokens"
    yield "learning rate", f"{value('optimizer.lr')}, {value('optimizer.schedule')}"
    yield "weight decay", str(value("optimizer.weight_decay"))
    yield "seed", str(value("run.seed"))


def _method(run: Run) -> str:
    """Return the method in the words of the last start, with links to its papers; its name if no start is known."""
    start = run.starts[-1] if run.starts else None
    if start is None or not start.method:
        return f"`{run.config.get('algorithm.method')}`"
    links = [f"[arXiv {paper}](https://arxiv.org/abs/{paper})" for paper in start.papers]
    return ", ".join([start.method, *links])


def _data(run: Run) -> Iterator[str]:
    """Yield lines about the data: numbers alone, nothing private."""
    if not run.data:
        return
    examples = [share.examples for share in run.data]
    said = (
        f"{count(sum(examples))} training examples with {count(sum(share.train_tokens for share in run.data))} tokens, "
        f"in the format `{run.config.get('data.format')}`"
    )
    if len(examples) > 1:
        said += f"; a client had between {count(min(examples))} and {count(max(examples))}, which no other client saw"
    yield f"{said}. The data are not part of this repository."


def _software(run: Run) -> Iterator[str]:
    if run.starts:
        versions = run.starts[-1].software
        yield ", ".join(f"{name} {versions[name]}" for name in _SOFTWARE if name in versions)


def _score_table(row: Row) -> str:
    after = f"after {count(row.step)} inner steps"
    rows = [
        (name, show(None if row.base is None else pick(row.base)), show(pick(row.after)))
        for name, pick, show in _SCORES
        if pick(row.after) is not None
    ]
    return _table(("score", "before", after), rows)


_SCORES = (
    ("loss (nats per target token)", attrgetter("loss"), significant),
    ("token accuracy", attrgetter("token_accuracy"), percent),
    ("exact match", attrgetter("exact_match"), percent),
    ("accuracy", attrgetter("accuracy"), percent),
    ("macro-F1", attrgetter("macro_f1"), significant),
    ("examples", attrgetter("examples"), count),
)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


_LOAD = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or the name of this repository
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
"""
_CHAT = f"""{_LOAD}
messages = [{{"role": "user", "content": "..."}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0, inputs["input_ids"].shape[1] :]))
```"""
_COMPLETION = f"""{_LOAD}
inputs = tokenizer("...", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))
```"""
_WITHOUT_TEMPLATE = "The tokenizer has no chat template: the model completes a text."
