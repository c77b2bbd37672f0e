"""The architectures that we run: a checkpoint's `config.json` becomes a `ModelConfig`, every field checked.

Each family is one function from the Hub's field names to ours. An error names the field and says what is accepted.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from playground.checkpoint.config import (
    CheckpointError,
    GqaConfig,
    MlaConfig,
    ModelConfig,
    MoeConfig,
    RopeConfig,
    YarnScaling,
)
from playground.checkpoint.fields import Fields
from playground.checkpoint.formats import quantization_of
from playground.checkpoint.positions import context_of, rope_of, sliding_layers, unrotated_layers


def _mla(fields: Fields) -> tuple[MlaConfig, RopeConfig]:
    fields.integer("num_key_value_heads", 1)  # stated in the files; latent attention has one for all heads
    rope = rope_of(fields, fields.integer("qk_rope_head_dim", least=2), interleaved=True)  # as the weights lie here
    nope, scaling = fields.integer("qk_nope_head_dim"), rope.scaling
    scale = (nope + rope.dim) ** -0.5
    if isinstance(scaling, YarnScaling) and scaling.mscale_all_dim:
        scale *= scaling.attention_scale(scaling.mscale_all_dim) ** 2
    mla = MlaConfig(
        heads=fields.integer("num_attention_heads"),
        q_lora_rank=None if fields.raw.get("q_lora_rank") is None else fields.integer("q_lora_rank"),
        kv_lora_rank=fields.integer("kv_lora_rank"),
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope.dim,
        v_head_dim=fields.integer("v_head_dim"),
        softmax_scale=scale,
        interleaved=fields.choice("rope_interleave", (True, False), True),
    )
    return mla, rope


def _gqa(fields: Fields, qk_norm: bool = False, bias: bool = False) -> tuple[GqaConfig, RopeConfig]:
    """`bias`: the family's queries, keys and values have one; `attention_bias` in a file gives the output one too."""
    every = not bias and fields.choice("attention_bias", (True, False), False)
    heads = fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads", heads)
    head_dim = fields.integer("head_dim", fields.integer("hidden_size") // heads)
    if heads % kv_heads:
        raise CheckpointError(f"config.json: {heads} heads can't share {kv_heads} key-value heads evenly.")
    if head_dim > 256:
        raise CheckpointError(f"config.json: head_dim must be 256 at most, not {head_dim}.")
    gqa = GqaConfig(heads, kv_heads, head_dim, qk_norm, bias or every, every)
    return gqa, rope_of(fields, head_dim, interleaved=False)


def _deepseek_moe(fields: Fields, v3: bool) -> MoeConfig | None:
    experts, layers = fields.integer("n_routed_experts", 0, least=0), fields.integer("num_hidden_layers")
    first, freq = fields.integer("first_k_dense_replace", 0, least=0), fields.integer("moe_layer_freq", 1)
    if not experts:
        return None
    methods = ("noaux_tc", "group_limited_greedy", "greedy")
    method = fields.choice("topk_method", methods if v3 else methods[1:], "noaux_tc" if v3 else "greedy")
    flat = method == "greedy"  # V2-Lite states groups, and does not use them
    return MoeConfig(
        layers=tuple(i for i in range(layers) if i >= first and i % freq == 0),
        n_routed_experts=experts,
        n_shared_experts=fields.integer("n_shared_experts", 0, least=0),
        num_experts_per_tok=fields.integer("num_experts_per_tok"),
        moe_intermediate_size=fields.integer("moe_intermediate_size"),
        n_group=1 if flat else fields.integer("n_group", 1),
        topk_group=1 if flat else fields.integer("topk_group", 1),
        routed_scaling_factor=fields.number("routed_scaling_factor", 1.0),
        scoring_func=fields.choice("scoring_func", ("sigmoid", "softmax"), "sigmoid" if v3 else "softmax"),
        norm_topk_prob=v3 and fields.choice("norm_topk_prob", (True, False), True),  # V2 states it and does without
        corrected=method == "noaux_tc",
    )


def _qwen3_moe(fields: Fields) -> MoeConfig:
    name = "num_experts" if "num_experts" in fields.raw else "num_local_experts"  # as transformers 5 writes it
    dense, every = fields.list_of("mlp_only_layers", int), fields.integer("decoder_sparse_step", 1)
    return MoeConfig(
        layers=tuple(i for i in range(fields.integer("num_hidden_layers")) if i not in dense and (i + 1) % every == 0),
        n_routed_experts=fields.integer(name),
        n_shared_experts=0,
        num_experts_per_tok=fields.integer("num_experts_per_tok"),
        moe_intermediate_size=fields.integer("moe_intermediate_size"),
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        scoring_func="softmax",
        norm_topk_prob=fields.choice("norm_topk_prob", (True, False), False),
        corrected=False,
    )


_PLAIN = {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6}
DEFAULTS = {  # what a field means that a file leaves out, as transformers has it
    "deepseek_v3": {
        "max_position_embeddings": 4096, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128, "v_head_dim": 128, "n_routed_experts": 256, "n_shared_experts": 1, "n_group": 8,
        "topk_group": 4, "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "first_k_dense_replace": 3,
        "routed_scaling_factor": 2.5, "bos_token_id": 0, "eos_token_id": 1,
    },
    "deepseek_v2": {
        "max_position_embeddings": 2048, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128, "v_head_dim": 128, "n_routed_experts": 64, "n_shared_experts": 2,
        "moe_intermediate_size": 1407, "bos_token_id": 1, "eos_token_id": 2,
    },
    "qwen3": _PLAIN | {"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3_moe": _PLAIN | {
        "num_key_value_heads": 4, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "sliding_window": 4096,
    },
    "qwen2": _PLAIN | {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    "llama": {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "smollm3": _PLAIN | {
        "num_key_value_heads": 4, "rope_theta": 2e6, "tie_word_embeddings": True, "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
    "mistral": {
        "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096, "bos_token_id": 1,
        "eos_token_id": 2,
    },
}  # fmt: skip
DEFAULTS["kimi_k2"] = DEFAULTS["deepseek_v3"]

FAMILIES = {  # model_type -> attention with its rotary embedding, experts
    "deepseek_v3": (_mla, lambda fields: _deepseek_moe(fields, v3=True)),
    "kimi_k2": (_mla, lambda fields: _deepseek_moe(fields, v3=True)),
    "deepseek_v2": (_mla, lambda fields: _deepseek_moe(fields, v3=False)),
    "qwen3": (lambda fields: _gqa(fields, qk_norm=True), lambda fields: None),
    "qwen3_moe": (lambda fields: _gqa(fields, qk_norm=True), _qwen3_moe),
    "qwen2": (lambda fields: _gqa(fields, bias=True), lambda fields: None),
    "llama": (_gqa, lambda fields: None),
    "mistral": (_gqa, lambda fields: None),
    "smollm3": (_gqa, lambda fields: None),
}


def parse_config(raw: Any, generation: Any = None) -> ModelConfig:
    """Validates a parsed `config.json`, and the token ids of a `generation_config.json` where there is one.

    Raises `CheckpointError` for an unsupported architecture, a field of the wrong type or size, or sizes that the
    128-wide block format can't hold.
    """
    fields = Fields(raw, "config.json")
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise CheckpointError(f"config.json: model_type {family!r} is not supported; {', '.join(FAMILIES)} are.")
    _refuse_unknown_forms(raw, family)
    fields = Fields(DEFAULTS.get(family, {}) | raw, "config.json")
    attention_of, moe_of = FAMILIES[family]
    attention, rope = attention_of(fields)
    moe, vocab_size = moe_of(fields), fields.integer("vocab_size")
    bos = fields.token_ids("bos_token_id", vocab_size)
    unrotated = unrotated_layers(fields) if family == "smollm3" else frozenset()
    sliding = sliding_layers(fields, family, unrotated)
    config = ModelConfig(
        model_type=family,
        vocab_size=vocab_size,
        hidden_size=fields.integer("hidden_size"),
        intermediate_size=fields.integer("intermediate_size"),
        num_hidden_layers=fields.integer("num_hidden_layers"),
        attention=attention,
        moe=moe,
        rope=rope,
        max_position_embeddings=context_of(fields, rope),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        tie_word_embeddings=fields.choice("tie_word_embeddings", (True, False), False),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=fields.token_ids("eos_token_id", vocab_size),
        skipped_layers=fields.integer("num_nextn_predict_layers", 0, least=0),
        quantization=quantization_of(raw.get("quantization_config")),
        mlp_bias=family in ("llama", "smollm3") and fields.choice("mlp_bias", (True, False), False),
        unrotated=unrotated,
        window=fields.integer("sliding_window") if sliding else None,
        sliding=sliding,
    )
    _check_sizes(config)
    if generation is not None:
        more = Fields(generation, "generation_config.json").token_ids("eos_token_id", vocab_size)
        config = replace(config, eos_token_ids=tuple(dict.fromkeys(config.eos_token_ids + more)))
    return config


def _refuse_unknown_forms(raw: dict, family: str) -> None:
    if raw.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"config.json: hidden_act {raw['hidden_act']!r} is not supported; 'silu' is.")
    if family.startswith("deepseek") and raw.get("attention_bias"):
        raise CheckpointError("config.json: attention_bias is not supported for latent attention; it must be false.")


def _check_sizes(c: ModelConfig) -> None:
    """Relations between fields that the kernels and the router rely on."""
    if moe := c.moe:
        chosen = moe.n_routed_experts // moe.n_group * moe.topk_group
        wrong = moe.n_routed_experts % moe.n_group or moe.topk_group > moe.n_group
        if wrong or moe.num_experts_per_tok > chosen:
            raise CheckpointError(
                f"config.json: {moe.n_routed_experts} experts in n_group={moe.n_group}, topk_group={moe.topk_group} "
                f"leave {chosen} to choose num_experts_per_tok={moe.num_experts_per_tok} from; these must fit."
            )
    if weight_count(c) > 1e13:
        raise CheckpointError("config.json: these sizes make a model of more than 10 trillion weights; check them.")


def weight_count(c: ModelConfig) -> int:
    """Weights of all matrices, without building anything."""
    d, attention = c.hidden_size, c.attention.weight_count(c.hidden_size)
    sparse = len(c.moe.layers) if c.moe else 0
    total = c.num_hidden_layers * attention + (c.num_hidden_layers - sparse) * 3 * d * c.intermediate_size
    if c.moe:
        each = 3 * d * c.moe.moe_intermediate_size * (c.moe.n_routed_experts + c.moe.n_shared_experts)
        total += sparse * (each + d * c.moe.n_routed_experts)
    return total + d * c.vocab_size * (1 if c.tie_word_embeddings else 2)
