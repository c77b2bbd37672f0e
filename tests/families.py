"""Small random checkpoints of every family, made by transformers, and how the tests run them."""

from __future__ import annotations

import torch
import transformers
from conftest import empty_cache

from playground.engine.pages import PAGE_SIZE
from playground.model.step import Step

COMMON = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "first_k_dense_replace": 1,
}
DEEPSEEK_YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "beta_fast": 32, "beta_slow": 1,
    "mscale": 1.0, "mscale_all_dim": 1.0, "rope_theta": 10000.0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 128, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "rope_theta": 500000.0,
}  # fmt: skip
QWEN_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "rope_theta": 1e6}
GQA = {"num_key_value_heads": 2, "head_dim": 32}

FAMILIES = {  # class of transformers, changes to the common sizes
    "deepseek-v3": ("DeepseekV3", MLA | {"q_lora_rank": 128, "n_group": 4, "topk_group": 2, "norm_topk_prob": True,
                                         "routed_scaling_factor": 2.5, "rope_parameters": DEEPSEEK_YARN}),
    "moonlight": ("DeepseekV3", MLA | {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
                                       "routed_scaling_factor": 2.446}),
    "deepseek-v2-lite": ("DeepseekV2", MLA | {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "n_shared_experts": 2,
                                              "topk_method": "greedy", "norm_topk_prob": False,
                                              "routed_scaling_factor": 1.0, "rope_parameters": DEEPSEEK_YARN,
                                              "intermediate_size": 342}),
    "deepseek-v2": ("DeepseekV2", MLA | {"q_lora_rank": 128, "n_group": 4, "topk_group": 2,
                                         "topk_method": "group_limited_greedy", "norm_topk_prob": False,
                                         "routed_scaling_factor": 16.0}),
    "qwen3": ("Qwen3", GQA | {"tie_word_embeddings": True}),
    "qwen3-yarn": ("Qwen3", GQA | {"rope_parameters": QWEN_YARN}),
    "qwen3-moe": ("Qwen3Moe", GQA | {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
                                     "norm_topk_prob": True, "mlp_only_layers": [1]}),
    "llama-3": ("Llama", GQA | {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "smollm2": ("Llama", {"hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 64,
                          "intermediate_size": 300, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "ragged-biases": ("Llama", {"hidden_size": 80, "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 16,
                                "intermediate_size": 64, "attention_bias": True, "mlp_bias": True}),
    "ragged-moe": ("Qwen3Moe", GQA | {"hidden_size": 160, "num_attention_heads": 6, "num_experts": 8,
                                      "num_experts_per_tok": 2, "moe_intermediate_size": 72, "norm_topk_prob": True}),
    "ragged-latent": ("DeepseekV3", MLA | {"hidden_size": 200, "q_lora_rank": 128, "n_group": 4, "topk_group": 2,
                                           "norm_topk_prob": True, "v_head_dim": 24, "moe_intermediate_size": 72}),
    "llama-biases": ("Llama", GQA | {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", GQA | {"sliding_window": None}),
    "mistral-in-window": ("Mistral", GQA | {"sliding_window": 640}),
    "mistral-beyond-window": ("Mistral", GQA | {"sliding_window": 100}),
    "qwen2-some-slide": ("Qwen2", {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 64,
                                   "max_window_layers": 1}),
    "qwen3-listed-slide": ("Qwen3", GQA | {"use_sliding_window": True, "sliding_window": 16, "layer_types": [
        "sliding_attention", "full_attention", "sliding_attention"]}),
    "qwen3-moe-slides": ("Qwen3Moe", GQA | {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
                                            "use_sliding_window": True, "sliding_window": 130}),
    "odd-heads": ("Qwen3", {"hidden_size": 200, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 50}),
    "odd-heads-biases": ("Llama", {"hidden_size": 100, "num_attention_heads": 4, "num_key_value_heads": 4,
                                   "head_dim": 100, "attention_bias": True}),
    "ragged-ranks": ("DeepseekV3", MLA | {"q_lora_rank": 90, "kv_lora_rank": 72, "n_group": 4, "topk_group": 2,
                                          "norm_topk_prob": True, "n_shared_experts": 2, "moe_intermediate_size": 72}),
    "halves-rotate": ("DeepseekV3", MLA | {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
                                           "rope_interleave": False}),
    "halves-rotate-latents": ("DeepseekV3", MLA | {"q_lora_rank": 128, "n_group": 1, "topk_group": 1,
                                                   "norm_topk_prob": True, "rope_interleave": False}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2, "rope_parameters": QWEN_YARN}),
    "qwen3-biases": ("Qwen3", GQA | {"attention_bias": True}),
    "qwen3-moe-one-expert": ("Qwen3Moe", GQA | {"num_experts": 8, "num_experts_per_tok": 1,
                                                "moe_intermediate_size": 128, "norm_topk_prob": True}),
    "smollm3": ("SmolLM3", GQA | {"no_rope_layer_interval": 2, "attention_bias": True}),
}  # fmt: skip


def theirs(name: str, **more):
    """A random model of transformers whose every parameter matters, with the correction bias spread."""
    kind, changes = FAMILIES[name]
    torch.manual_seed(3)
    config = getattr(transformers, f"{kind}Config")(**(COMMON | changes | more))
    model = getattr(transformers, f"{kind}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.copy_(1 + 0.2 * torch.randn_like(p) if "norm" in key else 0.08 * torch.randn_like(p))
        for key, b in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                b.copy_(0.2 * torch.randn_like(b))
    return model


def tokens(count: int) -> torch.Tensor:
    return torch.randint(3, 256, (count,), generator=torch.Generator().manual_seed(count))


@torch.inference_mode()
def prefill(model, ids: torch.Tensor, pieces: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Logits of every token, the prompt fed in equal pieces through the cache."""
    c, slots = model.config, torch.arange(len(ids))
    pages = -(-len(ids) // PAGE_SIZE)
    cache = empty_cache(c, pages, dtype)
    out, size = [], -(-len(ids) // pieces)
    for start in range(0, len(ids), size):
        piece = slots[start : start + size]
        step = Step(piece, piece, slots[: start + size] if start else None)
        out.append(model.logits(model(ids[piece], step, cache)))
    return torch.cat(out)
