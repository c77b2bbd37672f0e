"""SwiGLU of a product's partial sums, left in the form that the next product reads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.forms import Form, Formed
from kernels.launch import TRITON_DTYPE, let_next_start, overlap, wait_for_previous
from kernels.norm.partials import add_partials
from kernels.quant.e4m3 import allocate, emit, emitted


@triton.jit
def gated(gate, up, ROUND: tl.constexpr):
    """`silu(gate) * up` in float32, of numbers that ROUND holds, with every result rounded to it."""
    silu = (gate / (1.0 + tl.exp(-gate))).to(ROUND).to(tl.float32)
    return (silu * up).to(ROUND).to(tl.float32)


@triton.jit
def swiglu_kernel(
    partials_ptr, plain_ptr, q_ptr, s_ptr, blocks, stride, row_stride,
    PARTIALS: tl.constexpr, PLAIN: tl.constexpr, FP8: tl.constexpr, UE8M0: tl.constexpr, ROUND: tl.constexpr,
    BLOCKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    cols = block[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = tl.broadcast_to((block < blocks)[:, None], (BLOCKS, 128))
    dim = blocks * 128
    let_next_start(PDL)
    wait_for_previous(PDL)
    zero = tl.zeros((BLOCKS, 128), dtype=tl.float32)
    at = row * row_stride + cols
    gate = add_partials(zero, partials_ptr, at, stride, inside, PARTIALS).to(ROUND).to(tl.float32)
    up = add_partials(zero, partials_ptr, at + dim, stride, inside, PARTIALS).to(ROUND).to(tl.float32)
    y = gated(gate, up, ROUND)
    out = row * dim + cols
    emit(y, out, inside, row * blocks + block, block < blocks, plain_ptr, q_ptr, s_ptr, PLAIN, FP8, UE8M0)


def swiglu(partials: torch.Tensor, form: Form, *, dtype: torch.dtype) -> Formed:
    count, rows, width = partials.shape
    out = allocate(form, rows, width // 2, partials.new_empty(0, dtype=dtype))
    pointers, flags = emitted(form, out, partials)
    group = 1 if rows <= 64 else 8
    if rows:
        swiglu_kernel[(rows, triton.cdiv(width // 256, group))](
            partials, *pointers, width // 256, *partials.stride()[:2], PARTIALS=count, **flags,
            ROUND=TRITON_DTYPE[dtype],
            BLOCKS=group, num_warps=1 if group == 1 else 4, **overlap(partials),
        )  # fmt: skip
    return out
