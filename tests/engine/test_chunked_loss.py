"""The loss by chunks of positions equals the loss of all logits, which are never there together."""

import dataclasses

import pytest
import torch
import transformers as hf
from tiny_models import CONFIGS, DENSE, WIDE, rows
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from deca_ds.engine import chunked_loss, losses
from deca_ds.engine.chunked_loss import positions_at_a_time
from deca_ds.engine.losses import check_own_loss, token_scores, training_loss
from deca_ds.engine.output_head import OutputHead, find_head
from deca_ds.errors import ModelError

CPU = torch.device("cpu")
POSITIONS, PIECE, TARGETS = 7, 3, 40  # of a chunk, of a piece of it; of all micro-batches
ROWS = rows()
HEADS = {
    "untied": CONFIGS["llama"],
    "tied": CONFIGS["qwen2"],
    "biased": CONFIGS["phi"],
    "softcapped, tied": lambda: hf.Gemma2Config(**WIDE, query_pre_attn_scalar=8, final_logit_softcapping=0.5),
    "divided": CONFIGS["granite"],
    "scaled": lambda: hf.CohereConfig(**DENSE, logit_scale=0.3),
    "a factor of the body's": lambda: hf.FalconH1Config(
        **WIDE, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=4, mamba_n_groups=1, mamba_chunk_size=8, mamba_d_ssm=32,
        lm_head_multiplier=0.3,
    ),
    "a body inside the body": CONFIGS["opt"],
    "a body with more outputs": lambda: hf.MixtralConfig(
        **DENSE, num_key_value_heads=2, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.5
    ),
    "a layer before the head": lambda: hf.ElectraConfig(
        **DENSE, embedding_size=8, is_decoder=True, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    ),
}  # fmt: skip


def build(make, dtype=torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make(), dtype=dtype)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # biases and norms are no constants
    return model


@pytest.fixture
def chunked(monkeypatch):
    """chunked(model): from here on, its logits are there for POSITIONS positions at a time; chunked(model, piece): what
    is made of them for `piece` positions at a time."""

    def switch(model, piece=PIECE):
        position = 4 * find_head(model).linear.out_features
        monkeypatch.setattr(chunked_loss, "LOGITS_BYTES", POSITIONS * position)
        monkeypatch.setattr(chunked_loss, "PIECE_BYTES", piece * position)

    return switch


