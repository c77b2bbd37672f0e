"""Rotary embedding, and what goes into the KV cache on the way: what the ops take and give."""

from __future__ import annotations

import torch

from kernels import reference
from kernels.dispatch import implementation
from kernels.forms import KV, Form, Formed, Keep


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotary embedding: turns pairs of the last dimension, `(x[2i], x[2i+1])` as DeepSeek's weights are laid out, or
    `(x[i], x[i+dim/2])` as Llama's and Qwen's are. Torch on every device: a decode step rotates within other ops.

    `x` is `[..., dim]`, `cos` and `sin` broadcast against `[..., dim/2]`; the arithmetic is float32, the result
    has the dtype of `x`.
    """
    return reference.rotate(x, cos, sin, interleaved)


def rope_heads(
    partials: torch.Tensor,
    starts: tuple[int, int, int],
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    rope: torch.Tensor,
    slots: torch.Tensor,
    kv: KV,
    *,
    heads: int,
    eps: float,
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """From partial sums `[P, T, W]`, and a `bias [W]`, in which all queries, keys and values begin at columns `starts`:
    RMSNorm on every query and key head where `norms` gives the two weights `[D]`, then rotary embedding of halves by
    `rope [T, 2, D/2]`, each rounded to `dtype`. Returns the queries `[T, heads, D]` and writes all keys, then all
    values of a token to `slots [T]` of `kv`, as they are, or in E4M3 with values across (see `KV`)."""
    kv.check_values_across()
    return implementation("rope_heads", partials)(
        partials, starts, norms, rope, slots, kv, heads=heads, eps=eps, dtype=dtype, bias=bias
    )


def split_latents(
    partials: torch.Tensor,
    q_norm: torch.Tensor | None,
    rope: torch.Tensor,
    keep: Keep,
    form: Form | None,
    *,
    dtype: torch.dtype,
    eps: float,
) -> Formed | None:
    """Splits what MLA's first products leave, partial sums `[P, T, W]`. The query latent (the first `len(q_norm)`
    columns) is normed with `eps` and returned in `form`. The KV latent is normed and the rotary key behind it rotated
    by `rope [T, 2, R/2]`; both, rounded to `dtype`, are written where `keep` says. Without `q_norm` returns None."""
    return implementation("split_latents", partials)(partials, q_norm, rope, keep, form, dtype=dtype, eps=eps)


def absorb_queries(
    partials: torch.Tensor,
    absorb: torch.Tensor,
    rope: torch.Tensor,
    keep: Keep | None = None,
    *,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Queries against the latent cache: of partial sums `[P, T, >= H * (nope + R)]`, each head's first `nope` values
    times its `absorb [H, latent, nope]`, and its last R rotated by `rope [T, 2, R/2]`. Returns `[T, H, latent + R]`.
    With `keep` it also does what `split_latents` does for the KV latent, which the same partial sums then hold."""
    return implementation("absorb_queries", partials)(partials, absorb, rope, keep, dtype=dtype)
