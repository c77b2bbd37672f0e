"""The ops: a CUDA tensor goes to Triton, any other to the torch twin. Decided here and nowhere else.

The functions below own the contract (shapes, dtypes, errors); `reference.py` says in torch what each one computes.
Triton is imported on first use, so that a machine without it can still run the twins.

On a card an op may read some of its inputs before the ops before it have ended (see `launch.py`): weights, their scales
and norms; `lengths` and `pages`; of the cache of `gqa_decode` and `mla_decode` all pages but each row's newest;
`temperature`, `seeds` and `positions`; `experts` of `expert_gemm` with weights. None of these may be what an op wrote,
unless work of torch's own began after it; `experts` also where another `expert_gemm`, without weights, lies between
`route` and the one that reads them.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch

from kernels import reference
from kernels.forms import FP8_MAX, INVARIANT_ROWS, KV, SCORED, SHOWN, SURVEYED, Form, Formed, Keep, Routing, Survey
from kernels.reference import has_fp8_units
from kernels.sampling.noise import draw_multinomial, gumbel_noise, process_logits, uniform_noise

__all__ = [
    "FP8_MAX",
    "INVARIANT_ROWS",
    "KV",
    "SCORED",
    "SHOWN",
    "SURVEYED",
    "Form",
    "Formed",
    "Keep",
    "Routing",
    "Survey",
    "absorb_queries",
    "act_dequant",
    "act_quant",
    "add_norm",
    "add_norm_gate",
    "add_up",
    "advance",
    "causal_attention",
    "deliver",
    "draw",
    "draw_multinomial",
    "expert_gemm",
    "formed",
    "fp8_gemm",
    "gather_kv",
    "gemm_parts",
    "gemm_swiglu",
    "gqa_decode",
    "gumbel_noise",
    "has_fp8_units",
    "look_up",
    "mla_decode",
    "one_after_another",
    "plain_gemm",
    "process_logits",
    "rope_heads",
    "rotate",
    "route",
    "split_latents",
    "survey",
    "swiglu",
    "uniform_noise",
    "weight_dequant",
    "weight_quant",
]

_SCALE_FORMATS = (None, "ue8m0")


def _implementation(room: str, tensor: torch.Tensor):
    """The module that computes on this tensor's device: `kernels.<room>` in Triton, or the twins."""
    return importlib.import_module(f"kernels.{room}") if tensor.is_cuda else reference


def one_after_another():
    """A context in which kernels on a card don't overlap, so that a profile shows each one's own time."""
    return importlib.import_module("kernels.launch").one_after_another()


def _check_quantiser(x: torch.Tensor, block_size: int, scale_fmt: str | None) -> None:
    if not (x.is_floating_point() and x.element_size() >= 2):
        raise ValueError(f"can't quantise {x.dtype}: float32, bfloat16 or float16")
    if not (block_size == 128):
        raise ValueError(f"block_size must be 128, not {block_size}")
    if scale_fmt not in _SCALE_FORMATS:
        raise ValueError(f"scale_fmt must be None or 'ue8m0', not {scale_fmt!r}")


def _check_activations(x: torch.Tensor, block_size: int, scale_fmt: str | None) -> None:
    _check_quantiser(x, block_size, scale_fmt)
    if not (x.ndim >= 1 and x.shape[-1] % 128 == 0):
        raise ValueError(f"the last dimension must be a multiple of 128: {tuple(x.shape)}")


