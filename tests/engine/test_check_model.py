"""What is refused, or warned of, before a model is loaded."""

import json
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from list_experts import ListExpertsConfig, ListExpertsForCausalLM
from tiny_models import CONFIGS
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, LlamaConfig, LlamaForCausalLM
from words import make_tokenizer

from deca_ds.config import load_config
from deca_ds.config.schema import ModelConfig
from deca_ds.data.encoding import SEQUENCES
from deca_ds.engine.architecture import expert_lists, load_architecture
from deca_ds.engine.causality import check_causal
from deca_ds.engine.check_model import check_model, check_token_ids
from deca_ds.engine.losses import check_own_loss, count_targets, excerpt, training_loss
from deca_ds.errors import DataError, ModelError


def check(folder, **keys):
    config = load_config(None, [f"model.path={folder}", *(f"{key}={value}" for key, value in keys.items())])
    return check_model(config, load_architecture(config.model), AutoTokenizer.from_pretrained(folder), weights=False)


@pytest.fixture
def make(tmp_path):
    """make(config, **changes of config.json) -> a folder without weights, its tokenizer of 49 tokens."""

    def folder(config, **changes):
        config.save_pretrained(tmp_path)
        path = tmp_path / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        make_tokenizer(tmp_path)
        return tmp_path

    return folder


@pytest.mark.parametrize("name", ["gpt2", "gpt_neo", "gptj", "gpt_bigcode", "codegen", "opt", "biogpt", "mpt"])
def test_sequences_beyond_absolute_positions_are_refused(make, name):
    folder = make(CONFIGS[name]())
    assert check(folder, **{"data.max_length": 64}) == []
    with pytest.raises(ModelError, match=r"max_length = 65, and the model has 64 positions[\s\S]*at most 64"):
        check(folder, **{"data.max_length": 65})


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox", "falcon", "xglm", "dbrx"])
def test_sequences_beyond_rotary_positions_are_warned_of(make, name):
    folder = make(CONFIGS[name]())
    assert check(folder, **{"data.max_length": 64}) == []
    (warning,) = check(folder, **{"data.max_length": 65})
    assert "65" in warning and "64 positions" in warning


@pytest.mark.parametrize("name", ["bloom", "mamba", "recurrent_gemma"])
def test_models_without_positions_take_any_length(make, name):
    assert check(make(CONFIGS[name]()), **{"data.max_length": 5000}) == []


SHORT = {"data.max_length": 8}


def test_attention_that_there_is_not_is_told_by_its_key(make):
    folder = make(CONFIGS["llama"]())
    assert (
        check(folder, **{"model.attention": "sdpa", **SHORT})
        == check(folder, **{"model.attention": "eager", **SHORT})
        == []
    )
    with pytest.raises(ModelError, match=r"(?s)model.attention = 'flash'.*flash_attention_2.*name another") as caught:
        check(folder, **{"model.attention": "flash"})
    assert caught.value.where == "model.attention"


def test_attention_without_its_package_is_warned_of_in_a_plan_and_refused_in_a_run(make, monkeypatch):
    """The plan may be made where no model is to run."""
    folder = make(CONFIGS["llama"]())
    monkeypatch.setattr(LlamaForCausalLM, "_flash_attn_can_dispatch", lack, raising=True)
    (warning,) = check(folder, **{"model.attention": "flash_attention_2", **SHORT})
    assert "on this host model.attention = 'flash_attention_2': no package" in warning
    config = load_config(None, [f"model.path={folder}", "model.attention=flash_attention_2"])
    with pytest.raises(ModelError, match=r"no package[\s\S]*install what it needs on every host"):
        check_model(config, load_architecture(config.model), AutoTokenizer.from_pretrained(folder))


def lack(*_, **__):
    raise ImportError("no package")


