"""Block quantisation: what each op takes and gives, and the errors for what does not fit."""

from __future__ import annotations

import torch

from kernels import reference
from kernels.dispatch import implementation
from kernels.forms import Form, Formed

_SCALE_FORMATS = (None, "ue8m0")


def act_quant(
    x: torch.Tensor, block_size: int = 128, scale_fmt: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantises finite activations to E4M3, one scale per row and 128 values.

    `x [..., K]` float32, bfloat16 or float16, K a multiple of 128. Returns `q [..., K]` float8_e4m3fn and
    `s [..., K/128]` float32 with `x ~ q * s`: `s = max(amax, 1e-4) / 448`, and for `scale_fmt="ue8m0"` the next power
    of two. Raises ValueError for any other shape, dtype or format.
    """
    _check_activations(x, block_size, scale_fmt)
    return implementation("act_quant", x)(x, block_size, scale_fmt)


def act_dequant(q: torch.Tensor, scale: torch.Tensor, block_size: int = 128) -> torch.Tensor:
    """Restores `q [..., K]` with scales `[..., K/128]` to float32. Torch on every device: on a card the products
    restore on the fly."""
    return reference.act_dequant(q, scale, block_size)


def weight_quant(
    w: torch.Tensor, block_size: int = 128, scale_fmt: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantises a finite weight `[N, K]` to E4M3, one scale per 128x128 tile; ragged edges are tiles too.

    Returns `q [N, K]` float8_e4m3fn and `s [ceil(N/128), ceil(K/128)]` float32, scaled as in `act_quant`.
    """
    _check_quantiser(w, block_size, scale_fmt)
    if not (w.ndim == 2):
        raise ValueError(f"a weight has two dimensions: {tuple(w.shape)}")
    return implementation("weight_quant", w)(w, block_size, scale_fmt)


def weight_dequant(q: torch.Tensor, scale: torch.Tensor, block_size: int = 128, *, dtype: torch.dtype) -> torch.Tensor:
    """Restores `q [N, K]` float8_e4m3fn with tile scales `[ceil(N/128), ceil(K/128)]` float32 to `dtype`."""
    if not (block_size == 128):
        raise ValueError(f"block_size must be 128, not {block_size}")
    if not (q.ndim == 2 and q.dtype == torch.float8_e4m3fn):
        raise ValueError(f"not an FP8 weight: {q.dtype} {tuple(q.shape)}")
    if not (tuple(scale.shape) == tiles_of(q.shape)):
        raise ValueError(f"scales {tuple(scale.shape)} do not tile {tuple(q.shape)}")
    return implementation("weight_dequant", q)(q, scale, block_size, dtype=dtype)


def formed(x: torch.Tensor, form: Form) -> Formed:
    """Leaves `x [T, K]` in the form that the ops after it read."""
    if form.fp8:
        _check_activations(x, 128, None)
    return implementation("formed", x)(x, form)


def tiles_of(shape: torch.Size) -> tuple[int, int]:
    """How many 128x128 tiles a weight of this shape has, along N and along K."""
    return -(-shape[0] // 128), -(-shape[1] // 128)


def _check_quantiser(x: torch.Tensor, block_size: int, scale_fmt: str | None) -> None:
    if not (x.is_floating_point() and x.element_size() >= 2):
        raise ValueError(f"can't quantise {x.dtype}: float32, bfloat16 or float16")
    if not (block_size == 128):
        raise ValueError(f"block_size must be 128, not {block_size}")
    if scale_fmt not in _SCALE_FORMATS:
        raise ValueError(f"scale_fmt must be None or 'ue8m0', not {scale_fmt!r}")


def _check_activations(x: torch.Tensor, block_size: int, scale_fmt: str | None) -> None:
    _check_quantiser(x, block_size, scale_fmt)
    if not (x.ndim >= 1 and x.shape[-1] % 128 == 0):
        raise ValueError(f"the last dimension must be a multiple of 128: {tuple(x.shape)}")
