"""The FP8 formats that are read, by a config's `quantization_config`."""

from __future__ import annotations

from fnmatch import translate
from typing import Any

from playground.checkpoint.config import BLOCK_SIZE, CheckpointError, QuantizationConfig, Unconverted
from playground.checkpoint.fields import Fields


def quantization_of(raw: Any) -> QuantizationConfig | None:
    """Of block-scaled FP8, which runs as it is stored, and of formats that scale a tensor or its rows, which are
    restored and quantised again as they are loaded. Scales for activations go unused: they are measured here."""
    if raw is None:
        return None
    fields, method = Fields(raw, "config.json quantization_config"), raw.get("quant_method")
    lists = ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules")
    left = [name for one in lists for name in fields.list_of(one, str)]
    if method == "fp8":
        fields.choice("activation_scheme", ("dynamic", "static"), "dynamic")
        fields.choice("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
        if raw.get("weight_block_size") not in (None, [BLOCK_SIZE, BLOCK_SIZE]):
            raise CheckpointError(
                f"config.json quantization_config: weight_block_size must be [{BLOCK_SIZE}, {BLOCK_SIZE}] or null, "
                f"not {raw['weight_block_size']!r}."
            )
    elif method == "compressed-tensors":
        _check_compressed(fields)
    elif method == "modelopt":
        fields.choice("quant_algo", ("FP8",), None)
        left = ["re:" + translate(name) if "*" in name else name for name in left]  # as a shell's patterns
    elif method != "fbgemm_fp8":
        raise CheckpointError(
            f"config.json: quantization_config must have quant_method 'fp8', 'compressed-tensors', 'modelopt' or "
            f"'fbgemm_fp8', not {method!r}."
        )
    # the head is never FP8 in these formats, whether or not a list names it
    return QuantizationConfig(fields.choice("scale_fmt", (None, "ue8m0"), None), Unconverted.of(left))


def _check_compressed(fields: Fields) -> None:
    groups = fields.raw.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else [None]:
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict) or (weights.get("num_bits"), weights.get("type")) != (8, "float"):
            raise CheckpointError("config.json quantization_config: only weights of type float and 8 bits can be read.")
        Fields(weights, "config.json quantization_config").choice("strategy", ("tensor", "channel", "block"), "tensor")
