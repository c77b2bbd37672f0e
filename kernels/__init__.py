"""The ops: a CUDA tensor goes to Triton, any other to the torch twin. Decided here and nowhere else.

The functions below own the contract (shapes, dtypes, errors); `reference.py` says in torch what each one computes.
Triton is imported on first use, so that a machine without it can still run the twins.
"""

from __future__ import annotations

import importlib

import torch

from kernels import reference
from kernels.reference import FP8_MAX, INVARIANT_ROWS, has_fp8_units
from kernels.sampling import draw_gumbel, draw_multinomial, gumbel_noise, process_logits, uniform_noise

__all__ = [
    "FP8_MAX",
    "INVARIANT_ROWS",
    "act_dequant",
    "act_quant",
    "draw_gumbel",
    "draw_multinomial",
    "fp8_gemm",
    "gqa_decode",
    "gumbel_noise",
    "has_fp8_units",
    "mla_decode",
    "plain_gemm",
    "process_logits",
    "rms_norm",
    "uniform_noise",
    "weight_dequant",
    "weight_quant",
]

_SCALE_FORMATS = (None, "ue8m0")


def _implementation(room: str, tensor: torch.Tensor):
    """The module that computes on this tensor's device: `kernels.<room>` in Triton, or the twins."""
    return importlib.import_module(f"kernels.{room}") if tensor.is_cuda else reference


def _check_quantiser(x: torch.Tensor, block_size: int, scale_fmt: str | None) -> None:
    if not (x.is_floating_point() and x.element_size() >= 2):
        raise ValueError(f"can't quantise {x.dtype}: float32, bfloat16 or float16")
    if not (block_size == 128):
        raise ValueError(f"block_size must be 128, not {block_size}")
    if scale_fmt not in _SCALE_FORMATS:
        raise ValueError(f"scale_fmt must be None or 'ue8m0', not {scale_fmt!r}")


