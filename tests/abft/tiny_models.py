"""Tiny random models of each kind, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 50
_LLAMA: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_GPT2: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    n_embd=32,
    n_layer=2,
    n_head=4,
    n_positions=128,
    bos_token_id=1,
    eos_token_id=2,
    attn_pdrop=0.0,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
)
_MOE: dict[str, Any] = dict(
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, decoder_sparse_step=1, norm_topk_prob=True
)
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _LLAMA),
    "qwen2": ("Qwen2Config", _LLAMA),
    "qwen3": ("Qwen3Config", {**_LLAMA, "head_dim": 8}),
    "mistral": ("MistralConfig", {**_LLAMA, "sliding_window": 64}),
    "phi3": ("Phi3Config", _LLAMA),
    "gpt2": ("GPT2Config", _GPT2),
    "opt": ("OPTConfig", dict(
        vocab_size=VOCABULARY, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, dropout=0.0,
        max_position_embeddings=128, word_embed_proj_dim=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )),
    "mistral_window": ("MistralConfig", {**_LLAMA, "sliding_window": 6}),
    "qwen3_moe": ("Qwen3MoeConfig", {**_LLAMA, **_MOE, "head_dim": 8}),
    "gemma2": ("Gemma2Config", {**_LLAMA, "head_dim": 8, "sliding_window": 6, "attn_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3TextConfig", {**_LLAMA, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8,
                                    "layer_types": ["sliding_attention", "full_attention"]}),
    "olmo2": ("Olmo2Config", _LLAMA),
    "cohere": ("CohereConfig", _LLAMA),
    "glm4": ("Glm4Config", {**_LLAMA, "head_dim": 8}),
    "granite": ("GraniteConfig", {**_LLAMA, "attention_multiplier": 0.3}),
    "starcoder2": ("Starcoder2Config", {**_LLAMA, "sliding_window": 6, "residual_dropout": 0.0}),
    "smollm3": ("SmolLM3Config", {**_LLAMA, "no_rope_layers": [1, 0]}),
    "gpt_oss": ("GptOssConfig", {**_LLAMA, "head_dim": 8, "sliding_window": 6, "num_local_experts": 2,
                                 "num_experts_per_tok": 1}),
    "deepseek_v3": ("DeepseekV3Config", {
        **_LLAMA, "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 12, "head_dim": 8, "first_k_dense_replace": 2, "n_routed_experts": 2,
        "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1,
    }),
    "llama4": ("Llama4TextConfig", {
        **_LLAMA, "head_dim": 8, "intermediate_size_mlp": 48, "attention_chunk_size": 6, "no_rope_layers": [1, 0],
        "num_local_experts": 2, "interleave_moe_layer_step": 2,
    }),
    "gpt_neox": ("GPTNeoXConfig", dict(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, bos_token_id=1, eos_token_id=2,
    )),
}  # fmt: skip


# Every architecture that the parity tests run: its name, and what of its attention is special.
SERVED: dict[str, tuple[str, str]] = {
    "llama": ("Llama 2, 3", ""),
    "qwen2": ("Qwen2, Qwen2.5", ""),
    "qwen3": ("Qwen3", "normalised q and k"),
    "qwen3_moe": ("Qwen3-MoE", "mixture of experts"),
    "mistral": ("Mistral", ""),
    "mistral_window": ("Mistral with a sliding window", "window shorter than the prompt"),
    "gemma2": ("Gemma 2", "soft cap; window in every other layer"),
    "gemma3": ("Gemma 3 (text)", "window in most layers"),
    "phi3": ("Phi-3", "fused q, k and v"),
    "gpt2": ("GPT-2", "fused q, k and v"),
    "gpt_neox": ("GPT-NeoX, Pythia", "q, k and v fused head by head"),
    "opt": ("OPT", ""),
    "olmo2": ("OLMo 2", "normalised q and k"),
    "cohere": ("Cohere Command R", ""),
    "glm4": ("GLM-4", "rotary on half of the width"),
    "granite": ("Granite", "scale of its own"),
    "starcoder2": ("StarCoder2", "window"),
    "smollm3": ("SmolLM3", "layers without positions"),
    "llama4": ("Llama 4 (text)", "chunks; layers without positions; mixture of experts"),
    "gpt_oss": ("gpt-oss", "sinks; window; mixture of experts"),
    "deepseek_v3": ("DeepSeek-V3", "latent attention (MLA): keys and values differ in width"),
}

# Kinds whose layers, some or all, see a part of their sequence in a way of their own.
LOCAL = ("mistral_window", "gemma3", "llama4")
# transformers computes soft caps and sinks in its eager attention only.
_EAGER = ("gemma2", "gpt_oss")


def tiny(
    kind: str, *, seed: int = 0, attention: str | None = None, spread: float = 0.15, **changes: Any
) -> PreTrainedModel:
    """A random causal language model of two layers, in float32 and evaluation mode.

    `spread` is the standard deviation of its matrices, large enough for attention that is not uniform.
    """
    name, arguments = CONFIGS[kind]
    config = getattr(transformers, name)(**{**arguments, **changes})
    torch.manual_seed(seed)
    attention = attention or ("eager" if kind in _EAGER else "sdpa")
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return model.eval()


def padded(prompts: list[Tensor], groups: list[Tensor], side: str) -> dict[str, Tensor]:
    """A batch of prompts with padding on one side: inputs, key groups and the position of each last token."""
    length = max(len(prompt) for prompt in prompts)
    shape = (len(prompts), length)
    batch = {
        "input_ids": torch.zeros(shape, dtype=torch.long),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "key_groups": torch.full(shape, -1),
        "query_positions": torch.zeros((len(prompts), 1), dtype=torch.long),
    }
    for row, (prompt, group) in enumerate(zip(prompts, groups, strict=True)):
        start = length - len(prompt) if side == "left" else 0
        span = slice(start, start + len(prompt))
        batch["input_ids"][row, span] = prompt
        batch["attention_mask"][row, span] = 1
        batch["key_groups"][row, span] = group
        batch["query_positions"][row] = start + len(prompt) - 1
    return batch


def random_prompts(lengths: tuple[int, ...], seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(3, VOCABULARY, (n,), generator=generator) for n in lengths]
    groups = [torch.randint(-1, 2, (n,), generator=generator) for n in lengths]
    return prompts, groups


def packed(prompts: list[Tensor], groups: list[Tensor]) -> dict[str, Tensor]:
    """Return the prompts concatenated along the sequence dimension (batch size 1)."""
    cu_seqlens = torch.tensor([0, *(len(prompt) for prompt in prompts)]).cumsum(0)
    return {
        "input_ids": torch.cat(prompts)[None],
        "cu_seqlens": cu_seqlens,
        "key_groups": torch.cat(groups)[None],
        "query_positions": cu_seqlens[1:, None] - 1,
    }
