"""Attention over a paged cache, and of a prompt's chunks: what the ops take and give, and the errors."""

from __future__ import annotations

import torch

from kernels.dispatch import implementation
from kernels.forms import KV, Form, Formed


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
    """One decode step of grouped-query attention (Ainslie et al., 2023, arXiv:2305.13245).

    `q [R, H, D]`; `cache` holds all key heads of a token, then all value heads, in the dtype of `q`, or in E4M3 with
    values across (see `KV`); `block_table [R, P]` int32 and `seq_lens [R]` int32 as in `mla_decode`. Head h reads
    key-value head `h // (H / kv_heads)`. `window`: only so many of the last tokens are seen. Returns `[R, H * D]` in
    `form`. A row's result depends on that row alone.
    """
    _check_decode(q, cache, block_table, seq_lens)
    _check_window(window)
    cache.check_values_across()
    if not (q.shape[1] % kv_heads == 0 and cache.width == 2 * kv_heads * q.shape[-1]):
        raise ValueError(f"q {tuple(q.shape)} with {kv_heads} key-value heads does not fit {tuple(cache.values.shape)}")
    about = {"scale": scale, "kv_heads": kv_heads, "window": window}
    return implementation("gqa_decode", q)(q, cache, block_table, seq_lens, form, **about)


def mla_decode(
    q: torch.Tensor,
    cache: KV,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    expand: torch.Tensor,
    form: Form,
    *,
    scale: float,
) -> Formed:
    """One decode step of absorbed multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

    `q [R, H, latent + rope]` holds each head's query against the latent, then its rotary part; `cache` the latents
    and rotary keys, in the dtype of `q` or in E4M3; `block_table [R, P]` int32 each row's pages of the cache, in order;
    `seq_lens [R]` int32 >= 1 how many tokens each row sees; `expand [H, V, latent]` turns a head's result into values.
    Returns `[R, H * V]` in `form`. A row's result depends on that row alone.
    """
    _check_decode(q, cache, block_table, seq_lens)
    if q.shape[-1] != cache.width or expand.shape[0] != q.shape[1] or cache.across:
        raise ValueError(f"q {tuple(q.shape)} does not fit {tuple(cache.values.shape)} and {tuple(expand.shape)}")
    return implementation("mla_decode", q)(q, cache, block_table, seq_lens, expand, form, scale=scale)


def causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, form: Form, *, scale: float, window: int | None = None
) -> Formed:
    """Causal attention of a prefill chunk: the last T of S tokens look at themselves and at all before them.

    `q [T, H, D]`, `k [S, G, D]`, `v [S, G, V]` of one dtype, the last dimension contiguous, H a multiple of G: head h
    reads key-value head `h // (H / G)`. `window`: a token sees only so many, itself the last of them. Returns
    `[T, H * V]` in `form`."""
    _check_window(window)
    fits = q.shape[-1] == k.shape[-1] and k.shape[:2] == v.shape[:2] and q.shape[1] % k.shape[1] == 0
    if not (fits and len(q) <= len(k) and all(t.stride(-1) == 1 for t in (q, k, v))):
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} don't fit together")
    if form.fp8 and q.shape[1] * v.shape[-1] % 128:
        raise ValueError(f"{q.shape[1]} heads of {v.shape[-1]} are no whole blocks of 128, and can't be quantised")
    return implementation("causal_attention", q)(q, k, v, form, scale=scale, window=window)


def gather_kv(kv: KV, slots: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
    """What the cache holds at `slots [S]`, restored: `[S, width]` in `dtype`, which without scales is that of the
    cache."""
    return implementation("gather_kv", kv.values)(kv, slots, dtype=dtype)


def _check_window(window: int | None) -> None:
    if window is not None and window < 1:
        raise ValueError(f"a window has at least one token, not {window}")


def _check_decode(q: torch.Tensor, cache: KV, block_table: torch.Tensor, seq_lens: torch.Tensor) -> None:
    held = cache.values.dtype
    if not (q.ndim == 3 and held == (q.dtype if cache.scales is None else torch.float8_e4m3fn)):
        raise ValueError(f"q {tuple(q.shape)} and cache must share a dtype, not {q.dtype} and {held}")
    if not (block_table.shape[0] == seq_lens.shape[0] == q.shape[0]):
        raise ValueError("block_table, seq_lens and q must have the same rows")
