"""Configs of popular checkpoints, as their repositories state them: accepted, and as large as they are said to be."""

from __future__ import annotations

import pytest

from playground.checkpoint.families import parse_config, weight_count

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
LLAMA3 = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}  # fmt: skip
YARN = {
    "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096, "type": "yarn",
}  # fmt: skip
V3 = {
    "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "vocab_size": 129280,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
    "first_k_dense_replace": 3, "norm_topk_prob": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
    "routed_scaling_factor": 2.5, "max_position_embeddings": 163840, "rope_scaling": YARN, "quantization_config": FP8,
    "num_nextn_predict_layers": 1,
}  # fmt: skip


def dense(kind: str, hidden: int, inner: int, layers: int, heads: int, kv: int, vocab: int, **more) -> dict:
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": vocab}
    return {"model_type": kind, "num_attention_heads": heads, "num_key_value_heads": kv} | sizes | more


def qwen3(*sizes, **more) -> dict:
    window = {"sliding_window": None, "use_sliding_window": False, "max_window_layers": sizes[2]}
    about = {"head_dim": 128, "rope_theta": 1e6, "rope_scaling": None, "max_position_embeddings": 40960}
    return dense("qwen3", *sizes, 151936, **(window | about | more))


def qwen2(*sizes, vocab: int = 152064, **more) -> dict:
    window = {"sliding_window": 131072, "use_sliding_window": False, "max_window_layers": sizes[2]}
    return dense("qwen2", *sizes, vocab, **({"rope_theta": 1e6, "max_position_embeddings": 32768} | window | more))


def llama3(*sizes, vocab: int = 128256, **more) -> dict:
    about = {"rope_theta": 500000.0, "rope_scaling": LLAMA3, "max_position_embeddings": 131072}
    return dense("llama", *sizes, vocab, **(about | {"attention_bias": False, "mlp_bias": False} | more))


def qwen3_moe(*sizes, experts: int, inner: int, **more) -> dict:
    about = {"num_experts": experts, "num_experts_per_tok": 8, "moe_intermediate_size": inner, "norm_topk_prob": True}
    about |= {"mlp_only_layers": [], "decoder_sparse_step": 1, "head_dim": 128, "max_position_embeddings": 40960}
    return dense("qwen3_moe", *sizes, 151936, **(about | more))


TIED = {"tie_word_embeddings": True}
CONFIGS = {  # name -> its config, billions of parameters
    "Qwen/Qwen3-0.6B": (qwen3(1024, 3072, 28, 16, 8, **TIED), 0.596),
    "Qwen/Qwen3-1.7B-FP8": (qwen3(2048, 6144, 28, 16, 8, quantization_config=FP8, **TIED), 1.72),
    "Qwen/Qwen3-4B": (qwen3(2560, 9728, 36, 32, 8, **TIED), 4.02),
    "Qwen/Qwen3-8B-FP8": (qwen3(4096, 12288, 36, 32, 8, quantization_config=FP8), 8.19),
    "Qwen/Qwen3-14B": (qwen3(5120, 17408, 40, 40, 8), 14.8),
    "Qwen/Qwen3-32B": (qwen3(5120, 25600, 64, 64, 8), 32.8),
    "Qwen/Qwen3-30B-A3B-FP8": (qwen3_moe(2048, 6144, 48, 32, 4, experts=128, inner=768, quantization_config=FP8), 30.5),
    "Qwen/Qwen3-235B-A22B": (qwen3_moe(4096, 12288, 94, 64, 4, experts=128, inner=1536), 235.1),
    "Qwen/Qwen2.5-0.5B-Instruct": (qwen2(896, 4864, 24, 14, 2, vocab=151936, **TIED), 0.494),
    "Qwen/Qwen2.5-1.5B-Instruct": (qwen2(1536, 8960, 28, 12, 2, vocab=151936, **TIED), 1.54),
    "Qwen/Qwen2.5-3B": (qwen2(2048, 11008, 36, 16, 2, vocab=151936, **TIED), 3.09),
    "Qwen/Qwen2.5-7B-Instruct": (qwen2(3584, 18944, 28, 28, 4), 7.62),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B": (qwen2(5120, 27648, 64, 40, 8, max_position_embeddings=131072), 32.8),
    "meta-llama/Llama-3.1-8B-Instruct": (llama3(4096, 14336, 32, 32, 8), 8.03),
    "meta-llama/Llama-3.2-1B": (llama3(2048, 8192, 16, 32, 8, head_dim=64, **TIED), 1.24),
    "meta-llama/Llama-3.3-70B-Instruct": (llama3(8192, 28672, 80, 64, 8), 70.6),
    "meta-llama/Llama-2-7b-hf": (llama3(4096, 11008, 32, 32, 32, vocab=32000, rope_scaling=None), 6.74),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": (llama3(2048, 5632, 22, 32, 4, vocab=32000, rope_scaling=None), 1.10),
    "mistralai/Mistral-7B-v0.1": (dense("mistral", 4096, 14336, 32, 32, 8, 32000, sliding_window=4096), 7.24),
    "mistralai/Mistral-7B-Instruct-v0.3": (dense("mistral", 4096, 14336, 32, 32, 8, 32768, sliding_window=None), 7.25),
    "HuggingFaceTB/SmolLM2-135M": (llama3(576, 1536, 30, 9, 3, vocab=49152, rope_scaling=None, **TIED), 0.1345),
    "HuggingFaceTB/SmolLM2-360M": (llama3(960, 2560, 32, 15, 5, vocab=49152, rope_scaling=None, **TIED), 0.362),
    "HuggingFaceTB/SmolLM3-3B": (dense("smollm3", 2048, 11008, 36, 16, 4, 128256, no_rope_layer_interval=4), 3.08),
    "deepseek-ai/DeepSeek-V3": (V3, 671),
    "moonshotai/Moonlight-16B-A3B": (
        V3 | {"hidden_size": 2048, "intermediate_size": 11264, "moe_intermediate_size": 1408, "num_hidden_layers": 27,
              "num_attention_heads": 16, "vocab_size": 163840, "q_lora_rank": None, "n_routed_experts": 64,
              "n_shared_experts": 2, "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1,
              "first_k_dense_replace": 1, "routed_scaling_factor": 2.446, "rope_scaling": None,
              "max_position_embeddings": 8192, "num_nextn_predict_layers": 0, "quantization_config": None}, 15.96),
    "deepseek-ai/DeepSeek-V2-Lite": (
        V3 | {"model_type": "deepseek_v2", "hidden_size": 2048, "intermediate_size": 10944, "n_routed_experts": 64,
              "moe_intermediate_size": 1408, "num_hidden_layers": 27, "num_attention_heads": 16, "vocab_size": 102400,
              "q_lora_rank": None, "n_shared_experts": 2, "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1,
              "first_k_dense_replace": 1, "topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False,
              "routed_scaling_factor": 1.0, "quantization_config": None, "num_nextn_predict_layers": 0}, 15.7),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_popular_config_is_accepted_and_as_large_as_it_is_said_to_be(name):
    config, billions = CONFIGS[name]
    assert weight_count(parse_config(config)) / 1e9 == pytest.approx(billions, rel=0.01)