def act_quant(
    x: torch.Tensor, block_size: int = 128, scale_fmt: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantises finite activations to E4M3, one scale per row and 128 values.

    `x [..., K]` float32, bfloat16 or float16, K a multiple of 128. Returns `q [..., K]` float8_e4m3fn and
    `s [..., K/128]` float32 with `x ~ q * s`: `s = max(amax, 1e-4) / 448`, and for `scale_fmt="ue8m0"` the next power
    of two. Raises ValueError for any other shape, dtype or format.
    """
    _check_quantiser(x, block_size, scale_fmt)
    if not (x.ndim >= 1 and x.shape[-1] % 128 == 0):
        raise ValueError(f"the last dimension must be a multiple of 128: {tuple(x.shape)}")
    return _implementation("quant", x).act_quant(x, block_size, scale_fmt)


def act_dequant(q: torch.Tensor, scale: torch.Tensor, block_size: int = 128) -> torch.Tensor:
    """Restores `q [..., K]` with scales `[..., K/128]` to float32. On the GPU the products restore on the fly."""
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
    return _implementation("quant", w).weight_quant(w, block_size, scale_fmt)


def _tiles(shape: torch.Size) -> tuple[int, int]:
    return -(-shape[0] // 128), -(-shape[1] // 128)


def weight_dequant(q: torch.Tensor, scale: torch.Tensor, block_size: int = 128, *, dtype: torch.dtype) -> torch.Tensor:
    """Restores `q [N, K]` float8_e4m3fn with tile scales `[ceil(N/128), ceil(K/128)]` float32 to `dtype`."""
    if not (block_size == 128):
        raise ValueError(f"block_size must be 128, not {block_size}")
    if not (q.ndim == 2 and q.dtype == torch.float8_e4m3fn):
        raise ValueError(f"not an FP8 weight: {q.dtype} {tuple(q.shape)}")
    if not (tuple(scale.shape) == _tiles(q.shape)):
        raise ValueError(f"scales {tuple(scale.shape)} do not tile {tuple(q.shape)}")
    return _implementation("quant", q).weight_dequant(q, scale, block_size, dtype)


def fp8_gemm(
    a: torch.Tensor, a_s: torch.Tensor, b: torch.Tensor, b_s: torch.Tensor, *, out_dtype: torch.dtype
) -> torch.Tensor:
    """Block-scaled FP8 product `c[m, n] = sum over K-blocks of (a_blk . b_blk) * a_s * b_s`, summed in float32.

    `a [M, K]` float8_e4m3fn with `a_s [M, K/128]`, `b [N, K]` float8_e4m3fn with `b_s [ceil(N/128), K/128]`, scales
    float32; any M and N, K a multiple of 128. Returns `[M, N]` in `out_dtype`. For M <= `INVARIANT_ROWS` a row of the
    result depends, bit by bit, on that row of `a` alone. Raises ValueError for operands that don't fit together.
    """
    fp8 = torch.float8_e4m3fn
    if not (a.dtype == fp8 and b.dtype == fp8):
        raise ValueError(f"operands must be float8_e4m3fn, not {a.dtype} and {b.dtype}")
    if not (a.ndim == b.ndim == 2 and a.shape[1] == b.shape[1]):
        raise ValueError(f"can't multiply {tuple(a.shape)} by {tuple(b.shape)}")
    if not (a.shape[1] % 128 == 0):
        raise ValueError(f"K must be a multiple of 128, not {a.shape[1]}")
    if not (tuple(a_s.shape) == (a.shape[0], a.shape[1] // 128)):
        raise ValueError(f"a_s {tuple(a_s.shape)} does not fit a")
    if not (tuple(b_s.shape) == _tiles(b.shape)):
        raise ValueError(f"b_s {tuple(b_s.shape)} does not fit b {tuple(b.shape)}")
    return _implementation("gemm", a).fp8_gemm(a, a_s, b, b_s, out_dtype)


def plain_gemm(a: torch.Tensor, b: torch.Tensor, *, out_dtype: torch.dtype) -> torch.Tensor:
    """Plain product `a [M, K] @ b [N, K]^T`, or a batch of them `[H, M, K]`, `[H, N, K]`, summed in float32.

    For what the format keeps out of FP8: head, gate, and MLA's absorbed projections. Same row invariance as `fp8_gemm`.
    """
    if a.ndim != b.ndim or a.ndim not in (2, 3) or a.shape[-1] != b.shape[-1] or (a.ndim == 3 and len(a) != len(b)):
        raise ValueError(f"can't multiply {tuple(a.shape)} by {tuple(b.shape)}")
    if not (a.dtype == b.dtype):
        raise ValueError(f"operands must share a dtype, not {a.dtype} and {b.dtype}")
    return _implementation("gemm", a).plain_gemm(a, b, out_dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`x * rsqrt(mean(x^2) + eps) * weight` over the last dimension, in float32, returned in the dtype of `x`."""
    if not (weight.shape == x.shape[-1:]):
        raise ValueError(f"weight {tuple(weight.shape)} does not fit x {tuple(x.shape)}")
    return _implementation("norm", x).rms_norm(x, weight, eps)


def mla_decode(
    q: torch.Tensor, cache: torch.Tensor, pages: torch.Tensor, lengths: torch.Tensor, *, scale: float, value_dim: int
) -> torch.Tensor:
    """One decode step of absorbed multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

    `q [R, H, value_dim + rope]` holds each head's query against the latent, then its rotary part; `cache [pages,
    page_size, value_dim + rope]` the latents and rotary keys; `pages [R, P]` int32 each row's pages in order;
    `lengths [R]` int32 >= 1 how many tokens each row sees. Returns `[R, H, value_dim]`: still latent, to be expanded
    by the caller. A row's result depends on that row alone.
    """
    if not (q.ndim == 3 and q.shape[-1] == cache.shape[-1]):
        raise ValueError(f"q {tuple(q.shape)} does not fit {tuple(cache.shape)}")
    if not (q.dtype == cache.dtype):
        raise ValueError(f"q and cache must share a dtype, not {q.dtype} and {cache.dtype}")
    if not (pages.shape[0] == lengths.shape[0] == q.shape[0]):
        raise ValueError("pages, lengths and q must have the same rows")
    return _implementation("attention", q).mla_decode(q, cache, pages, lengths, scale, value_dim)


def gqa_decode(
    q: torch.Tensor, cache: torch.Tensor, pages: torch.Tensor, lengths: torch.Tensor, *, scale: float, kv_heads: int
) -> torch.Tensor:
    """One decode step of grouped-query attention (Ainslie et al., 2023, arXiv:2305.13245).

    `q [R, H, D]`; `cache [pages, page_size, 2 * kv_heads * D]` holds all key heads of a token, then all value heads;
    `pages [R, P]` int32 and `lengths [R]` int32 as in `mla_decode`. Head h reads key-value head `h // (H / kv_heads)`.
    Returns `[R, H, D]`. A row's result depends on that row alone.
    """
    if not (q.ndim == 3 and q.shape[1] % kv_heads == 0 and cache.shape[-1] == 2 * kv_heads * q.shape[-1]):
        raise ValueError(f"q {tuple(q.shape)} with {kv_heads} key-value heads does not fit {tuple(cache.shape)}")
    if not (q.dtype == cache.dtype):
        raise ValueError(f"q and cache must share a dtype, not {q.dtype} and {cache.dtype}")
    if not (pages.shape[0] == lengths.shape[0] == q.shape[0]):
        raise ValueError("pages, lengths and q must have the same rows")
    return _implementation("attention", q).gqa_decode(q, cache, pages, lengths, scale, kv_heads)
