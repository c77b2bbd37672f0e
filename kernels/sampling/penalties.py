"""Penalties and biases in Triton: logits as they were, but for tokens that were seen or are biased. Compiled without
fused multiplication and addition, which rounds once where the twin rounds twice."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.launch import let_next_start, overlap, wait_for_previous
from kernels.sampling.layout import PROMPTED

TILE = 1024
_PROMPTED = tl.constexpr(PROMPTED)


@triton.jit
def penalise_kernel(
    logits_ptr, counts_ptr, bias_ptr, repetition_ptr, frequency_ptr, presence_ptr, penalised_ptr, out_ptr, vocab,
    TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row, token = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside, at = token < vocab, row * vocab + token
    let_next_start(PDL)
    wait_for_previous(PDL)
    logits = tl.load(logits_ptr + at, mask=inside, other=0.0)
    seen = tl.load(counts_ptr + at, mask=inside, other=0)
    bias = tl.load(bias_ptr + at, mask=inside, other=0.0).to(tl.float64)
    repetition = tl.load(repetition_ptr + row)
    frequency, presence = tl.load(frequency_ptr + row), tl.load(presence_ptr + row)
    x, written = logits.to(tl.float64), (seen % _PROMPTED).to(tl.float64)
    x = tl.where(seen > 0, tl.where(x > 0, x / repetition, x * repetition), x)
    x = x - frequency * written - tl.where(written > 0, presence, 0.0) + bias
    out = tl.where(tl.load(penalised_ptr + row) > 0, x.to(tl.float32), logits)
    tl.store(out_ptr + at, out, mask=inside)


def penalise(
    logits: torch.Tensor,
    counts: torch.Tensor,
    bias: torch.Tensor,
    repetition: torch.Tensor,
    frequency: torch.Tensor,
    presence: torch.Tensor,
    penalised: torch.Tensor,
) -> torch.Tensor:
    (rows, vocab), logits = logits.shape, logits.contiguous()
    out = torch.empty_like(logits)
    if rows:
        penalise_kernel[(rows, triton.cdiv(vocab, TILE))](
            logits, counts, bias, repetition, frequency, presence, penalised, out, vocab,
            TILE=TILE, num_warps=4, enable_fp_fusion=False, **overlap(logits),
        )  # fmt: skip
    return out
