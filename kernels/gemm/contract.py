"""The products: what each takes and gives, and the errors for what does not fit."""

from __future__ import annotations

import torch

from kernels.dispatch import implementation
from kernels.forms import Form, Formed
from kernels.quant.contract import tiles_of


def fp8_gemm(
    a: torch.Tensor, a_s: torch.Tensor, b: torch.Tensor, b_s: torch.Tensor, *, out_dtype: torch.dtype
) -> torch.Tensor:
    """Block-scaled FP8 product `c[m, n] = sum over K-blocks of (a_blk . b_blk) * a_s * b_s`, summed in float32.

    `a [M, K]` float8_e4m3fn with `a_s [M, K/128]`, `b [N, K]` float8_e4m3fn with `b_s [ceil(N/128), K/128]`, scales
    float32; any M and N, K a multiple of 128; `b` and `b_s` contiguous. Returns `[M, N]` in `out_dtype`. For M <=
    `INVARIANT_ROWS` a row of the result depends, bit by bit, on that row of `a` alone. Raises ValueError for operands
    that don't fit together.
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
    if not (tuple(b_s.shape) == tiles_of(b.shape)):
        raise ValueError(f"b_s {tuple(b_s.shape)} does not fit b {tuple(b.shape)}")
    if not (b.is_contiguous() and b_s.is_contiguous()):  # a copy made here would be read before it is there
        raise ValueError("weights and their scales must be contiguous")
    return implementation("fp8_gemm", a)(a, a_s, b, b_s, out_dtype=out_dtype)


def plain_gemm(a: torch.Tensor, b: torch.Tensor, *, out_dtype: torch.dtype) -> torch.Tensor:
    """Plain product `a [M, K] @ b [N, K]^T`, summed in float32, for what the format keeps out of FP8 (head, gate).
    Same row invariance as `fp8_gemm`."""
    _check_product(a, b, None, None)
    return implementation("plain_gemm", a)(a, b, out_dtype=out_dtype)


def gemm_partials(
    a: torch.Tensor,
    b: torch.Tensor,
    a_s: torch.Tensor | None = None,
    b_s: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """`fp8_gemm`, or without scales `plain_gemm`, as split-K partial sums `[P, M, N]`. The op that reads them must load
    them anyway and adds them up in passing. They are float32, or `out_dtype` where K is not split (P = 1)."""
    _check_product(a, b, a_s, b_s)
    if not b.is_contiguous():
        raise ValueError("weights must be contiguous")
    return implementation("gemm_partials", a)(a, b, a_s, b_s, out_dtype=out_dtype)


def gemm_swiglu(
    a: torch.Tensor,
    b: torch.Tensor,
    a_s: torch.Tensor | None = None,
    b_s: torch.Tensor | None = None,
    *,
    form: Form,
    dtype: torch.dtype,
) -> Formed:
    """`swiglu` of `gemm_partials` with `b [2 * I, K]`, gate and then up: on some cards one kernel for many rows.
    Returns `[T, I]` in `form`."""
    _check_product(a, b, a_s, b_s)
    if not b.is_contiguous() or len(b) % 256:
        raise ValueError(f"gate and up must be contiguous, and two multiples of 128: {tuple(b.shape)}")
    return implementation("gemm_swiglu", a)(a, b, a_s, b_s, form=form, dtype=dtype)


def expert_gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    experts: torch.Tensor,
    a_s: torch.Tensor | None = None,
    b_s: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype,
    shared: int = 0,
) -> torch.Tensor:
    """Products with the experts that each row chose: `b [E, N, K]`, `experts [T, k]` int32; `a [T, K]`, read by all
    choices of a row, or `[T * k, K]`, one row per choice. Scales as in `fp8_gemm`, `b_s [E, ceil(N/128), K/128]`.
    Multiplied by `weights [T, k]` float32 where given. The last `shared` choices of every row are the last experts of
    `b`, which may be read before `experts` is. Returns `[T, k, N]`: float32 for few rows, else `out_dtype`."""
    _check_product(a, b, a_s, b_s)
    if not all(t is None or t.is_contiguous() for t in (b, experts, weights)):
        raise ValueError("weights, experts and their weights must be contiguous")
    if experts.ndim != 2 or len(a) not in (len(experts), experts.numel()) or not 0 <= shared <= experts.shape[1]:
        raise ValueError(f"experts {tuple(experts.shape)}, {shared} of them shared, do not fit {len(a)} rows")
    return implementation("expert_gemm", a)(a, b, experts, a_s, b_s, weights, out_dtype=out_dtype, shared=shared)


def add_up(partials: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
    """Partial sums `[P, ...]`, contiguous, added in order in float32 and rounded to `dtype`."""
    return implementation("add_up", partials)(partials, dtype=dtype)


def _check_product(a: torch.Tensor, b: torch.Tensor, a_s: torch.Tensor | None, b_s: torch.Tensor | None) -> None:
    if a.ndim != 2 or a.shape[-1] != b.shape[-1] or a.dtype != b.dtype or (a_s is None) != (b_s is None):
        raise ValueError(f"can't multiply {a.dtype} {tuple(a.shape)} by {b.dtype} {tuple(b.shape)}")
    if not (b_s is None or b_s.is_contiguous()):
        raise ValueError("scales of weights must be contiguous")