def test_a_tokenizer_with_more_ids_than_the_embedding_has_rows_is_refused(make):
    options = dict(hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=1)
    folder = make(LlamaConfig(**options, vocab_size=48))
    with pytest.raises(ModelError, match=r"ids up to 48, .* 48 rows[\s\S]*resize_token_embeddings\(49\)"):
        check(folder)
    assert check(make(LlamaConfig(**options, vocab_size=49))) == []
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(folder)
    (warning,) = check(folder)  # nothing but the data can bring it in, and that is checked
    assert "ids up to 49" in warning and "<image> must not be in the data" in warning
    tokenizer.pad_token = "<image>"
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match="ids up to 49"):
        check(folder)


def test_special_tokens_that_no_file_names_are_warned_of(make):
    folder = make(CONFIGS["llama"]())
    path = folder / "tokenizer_config.json"
    named = json.loads(path.read_text())
    path.write_text(json.dumps({**named, "eos_token": None}))
    (warning,) = check(folder, **SHORT)
    assert "no end-of-text token" in warning and "does not learn to end its answers" in warning
    assert check(folder, **{"data.format": "messages", **SHORT}) == [], "the template ends them"
    path.unlink()
    config = load_config(None, [f"model.path={folder}", "data.max_length=8"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = "</s>"  # as classes have one by themselves: Qwen2's is not that of its chat models
    (warning,) = check_model(config, load_architecture(config.model), tokenizer, weights=False)
    assert "no tokenizer_config.json" in warning and "end of text: </s>), and there is no chat template" in warning


def test_data_with_a_token_that_the_model_lacks_is_refused():
    def sequences(*ids):
        rows = {"input_ids": [[1, 2], list(ids)], "labels": [[1, 2], list(ids)]}
        return Dataset.from_dict(rows | {"targets": [1, 1], "length": [2, 2]}, features=SEQUENCES)

    architecture = LlamaConfig(vocab_size=50)
    check_token_ids(architecture, sequences(49, 3), None)
    with pytest.raises(DataError, match=r"token id 50, .* 50 tokens"):
        check_token_ids(architecture, sequences(49), None, sequences(2, 50, 3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantised \(gptq\)"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, r"quantised \(mxfp4\)"),
        ({"layerdrop": 0.1}, r"layerdrop = 0\.1[\s\S]*set layerdrop to 0"),
    ],
)
def test_models_that_cannot_be_trained_whole_are_refused(make, changes, message):
    with pytest.raises(ModelError, match=message):
        check(make(CONFIGS["opt"](), **changes))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_outputs_that_config_json_asks_for_are_not_computed(make, name):
    outputs = {"return_dict": False, "output_attentions": True, "output_hidden_states": True}
    architecture = load_architecture(ModelConfig(path=str(make(CONFIGS[name](), **outputs))))
    architecture.save_pretrained(make(LlamaConfig()))  # refuses attentions beside some implementations of attention
    made = AutoModelForCausalLM.from_config(architecture)(torch.tensor([[1, 2, 3]]))
    assert made.logits.shape == (1, 3, 64) and made.attentions is made.hidden_states is None


def test_experts_in_lists_are_found_and_nothing_outside_layers():
    def found(model):
        names = {id(module): name for name, module in model.named_modules()}
        return [names[id(module)] for module in expert_lists(model)]

    options = dict(hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=2, vocab_size=20)
    assert found(ListExpertsForCausalLM(ListExpertsConfig(**options))) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    for name in ("llama", "mixtral", "gemma3", "gemma3n_text"):
        assert found(AutoModelForCausalLM.from_config(CONFIGS[name]())) == [], name


def test_a_model_with_another_loss_is_refused():
    torch.manual_seed(0)
    options = dict(hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=1, vocab_size=20)
    model = LlamaForCausalLM(LlamaConfig(**options, initializer_range=0.5))
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    cpu = torch.device("cpu")
    check_own_loss(model, batch, cpu)
    model.loss_function = lambda logits, labels, **_: torch.nn.functional.cross_entropy(logits[0], labels[0])
    with pytest.raises(ModelError, match="LlamaForCausalLM computes the loss"):
        check_own_loss(model, batch, cpu)
    forward = model.forward
    model.forward = lambda input_ids, attention_mask, use_cache: forward(input_ids, attention_mask)
    check_own_loss(model, batch, cpu)  # takes no labels: it has no loss


@pytest.mark.parametrize(
    ("targets", "first"), [([1], 0), ([7], 0), ([8], 1), ([19], 12), ([15, 9], 2), ([], 0)], ids=str
)
def test_of_a_long_row_a_part_with_a_target_is_tried(targets, first):
    ids = torch.arange(100, 120).repeat(2, 1)
    labels = torch.full_like(ids, -100)
    labels[:, 0] = 100  # never predicted
    labels[1, targets] = ids[1, targets]
    of_rows = torch.tensor([3, -1])
    part = excerpt({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids), "row": of_rows}, 8)
    assert part["input_ids"].tolist() == [list(range(100 + first, 108 + first))] * 2
    assert part["attention_mask"].shape == part["labels"].shape == (2, 8) and part["row"] is of_rows
    assert count_targets(part) > 0 or not targets
    assert excerpt(part, 100).keys() == part.keys() and torch.equal(excerpt(part, 100)["labels"], part["labels"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_sees_the_tokens_that_it_is_to_predict_is_refused(dtype):
    options = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=20)

    def check_bert(**more):
        torch.manual_seed(0)
        config = BertConfig(**options, initializer_range=0.2, **more)
        check_causal(AutoModelForCausalLM.from_config(config, dtype=dtype).eval(), torch.arange(3, 15))

    check_bert(is_decoder=True)
    with pytest.raises(ModelError, match="BertLMHeadModel sees the tokens that it is to predict"):
        check_bert()


@pytest.mark.parametrize("name", ["mixtral", "mamba2", "recurrent_gemma", "bloom", "gemma3"])
def test_decoders_of_all_kinds_are_causal(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.bfloat16).eval()
    for length in (1, 2, 60):
        check_causal(model, torch.randint(4, 44, (length,)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": "2"}, "num_hidden_layers"),
        ({"num_attention_heads": 3}, "number of attention heads"),
        ({"num_attention_heads": 0}, "modulo by zero"),
        ({"head_dim": 0}, "negative power"),
        ({"vocab_size": -5}, "negative dimension"),
        ({"pad_token_id": 99999}, "Padding_idx"),
        ({"dtype": "float33"}, "float33"),
        ({"id2label": 5}, "int"),
        ({"quantization_config": "x"}, "to_dict"),
        ({"quantization_config": {}}, "quantised"),
    ],
)
def test_what_config_json_cannot_hold_is_one_message(make, changes, message):
    with pytest.raises(ModelError, match=message) as refused:
        check(make(LlamaConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1), **changes))
    assert refused.value.where.startswith(("model.path", "quantization_config"))


def test_an_auxiliary_loss_counts_by_the_share_of_the_targets_and_needs_a_weight():
    outputs = SimpleNamespace(logits=torch.zeros(1, 3, 4), aux_loss=torch.tensor(2.0))
    weight = dict(router_aux_loss_coef=0.5)
    config = SimpleNamespace(**weight, get_text_config=lambda: None)

    def model(**_):
        return outputs

    model.config = config
    batch = {name: torch.tensor([[1, 2, 3]]) for name in ("input_ids", "labels", "attention_mask")}
    loss = training_loss(model, batch, torch.device("cpu"), targets=8)
    assert float(loss) == pytest.approx((2 * torch.tensor(4.0).log() + 2 * 0.5 * 2.0) / 8)
    model.config = SimpleNamespace(get_text_config=lambda: None)
    with pytest.raises(ModelError, match="gives no weight"):
        training_loss(model, batch, torch.device("cpu"), targets=8)
