"""The architectures that we run: a checkpoint's `config.json` becomes a `ModelConfig`, every field checked.

Each family is one function from the Hub's field names to ours. An error names the field and says what is accepted.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from playground.checkpoint.config import (
    BLOCK_SIZE,
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    CheckpointError,
    GqaConfig,
    Llama3Scaling,
    MlaConfig,
    ModelConfig,
    MoeConfig,
    QuantizationConfig,
    RopeConfig,
    SamplingDefaults,
    YarnScaling,
    whole_blocks,
)

_LIMITS = {  # the largest known model stays under a quarter of each; more is a damaged file, not a model
    "vocab_size": 1 << 20,
    "hidden_size": 1 << 16,
    "intermediate_size": 1 << 18,
    "moe_intermediate_size": 1 << 16,
    "num_hidden_layers": 512,
    "num_attention_heads": 1024,
    "num_key_value_heads": 1024,
    "n_routed_experts": 4096,
    "num_experts": 4096,
    "num_local_experts": 4096,
    "head_dim": 1024,
    "max_position_embeddings": 1 << 24,
    "original_max_position_embeddings": 1 << 24,
}
_MAX_INT = 1 << 16


class Fields:
    """Typed access to a JSON object; every complaint names the field."""

    def __init__(self, raw: Any, where: str):
        if not isinstance(raw, dict):
            raise CheckpointError(f"{where} must be a JSON object, not {type(raw).__name__}.")
        self.raw, self.where = raw, where

    def _fail(self, name: str, wanted: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {name} must be {wanted}, not {self.raw.get(name)!r}.")

    def integer(self, name: str, default: int | None = None, least: int = 1) -> int:
        value, most = self.raw.get(name), _LIMITS.get(name, _MAX_INT)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self._fail(name, f"an integer from {least} to {most}")
        return value

    def number(self, name: str, default: float | None = None, least: float = 0.0) -> float:
        value = self.raw.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < 1e30:
            raise self._fail(name, f"a number of at least {least}")
        return float(value)

    def choice(self, name: str, options: tuple, default: Any) -> Any:
        value = self.raw.get(name, default)
        if not isinstance(value, (str, bool, type(None))) or value not in options:
            raise self._fail(name, "one of " + ", ".join(map(repr, options)))
        return value

    def list_of(self, name: str, kind: type) -> tuple:
        value = self.raw.get(name)
        value = [] if value is None else value
        if not isinstance(value, list) or not all(type(item) is kind for item in value):
            raise self._fail(name, f"a list of {kind.__name__}")
        return tuple(value)

    def token_ids(self, name: str, vocab_size: int) -> tuple[int, ...]:
        value = self.raw.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(i) is int and 0 <= i < vocab_size for i in ids):
            raise self._fail(name, "token ids below vocab_size")
        return tuple(ids)


def _scaling(raw: Any, context: int) -> YarnScaling | Llama3Scaling | None:
    if raw is None:
        return None
    fields = Fields(raw, "config.json rope_scaling")
    kind = raw.get("rope_type", raw.get("type"))
    if kind in (None, "default"):
        return None
    if kind not in ("yarn", "llama3"):
        raise CheckpointError(f"config.json: rope_scaling of type {kind!r} is not supported; 'yarn' and 'llama3' are.")
    factor, original = fields.number("factor", least=1.0), "original_max_position_embeddings"
    if kind == "llama3":
        scaling = Llama3Scaling(
            factor, fields.integer(original), fields.number("low_freq_factor"), fields.number("high_freq_factor")
        )
        if not 0 < scaling.low_freq_factor < scaling.high_freq_factor:
            raise CheckpointError("config.json rope_scaling: low_freq_factor must lie between 0 and high_freq_factor.")
        return scaling
    return YarnScaling(
        factor=factor,
        original_max_position_embeddings=fields.integer(original, context),
        beta_fast=fields.number("beta_fast", 32.0, least=1e-3),
        beta_slow=fields.number("beta_slow", 1.0, least=1e-3),
        mscale=fields.number("mscale", 0.0),
        mscale_all_dim=fields.number("mscale_all_dim", 0.0),
        attention_factor=None if raw.get("attention_factor") is None else fields.number("attention_factor"),
    )


def _rope(fields: Fields, dim: int, interleaved: bool) -> RopeConfig:
    # transformers 5 writes one rope_parameters where the Hub's files have rope_theta and rope_scaling
    raw = fields.raw.get("rope_parameters") or fields.raw.get("rope_scaling")
    inner = isinstance(raw, dict) and "rope_theta" in raw
    theta = (Fields(raw, "config.json rope_parameters") if inner else fields).number("rope_theta", 10000.0, least=2.0)
    if dim % 2:
        raise CheckpointError(f"config.json: the rotary dimension must be even, not {dim}.")
    return RopeConfig(theta, dim, interleaved, _scaling(raw, fields.integer("max_position_embeddings")))


def _quantization(raw: Any) -> QuantizationConfig | None:
    if raw is None:
        return None
    fields = Fields(raw, "config.json quantization_config")
    if raw.get("quant_method") != "fp8" or raw.get("weight_block_size") != [BLOCK_SIZE, BLOCK_SIZE]:
        raise CheckpointError(
            "config.json: quantization_config must have quant_method 'fp8' and weight_block_size "
            f"[{BLOCK_SIZE}, {BLOCK_SIZE}], not {raw.get('quant_method')!r} and {raw.get('weight_block_size')!r}."
        )
    fields.choice("activation_scheme", ("dynamic",), "dynamic")
    fields.choice("fmt", ("e4m3",), "e4m3")
    # the head is never FP8 in this format, whether or not the list names it
    left = fields.list_of("modules_to_not_convert", str)
    return QuantizationConfig(fields.choice("scale_fmt", (None, "ue8m0"), None), frozenset(left))


def _mla(fields: Fields) -> tuple[MlaConfig, RopeConfig]:
    fields.integer("num_key_value_heads", 1)  # stated in the files; latent attention has one for all heads
    rope = _rope(fields, fields.integer("qk_rope_head_dim", least=2), interleaved=True)
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
    )
    return mla, rope


def _gqa(fields: Fields, qk_norm: bool) -> tuple[GqaConfig, RopeConfig]:
    heads = fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads", heads)
    head_dim = fields.integer("head_dim", fields.integer("hidden_size") // heads)
    if heads % kv_heads:
        raise CheckpointError(f"config.json: {heads} heads can't share {kv_heads} key-value heads evenly.")
    if head_dim % 16 or head_dim > 256:
        raise CheckpointError(f"config.json: head_dim must be a multiple of 16 up to 256, not {head_dim}.")
    return GqaConfig(heads, kv_heads, head_dim, qk_norm), _rope(fields, head_dim, interleaved=False)


def _deepseek_moe(fields: Fields, v3: bool) -> MoeConfig | None:
    experts, layers = fields.integer("n_routed_experts", 0, least=0), fields.integer("num_hidden_layers")
    first, freq = fields.integer("first_k_dense_replace", 0, least=0), fields.integer("moe_layer_freq", 1)
    if not experts:
        return None
    if v3:
        method = fields.choice("topk_method", ("noaux_tc", "group_limited_greedy"), "noaux_tc")
    else:
        method = fields.choice("topk_method", ("greedy", "group_limited_greedy"), "greedy")
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
        norm_topk_prob=fields.choice("norm_topk_prob", (True, False), v3),
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


FAMILIES = {  # model_type -> attention with its rotary embedding, experts
    "deepseek_v3": (_mla, lambda fields: _deepseek_moe(fields, v3=True)),
    "kimi_k2": (_mla, lambda fields: _deepseek_moe(fields, v3=True)),
    "deepseek_v2": (_mla, lambda fields: _deepseek_moe(fields, v3=False)),
    "qwen3": (lambda fields: _gqa(fields, qk_norm=True), lambda fields: None),
    "qwen3_moe": (lambda fields: _gqa(fields, qk_norm=True), _qwen3_moe),
    "llama": (lambda fields: _gqa(fields, qk_norm=False), lambda fields: None),
    "mistral": (lambda fields: _gqa(fields, qk_norm=False), lambda fields: None),
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
    attention_of, moe_of = FAMILIES[family]
    attention, rope = attention_of(fields)
    moe, vocab_size = moe_of(fields), fields.integer("vocab_size")
    bos = fields.token_ids("bos_token_id", vocab_size)
    config = ModelConfig(
        model_type=family,
        vocab_size=vocab_size,
        hidden_size=fields.integer("hidden_size"),
        intermediate_size=fields.integer("intermediate_size"),
        num_hidden_layers=fields.integer("num_hidden_layers"),
        attention=attention,
        moe=moe,
        rope=rope,
        max_position_embeddings=fields.integer("max_position_embeddings"),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        tie_word_embeddings=fields.choice("tie_word_embeddings", (True, False), False),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=fields.token_ids("eos_token_id", vocab_size),
        skipped_layers=fields.integer("num_nextn_predict_layers", 0, least=0),
        quantization=_quantization(raw.get("quantization_config")),
    )
    _check_sizes(config)
    if generation is not None:
        more = Fields(generation, "generation_config.json").token_ids("eos_token_id", vocab_size)
        config = replace(config, eos_token_ids=tuple(dict.fromkeys(config.eos_token_ids + more)))
    return config


def parse_defaults(generation: Any) -> SamplingDefaults:
    """The sampling settings of a `generation_config.json`; a value that we would refuse is left out."""
    if not isinstance(generation, dict):
        return SamplingDefaults()
    fields, found = Fields(generation, "generation_config.json"), {}
    ranges = {"temperature": (MIN_TEMPERATURE, MAX_TEMPERATURE), "top_p": (1e-6, 1.0), "min_p": (0.0, 1.0)}
    for name, (low, high) in ranges.items():
        value = generation.get(name)
        if type(value) in (int, float) and low <= value <= high:
            found[name] = fields.number(name)
    if type(generation.get("top_k")) is int and 0 <= generation["top_k"] <= _LIMITS["vocab_size"]:
        found["top_k"] = generation["top_k"]
    return SamplingDefaults(**found, source="generation_config.json" if found else None)


def _refuse_unknown_forms(raw: dict, family: str) -> None:
    if raw.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"config.json: hidden_act {raw['hidden_act']!r} is not supported; 'silu' is.")
    for name in ("attention_bias", "mlp_bias"):
        if raw.get(name):
            raise CheckpointError(f"config.json: {name} is not supported; it must be false.")
    if raw.get("rope_interleave") is False:
        raise CheckpointError("config.json: rope_interleave false is not supported; only true is.")
    if raw.get("sliding_window") is not None and raw.get("use_sliding_window", family == "mistral"):
        raise CheckpointError(f"config.json: sliding_window {raw['sliding_window']!r} is not supported; only null is.")


def _check_sizes(c: ModelConfig) -> None:
    """Relations between fields that the kernels and the router rely on."""
    a, moe = c.attention, c.moe
    inner = {
        "hidden_size": c.hidden_size
    } | a.block_sizes()  # every K of an FP8 product; a dense layer's own inner size is padded
    if moe:
        inner["moe_intermediate_size"] = moe.moe_intermediate_size
    for name, size in inner.items():
        if size % BLOCK_SIZE:
            raise CheckpointError(f"config.json: {name} must be a multiple of {BLOCK_SIZE}, not {size}.")
    if moe:
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
    """Weights of all matrices, in whole 128-wide blocks, without building anything."""
    d, attention = c.hidden_size, c.attention.weight_count(c.hidden_size)
    sparse = len(c.moe.layers) if c.moe else 0
    total = c.num_hidden_layers * attention + (c.num_hidden_layers - sparse) * 3 * d * whole_blocks(c.intermediate_size)
    if c.moe:
        each = 3 * d * c.moe.moe_intermediate_size * (c.moe.n_routed_experts + c.moe.n_shared_experts)
        total += sparse * (each + d * c.moe.n_routed_experts)
    return total + d * c.vocab_size * (1 if c.tie_word_embeddings else 2)
