"""Tiny models of many architectures with random weights, and a batch of rows for them."""

from collections.abc import Callable
from pathlib import Path

import torch
import transformers as hf
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

VOCABULARY = dict(vocab_size=64, max_position_embeddings=64, initializer_range=0.2)
DENSE = dict(VOCABULARY, hidden_size=16, intermediate_size=24, num_attention_heads=4, num_hidden_layers=2)
GROUPED = dict(DENSE, num_key_value_heads=2)
WIDE = dict(GROUPED, head_dim=8)  # heads wider than the hidden state
GPT = dict(vocab_size=64, n_embd=16, n_head=4, n_layer=2, n_positions=64, initializer_range=0.2)
DRY = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
NO_DROPOUT = dict(attention_dropout=0.0, dropout=0.0, activation_dropout=0.0)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
ROUTED = dict(n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=8)
GROUPS = dict(ROUTED, first_k_dense_replace=1, n_group=2, topk_group=1)
LATENT = dict(kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4)
DELTA = dict(
    linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
    layer_types=["linear_attention", "full_attention"],
)  # fmt: skip
MAMBA = dict(mamba_n_heads=4, mamba_d_head=8, mamba_d_state=4, mamba_n_groups=1, mamba_chunk_size=8)
GEMMA = dict(WIDE, query_pre_attn_scalar=8, sliding_window=8)
VISION = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)


def _without(options: dict, *names: str) -> dict:
    return {name: value for name, value in options.items() if name not in names}


CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    # dense
    "llama": lambda: hf.LlamaConfig(**GROUPED),
    "llama, tied, biased": lambda: hf.LlamaConfig(
        **GROUPED, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "qwen2": lambda: hf.Qwen2Config(**GROUPED, tie_word_embeddings=True),
    "qwen3": lambda: hf.Qwen3Config(**WIDE),
    "gemma": lambda: hf.GemmaConfig(**WIDE),
    "gemma2": lambda: hf.Gemma2Config(**GEMMA),  # softcapped
    "gemma3_text": lambda: hf.Gemma3TextConfig(**GEMMA),
    "gemma3": lambda: hf.Gemma3Config(  # a nested text config and a tower that text does not use
        text_config=GEMMA, vision_config=VISION, mm_tokens_per_image=1, image_token_index=63, boi_token_index=62,
        eoi_token_index=61,
    ),
    "gemma3n_text": lambda: hf.Gemma3nTextConfig(
        **WIDE, num_kv_shared_layers=0, laurel_rank=4, vocab_size_per_layer_input=64, hidden_size_per_layer_input=8,
        altup_num_inputs=2, sliding_window=8,
    ),
    "gemma4_text": lambda: hf.Gemma4TextConfig(
        **WIDE, sliding_window=8, vocab_size_per_layer_input=64, hidden_size_per_layer_input=8
    ),
    "mistral": lambda: hf.MistralConfig(**WIDE, sliding_window=8),
    "phi": lambda: hf.PhiConfig(**DENSE),
    "phi3": lambda: hf.Phi3Config(**GROUPED, pad_token_id=0),
    "gpt2": lambda: hf.GPT2Config(**GPT, **DRY),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**DENSE),
    "gptj": lambda: hf.GPTJConfig(**GPT, **DRY, rotary_dim=4),
    "gpt_neo": lambda: hf.GPTNeoConfig(
        **VOCABULARY, hidden_size=16, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        window_size=8,
    ),
    "gpt_bigcode": lambda: hf.GPTBigCodeConfig(**GPT, **DRY),
    "codegen": lambda: hf.CodeGenConfig(**{**GPT, **DRY, "n_embd": 32}, rotary_dim=4),
    "opt": lambda: hf.OPTConfig(
        vocab_size=64, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=16,
        max_position_embeddings=64, init_std=0.2, **NO_DROPOUT,
    ),
    "bloom": lambda: hf.BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=4, initializer_range=0.2),
    "falcon": lambda: hf.FalconConfig(**_without(DENSE, "intermediate_size"), alibi=False),
    "mpt": lambda: hf.MptConfig(vocab_size=64, d_model=16, n_heads=4, n_layers=2, max_seq_len=64),
    "xglm": lambda: hf.XGLMConfig(
        vocab_size=64, d_model=16, ffn_dim=24, num_layers=2, attention_heads=4, max_position_embeddings=64,
        init_std=0.2, **NO_DROPOUT,
    ),
    "biogpt": lambda: hf.BioGptConfig(
        **DENSE, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, activation_dropout=0.0
    ),
    "olmo": lambda: hf.OlmoConfig(**GROUPED),
    "olmo2": lambda: hf.Olmo2Config(**GROUPED),
    "olmo3": lambda: hf.Olmo3Config(**GROUPED, sliding_window=8),
    "cohere": lambda: hf.CohereConfig(**GROUPED),
    "cohere2": lambda: hf.Cohere2Config(**WIDE, sliding_window=8),
    "granite": lambda: hf.GraniteConfig(
        **GROUPED, logits_scaling=2.0, residual_multiplier=0.5, embedding_multiplier=3.0
    ),
    "starcoder2": lambda: hf.Starcoder2Config(**GROUPED, residual_dropout=0.0, embedding_dropout=0.0),
    "stablelm": lambda: hf.StableLmConfig(**GROUPED, use_qkv_bias=True),
    "persimmon": lambda: hf.PersimmonConfig(**DENSE),
    "nemotron": lambda: hf.NemotronConfig(**WIDE),
    "glm": lambda: hf.GlmConfig(**WIDE, pad_token_id=0),
    "glm4": lambda: hf.Glm4Config(**WIDE, pad_token_id=0),
    "smollm3": lambda: hf.SmolLM3Config(**GROUPED, pad_token_id=0, bos_token_id=1, eos_token_id=2),
    "ernie4_5": lambda: hf.Ernie4_5Config(**WIDE),
    "exaone4": lambda: hf.Exaone4Config(**GROUPED, sliding_window=8),
    "apertus": lambda: hf.ApertusConfig(**GROUPED),
    "diffllama": lambda: hf.DiffLlamaConfig(**GROUPED),
    "arcee": lambda: hf.ArceeConfig(**WIDE),
    "bitnet": lambda: hf.BitNetConfig(**GROUPED),
    "seed_oss": lambda: hf.SeedOssConfig(**WIDE, residual_dropout=0.0, attention_dropout=0.0),
    "nanochat": lambda: hf.NanoChatConfig(**GROUPED),
    # experts
    "mixtral": lambda: hf.MixtralConfig(**GROUPED, num_local_experts=4),
    "qwen2_moe": lambda: hf.Qwen2MoeConfig(**GROUPED, **EXPERTS, shared_expert_intermediate_size=8),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(**WIDE, **EXPERTS),
    "olmoe": lambda: hf.OlmoeConfig(**GROUPED, num_experts=4, num_experts_per_tok=2),
    "granitemoe": lambda: hf.GraniteMoeConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "phimoe": lambda: hf.PhimoeConfig(
        **GROUPED, num_local_experts=4, num_experts_per_tok=2, router_jitter_noise=0.0, input_jitter_noise=0.0
    ),
    "jetmoe": lambda: hf.JetMoeConfig(
        **VOCABULARY, hidden_size=16, num_hidden_layers=2, num_key_value_heads=2, kv_channels=8, intermediate_size=24,
        num_local_experts=4,
    ),
    "dbrx": lambda: hf.DbrxConfig(
        vocab_size=64, d_model=16, n_heads=4, n_layers=2, max_seq_len=64,
        attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=10000.0),
        ffn_config=dict(ffn_hidden_size=24, moe_num_experts=4, moe_top_k=2, hidden_size=16),
    ),
    "deepseek_v2": lambda: hf.DeepseekV2Config(
        **DENSE, **LATENT, **{**GROUPS, "n_group": 1}, num_key_value_heads=4
    ),
    "deepseek_v3": lambda: hf.DeepseekV3Config(**DENSE, **LATENT, **GROUPS, num_key_value_heads=4),
    "glm4_moe": lambda: hf.Glm4MoeConfig(**WIDE, **{**GROUPS, "n_group": 1}),
    "dots1": lambda: hf.Dots1Config(**WIDE, **{**GROUPS, "n_group": 1}),
    "gpt_oss": lambda: hf.GptOssConfig(**WIDE, num_local_experts=4, num_experts_per_tok=2, sliding_window=8),
    "ernie4_5_moe": lambda: hf.Ernie4_5_MoeConfig(
        **GROUPED, moe_num_experts=4, moe_k=2, moe_intermediate_size=8, moe_num_shared_experts=1,
        moe_layer_start_index=1,
    ),
    "llama4_text": lambda: hf.Llama4TextConfig(
        **WIDE, num_local_experts=2, intermediate_size_mlp=24, interleave_moe_layer_step=1
    ),
    "minimax": lambda: hf.MiniMaxConfig(**WIDE, num_local_experts=4, num_experts_per_tok=2, block_size=8),
    "minimax_m2": lambda: hf.MiniMaxM2Config(**WIDE, num_local_experts=4, num_experts_per_tok=2),
    "hunyuan_v1_moe": lambda: hf.HunYuanMoEV1Config(**WIDE, num_experts=4, moe_topk=2),
    "longcat_flash": lambda: hf.LongcatFlashConfig(
        **_without(DENSE, "intermediate_size"), **LATENT, num_layers=2, ffn_hidden_size=24, n_routed_experts=4,
        zero_expert_num=1, moe_topk=2, expert_ffn_hidden_size=8, head_dim=4,
    ),
    # state spaces, convolutions and mixtures of them with attention
    "mamba": lambda: hf.MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=2),
    "mamba2": lambda: hf.Mamba2Config(
        vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=2, num_heads=4, head_dim=8, n_groups=1,
        chunk_size=8,
    ),
    "falcon_mamba": lambda: hf.FalconMambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=2),
    "rwkv": lambda: hf.RwkvConfig(
        vocab_size=64, hidden_size=16, attention_hidden_size=16, num_hidden_layers=2, context_length=64
    ),
    "jamba": lambda: hf.JambaConfig(
        **{**GROUPED, "num_hidden_layers": 4}, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
        expert_layer_offset=1, num_experts=4, use_mamba_kernels=False, mamba_d_state=4, mamba_dt_rank=4,
    ),
    "zamba2": lambda: hf.Zamba2Config(
        **{**DENSE, "num_hidden_layers": 4}, layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        mamba_d_state=4, mamba_ngroups=1, n_mamba_heads=4, mamba_headdim=8, num_mem_blocks=1, adapter_rank=4,
        chunk_size=8, use_mem_eff_path=False,
    ),
    "bamba": lambda: hf.BambaConfig(**GROUPED, **MAMBA, attn_layer_indices=[1], pad_token_id=0),
    "falcon_h1": lambda: hf.FalconH1Config(**WIDE, **MAMBA, mamba_d_ssm=32),
    "granitemoehybrid": lambda: hf.GraniteMoeHybridConfig(
        **GROUPED, **MAMBA, num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=8,
        layer_types=["mamba", "attention"],
    ),
    "nemotron_h": lambda: hf.NemotronHConfig(
        **WIDE, **_without(ROUTED, "n_shared_experts"), layers_block_type=["mamba", "attention"], mamba_num_heads=4,
        mamba_head_dim=8, ssm_state_size=4, n_groups=1, chunk_size=8,
    ),
    "lfm2": lambda: hf.Lfm2Config(**GROUPED, layer_types=["conv", "full_attention"], block_multiple_of=8),
    "lfm2_moe": lambda: hf.Lfm2MoeConfig(
        **GROUPED, **EXPERTS, layer_types=["conv", "full_attention"], num_dense_layers=1
    ),
    "qwen3_next": lambda: hf.Qwen3NextConfig(**WIDE, **EXPERTS, **DELTA, shared_expert_intermediate_size=8),
    "qwen3_5_text": lambda: hf.Qwen3_5TextConfig(**WIDE, **DELTA),
    "olmo_hybrid": lambda: hf.OlmoHybridConfig(**WIDE, **DELTA, pad_token_id=0),
    "recurrent_gemma": lambda: hf.RecurrentGemmaConfig(
        **_without(GROUPED, "initializer_range", "max_position_embeddings"), lru_width=16, head_dim=4,
        block_types=["recurrent", "attention"], attention_window_size=8,
    ),
}  # fmt: skip


def make(folder: Path, config: PretrainedConfig) -> nn.Module:
    """A random model of `config`, saved in `folder`; its norms, biases and buffers are random, too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.dim() < 2 and tensor.is_floating_point():
                tensor.add_(0.2 * torch.randn_like(tensor))
    model.save_pretrained(folder)
    return model


def rows(rank: int = 0, ranks: int = 1) -> dict[str, torch.Tensor]:
    """This rank's rows of a batch of six; a prompt without targets and a padded row make their targets differ."""
    ids = torch.randint(4, 44, (6, 9), generator=torch.Generator().manual_seed(1))
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[0, :5] = -100
    labels[4, 6:], mask[4, 6:] = -100, 0
    mine = slice(rank * 6 // ranks, (rank + 1) * 6 // ranks)
    return {"input_ids": ids[mine], "labels": labels[mine], "attention_mask": mask[mine]}
