"""Many architectures over one and two ranks: what is loaded, trained and exported is what plain transformers has."""

import json
import os
import shutil
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from jobs import launch, whole_lines
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, make, rows
from transformers import AutoModelForCausalLM

from deca_ds.checkpoint.export import export_model

# DECA_TEST_ARCHITECTURES=all tries all of tiny_models.py, for a new version of transformers or DeepSpeed
EVERYWHERE = (
    "llama, tied, biased", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "gptj", "gpt_neox", "opt", "bloom", "cohere",
    "granite", "mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3", "zamba2", "falcon_h1", "lfm2_moe", "qwen3_next",
)  # fmt: skip
NAMES = tuple(CONFIGS) if os.environ.get("DECA_TEST_ARCHITECTURES") == "all" else EVERYWHERE
# over one rank, where nothing is divided: what differs by more than a layer's details
ONE_RANK = (
    "llama, tied, biased", "gemma3", "gpt2", "mixtral", "gpt_oss", "zamba2", "llama, tied, biased, bfloat16",
    "mixtral, auxiliary loss", "tied in the config alone", "tied, with the head alone", "pickled, without a prefix",
    "experts in a list",
)  # fmt: skip
REFUSED = {"rwkv": "cannot be built on ZeRO-3 shards"}
TOWERS = ("model.vision_tower.", "model.multi_modal_projector.")  # gemma3's, which text does not train
ROUTERS = ("mixtral", "gpt_oss", "qwen2_moe")  # once more, with the routers' auxiliary loss
HALF = ("llama, tied, biased", "deepseek_v3", "lfm2_moe")  # once more, in bfloat16
RANDOM = ("gpt2", "gpt_neox", "mixtral", "qwen3")  # once more, with random weights
REMOTE = ["model.trust_remote_code=true"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, tuple[Path, list[str]]]:
    """By what they are: model folders, and options of the run."""
    base = tmp_path_factory.mktemp("models")
    made = {name: (base / name.replace(", ", "-"), []) for name in NAMES}
    for name, (folder, _) in made.items():
        make(folder, CONFIGS[name]())
    made |= {f"{name}, bfloat16": (_copy(made[name][0], "-half"), ["model.dtype=bfloat16"]) for name in HALF}
    for name in ROUTERS:
        folder = _copy(made[name][0], "-router")
        _edit(folder / "config.json", output_router_logits=True, router_aux_loss_coef=0.3)
        made[f"{name}, auxiliary loss"] = folder, []

    untied = _copy(made["llama, tied, biased"][0], "-untied")
    weights = load_file(untied / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(weights, untied / "model.safetensors", metadata={"format": "pt"})
    made["tied in the config alone"] = untied, []
    head = _copy(made["llama, tied, biased"][0], "-head")
    del weights["model.embed_tokens.weight"]
    save_file(weights, head / "model.safetensors", metadata={"format": "pt"})
    made["tied, with the head alone"] = head, []
    pickled = _copy(made["gpt2"][0], "-pickled")
    weights = load_file(pickled / "model.safetensors")
    (pickled / "model.safetensors").unlink()
    torch.save({k.removeprefix("transformer."): v for k, v in weights.items()}, pickled / "pytorch_model.bin")
    made["pickled, without a prefix"] = pickled, []
    made["experts in a list"] = _list_experts(base / "list"), REMOTE
    return made


@pytest.fixture(scope="module")
def plain(folders):
    """By what they are: the model as plain transformers loads it."""
    return {name: _plain(folder, options) for name, (folder, options) in folders.items()}


@pytest.mark.multiprocess
@pytest.mark.parametrize("ranks", [1, 2])
def test_losses_gradients_and_export_are_those_of_plain_transformers(tmp_path, folders, plain, ranks):
    if ranks == 1 and NAMES == EVERYWHERE:
        folders = {name: folders[name] for name in ONE_RANK}
    wanted = json.dumps(
        [
            {"folder": str(folder), "options": options, "random": name in RANDOM}
            for name, (folder, options) in folders.items()
        ]
    )
    launcher = "hand" if ranks > 1 else "python"
    found = tmp_path / "found.jsonl"
    finished = launch(launcher, ranks, [wanted], script="tests/engine/loading_worker.py", FOUND=str(found))
    assert finished.code == 0, finished.output[-4000:]
    for (name, (folder, options)), got in zip(folders.items(), whole_lines(found), strict=True):
        if "refused" in got:
            assert name in REFUSED and REFUSED[name] in got["refused"], (name, got["refused"])
            continue
        model, half = plain[name], "bfloat16" in name
        tolerance = 2e-3 if half else 1e-5  # ZeRO-3's linear layers round before they add a bias
        with torch.no_grad():
            logits = model.eval()(**_inputs(rows())).logits
        assert got["score"] == pytest.approx(_cross_entropy(logits, rows()["labels"]), rel=tolerance), name
        parameters = dict(model.named_parameters())
        names = [n for block in got["blocks"] for n in block["names"]]
        assert sorted([*names, *got["frozen"]]) == sorted(parameters), name
        assert all(n.startswith(TOWERS) for n in got["frozen"]), name
        trained = deepcopy(model).train()
        for place, block in enumerate(got["blocks"]):
            if half and place:  # bfloat16 rounds most of a step away, and differently
                break
            loss, norm = _descend(trained, block["names"], ranks)
            assert block["loss"] == pytest.approx(loss, rel=tolerance), (name, block["names"][0])
            assert block["norm"] == pytest.approx(norm, rel=0.1 if half else 1e-3, abs=1e-6), (name, place)

        exported = tmp_path / folder.name
        if options == REMOTE:
            shutil.copy(Path(__file__).with_name("list_experts.py"), folder / f"run-{ranks}" / "hf")
        export_model(folder / f"run-{ranks}", exported, trust_remote_code=options == REMOTE)
        with torch.no_grad():
            again = _plain(exported, options)(**_inputs(rows())).logits
        assert torch.equal(again, logits), name


def test_the_ranks_of_the_experts_in_a_list_run_others(plain):
    """What the test above is about: no rank runs what the other one runs."""
    ran = []
    for rank in (0, 1):
        model, here = plain["experts in a list"], set()
        hooks = [
            module.register_forward_hook(lambda *_, name=name, here=here: here.add(name))
            for name, module in model.named_modules()
            if name.rpartition(".")[0].endswith("experts")
        ]
        model(**_inputs(rows(rank, 2)))
        for hook in hooks:
            hook.remove()
        ran.append(here)
    assert ran[0] - ran[1] and ran[1] - ran[0]


def _plain(folder: Path, options: list[str]):
    dtype = torch.bfloat16 if "model.dtype=bfloat16" in options else torch.float32
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=options == REMOTE).eval()


