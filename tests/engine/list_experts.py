"""Modelling code that comes with a model: experts in a list, of which a layer runs those that its tokens choose."""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP


class ListExpertsConfig(LlamaConfig):
    model_type = "list_experts"
    num_experts: int = 12


class Experts(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(LlamaMLP(config) for _ in range(config.num_experts))

    def forward(self, hidden):
        weights, chosen = self.gate(hidden).softmax(dim=-1).max(dim=-1)
        out = torch.zeros_like(hidden)
        for expert in chosen.unique().tolist():
            mine = chosen == expert
            out[mine] = self.experts[expert](hidden[mine]) * weights[mine].unsqueeze(-1)
        return out


class ListExpertsForCausalLM(LlamaForCausalLM):
    config_class = ListExpertsConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = Experts(config)
        self.post_init()
