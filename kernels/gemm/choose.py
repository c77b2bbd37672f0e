"""Which product runs where.

| rows | FP8 on Hopper | FP8 on other cards with TMA | else: plain numbers, experts, older cards |
| --- | --- | --- | --- |
| up to `INVARIANT_ROWS` | `sm90_streamed.py`, experts too | `narrow.py` | `narrow.py` |
| more | `sm90_specialized.py` where its tiles fill the card, else `tma.py` | `tma.py` | `wide.py` |

Up to `INVARIANT_ROWS` a row's result depends, bit by bit, on that row alone. `decode=True` takes the path of cards
without FP8 units on any card; None asks the card.
"""

from __future__ import annotations

import torch

from kernels.forms import INVARIANT_ROWS, Form, Formed
from kernels.gemm.add_up import add_up
from kernels.gemm.narrow import narrow
from kernels.gemm.sm90_specialized import WHOLE, Cut, cut_for, specialized_product, specialized_swiglu
from kernels.gemm.sm90_streamed import streamed, streams
from kernels.gemm.tma import tma_product
from kernels.gemm.wide import wide
from kernels.launch import has_tma, is_hopper, multiprocessors
from kernels.norm.swiglu import swiglu


def _streams(a: torch.Tensor, a_s: torch.Tensor | None) -> bool:
    return a_s is not None and is_hopper(a) and streams(a.shape[1])


def special_cut(a: torch.Tensor, n: int, out_dtype: torch.dtype) -> Cut | None:
    """How a product of `a` with N rows of a weight falls into units for warps with roles; None: not their product."""
    if not is_hopper(a) or out_dtype.itemsize != 2 or n % 8:
        return None
    rows, k = a.shape
    return cut_for(rows, n, -(-k // 128), multiprocessors(a))


def gemm_partials(
    a: torch.Tensor,
    b: torch.Tensor,
    a_s: torch.Tensor | None = None,
    b_s: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype,
    decode: bool | None = None,
) -> torch.Tensor:
    if len(a) <= INVARIANT_ROWS:
        if not decode and _streams(a, a_s):
            return streamed(a, b, a_s, b_s, out_dtype)
        return narrow(a, b, a_s, b_s, decode=decode)
    if a_s is None or decode or not has_tma(a):
        return wide(a, b, a_s, b_s, out_dtype, decode=decode)
    a = a.contiguous()
    if cut := special_cut(a, len(b), out_dtype):
        return specialized_product(a, b, a_s, b_s, out_dtype, cut)
    return tma_product(a, b, a_s, b_s, out_dtype)


def gemm_swiglu(
    a: torch.Tensor,
    b: torch.Tensor,
    a_s: torch.Tensor | None = None,
    b_s: torch.Tensor | None = None,
    *,
    form: Form,
    dtype: torch.dtype,
) -> Formed:
    alone = form.fp8 and not form.plain and not form.ue8m0  # what a product's end can leave
    if len(a) > INVARIANT_ROWS and a_s is not None and alone and special_cut(a, len(b), dtype) == WHOLE:
        return specialized_swiglu(a.contiguous(), b, a_s, b_s, dtype)
    return swiglu(gemm_partials(a, b, a_s, b_s, out_dtype=dtype), form, dtype=dtype)


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
    if len(experts) > INVARIANT_ROWS:
        c = wide(a, b, a_s, b_s, out_dtype, experts, weights)
    elif _streams(a, a_s):
        c = streamed(a, b, a_s, b_s, out_dtype, experts, weights, shared)
    else:
        c = narrow(a, b, a_s, b_s, experts, weights)
    return c.view(*experts.shape, -1)


def fp8_gemm(
    a: torch.Tensor,
    a_s: torch.Tensor,
    b: torch.Tensor,
    b_s: torch.Tensor,
    *,
    out_dtype: torch.dtype,
    decode: bool | None = None,
) -> torch.Tensor:
    return add_up(gemm_partials(a, b, a_s, b_s, out_dtype=out_dtype, decode=decode), dtype=out_dtype)


def plain_gemm(a: torch.Tensor, b: torch.Tensor, *, out_dtype: torch.dtype) -> torch.Tensor:
    return add_up(gemm_partials(a, b.contiguous(), out_dtype=out_dtype), dtype=out_dtype)
