"""From a checkpoint's tensors to a model's parameters: nothing missing, nothing unknown, each in the expected form.

A projection may come as FP8 with its scales or as plain numbers, and be expected in either form. Going to FP8 happens
on the device, tensor by tensor, and keeps each tile's relative error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import kernels
from playground.checkpoint.config import CheckpointError, ModelConfig
from playground.model.layers import Linear
from playground.model.layout import lay_out

SCALE_SUFFIX = "_scale_inv"
OTHER_SUFFIX = "_scale"  # of formats that scale a whole tensor, or each of its rows


class Header(NamedTuple):
    """What a file says about a tensor before it is read."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


_FLOATS = (torch.bfloat16, torch.float32, torch.float16)
_SCALES = (torch.float32, torch.bfloat16, torch.float8_e8m0fnu)


_UNUSED = re.compile(
    r"rotary_emb\.inv_freq$|\.self_attn\.(attn\.|[kv]_proj\.)?([kv]|output)_scale$|_proj\.input_scale(_ub)?$"
)


def weight_of(name: str) -> str:
    """The weight that a tensor of scales belongs to; of any other tensor its own name."""
    suffix = next((one for one in (SCALE_SUFFIX, OTHER_SUFFIX) if name.endswith("weight" + one)), "")
    return name.removesuffix(suffix)


def expected_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a checkpoint must hold, by name; scales belong to their weight and are not listed."""
    slots = {name: p for name, p in model.named_parameters() if not name.endswith(SCALE_SUFFIX)}
    if model.config.tie_word_embeddings:
        slots.pop("lm_head.weight", None)
    return slots


def is_skipped(config: ModelConfig, name: str) -> bool:
    """Tensors that a checkpoint may hold and we leave there: multi-token prediction layers, frequencies that some old
    exports stored, and scales for an E4M3 cache or for activations, which we measure."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer and int(layer[1]) - config.num_hidden_layers in range(config.skipped_layers):
        return True
    return _UNUSED.search(name) is not None


def unused_scales(headers: Mapping[str, Header]) -> int:
    """How many scales for a cache or for activations the files hold: they go unused."""
    return sum(_UNUSED.search(name) is not None and "_scale" in name for name in headers)


def check_headers(model: nn.Module, headers: Mapping[str, Header]) -> None:
    """Compares the files' headers with the model, so that nothing is read in vain. Raises `CheckpointError` naming
    the first tensor that is unknown, missing, misshapen or of the wrong type, and its file."""
    slots = expected_parameters(model)
    for name, header in headers.items():
        if not math.prod(header.shape):  # transformers writes shared experts that a model doesn't have
            continue
        weight = weight_of(name)
        if not is_skipped(model.config, weight) and (weight not in slots or (weight != name and weight not in headers)):
            raise CheckpointError(f"{header.file}: tensor {name} is not part of this architecture.")
    for name, slot in slots.items():
        header = headers.get(name)
        suffix = OTHER_SUFFIX if name + OTHER_SUFFIX in headers else SCALE_SUFFIX
        scale = headers.get(name + suffix)
        if header is None:
            missing = [other for other in slots if other not in headers]
            raise CheckpointError(f"tensor {name} is missing in the safetensors files, and {len(missing) - 1} more.")
        form = None if scale is None else (suffix, scale.shape, scale.dtype)
        if wrong := check_form(name, header.shape, header.dtype, form, stored_shape(model, name, slot)):
            raise CheckpointError(f"{header.file}: {wrong}")


def check_form(name: str, shape: tuple[int, ...], dtype: torch.dtype, scale: tuple | None, stored: tuple) -> str | None:
    """What is wrong with a tensor for its place, in words, or None. `scale`: suffix, shape and dtype of its scales."""
    if tuple(shape) != tuple(stored):
        return f"tensor {name} has shape {list(shape)}, not {list(stored)}."
    projection = name.endswith("_proj.weight") or name.endswith("_proj_with_mqa.weight")
    if dtype != torch.float8_e4m3fn or not projection:
        if dtype not in _FLOATS:
            return f"tensor {name} is {dtype}, not {'float8_e4m3fn or ' if projection else ''}bfloat16 or float32."
        return None if scale is None else f"tensor {name}{scale[0]} belongs to a weight that is {dtype}, not FP8."
    if scale is None:
        return f"tensor {name} is FP8 and its {name}{SCALE_SUFFIX} is missing."
    suffix, given, kind = scale
    shapes = [tiles_of(shape)] + ([(), (1,), (1, 1), shape[:1], (shape[0], 1)] if suffix == OTHER_SUFFIX else [])
    if tuple(given) not in [tuple(one) for one in shapes]:
        return f"tensor {name}{suffix} has shape {list(given)}, not {list(shapes[0])}."
    return None if kind in _SCALES else f"tensor {name}{suffix} is {kind}, not float32 or bfloat16."


