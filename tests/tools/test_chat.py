"""`deca chat`: what several models say to the same prompts, over turns, with and without a chat template."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console

from deca_ds.cli import main
from deca_ds.errors import ModelError
from deca_ds.tools.chat.command import check_model, talk
from deca_ds.tools.chat.show import Below, Beside, screen
from deca_ds.tools.chat.speaker import Sampling, Speaker

CPU = torch.device("cpu")
TEMPLATE = "{% for m in messages %}{{ m.role[0] + ' ' + m.content + ' </s> ' }}{% endfor %}Label : "


@pytest.fixture(scope="module")
def chatty(tiny_model, tmp_path_factory):
    """The tiny model with a chat template, and with sampling that no greedy answer may follow."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("chat") / "chatty"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = TEMPLATE
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, "top_k": 3, "eos_token_id": [2, 40]}))
    return folder


def continued(folder, text, tokens):
    """What plain transformers makes of `text`, the likeliest tokens alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    for _ in range(tokens):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        if ids[0, -1] in (2, 40):
            break
    return tokenizer.decode(ids[0, len(tokenizer(text)["input_ids"]) :], skip_special_tokens=True)


def test_each_model_answers_the_prompt_in_its_own_template(tiny_model, chatty, capsys):
    command = ["chat", str(tiny_model), str(chatty), "--prompt", "w1 w2", "--max-new-tokens", "6"]
    assert main(command) == 0
    plain, templated = continued(tiny_model, "w1 w2", 6), continued(chatty, "u w1 w2 </s> Label : ", 6)
    assert plain != templated
    said = capsys.readouterr()
    assert said.out == f"{tiny_model}\n{plain}\n\n{chatty}\n{templated}\n" and "ERROR" not in said.err
    assert main([*command[:2], *command[3:]]) == 0
    assert capsys.readouterr().out == f"{plain}\n", "a single one is not named"


def test_what_was_not_trained_through_the_template_is_asked_without_it(chatty, monkeypatch, capsys):
    command = ["chat", str(chatty), "--plain", "--max-new-tokens", "6"]
    assert main([*command, "--prompt", "w1 w2"]) == 0
    plain = continued(chatty, "w1 w2", 6)
    assert capsys.readouterr().out == f"{plain}\n" and plain != continued(chatty, "u w1 w2 </s> Label : ", 6)
    monkeypatch.setattr("sys.stdin", io.StringIO("w1 w2\n"))
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines()[-1] == plain


def test_sampling_is_seeded(chatty, capsys):
    said = []
    for seed in ("1", "1", "2"):
        assert main(["chat", str(chatty), "--prompt", "w1", "--temperature", "3", "--seed", seed]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]


def test_turns_are_remembered_until_a_reset(tiny_model, chatty, monkeypatch):
    """Each model remembers its own answers. An interrupted turn, and one that one of them has no room for, are none."""
    speakers = [Speaker(str(folder), CPU) for folder in (tiny_model, chatty)]
    seen, encode = [], Speaker.encode

    def note(self, prompt):
        inputs = encode(self, prompt)
        seen.append(self._tokenizer.decode(inputs["input_ids"][0]))
        if prompt == "w9":
            raise KeyboardInterrupt
        return inputs

    monkeypatch.setattr(Speaker, "encode", note)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"w1\n\nw9\n{'w2 ' * 70}\nw3\n/reset\nw4\n"))
    shown = Console(file=io.StringIO(), width=80)
    talk(speakers, Sampling(0.0, 2), 0, shown)
    plain, templated = continued(tiny_model, "w1", 2), continued(chatty, "u w1 </s> Label : ", 2)
    assert seen[0] == "w1" and seen[1] == "<unk> w1 </s> Label :"
    assert seen[-4:] == [
        f"w1 {plain} w3",
        f"<unk> w1 </s> <unk> {templated} </s> <unk> w3 </s> Label :",
        "w4",
        "<unk> w4 </s> Label :",
    ]
    assert len(seen) == 2 + 1 + 1 + 4, "who is asked first ends a turn for all"
    assert f"{tiny_model} has no chat template" in shown.file.getvalue().replace("\n", "")


def test_an_answer_ends_where_the_positions_do(tiny_model):
    speaker = Speaker(str(tiny_model), CPU)
    speaker.answer("w1 " * 60, Sampling(0.0, 200), lambda text: None)
    with pytest.raises(ModelError, match="64 tokens, and the model positions for 64"):
        speaker.answer("w1 " * 64, Sampling(0.0, 200), lambda text: None)


def test_what_is_no_model_is_told(tmp_path, tiny_model, capsys):
    (tmp_path / "run" / "hf").mkdir(parents=True)
    (tmp_path / "run" / "hf" / "config.json").write_text("{}")
    (tmp_path / "file").touch()
    for name, words in {
        "run": "deca export .*run NEW_FOLDER",
        "file": "is a file",
        ".": "no config.json",
        "missing": "no folder",
    }.items():
        with pytest.raises(ModelError, match=words):
            check_model(str(tmp_path / name))
    assert main(["chat", str(tiny_model), str(tmp_path / "run"), "--prompt", "w1"]) == 2
    assert "is the folder of a run" in capsys.readouterr().err
    for wrong in (["--temperature", "-1"], ["--max-new-tokens", "0"], ["--seed", "-1"], ["--prompt", " "]):
        assert main(["chat", str(tiny_model), "--prompt", "w1", *wrong]) == 2
        assert wrong[0] in capsys.readouterr().err


def test_weights_that_are_not_there_are_told(tiny_model, tmp_path):
    from transformers import AutoTokenizer, LlamaConfig, LlamaModel

    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    LlamaModel(LlamaConfig.from_pretrained(tiny_model)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no weights for lm_head"):
        Speaker(str(tmp_path), CPU)


def test_answers_stand_side_by_side_where_the_terminal_is_wide_enough():
    def console(width, terminal):
        return Console(file=io.StringIO(), width=width, force_terminal=terminal, legacy_windows=False)

    names = ["base", "client 0", "mean"]
    assert isinstance(screen(console(120, True), names), Beside)
    assert isinstance(screen(console(80, True), names), Below)
    assert isinstance(screen(console(120, False), names), Below)
    wide = console(120, True)
    with screen(wide, names) as shown:
        for number in range(3):
            shown.begin(number)
            shown.say(f"this is [b]{number}[/b]")
    last = [line for line in wide.file.getvalue().splitlines() if "[b]2[/b]" in line][-1]
    assert [last.index(f"this is [b]{number}[/b]") // 40 for number in range(3)] == [0, 1, 2]
    narrow = console(20, True)
    with screen(narrow, names[:2]) as shown:
        shown.begin(0)
        for piece in ("words ", "that are ", "not ", "broken\nat ", "all"):
            shown.say(piece)
        shown.begin(1)
        shown.say("yes")
    text = narrow.file.getvalue()
    assert "words that are not \nbroken\nat all\n\n" in text and text.endswith("yes\n")
