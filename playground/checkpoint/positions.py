"""Where tokens stand: rotary embedding and its scalings, the context, and layers that see a window or do without."""

from __future__ import annotations

from typing import Any

from playground.checkpoint.config import (
    CheckpointError,
    LinearScaling,
    Llama3Scaling,
    LongScaling,
    RopeConfig,
    Scaling,
    YarnScaling,
)
from playground.checkpoint.fields import Fields


def _scaling(raw: Any, top: Fields) -> Scaling | None:
    if raw is None:
        return None
    fields, context = Fields(raw, "config.json rope_scaling"), top.integer("max_position_embeddings")
    kind, original = raw.get("rope_type", raw.get("type")), "original_max_position_embeddings"
    if kind in (None, "default", "dynamic"):  # the last stretches a text beyond the context, which no row can be
        return None
    if kind not in ("yarn", "llama3", "linear", "longrope", "su"):
        raise CheckpointError(
            f"config.json: rope_scaling of type {kind!r} is not supported; yarn, llama3, linear, dynamic, longrope are."
        )
    stated = fields if raw.get(original) is not None else top
    before = stated.integer(original, context, least=2)
    if kind == "linear":
        return LinearScaling(fields.number("factor", least=1.0))
    if kind in ("longrope", "su"):
        return LongScaling(
            short=fields.numbers("short_factor"),
            long=fields.numbers("long_factor"),
            original_max_position_embeddings=before,
            factor=fields.number("factor", context / before) if original not in top.raw else context / before,
            attention_factor=fields.maybe("attention_factor"),
        )
    factor = fields.number("factor", context / before, least=1.0)
    if kind == "llama3":
        scaling = Llama3Scaling(
            factor, fields.integer(original), fields.number("low_freq_factor"), fields.number("high_freq_factor")
        )
        if not 0 < scaling.low_freq_factor < scaling.high_freq_factor:
            raise CheckpointError("config.json rope_scaling: low_freq_factor must lie between 0 and high_freq_factor.")
        return scaling
    return YarnScaling(
        factor=factor,
        original_max_position_embeddings=before,
        beta_fast=fields.number("beta_fast", 32.0) or 32.0,
        beta_slow=fields.number("beta_slow", 1.0) or 1.0,
        mscale=fields.number("mscale", 0.0),
        mscale_all_dim=fields.number("mscale_all_dim", 0.0),
        attention_factor=fields.maybe("attention_factor"),
        truncate=fields.choice("truncate", (True, False), True),
    )


def rope_of(fields: Fields, dim: int, interleaved: bool) -> RopeConfig:
    # transformers 5 writes one rope_parameters where the Hub's files have rope_theta and rope_scaling; of both, the
    # older name counts
    raw = fields.raw.get("rope_scaling") or fields.raw.get("rope_parameters")
    inner = isinstance(raw, dict) and "rope_theta" in raw
    theta = (Fields(raw, "config.json rope_parameters") if inner else fields).number("rope_theta", 10000.0, least=2.0)
    if dim % 2:
        raise CheckpointError(f"config.json: the rotary dimension must be even, not {dim}.")
    scaling = _scaling(raw, fields)
    if isinstance(scaling, LongScaling) and not len(scaling.short) == len(scaling.long) == dim // 2:
        raise CheckpointError(f"config.json: short_factor and long_factor must have {dim // 2} numbers each.")
    return RopeConfig(theta, dim, interleaved, scaling)


def context_of(fields: Fields, rope: RopeConfig) -> int:
    """Tokens that a row may have."""
    stated, scaling, raw = fields.integer("max_position_embeddings"), rope.scaling, fields.raw
    before = (raw.get("rope_scaling") or raw.get("rope_parameters") or {}).get("original_max_position_embeddings")
    if isinstance(scaling, YarnScaling) and before is not None:  # files state the context before or after stretching
        stated = max(stated, int(scaling.factor * scaling.original_max_position_embeddings))
    return stated


def sliding_layers(fields: Fields, family: str, unrotated: frozenset[int]) -> frozenset[int]:
    """Layers that see a window of the last tokens, as transformers has it: all of a Mistral or Qwen3-MoE that states
    one, those of a list, those from `max_window_layers` on, or SmolLM3's without rotary embedding."""
    layers, raw = range(fields.integer("num_hidden_layers")), fields.raw
    switched = family in ("qwen2", "qwen3", "qwen3_moe", "smollm3")
    used = family == "mistral" or (switched and fields.choice("use_sliding_window", (True, False), False))
    if not used or raw.get("sliding_window") is None:
        return frozenset()
    if family in ("mistral", "qwen3_moe"):
        return frozenset(layers)
    kinds = fields.list_of("layer_types", str)
    if kinds:
        if len(kinds) != len(layers) or not {"full_attention", "sliding_attention"}.issuperset(kinds):
            raise CheckpointError(
                f"config.json: layer_types must give {len(layers)} layers full_attention or sliding_attention."
            )
        return frozenset(i for i in layers if kinds[i] == "sliding_attention")
    if family == "smollm3":
        return unrotated
    return frozenset(layers[fields.integer("max_window_layers", least=0) :])


def unrotated_layers(fields: Fields) -> frozenset[int]:
    """SmolLM3 leaves every fourth layer, or those that its list marks with 0, without rotary embedding."""
    layers, listed = fields.integer("num_hidden_layers"), fields.list_of("no_rope_layers", int)
    every = fields.integer("no_rope_layer_interval", 4)
    marks = listed or tuple(int((i + 1) % every != 0) for i in range(layers))
    if len(marks) != layers:
        raise CheckpointError(f"config.json: no_rope_layers has {len(marks)} entries for {layers} layers.")
    return frozenset(i for i, rotated in enumerate(marks) if not rotated)
