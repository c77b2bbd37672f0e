"""Products in Triton: FP8 with block scales, plain ones, and those of a mixture's experts.

Few rows are `narrow.py`, on Hopper `sm90_streamed.py`; many are `wide.py`. The line between them is `INVARIANT_ROWS`,
up to which a row's result depends, bit by bit, on that row alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.forms import INVARIANT_ROWS, Form, Formed
from kernels.gemm.narrow import narrow
from kernels.gemm.sm90_streamed import streamed, streams
from kernels.gemm.wide import wide, wide_swiglu
from kernels.launch import is_hopper, let_next_start, overlap, wait_for_previous
from kernels.norm.add_norm import swiglu


def gemm_parts(a, b, a_s, b_s, out_dtype: torch.dtype, decode: bool | None = None) -> torch.Tensor:
    """`decode=True` takes the path of cards without FP8 units on any card; None asks the card."""
    if len(a) > INVARIANT_ROWS:
        return wide(a, b, a_s, b_s, out_dtype, decode=decode)
    if a_s is not None and not decode and is_hopper(a) and streams(a.shape[1]):
        return streamed(a, b, a_s, b_s, out_dtype)
    return narrow(a, b, a_s, b_s, decode=decode)


def gemm_swiglu(a, b, a_s, b_s, form: Form, dtype: torch.dtype) -> Formed:
    if len(a) > INVARIANT_ROWS:
        return wide_swiglu(a, b, a_s, b_s, form, dtype)
    return swiglu(gemm_parts(a, b, a_s, b_s, dtype), dtype, form)


def expert_gemm(a, b, a_s, b_s, experts, weights, out_dtype: torch.dtype, shared: int = 0) -> torch.Tensor:
    if len(experts) <= INVARIANT_ROWS:
        if a_s is not None and is_hopper(a) and streams(a.shape[1]):
            c = streamed(a, b, a_s, b_s, out_dtype, experts, weights, shared)
        else:
            c = narrow(a, b, a_s, b_s, experts, weights)
    else:
        c = wide(a, b, a_s, b_s, out_dtype, experts, weights)
    return c.view(*experts.shape, -1)


@triton.jit
def add_up_kernel(parts_ptr, c_ptr, count, COUNT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    let_next_start(PDL)
    wait_for_previous(PDL)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for p in tl.static_range(COUNT):
        total += tl.load(parts_ptr + p * count + at, mask=inside, other=0.0)
    tl.store(c_ptr + at, total.to(c_ptr.dtype.element_ty), mask=inside)


def add_up(parts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    count = parts[0].numel()
    if len(parts) == 1 and parts.dtype == dtype:
        return parts[0]
    c = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    if count:
        add_up_kernel[(triton.cdiv(count, 1024),)](parts, c, count, COUNT=len(parts), BLOCK=1024, **overlap(parts))
    return c


def fp8_gemm(a, a_s, b, b_s, out_dtype: torch.dtype, decode: bool | None = None) -> torch.Tensor:
    return add_up(gemm_parts(a, b, a_s, b_s, out_dtype, decode), out_dtype)


def plain_gemm(a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    b = b.contiguous()
    if len(a) <= INVARIANT_ROWS:
        return add_up(narrow(a, b, None, None), out_dtype)
    return wide(a, b, None, None, out_dtype)[0]
