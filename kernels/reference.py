"""The definition of right: one plain-torch twin per kernel, for any device, upcast to float32.

Formats: activations in blocks of 128 along a row, weights in tiles of 128x128, values E4M3 (`float8_e4m3fn`, largest
448), scales float32, restored by `value * scale` (DeepSeek-V3 technical report, section 3.3; arXiv:2412.19437).
Shapes, dtypes and errors are stated once, at the public functions in `kernels/__init__.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

FP8_MAX = 448.0
AMAX_FLOOR = 1e-4  # keeps the scale of an all-zero block away from zero
INVARIANT_ROWS = 16  # up to this many rows, a product's row depends on that row alone (see `plain_gemm`)


def has_fp8_units(device: torch.device) -> bool:
    """E4M3 tensor cores came with compute capability 8.9. Before it the kernels decode to float16, exactly; off CUDA
    (Triton's interpreter) the FP8 path runs."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def _scale_of(amax: torch.Tensor, scale_fmt: str | None) -> torch.Tensor:
    """`max(amax, 1e-4) / 448`, for ue8m0 rounded up to a power of two, exactly, by taking the float apart."""
    scale = amax.clamp_(min=AMAX_FLOOR).div_(FP8_MAX)
    if scale_fmt == "ue8m0":
        mantissa, exponent = torch.frexp(scale)  # scale = mantissa * 2^exponent, mantissa in [0.5, 1)
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).to(exponent.dtype))
    return scale


def act_quant(x: torch.Tensor, block_size: int, scale_fmt: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = x.float().reshape(*x.shape[:-1], -1, block_size)
    scale = _scale_of(blocks.abs().amax(-1, keepdim=True), scale_fmt)
    # |x / s| exceeds 448 by rounding at most: the cast, to nearest even, needs no clamp
    return (blocks / scale).to(torch.float8_e4m3fn).view(x.shape), scale.squeeze(-1)


def act_dequant(q: torch.Tensor, scale: torch.Tensor, block_size: int) -> torch.Tensor:
    return q.float().view(*scale.shape, block_size).mul_(scale.unsqueeze(-1)).view(q.shape)


def _spread(scale: torch.Tensor, shape: torch.Size, block_size: int) -> torch.Tensor:
    """Tile scales repeated over the elements of a weight `[N, K]`, ragged edges cut."""
    rows, cols = shape
    return scale.repeat_interleave(block_size, 0)[:rows].repeat_interleave(block_size, 1)[:, :cols]


def weight_quant(w: torch.Tensor, block_size: int, scale_fmt: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    rows, cols = w.shape
    padded = F.pad(w.float(), (0, -cols % block_size, 0, -rows % block_size))
    tiles = padded.unflatten(1, (-1, block_size)).unflatten(0, (-1, block_size))  # [N/128, 128, K/128, 128]
    scale = _scale_of(tiles.abs().amax(dim=(1, 3)), scale_fmt)
    return (w.float() / _spread(scale, w.shape, block_size)).to(torch.float8_e4m3fn), scale


def weight_dequant(q: torch.Tensor, scale: torch.Tensor, block_size: int, dtype: torch.dtype) -> torch.Tensor:
    return (q.float() * _spread(scale, q.shape, block_size)).to(dtype)


def fp8_gemm(
    a: torch.Tensor, a_s: torch.Tensor, b: torch.Tensor, b_s: torch.Tensor, out_dtype: torch.dtype
) -> torch.Tensor:
    out = torch.zeros(a.shape[0], b.shape[0], dtype=torch.float32, device=a.device)
    for k, (a_blk, b_blk) in enumerate(zip(a.split(128, -1), b.split(128, -1), strict=True)):
        tile_scale = b_s[:, k].repeat_interleave(128)[: b.shape[0]]
        out += (a_blk.float() @ b_blk.float().T) * a_s[:, k : k + 1] * tile_scale
    return out.to(out_dtype)


def plain_gemm(a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """Few rows go one by one: a BLAS picks its summation order by the number of rows, and a running row's result
    must not depend on how many others share its step."""
    if 1 < a.shape[-2] <= INVARIANT_ROWS:
        return torch.cat([plain_gemm(row, b, out_dtype) for row in a.split(1, -2)], dim=-2)
    a, b = a.float(), b.float()
    return (F.linear(a, b) if b.ndim == 2 else a @ b.mT).to(out_dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


def mla_decode(
    q: torch.Tensor, cache: torch.Tensor, pages: torch.Tensor, lengths: torch.Tensor, scale: float, value_dim: int
) -> torch.Tensor:
    out = torch.empty(*q.shape[:-1], value_dim, dtype=q.dtype, device=q.device)
    for row, length in enumerate(lengths.tolist()):
        used = pages[row, : -(-length // cache.shape[1])]
        keys = cache[used].flatten(0, 1)[:length].float()  # [length, latent]
        probs = ((q[row].float() @ keys.T) * scale).softmax(-1)
        out[row] = (probs @ keys[:, :value_dim]).to(q.dtype)
    return out


def gqa_decode(
    q: torch.Tensor, cache: torch.Tensor, pages: torch.Tensor, lengths: torch.Tensor, scale: float, kv_heads: int
) -> torch.Tensor:
    out = torch.empty_like(q)
    for row, length in enumerate(lengths.tolist()):
        used = pages[row, : -(-length // cache.shape[1])]
        seen = cache[used].flatten(0, 1)[:length].float().unflatten(-1, (2, kv_heads, -1))
        keys, values = seen.permute(1, 2, 0, 3)  # [G, length, D] each
        probs = (q[row].float().unflatten(0, (kv_heads, -1)) @ keys.mT * scale).softmax(-1)  # [G, H/G, length]
        out[row] = (probs @ values).flatten(0, 1).to(q.dtype)
    return out
