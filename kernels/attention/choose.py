"""Which attention runs where.

| op | on Hopper | else |
| --- | --- | --- |
| `gqa_decode` | `sm90_streamed_gqa.py`: heads of 64 or 128, pages of 64 tokens, no window | `gqa.py` |
| `mla_decode` | `sm90_streamed_mla.py`: a plain cache of 16 bits, pages of 64 tokens | `mla.py` |
| `causal_attention` | `sm90_specialized_prefill.py`: over `FEW_QUERIES`, heads of 64 or 128, no window | `prefill.py` |
"""

from __future__ import annotations

import torch
import triton

from kernels.attention.gqa import paged_gqa
from kernels.attention.mla import HEADS_PER_PROGRAM, expand_latents, paged_mla
from kernels.attention.prefill import tiled_attention
from kernels.attention.sm90_specialized_prefill import attends, specialized_attention
from kernels.attention.sm90_streamed_gqa import streamed_attention, streams_pages
from kernels.attention.sm90_streamed_mla import streamed_latents, streams_latents
from kernels.attention.spans import join_heads, programs_for, spans
from kernels.forms import KV, LOG2_E, Form, Formed
from kernels.launch import is_hopper

GQA_SPLITS = 32  # spans of a row, at most
MLA_SPLITS = 64
STREAMED_MLA_SPLITS = 32  # its programs hold much shared memory, and those without work want it, too
FEW_QUERIES = 512  # up to this many, kernels that begin and end at once count for more than those that multiply fast


def gqa_decode(
    q: torch.Tensor,
    cache: KV,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    form: Form,
    *,
    scale: float,
    kv_heads: int,
    window: int | None = None,
) -> Formed:
    q = q.contiguous()
    scratch = spans(q, q.shape[-1], GQA_SPLITS)
    given = (q, cache, block_table, seq_lens, scratch, scale * LOG2_E, kv_heads, GQA_SPLITS)
    if window is None and is_hopper(q) and streams_pages(q, cache):
        streamed_attention(*given)
    else:
        paged_gqa(*given, window)
    return join_heads(scratch, seq_lens, form, q, cache.page_size, window)


def mla_decode(
    q: torch.Tensor,
    cache: KV,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    expand: torch.Tensor,
    form: Form,
    *,
    scale: float,
    decode: bool | None = None,
) -> Formed:
    """`decode=True` takes the path of cards without FP8 units on any card; None asks the card."""
    q, latent = q.contiguous(), expand.shape[-1]
    streamed = is_hopper(q) and streams_latents(q, cache, latent)
    splits = STREAMED_MLA_SPLITS if streamed else MLA_SPLITS
    programs = programs_for(len(q) * triton.cdiv(q.shape[1], HEADS_PER_PROGRAM), splits)
    scratch = spans(q, latent, splits)
    if streamed:
        streamed_latents(q, cache, block_table, seq_lens, scratch, scale * LOG2_E, splits, programs)
    else:
        paged_mla(q, cache, block_table, seq_lens, scratch, scale * LOG2_E, splits, programs, decode)
    return expand_latents(scratch, seq_lens, expand, form, q, cache.page_size)


def causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, form: Form, *, scale: float, window: int | None = None
) -> Formed:
    if window is None and len(q) > FEW_QUERIES and is_hopper(q) and attends(q, k, v):
        return specialized_attention(q, k, v, form, scale=scale)
    return tiled_attention(q, k, v, form, scale=scale, window=window)