def compute_whole(model, batch=ROWS):
    """The same as `compute`, with all logits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "find_head", lambda _: None)
        return compute(model, batch)


def compute(model, batch=ROWS):
    """Loss, gradients and how often each came, scores of tokens."""
    model.zero_grad()
    came: dict[str, int] = {}

    def note(name):
        return lambda _: came.update({name: came.get(name, 0) + 1})

    hooks = [
        p.register_post_accumulate_grad_hook(note(name)) for name, p in model.named_parameters() if p.requires_grad
    ]
    loss = training_loss(model, batch, CPU, TARGETS)
    loss.backward()
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        by_token = token_scores(model, batch, CPU)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, came, by_token


class Largest(TorchDispatchMode):
    """The most rows of a tensor with a column for each token that any operation makes, the head's weight left out.

    dtype: of the tensors that are looked at; None: any.
    """

    def __init__(self, head, dtype=None):
        super().__init__()
        self.size, self.hidden, self.dtype, self.rows = head.out_features, head.in_features, dtype, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.shape[-1:] == (self.size,)
                and tensor.shape != (self.hidden, self.size)
                and self.dtype in (None, tensor.dtype)
            ):
                self.rows = max(self.rows, tensor.numel() // self.size)
        return result


@pytest.mark.parametrize("name", HEADS)
def test_the_loss_equals_that_of_all_logits_in_training_and_evaluation(name, chunked):
    model = build(HEADS[name])
    loss, gradients, came, by_token = compute_whole(model)
    chunked(model)
    by_chunks, same_gradients, came_by_chunks, same = compute(model)
    assert came_by_chunks == came and set(came.values()) == {1}
    torch.testing.assert_close(by_chunks, loss, rtol=0, atol=1e-6)
    torch.testing.assert_close(same_gradients, gradients, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(same.losses, by_token.losses, rtol=0, atol=2e-6)
    assert torch.equal(same.right, by_token.right)
    assert torch.equal(same.losses.sum(dim=1), same.losses.contiguous().sum(dim=1)), "another order of summing"
    assert torch.equal(same.targets, by_token.targets)
    check_own_loss(model.eval(), ROWS, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", HEADS)
def test_the_size_of_a_piece_changes_no_bit(name, dtype, chunked):
    model = build(HEADS[name], dtype)
    chunked(model, POSITIONS)
    loss, gradients, _, by_token = compute(model)
    chunked(model)
    same_loss, same_gradients, _, same = compute(model)
    assert torch.equal(same_loss, loss)
    assert gradients and all(torch.equal(same_gradients[key], gradients[key]) for key in gradients)
    assert torch.equal(same.losses, by_token.losses) and torch.equal(same.right, by_token.right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("positions", [1, 5, 100, 2999])
def test_loss_and_gradient_of_a_chunk_have_the_bits_of_torchs_sum_over_it(positions, dtype):
    torch.manual_seed(positions)
    model = build(CONFIGS["llama"], dtype)
    head, divisor = find_head(model), 1009
    weight, targets = head.linear.weight.requires_grad_(False), torch.randint(head.linear.out_features, (positions,))
    hidden = torch.randn(1, positions, head.linear.in_features).to(dtype).requires_grad_()
    expected = nn.functional.linear(hidden[0], weight).requires_grad_()
    expected = nn.functional.cross_entropy(expected.float(), targets, reduction="sum") / divisor
    (gradient,) = torch.autograd.grad(expected, hidden)
    loss = chunked_loss.summed_loss(model, head, hidden, [(torch.arange(positions), targets)], PIECE, divisor)
    assert torch.equal(loss, expected.detach().view(1, 1, 1))
    assert torch.equal(torch.autograd.grad(loss, hidden)[0], gradient)


def test_what_is_made_of_logits_on_a_cpu_is_as_large_as_a_piece(chunked):
    model = build(CONFIGS["llama"], torch.bfloat16)
    head = model.get_output_embeddings()
    head.weight.requires_grad_(False)  # whose gradient is summed in float32
    chunked(model)
    with Largest(head, torch.float32) as losses_of, Largest(head) as any_type:
        compute(model)
    assert losses_of.rows == PIECE and any_type.rows == POSITIONS


@pytest.mark.parametrize(("vocabulary", "cpu", "gpu"), [(64, 524288, 524288), (32000, 1048, 1024), (256000, 131, 512)])
def test_a_gpus_chunk_is_made_of_parts_that_keep_it_computing(vocabulary, cpu, gpu):
    head = OutputHead(nn.Linear(1, vocabulary, device="meta"), {})
    assert (positions_at_a_time(head, False), positions_at_a_time(head, True)) == (cpu, gpu)


def test_no_operation_makes_logits_of_more_positions_than_wanted(chunked):
    model = build(lambda: hf.Gemma2Config(**WIDE, query_pre_attn_scalar=8, tie_word_embeddings=False))
    head = model.get_output_embeddings()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    with Largest(head) as whole:
        compute_whole(model)
    chunked(model)
    with Largest(head) as parts:
        compute(model)
    assert whole.rows >= ROWS["labels"].numel() - len(ROWS["labels"])
    assert parts.rows == POSITIONS


def test_positions_without_a_target_have_no_logits():
    model = build(CONFIGS["llama"])
    few = ROWS | {"labels": ROWS["labels"].clone()}
    few["labels"][:, :6] = -100
    targets = int((few["labels"][:, 1:] != -100).sum())
    with Largest(model.get_output_embeddings()) as largest:
        compute(model, few)
    assert largest.rows == targets


@pytest.mark.parametrize(
    ("make", "trained"),
    [
        (CONFIGS["llama"], "lm_head"),
        (CONFIGS["llama"], "model.layers.1"),
        (CONFIGS["qwen2"], "model.layers.1"),
        (CONFIGS["qwen2"], "model.embed_tokens"),  # the head, too
    ],
    ids=["head", "layer", "layer below a tied head", "tied head"],
)
def test_the_gradients_of_one_block_equal_those_of_all_logits(make, trained, chunked):
    model = build(make)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(trained))
    _, gradients, came, *_ = compute_whole(model)
    chunked(model)
    _, same_gradients, came_by_chunks, *_ = compute(model)
    assert came_by_chunks == came
    torch.testing.assert_close(same_gradients, gradients, rtol=1e-5, atol=1e-6)


def test_without_targets_the_loss_is_zero_and_with_nothing_to_train_it_has_no_gradient(chunked):
    model = build(CONFIGS["llama"])
    chunked(model)
    nothing = ROWS | {"labels": torch.full_like(ROWS["labels"], -100)}
    loss, gradients, _, by_token = compute(model, nothing)
    assert float(loss) == 0 and not any(each.any() for each in by_token)
    assert all(not gradient.any() for gradient in gradients.values())
    assert len(gradients) == len(list(model.parameters()))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert not training_loss(model, ROWS, CPU, TARGETS).requires_grad


def test_gradients_in_bfloat16_are_as_exact_as_those_of_all_logits(chunked):
    exact = compute_whole(build(CONFIGS["llama"], torch.bfloat16).float())[1]
    model = build(CONFIGS["llama"], torch.bfloat16)
    whole = compute_whole(model)[1]
    chunked(model)
    parts = compute(model)[1]

    def off(gradients, name):
        return float((gradients[name].float() - exact[name]).norm() / exact[name].norm())

    for name in exact:
        assert parts[name].dtype == torch.bfloat16
        assert off(parts, name) <= 1.2 * off(whole, name) + 2**-9, name


class Shifted(hf.LlamaForCausalLM):
    """The logits of a position depend on those of others."""

    def forward(self, **inputs):
        outputs = super().forward(**inputs)
        return dataclasses.replace(outputs, logits=outputs.logits - outputs.logits.mean(dim=1, keepdim=True))


class Copying(hf.LlamaForCausalLM):
    """Logits depend on the tokens."""

    def forward(self, input_ids, **inputs):
        outputs = super().forward(input_ids=input_ids, **inputs)
        bonus = nn.functional.one_hot(input_ids, self.config.vocab_size)
        return dataclasses.replace(outputs, logits=outputs.logits + bonus)


class InPlace(hf.LlamaForCausalLM):
    """Logits are scaled where they are: their gradient could not be taken."""

    def forward(self, **inputs):
        outputs = super().forward(**inputs)
        outputs.logits.mul_(2)
        return outputs


class LayerBehind(hf.LlamaForCausalLM):
    """The head is followed by another layer."""

    def __init__(self, config):
        super().__init__(config)
        self.last = nn.Linear(config.vocab_size, config.vocab_size)

    def forward(self, **inputs):
        outputs = super().forward(**inputs)
        return dataclasses.replace(outputs, logits=self.last(outputs.logits))


class OwnScale(hf.LlamaForCausalLM):
    """A parameter beside the head."""

    def __init__(self, config):
        super().__init__(config)
        self.scale = nn.Parameter(torch.ones(1))


class Unlike(hf.LlamaForCausalLM):
    """Its logits depend on the number of rows, of which a probe of the head has one."""

    def forward(self, input_ids, **inputs):
        outputs = super().forward(input_ids=input_ids, **inputs)
        return outputs if len(input_ids) == 1 else dataclasses.replace(outputs, logits=2 * outputs.logits)


@pytest.mark.parametrize("kind", [Shifted, Copying, InPlace, LayerBehind, OwnScale, "bert"])
def test_another_forward_keeps_all_logits(kind, monkeypatch):
    torch.manual_seed(0)
    if kind == "bert":  # layers between body and head are one module with it
        config = hf.BertConfig(**DENSE, is_decoder=True, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        model = AutoModelForCausalLM.from_config(config)
    else:
        model = kind(CONFIGS["llama"]())
    assert find_head(model) is None
    monkeypatch.setattr(chunked_loss, "LOGITS_BYTES", 4)
    loss, gradients, *_ = compute(model)
    with torch.no_grad():
        logits = model(input_ids=ROWS["input_ids"]).logits[:, :-1]
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), ROWS["labels"][:, 1:].flatten(), reduction="sum")
    assert float(loss) == pytest.approx(float(expected) / TARGETS, rel=1e-6)
    used = {name for name, parameter in model.named_parameters() if name not in ("scale",)}
    assert used <= gradients.keys()


def test_logits_that_turn_out_to_depend_on_more_are_refused():
    torch.manual_seed(0)
    model = Unlike(CONFIGS["llama"]()).eval()
    assert find_head(model) is not None
    with pytest.raises(ModelError, match=r"Unlike has the loss .* with the logits of each position by itself"):
        check_own_loss(model, ROWS, CPU)


def test_the_head_is_found_without_weights():
    from accelerate import init_empty_weights

    for name in ("llama", "gemma2", "cohere", "mixtral", "opt", "bloom", "mamba", "rwkv", "falcon_h1", "dbrx"):
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(CONFIGS[name]())
        model.tie_weights()
        assert find_head(model).linear is model.get_output_embeddings(), name
