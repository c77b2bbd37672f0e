"""Residual sum and RMSNorm: adds up the partial sums of the product before it, and leaves its result in the form that
the next product reads. One program per row, so a row's numbers never depend on how many rows there are."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.forms import Form, Formed
from kernels.launch import let_next_start, overlap, wait_for_previous
from kernels.norm.partials import add_partials
from kernels.quant.e4m3 import allocate, emit, emitted


@triton.jit
def add_norm_kernel(
    x_ptr, a_ptr, b_ptr, w_ptr, sum_ptr, plain_ptr, q_ptr, s_ptr, gate_ptr, logits_ptr, dim, x_row, a_part, a_row,
    b_part, b_row, eps, experts,
    A: tl.constexpr, B: tl.constexpr, PLAIN: tl.constexpr, FP8: tl.constexpr, UE8M0: tl.constexpr,
    BLOCKS: tl.constexpr, PAIRS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program 0 of a row stores its sum and norm. The others, where there is a gate, compute the norm again, which
    costs less than waiting for it, and multiply it with PAIRS pairs of the gate's rows."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    block = tl.arange(0, BLOCKS)
    cols = block[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = cols < dim
    w = tl.load(w_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    if PAIRS:  # no kernel writes a gate: its first rows are loaded before the norm is there
        expert = (part - 1) * (2 * PAIRS) + tl.arange(0, 2)
        gate_at = expert[:, None, None] * dim + cols[None, :, :]
        there = (expert >= 0)[:, None, None] & inside[None, :, :]
        gate = tl.load(gate_ptr + gate_at, mask=there & (expert < experts)[:, None, None], other=0.0)
    let_next_start(PDL)
    wait_for_previous(PDL)
    x = tl.load(x_ptr + row * x_row + cols, mask=inside, other=0.0)
    if A + B > 0:
        update = tl.zeros((BLOCKS, 128), dtype=tl.float32)
        update = add_partials(update, a_ptr, row * a_row + cols, a_part, inside, A)
        update = add_partials(update, b_ptr, row * b_row + cols, b_part, inside, B)
        x = (x.to(tl.float32) + update.to(x.dtype).to(tl.float32)).to(x.dtype)
        tl.store(sum_ptr + row * dim + cols, x, mask=inside & (part == 0))
    wide = x.to(tl.float32)
    square = tl.sum(tl.sum(wide * wide, axis=1), axis=0)
    y = (wide * tl.rsqrt(square / dim + eps) * w).to(x.dtype).to(tl.float32)
    at, blocks = row * dim + cols, dim // 128
    if part == 0:
        emit(y, at, inside, row * blocks + block, block < blocks, plain_ptr, q_ptr, s_ptr, PLAIN, FP8, UE8M0)
    if PAIRS:
        for pair in tl.static_range(PAIRS):
            logits = tl.sum(tl.sum(gate.to(tl.float32) * y[None, :, :], axis=2), axis=1)
            tl.store(logits_ptr + row * experts + expert, logits, mask=(part > 0) & (expert < experts))
            if pair + 1 < PAIRS:
                expert += 2
                gate_at += 2 * dim
                gate = tl.load(gate_ptr + gate_at, mask=there & (expert < experts)[:, None, None], other=0.0)


def add_norm(
    x: torch.Tensor, partials: list[torch.Tensor], weight: torch.Tensor, eps: float, form: Form
) -> tuple[torch.Tensor, Formed]:
    return norm_and_gate(x, partials, weight, eps, form, None)[:2]


def norm_and_gate(
    x: torch.Tensor,
    partials: list[torch.Tensor],
    weight: torch.Tensor,
    eps: float,
    form: Form,
    gate: torch.Tensor | None,
) -> tuple[torch.Tensor, Formed, torch.Tensor | None]:
    """`add_norm`, and in the same launch the gate's logits `[1, T, E]`."""
    (rows, dim), (a, b) = x.shape, (*partials, x[None], x[None])[:2]
    total = torch.empty(rows, dim, dtype=x.dtype, device=x.device) if partials else x
    out = allocate(form, rows, dim, x)
    pointers, flags = emitted(form, out, x)
    blocks = triton.next_power_of_2(triton.cdiv(dim, 128))
    warps = 8 if blocks >= 16 else 4
    if rows <= 64:  # a few programs, which have to have many loads on their way
        warps = min(max(blocks, 4), 16)
    # more rows, more pairs to a program: what all of them read for their norms would be too much. No number changes
    pairs, experts, logits = 0, 0, None
    if gate is not None:
        pairs, experts = 1 if rows <= 4 else 8, len(gate)
        logits = torch.empty(1, rows, experts, dtype=torch.float32, device=x.device)
    if rows:
        add_norm_kernel[(rows, 1 + (triton.cdiv(experts, 2 * pairs) if pairs else 0))](
            x, a, b, weight, total, *pointers, x if gate is None else gate, total if logits is None else logits, dim,
            x.stride(0), *a.stride()[:2], *b.stride()[:2], eps, experts,
            A=len(a) if len(partials) > 0 else 0, B=len(b) if len(partials) > 1 else 0, **flags, BLOCKS=blocks,
            PAIRS=pairs,
            num_warps=warps, **overlap(x),
        )  # fmt: skip
    return total, out, logits