def act_quant(
    x: torch.Tensor, block_size: int = 128, scale_fmt: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantises finite activations to E4M3, one scale per row and 128 values.

    `x [..., K]` float32, bfloat16 or float16, K a multiple of 128. Returns `q [..., K]` float8_e4m3fn and
    `s [..., K/128]` float32 with `x ~ q * s`: `s = max(amax, 1e-4) / 448`, and for `scale_fmt="ue8m0"` the next power
    of two. Raises ValueError for any other shape, dtype or format.
    """
    _check_activations(x, block_size, scale_fmt)
    return _implementation("quant.e4m3", x).act_quant(x, block_size, scale_fmt)


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
    return _implementation("quant.e4m3", w).weight_quant(w, block_size, scale_fmt)


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
    return _implementation("quant.e4m3", q).weight_dequant(q, scale, block_size, dtype)


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
    if not (tuple(b_s.shape) == _tiles(b.shape)):
        raise ValueError(f"b_s {tuple(b_s.shape)} does not fit b {tuple(b.shape)}")
    if not (b.is_contiguous() and b_s.is_contiguous()):  # a copy made here would be read before it is there
        raise ValueError("weights and their scales must be contiguous")
    return _implementation("gemm.choose", a).fp8_gemm(a, a_s, b, b_s, out_dtype)


def add_up(parts: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
    """Partial sums `[P, ...]`, contiguous, added in order in float32 and rounded to `dtype`."""
    return _implementation("gemm.choose", parts).add_up(parts, dtype)


def _check_product(a: torch.Tensor, b: torch.Tensor, a_s: torch.Tensor | None, b_s: torch.Tensor | None) -> None:
    if a.ndim != 2 or a.shape[-1] != b.shape[-1] or a.dtype != b.dtype or (a_s is None) != (b_s is None):
        raise ValueError(f"can't multiply {a.dtype} {tuple(a.shape)} by {b.dtype} {tuple(b.shape)}")
    if not (b_s is None or b_s.is_contiguous()):
        raise ValueError("scales of weights must be contiguous")


def plain_gemm(a: torch.Tensor, b: torch.Tensor, *, out_dtype: torch.dtype) -> torch.Tensor:
    """Plain product `a [M, K] @ b [N, K]^T`, summed in float32, for what the format keeps out of FP8 (head, gate).
    Same row invariance as `fp8_gemm`."""
    _check_product(a, b, None, None)
    return _implementation("gemm.choose", a).plain_gemm(a, b, out_dtype)


def gemm_parts(
    a: torch.Tensor,
    b: torch.Tensor,
    a_s: torch.Tensor | None = None,
    b_s: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """`fp8_gemm`, or without scales `plain_gemm`, as partial sums `[P, M, N]`, which a reader that must load
    the result anyway adds up in passing: float32, or `out_dtype` where one part is all."""
    _check_product(a, b, a_s, b_s)
    if not b.is_contiguous():
        raise ValueError("weights must be contiguous")
    return _implementation("gemm.choose", a).gemm_parts(a, b, a_s, b_s, out_dtype)


def gemm_swiglu(
    a: torch.Tensor,
    b: torch.Tensor,
    a_s: torch.Tensor | None = None,
    b_s: torch.Tensor | None = None,
    *,
    form: Form,
    dtype: torch.dtype,
) -> Formed:
    """`swiglu` of `gemm_parts` with `b [2 * I, K]`, gate and then up: on some cards one kernel for many rows. Returns
    `[T, I]` in `form`."""
    _check_product(a, b, a_s, b_s)
    if not b.is_contiguous() or len(b) % 256:
        raise ValueError(f"gate and up must be contiguous, and two multiples of 128: {tuple(b.shape)}")
    return _implementation("gemm.choose", a).gemm_swiglu(a, b, a_s, b_s, form, dtype)


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
    return _implementation("gemm.choose", a).expert_gemm(a, b, a_s, b_s, experts, weights, out_dtype, shared)


def route(parts: torch.Tensor, bias: torch.Tensor | None, rule: Routing) -> tuple[torch.Tensor, torch.Tensor]:
    """Which experts each row goes to: partial sums of logits `[P, T, E]` and a correction `bias [E]` that chooses but
    does not weigh, to the chosen `[T, k]` int32, best first, then those shared by all, and their weights `[T, k]`
    float32."""
    return _implementation("moe.route", parts).route(parts, bias, rule)


def formed(x: torch.Tensor, form: Form) -> Formed:
    """Leaves `x [T, K]` in the form that its readers want."""
    if form.fp8:
        _check_activations(x, 128, None)
    return _implementation("quant.e4m3", x).formed(x, form)


def add_norm(
    x: torch.Tensor, parts: list[torch.Tensor], weight: torch.Tensor, eps: float, form: Form
) -> tuple[torch.Tensor, Formed]:
    """The residual sum and its RMSNorm: `x [T, D]` plus every part of up to two stacks `[P, T, D]`, in order, rounded
    to the dtype of `x`; and `x * rsqrt(mean(x^2) + eps) * weight` of that, in `form`."""
    _check_norm(x, parts, weight)
    return _implementation("norm.add_norm", x).add_norm(x, parts, weight, eps, form)[:2]


def add_norm_gate(
    x: torch.Tensor, parts: list[torch.Tensor], weight: torch.Tensor, eps: float, form: Form, gate: torch.Tensor
) -> tuple[torch.Tensor, Formed, torch.Tensor]:
    """`add_norm`, and partial sums of what `gate [E, D]` says of the norm, `[P, T, E]` float32. Up to `INVARIANT_ROWS`
    rows in one launch, and each row's by itself."""
    _check_norm(x, parts, weight)
    if gate.shape[1:] != weight.shape or not gate.is_contiguous():
        raise ValueError(f"gate {tuple(gate.shape)} must be contiguous and fit {tuple(x.shape)}")
    if len(x) <= INVARIANT_ROWS:
        return _implementation("norm.add_norm", x).add_norm(x, parts, weight, eps, form, gate)
    total, out = add_norm(x, parts, weight, eps, form._replace(plain=True))
    return total, out, gemm_parts(out.plain.to(gate.dtype), gate, out_dtype=torch.float32)


def _check_norm(x: torch.Tensor, parts: list[torch.Tensor], weight: torch.Tensor) -> None:
    if weight.shape != x.shape[-1:] or len(parts) > 2 or any(p.shape[1:] != x.shape for p in parts):
        raise ValueError(
            f"weight {tuple(weight.shape)} or {[tuple(p.shape) for p in parts]} don't fit {tuple(x.shape)}"
        )


def swiglu(parts: torch.Tensor, form: Form, *, dtype: torch.dtype) -> Formed:
    """`silu(gate) * up` of partial sums `[P, T, 2 * I]` that hold gate, then up; I a multiple of 128. Each sum, the
    SiLU and the result are rounded to `dtype`. Returns `[T, I]` in `form`."""
    if parts.ndim != 3 or parts.shape[-1] % 256:
        raise ValueError(f"gate and up must be two multiples of 128: {tuple(parts.shape)}")
    return _implementation("norm.add_norm", parts).swiglu(parts, dtype, form)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotary embedding: turns pairs of the last dimension, `(x[2i], x[2i+1])` as DeepSeek's weights are laid out, or
    `(x[i], x[i+dim/2])` as Llama's and Qwen's are. Torch on every device; a decode step turns in passing.

    `x` is `[..., dim]`, `cos` and `sin` broadcast against `[..., dim/2]`; the arithmetic is float32, the result
    has the dtype of `x`.
    """
    return reference.rotate(x, cos, sin, interleaved)


def rope_heads(
    parts: torch.Tensor,
    starts: tuple[int, int, int],
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    rope: torch.Tensor,
    slots: torch.Tensor,
    kv: KV,
    *,
    heads: int,
    eps: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """From partial sums `[P, T, W]` in which all queries, keys and values begin at columns `starts`: RMSNorm on every
    query and key head where `norms` gives the two weights `[D]`, then rotary embedding of halves by `rope [T, 2, D/2]`,
    each rounded to `dtype`. Returns the queries `[T, heads, D]` and writes all keys, then all values of a token to
    `slots [T]` of `kv`, as they are, or in E4M3 with values across (see `KV`)."""
    _check_values_across(kv)
    return _implementation("rope.heads", parts).rope_heads(parts, starts, norms, rope, slots, kv, heads, eps, dtype)


def _check_values_across(cache: KV) -> None:
    if cache.across != (0 if cache.scales is None else cache.width // 2):
        raise ValueError(f"an E4M3 cache of heads keeps its values across, not {cache.across} columns")


def gather_kv(kv: KV, places: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
    """What the cache holds at `places [S]`, restored: `[S, width]` in `dtype`, which without scales is that of the
    cache."""
    return _implementation("attention.gather", kv.values).gather_kv(kv, places, dtype)


def split_latents(
    parts: torch.Tensor,
    q_norm: torch.Tensor | None,
    rope: torch.Tensor,
    keep: Keep,
    form: Form | None,
    *,
    dtype: torch.dtype,
) -> Formed | None:
    """MLA's first products apart, from partial sums `[P, T, W]`: the query latent (the first `len(q_norm)` columns) is
    normed and returned in `form`; the KV latent is normed and the rotary key behind it turned by `rope [T, 2, R/2]`,
    and both, rounded to `dtype`, go where `keep` says. Without `q_norm` returns None."""
    return _implementation("rope.heads", parts).split_latents(parts, q_norm, rope, keep, form, dtype)


def absorb_queries(
    parts: torch.Tensor,
    absorb: torch.Tensor,
    rope: torch.Tensor,
    keep: Keep | None = None,
    *,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Queries against the latent cache: of partial sums `[P, T, >= H * (nope + R)]`, each head's first `nope` values
    times its `absorb [H, latent, nope]`, and its last R turned by `rope [T, 2, R/2]`. Returns `[T, H, latent + R]`.
    With `keep` also does what `split_latents` does for the KV latent, which the same partial sums then hold."""
    return _implementation("rope.heads", parts).absorb_queries(parts, absorb, rope, dtype, keep)


def mla_decode(
    q: torch.Tensor,
    cache: KV,
    pages: torch.Tensor,
    lengths: torch.Tensor,
    expand: torch.Tensor,
    form: Form,
    *,
    scale: float,
) -> Formed:
    """One decode step of absorbed multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

    `q [R, H, latent + rope]` holds each head's query against the latent, then its rotary part; `cache` the latents
    and rotary keys, in the dtype of `q` or in E4M3; `pages [R, P]` int32 each row's pages in order;
    `lengths [R]` int32 >= 1 how many tokens each row sees; `expand [H, V, latent]` turns a head's result into values.
    Returns `[R, H * V]` in `form`. A row's result depends on that row alone.
    """
    _check_decode(q, cache, pages, lengths)
    if q.shape[-1] != cache.width or expand.shape[0] != q.shape[1] or cache.across:
        raise ValueError(f"q {tuple(q.shape)} does not fit {tuple(cache.values.shape)} and {tuple(expand.shape)}")
    return _implementation("attention.mla", q).mla_decode(q, cache, pages, lengths, scale, expand, form)


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, form: Form, *, scale: float) -> Formed:
    """Attention of a piece of a prompt: the last T of S tokens look at themselves and at all before them.

    `q [T, H, D]`, `k [S, G, D]`, `v [S, G, V]` of one dtype, the last dimension contiguous, H a multiple of G: head h
    reads key-value head `h // (H / G)`. Returns `[T, H * V]` in `form`."""
    fits = q.shape[-1] == k.shape[-1] and k.shape[:2] == v.shape[:2] and q.shape[1] % k.shape[1] == 0
    if not (fits and len(q) <= len(k) and all(t.stride(-1) == 1 for t in (q, k, v))):
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} don't fit together")
    if form.fp8 and q.shape[1] * v.shape[-1] % 128:
        raise ValueError(f"{q.shape[1]} heads of {v.shape[-1]} are no whole blocks of 128, and can't be quantised")
    return _implementation("attention.prefill", q).causal_attention(q, k, v, scale, form)