def _inputs(batch: dict) -> dict:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return float(
        torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
        )
    )


def _descend(model, names: list[str], ranks: int) -> tuple[float, float]:
    """A step down the gradient for some parameters. Returns the loss, which is transformers' own of each rank's
    micro-batch, weighted by its targets, and the gradient's norm."""
    model.zero_grad()
    parts = [rows(rank, ranks) for rank in range(ranks)]
    targets = [int((part["labels"][:, 1:] != -100).sum()) for part in parts]
    losses = [model(**part, use_cache=False).loss for part in parts]
    loss = sum(loss * count / sum(targets) for loss, count in zip(losses, targets, strict=True))
    loss.backward()
    chosen = [parameter for name, parameter in model.named_parameters() if name in names]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in chosen]
    with torch.no_grad():
        for parameter, gradient in zip(chosen, gradients, strict=True):
            parameter.sub_(gradient, alpha=0.01)
    return float(loss.detach()), sum(float(g.double().square().sum()) for g in gradients) ** 0.5


def _copy(folder: Path, ending: str) -> Path:
    return Path(shutil.copytree(folder, folder.with_name(folder.name + ending)))


def _edit(path: Path, **keys) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def _list_experts(folder: Path) -> Path:
    from list_experts import ListExpertsConfig, ListExpertsForCausalLM

    torch.manual_seed(0)
    options = dict(vocab_size=64, hidden_size=16, intermediate_size=8, num_attention_heads=4, num_hidden_layers=2)
    ListExpertsForCausalLM(ListExpertsConfig(**options, initializer_range=0.5)).save_pretrained(folder)
    shutil.copy(Path(__file__).with_name("list_experts.py"), folder)
    code = {
        "AutoConfig": "list_experts.ListExpertsConfig",
        "AutoModelForCausalLM": "list_experts.ListExpertsForCausalLM",
    }
    _edit(folder / "config.json", auto_map=code)
    return folder
