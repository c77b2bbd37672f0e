"""A checkpoint's `config.json`, parsed once at the boundary into frozen dataclasses.

Everything behind this file may trust its fields: types, signs and the divisibility that the block format needs have
been checked here, and an error names the field and says what is accepted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

BLOCK_SIZE = 128
"""Width of an activation block and side of a weight tile: the only block size of the DeepSeek-V3 FP8 format."""

_MAX_INT = 1 << 24  # no dimension of a known model comes near; a larger one is a damaged file, not a model


class CheckpointError(ValueError):
    """A model folder that can't be used: the message names the file, field or tensor and says what would do."""


@dataclass(frozen=True)
class YarnConfig:
    """YaRN context extension (Peng et al., 2023), with DeepSeek's two `mscale` fields."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def attention_scale(self, mscale: float) -> float:
        """YaRN's magnitude correction `0.1 * mscale * ln(factor) + 1`; 1 where nothing is extended."""
        return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


@dataclass(frozen=True)
class QuantizationConfig:
    """Block-scaled FP8: E4M3 weights in 128x128 tiles, activations quantised on the fly in 1x128 blocks."""

    scale_fmt: str | None = None  # None: float32 scales (V3). "ue8m0": powers of two (V3.1)


@dataclass(frozen=True)
class ModelConfig:
    """The DeepSeek-V3 architecture (arXiv:2412.19437), with the field names of its `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    first_k_dense_replace: int
    routed_scaling_factor: float
    scoring_func: str
    norm_topk_prob: bool
    topk_method: str
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    yarn: YarnConfig | None
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    quantization: QuantizationConfig | None

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Values that the cache holds per token and layer: the compressed KV latent, then the shared rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        scale = self.qk_head_dim**-0.5
        if self.yarn and self.yarn.mscale_all_dim:
            scale *= self.yarn.attention_scale(self.yarn.mscale_all_dim) ** 2
        return scale

    def is_moe(self, layer: int) -> bool:
        return self.n_routed_experts > 0 and layer >= self.first_k_dense_replace


class _Fields:
    """Typed access to a JSON object; every complaint names the field."""

    def __init__(self, raw: dict[str, Any], where: str):
        if not isinstance(raw, dict):
            raise CheckpointError(f"{where} must be a JSON object, not {type(raw).__name__}.")
        self.raw, self.where = raw, where

    def _fail(self, name: str, wanted: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {name} must be {wanted}, not {self.raw.get(name)!r}.")

    def integer(self, name: str, default: int | None = None, least: int = 1) -> int:
        value = self.raw.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MAX_INT:
            raise self._fail(name, f"an integer from {least} to {_MAX_INT}")
        return value

    def number(self, name: str, default: float | None = None, least: float = 0.0) -> float:
        value = self.raw.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < 1e30:
            raise self._fail(name, f"a number of at least {least}")
        return float(value)

    def choice(self, name: str, options: tuple, default: Any) -> Any:
        value = self.raw.get(name, default)
        if value not in options or isinstance(value, bool) != isinstance(default, bool):
            raise self._fail(name, "one of " + ", ".join(map(repr, options)))
        return value


def _parse_yarn(raw: dict[str, Any] | None) -> YarnConfig | None:
    if raw is None:
        return None
    fields = _Fields(raw, "config.json rope_scaling")
    kind = raw.get("type", raw.get("rope_type"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise CheckpointError(f"config.json: rope_scaling {raw!r} is not supported; only type 'yarn' is.")
    return YarnConfig(
        factor=fields.number("factor", least=1.0),
        original_max_position_embeddings=fields.integer("original_max_position_embeddings"),
        beta_fast=fields.number("beta_fast", 32.0),
        beta_slow=fields.number("beta_slow", 1.0),
        mscale=fields.number("mscale", 1.0),
        mscale_all_dim=fields.number("mscale_all_dim", 0.0),
    )


def _parse_quantization(raw: dict[str, Any] | None) -> QuantizationConfig | None:
    if raw is None:
        return None
    fields = _Fields(raw, "config.json quantization_config")
    if raw.get("quant_method") != "fp8" or raw.get("weight_block_size") != [BLOCK_SIZE, BLOCK_SIZE]:
        raise CheckpointError(
            "config.json: quantization_config must have quant_method 'fp8' and weight_block_size "
            f"[{BLOCK_SIZE}, {BLOCK_SIZE}], not {raw.get('quant_method')!r} and {raw.get('weight_block_size')!r}."
        )
    fields.choice("activation_scheme", ("dynamic",), "dynamic")
    fields.choice("fmt", ("e4m3",), "e4m3")
    return QuantizationConfig(scale_fmt=fields.choice("scale_fmt", (None, "ue8m0"), None))


def _parse_token_ids(fields: _Fields, name: str, vocab_size: int) -> tuple[int, ...]:
    value = fields.raw.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < vocab_size for i in ids):
        raise CheckpointError(f"config.json: {name} must hold token ids below vocab_size, not {value!r}.")
    return tuple(ids)


def parse_config(raw: dict[str, Any]) -> ModelConfig:
    """Validates a parsed `config.json`.

    Raises `CheckpointError` for an unsupported architecture, a field of the wrong type or size, or sizes that the
    128-wide block format can't hold.
    """
    fields = _Fields(raw, "config.json")
    if raw.get("model_type") != "deepseek_v3":
        raise CheckpointError(f"config.json: model_type {raw.get('model_type')!r} is not supported; 'deepseek_v3' is.")
    if raw.get("hidden_act", "silu") != "silu" or raw.get("attention_bias", False):
        raise CheckpointError("config.json: only hidden_act 'silu' and attention_bias false are supported.")
    vocab_size = fields.integer("vocab_size")
    bos = _parse_token_ids(fields, "bos_token_id", vocab_size)
    # transformers 5 writes one rope_parameters where the Hub's files have rope_theta and rope_scaling
    rope = raw.get("rope_parameters") or raw.get("rope_scaling")
    theta = _Fields(rope or {}, "config.json rope_parameters") if "rope_theta" in (rope or {}) else fields
    config = ModelConfig(
        vocab_size=vocab_size,
        hidden_size=fields.integer("hidden_size"),
        intermediate_size=fields.integer("intermediate_size"),
        moe_intermediate_size=fields.integer("moe_intermediate_size"),
        num_hidden_layers=fields.integer("num_hidden_layers"),
        num_attention_heads=fields.integer("num_attention_heads"),
        n_routed_experts=fields.integer("n_routed_experts", 0, least=0),
        n_shared_experts=fields.integer("n_shared_experts", 0, least=0),
        num_experts_per_tok=fields.integer("num_experts_per_tok", 1),
        n_group=fields.integer("n_group", 1),
        topk_group=fields.integer("topk_group", 1),
        first_k_dense_replace=fields.integer("first_k_dense_replace", 0, least=0),
        routed_scaling_factor=fields.number("routed_scaling_factor", 1.0),
        scoring_func=fields.choice("scoring_func", ("sigmoid", "softmax"), "sigmoid"),
        norm_topk_prob=fields.choice("norm_topk_prob", (True, False), True),
        topk_method=fields.choice("topk_method", ("noaux_tc", "group_limited_greedy"), "noaux_tc"),
        q_lora_rank=None if raw.get("q_lora_rank") is None else fields.integer("q_lora_rank"),
        kv_lora_rank=fields.integer("kv_lora_rank"),
        qk_nope_head_dim=fields.integer("qk_nope_head_dim"),
        qk_rope_head_dim=fields.integer("qk_rope_head_dim", least=2),
        v_head_dim=fields.integer("v_head_dim"),
        max_position_embeddings=fields.integer("max_position_embeddings"),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_theta=theta.number("rope_theta", 10000.0, least=1.0),
        yarn=_parse_yarn(rope),
        tie_word_embeddings=fields.choice("tie_word_embeddings", (True, False), False),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=_parse_token_ids(fields, "eos_token_id", vocab_size),
        quantization=_parse_quantization(raw.get("quantization_config")),
    )
    _check_sizes(config)
    return config


def _check_sizes(c: ModelConfig) -> None:
    """Relations between fields that the kernels and the router rely on."""
    inner = {  # every K of an FP8 product
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "moe_intermediate_size": c.moe_intermediate_size,
        "q_lora_rank": c.q_lora_rank or 0,
        "kv_lora_rank": c.kv_lora_rank,
        "num_attention_heads * v_head_dim": c.num_attention_heads * c.v_head_dim,
    }
    for name, size in inner.items():
        if size % BLOCK_SIZE:
            raise CheckpointError(f"config.json: {name} must be a multiple of {BLOCK_SIZE}, not {size}.")
    if c.qk_rope_head_dim % 2:
        raise CheckpointError(f"config.json: qk_rope_head_dim must be even, not {c.qk_rope_head_dim}.")
    if c.n_routed_experts:
        chosen = c.n_routed_experts // c.n_group * c.topk_group
        if c.n_routed_experts % c.n_group or c.topk_group > c.n_group or c.num_experts_per_tok > chosen:
            raise CheckpointError(
                f"config.json: {c.n_routed_experts} experts in n_group={c.n_group}, topk_group={c.topk_group} leave "
                f"{chosen} to choose num_experts_per_tok={c.num_experts_per_tok} from; these must divide and fit."
            )
