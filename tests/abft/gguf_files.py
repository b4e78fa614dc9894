"""GGUF files of tiny Llamas, written as llama.cpp's converter lays them out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_models import tiny
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel

WORDS = ["th", "ex"]
MERGES = ["t h", "e x"]


def tiny_llama() -> PreTrainedModel:
    """Return a random Llama with room for a byte-level vocabulary; its weights are exact in bfloat16."""
    return tiny("llama", vocab_size=300, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False).bfloat16().float()


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Return W_Q or W_K with the two halves of each head interleaved, as llama.cpp rotates them."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    config, weights = model.config, model.state_dict()
    named = {
        "token_embd": weights["model.embed_tokens.weight"],
        "output_norm": weights["model.norm.weight"],
        "output": weights["lm_head.weight"],
    }
    parts = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for layer in range(config.num_hidden_layers):
        for short, long in parts.items():
            weight = weights[f"model.layers.{layer}.{long}.weight"]
            named[f"blk.{layer}.{short}"] = _interleaved(weight, heads[short]) if short in heads else weight
    return {f"{name}.weight": tensor for name, tensor in named.items()}


def write_gguf(path: Path, model: PreTrainedModel, *, half: bool = True, architecture: str = "llama") -> Path:
    """Write the model with a byte-level tokenizer; `half` stores matrices in float16."""
    import gguf

    config: Any = model.config
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    tokens = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *WORDS]
    tokens += [f"<unused{i}>" for i in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(MERGES)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, tensor in _tensors(model).items():
        stored = tensor.half() if half and tensor.dim() == 2 else tensor
        writer.add_tensor(name, stored.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