def _check_decode(q: torch.Tensor, cache: KV, pages: torch.Tensor, lengths: torch.Tensor) -> None:
    held = cache.values.dtype
    if not (q.ndim == 3 and held == (q.dtype if cache.scales is None else torch.float8_e4m3fn)):
        raise ValueError(f"q {tuple(q.shape)} and cache must share a dtype, not {q.dtype} and {held}")
    if not (pages.shape[0] == lengths.shape[0] == q.shape[0]):
        raise ValueError("pages, lengths and q must have the same rows")


def gqa_decode(
    q: torch.Tensor,
    cache: KV,
    pages: torch.Tensor,
    lengths: torch.Tensor,
    form: Form,
    *,
    scale: float,
    kv_heads: int,
) -> Formed:
    """One decode step of grouped-query attention (Ainslie et al., 2023, arXiv:2305.13245).

    `q [R, H, D]`; `cache` holds all key heads of a token, then all value heads, in the dtype of `q`, or in E4M3 with
    values across (see `KV`); `pages [R, P]` int32 and `lengths [R]` int32 as in `mla_decode`. Head h reads key-value
    head `h // (H / kv_heads)`. Returns `[R, H * D]` in `form`. A row's result depends on that row alone.
    """
    _check_decode(q, cache, pages, lengths)
    _check_values_across(cache)
    if not (q.shape[1] % kv_heads == 0 and cache.width == 2 * kv_heads * q.shape[-1]):
        raise ValueError(f"q {tuple(q.shape)} with {kv_heads} key-value heads does not fit {tuple(cache.values.shape)}")
    return _implementation("attention.gqa", q).gqa_decode(q, cache, pages, lengths, scale, kv_heads, form)