def tiles_of(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(-(-n // 128) for n in shape)


def stored_shape(model: nn.Module, name: str, slot: nn.Parameter) -> tuple[int, ...]:
    """The shape that a checkpoint gives this parameter: without the padding that we add."""
    owner, _, leaf = name.rpartition(".")
    part = model.get_submodule(owner)
    stored = getattr(part, "stored", tuple(slot.shape))
    return stored if leaf == "weight" else stored[:1] if leaf == "bias" else tuple(slot.shape)


def with_scales(
    tensors: Iterable[tuple[str, torch.Tensor]],
) -> Iterator[tuple[str, torch.Tensor, tuple[str, torch.Tensor] | None]]:
    """Brings each FP8 weight together with its scales and their suffix, whichever comes first. `CheckpointError` for
    one alone."""
    waiting: dict[str, tuple[str, torch.Tensor]] = {}
    for name, tensor in tensors:
        weight = weight_of(name)
        if tensor.dtype != torch.float8_e4m3fn and weight == name:
            yield name, tensor, None
        elif (other := waiting.pop(weight, None)) is None:
            waiting[weight] = (name, tensor)
        else:
            (_, values), (of, scale) = ((name, tensor), other) if weight == name else (other, (name, tensor))
            yield weight, values, (of.removeprefix(weight), scale)
    for weight, (name, _) in waiting.items():
        raise CheckpointError(f"tensor {weight + SCALE_SUFFIX if name == weight else weight} is missing.")


@torch.no_grad()
def fill(
    model: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]], device: torch.device, dtype: torch.dtype
) -> Iterator[None]:
    """Gives every parameter its tensor, one at a time: yields behind each. Raises `CheckpointError` for what is
    missing, unknown or does not fit."""
    slots = expected_parameters(model)
    for name, tensor, scale in with_scales(tensors):
        if is_skipped(model.config, name) or not tensor.numel():
            continue
        slot = slots.pop(name, None)
        if slot is None:
            raise CheckpointError(f"tensor {name} is not part of this architecture, or stands in two files.")
        form = None if scale is None else (scale[0], scale[1].shape, scale[1].dtype)
        stored = stored_shape(model, name, slot)
        if wrong := check_form(name, tensor.shape, tensor.dtype, form, stored):
            raise CheckpointError(wrong)
        owner, _, leaf = name.rpartition(".")
        part = model.get_submodule(owner)
        tensor = _finite(tensor.to(device), name)
        if isinstance(part, Linear) and leaf == "weight":
            scale = None if scale is None else _checked(scale[1].to(device).float(), tensor, name + scale[0])
            _fill_projection(part, tensor, scale, dtype)
        else:
            kept = torch.float32 if leaf == "e_score_correction_bias" else dtype
            tensor = lay_out(tensor, getattr(part, "rows", None), 0)
            padding = [n for size, end in zip(tensor.shape, slot.shape, strict=True) for n in (end - size, 0)][::-1]
            setattr(part, leaf, nn.Parameter(F.pad(tensor.to(kept), padding), requires_grad=False))
        yield
    if slots:
        raise CheckpointError(f"tensor {next(iter(slots))} is missing, and {len(slots) - 1} more.")


def _finite(tensor: torch.Tensor, name: str) -> torch.Tensor:
    if tensor.dtype == torch.float8_e4m3fn:
        whole = (tensor.view(torch.uint8) & 0x7F) != 0x7F  # E4M3 has no infinity, and one NaN of either sign
    else:
        whole = tensor.isfinite()
    if not bool(whole.all()):
        raise CheckpointError(f"tensor {name} holds a NaN or an infinity: it is damaged; download it again.")
    return tensor


def _checked(scale: torch.Tensor, weight: torch.Tensor, name: str) -> torch.Tensor:
    """Scales that can be multiplied by: positive, or 0 where a whole tile is zero."""
    if not bool((scale.isfinite() & (scale >= 0)).all()):
        raise CheckpointError(f"tensor {name} holds a scale that is not a positive finite number.")
    tiled = scale.shape == tiles_of(weight.shape)
    for row, column in (scale == 0).nonzero().tolist() if tiled else ():
        tile = weight[row * 128 : (row + 1) * 128, column * 128 : (column + 1) * 128]
        if bool(tile.float().any()):
            raise CheckpointError(f"tensor {name} holds a scale of 0 for a tile that is not.")
    return scale


def _fill_projection(part: Linear, weight: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> None:
    if scale is not None and scale.shape != tiles_of(weight.shape):  # of the whole tensor, or of each row
        weight, scale, part.twice = weight.float() * scale.reshape(-1, 1), None, part.is_fp8
    if part.rows or part.columns:
        if scale is not None:
            weight, scale, part.twice = kernels.weight_dequant(weight, scale, dtype=torch.float32), None, part.is_fp8
        weight = lay_out(lay_out(weight, part.rows, 0), part.columns, 1)
    if not part.is_fp8:
        weight = weight.to(dtype) if scale is None else kernels.weight_dequant(weight, scale, dtype=dtype)
    elif scale is None:
        plain = weight
        weight, scale = kernels.weight_quant(plain, scale_fmt=part.scale_fmt)
        part.tile_errors = tile_errors(plain, weight, scale)
    rows, cols = weight.shape
    part.weight[:rows, :cols].copy_(weight)  # what is left of a padded weight stays zero
    if part.is_fp8:
        part.weight_scale_inv[: scale.shape[0], : scale.shape[1]].copy_(scale)


def tile_errors(plain: torch.Tensor, q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Relative error of each 128x128 tile, `[ceil(N/128), ceil(K/128)]` float32: norm of the difference to norm."""
    plain = plain.float()
    difference = kernels.weight_dequant(q, scale, dtype=torch.float32) - plain

    def norms(t: torch.Tensor) -> torch.Tensor:
        t = F.pad(t, (0, -t.shape[1] % 128, 0, -t.shape[0] % 128))
        return t.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).square().sum(dim=(1, 3)).sqrt()

    return norms(difference) / norms(plain).clamp(min=1e-30)