def draw(
    logits: torch.Tensor, temperature: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token per row by Gumbel-max: the argmax of `logits [R, V]` (float32 or float64) over `temperature [R]`
    (float64) plus `gumbel_noise` of `seeds [R]` int64 and `positions [R]`, any integers; equals go to the lowest id.
    Temperature 0 is greedy: no noise. Returns ids `[R]` int64 and their log-probabilities `[R]` float32 at
    temperature 1."""
    return _implementation("sampling.draw", logits).draw(logits, temperature, seeds, positions)


def survey(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    ids: torch.Tensor,
) -> torch.Tensor:
    """What stood behind the draw of `ids [R]` by `draw` from the other arguments: `[R, SURVEYED]` float64, of which
    `Survey.of` takes a row apart."""
    return _implementation("sampling.survey", logits).survey(logits, temperature, seeds, positions, ids)


def look_up(
    tokens: torch.Tensor, positions: torch.Tensor, weight: torch.Tensor, table: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a forward begins with: rows `tokens [T]` of the embeddings `weight [V, D]`, and rows `positions [T]` (both
    int64) of the angles `table [P, 2, R/2]`. No index is checked on a card."""
    return _implementation("stepping.step", weight).look_up(tokens, positions, weight, table)


def deliver(tensors: Sequence[torch.Tensor], starts: Sequence[int], host: torch.Tensor, turn: torch.Tensor) -> None:
    """Copies each tensor, contiguous, of elements of 4 or 8 bytes, word by word to its start in row `turn [1]` (int32)
    of `host [2, W]` int32. With tensors on a card this is pinned memory, and the words are there when what has been
    launched so far has ended."""
    _implementation("stepping.step", turn).deliver(tensors, starts, host, turn)


def advance(
    ids: torch.Tensor,
    moves: torch.Tensor,
    pages: torch.Tensor,
    *,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    lengths: torch.Tensor,
    slots: torch.Tensor,
    turn: torch.Tensor,
    page_size: int,
) -> None:
    """Moves R rows on by `moves [R]` (0 or 1): the drawn `ids [R]` become `tokens`, and `positions`, `lengths` (int32,
    position + 1) and `slots` (places in the flattened cache, through `pages [R, P]` int32) follow; `turn [1]` (int32, 0
    or 1) becomes the other. All in place."""
    room = _implementation("stepping.step", ids)
    room.advance(ids, moves, pages, tokens, positions, lengths, slots, turn, page_size)
