"""The definition of right: one plain-torch twin per kernel, for any device, upcast to float32.

Formats: activations in blocks of 128 along a row, weights in tiles of 128x128, values E4M3 (`float8_e4m3fn`, largest
448), scales float32, restored by `value * scale` (DeepSeek-V3 technical report, section 3.3; arXiv:2412.19437).
Shapes, dtypes and errors are stated once, in the `contract.py` of each family of ops.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F

from kernels.forms import AMAX_FLOOR, FP8_MAX, INVARIANT_ROWS, KV, UNIT, Form, Formed, Keep, Routing
from kernels.sampling.layout import PROMPTED, SCORED, SHOWN
from kernels.sampling.noise import gumbel_noise


def has_fp8_units(device: torch.device) -> bool:
    """E4M3 tensor cores came with compute capability 8.9. Before it the kernels decode to float16, exactly; off CUDA
    (Triton's interpreter) the FP8 path runs."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def _scale_of(amax: torch.Tensor, scale_fmt: str | None) -> torch.Tensor:
    """`max(amax, 1e-4) / 448`, for ue8m0 rounded up to a power of two, exactly, by taking the float apart."""
    scale = amax.clamp_(min=AMAX_FLOOR).div_(FP8_MAX)
    if scale_fmt == "ue8m0":
        mantissa, exponent = torch.frexp(scale)  # scale = mantissa * 2^exponent, mantissa in [0.5, 1)
        power = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).to(exponent.dtype))
        scale = torch.where(scale.isfinite(), power, scale)
    return scale


def act_quant(
    x: torch.Tensor, block_size: int = 128, scale_fmt: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = x.float().reshape(*x.shape[:-1], -1, block_size)
    scale = _scale_of(blocks.abs().amax(-1, keepdim=True), scale_fmt)
    # |x / s| exceeds 448 by rounding at most: the cast, to nearest even, needs no clamp
    return (blocks / scale).to(torch.float8_e4m3fn).view(x.shape), scale.squeeze(-1)


def act_dequant(q: torch.Tensor, scale: torch.Tensor, block_size: int = 128) -> torch.Tensor:
    return q.float().view(*scale.shape, block_size).mul_(scale.unsqueeze(-1)).view(q.shape)


def _spread(scale: torch.Tensor, shape: torch.Size, block_size: int) -> torch.Tensor:
    """Tile scales repeated over the elements of a weight `[N, K]`, ragged edges cut."""
    rows, cols = shape
    return scale.repeat_interleave(block_size, 0)[:rows].repeat_interleave(block_size, 1)[:, :cols]


def weight_quant(
    w: torch.Tensor, block_size: int = 128, scale_fmt: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, cols = w.shape
    padded = F.pad(w.float(), (0, -cols % block_size, 0, -rows % block_size))
    tiles = padded.unflatten(1, (-1, block_size)).unflatten(0, (-1, block_size))  # [N/128, 128, K/128, 128]
    scale = _scale_of(tiles.abs().amax(dim=(1, 3)), scale_fmt)
    return (w.float() / _spread(scale, w.shape, block_size)).to(torch.float8_e4m3fn), scale


def weight_dequant(q: torch.Tensor, scale: torch.Tensor, block_size: int = 128, *, dtype: torch.dtype) -> torch.Tensor:
    return (q.float() * _spread(scale, q.shape, block_size)).to(dtype)


def fp8_gemm(
    a: torch.Tensor, a_s: torch.Tensor, b: torch.Tensor, b_s: torch.Tensor, *, out_dtype: torch.dtype
) -> torch.Tensor:
    a, b = a.float(), b.float()
    few = 1 < len(a) <= INVARIANT_ROWS
    rows = zip(a.split(1), a_s.split(1), strict=True) if few else [(a, a_s)]
    return torch.cat([_blockwise(x, scale, b, b_s) for x, scale in rows]).to(out_dtype)


def _blockwise(a: torch.Tensor, a_s: torch.Tensor, b: torch.Tensor, b_s: torch.Tensor) -> torch.Tensor:
    """The sum over blocks of K of their products, each scaled, in float32."""
    out = torch.zeros(a.shape[0], b.shape[0], dtype=torch.float32, device=a.device)
    for k, (a_blk, b_blk) in enumerate(zip(a.split(128, -1), b.split(128, -1), strict=True)):
        tile_scale = b_s[:, k].repeat_interleave(128)[: b.shape[0]]
        out += (a_blk @ b_blk.T) * a_s[:, k : k + 1] * tile_scale
    return out


def plain_gemm(a: torch.Tensor, b: torch.Tensor, *, out_dtype: torch.dtype) -> torch.Tensor:
    a, b = a.float(), b.float()
    if len(a) == 1:
        return F.linear(aligned_rows(a), b).to(out_dtype)
    if len(a) <= INVARIANT_ROWS:
        products = [F.linear(row, b) for row in aligned_rows(a).split(1)]
        return (torch.cat(products) if products else a.new_empty(0, len(b))).to(out_dtype)
    return F.linear(a, b).to(out_dtype)


def aligned_rows(a: torch.Tensor) -> torch.Tensor:
    """`a [T, K]` float32 with every row at a multiple of 64 bytes, to be multiplied row by row. A BLAS picks its order
    of summation by the number of rows and by their alignment, and a row's result must not depend on the others."""
    k = a.shape[1]
    if k % 16:
        return F.pad(a, (0, -k % 16))[:, :k]
    if a.data_ptr() % 64 or a.stride(0) % 16 or a.stride(1) != 1:
        return a.clone(memory_format=torch.contiguous_format)
    return a


def gemm_partials(a, b, a_s=None, b_s=None, *, out_dtype: torch.dtype) -> torch.Tensor:
    if a_s is None:
        return plain_gemm(a, b, out_dtype=out_dtype)[None]
    return fp8_gemm(a, a_s, b, b_s, out_dtype=out_dtype)[None]


def expert_gemm(
    a, b, experts, a_s=None, b_s=None, weights=None, *, out_dtype: torch.dtype, shared: int = 0
) -> torch.Tensor:
    chosen, share = experts.flatten(), experts.numel() // len(a)

    def product(rows, expert: int) -> torch.Tensor:
        scales = (None, None) if a_s is None else (a_s[rows], b_s[expert])
        return gemm_partials(a[rows], b[expert], *scales, out_dtype=out_dtype)[0]

    if len(experts) <= INVARIANT_ROWS and a_s is None:  # a row at a time anyhow: nothing to gather
        rows = aligned_rows(a.float()).split(1)
        products = (F.linear(rows[number // share], b[e].float()) for number, e in enumerate(chosen.tolist()))
        out = torch.cat(list(products)).to(out_dtype)
    else:
        out = torch.empty(len(chosen), b.shape[1], dtype=out_dtype, device=a.device)
        for expert in chosen.unique().tolist():
            which = (chosen == expert).nonzero()[:, 0]
            out[which] = product(which // share, expert)
    if weights is not None:
        out = (out * weights.reshape(-1, 1)).to(out_dtype)
    return out.view(*experts.shape, -1)


def row_sigmoid(logits: torch.Tensor) -> torch.Tensor:
    """Sigmoid with the same bits for a row alone and in company. A CPU computes a tensor's last few values, short of a
    whole vector, by another formula than the rest; padded to 64 columns, no row has such a tail."""
    return F.pad(logits, (0, -logits.shape[-1] % 64)).sigmoid()[:, : logits.shape[-1]]


def route(partials: torch.Tensor, bias: torch.Tensor | None, rule: Routing) -> tuple[torch.Tensor, torch.Tensor]:
    logits = add_up(partials, dtype=torch.float32)
    scores = row_sigmoid(logits) if rule.sigmoid else logits.softmax(-1)
    choice = scores if bias is None else scores + bias
    if rule.groups > 1:
        groups = choice.view(len(choice), rule.groups, -1)
        two = min(2, groups.shape[-1])
        best = groups.amax(-1) if bias is None else groups.topk(two, dim=-1).values.sum(-1)
        kept = best.topk(rule.kept_groups, dim=-1).indices
        dropped = torch.full_like(best, float("-inf")).scatter_(-1, kept, 0.0)
        choice = (groups + dropped[..., None]).view_as(scores)
    chosen = choice.topk(rule.top_k, dim=-1).indices
    weights = scores.gather(-1, chosen)  # the bias chooses, the plain score weighs
    if rule.normalised:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    shared = logits.shape[-1] + torch.arange(rule.shared, device=logits.device).expand(len(chosen), -1)
    weights = F.pad(weights * rule.scaling, (0, rule.shared), value=1.0)
    return torch.cat([chosen, shared], dim=-1).int(), weights


def formed(x: torch.Tensor, form: Form) -> Formed:
    q, s = act_quant(x, 128, "ue8m0" if form.ue8m0 else None) if form.fp8 else (None, None)
    return Formed(x if form.plain else None, q, s)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    mean = torch.linalg.vecdot(wide, wide).unsqueeze(-1) / x.shape[-1]
    return (wide * torch.rsqrt(mean + eps) * weight.float()).to(x.dtype)


def add_up(partials: torch.Tensor | list[torch.Tensor], *, dtype: torch.dtype) -> torch.Tensor:
    """Partial sums added in order."""
    total = partials[0].float()
    for part in partials[1:]:
        total = total + part.float()
    return total.to(dtype)


def gemm_swiglu(a, b, a_s=None, b_s=None, *, form: Form, dtype: torch.dtype) -> Formed:
    return swiglu(gemm_partials(a, b, a_s, b_s, out_dtype=dtype), form, dtype=dtype)


def _sum_and_norm(x: torch.Tensor, partials: list[torch.Tensor], weight: torch.Tensor, eps: float):
    if partials:
        x = x + add_up([part for group in partials for part in group], dtype=x.dtype)
    return x, rms_norm(x, weight, eps)


def add_norm(
    x: torch.Tensor, partials: list[torch.Tensor], weight: torch.Tensor, eps: float, form: Form
) -> tuple[torch.Tensor, Formed]:
    x, y = _sum_and_norm(x, partials, weight, eps)
    return x, formed(y, form)


def add_norm_gate(
    x: torch.Tensor, partials: list[torch.Tensor], weight: torch.Tensor, eps: float, form: Form, gate: torch.Tensor
) -> tuple[torch.Tensor, Formed, torch.Tensor]:
    x, y = _sum_and_norm(x, partials, weight, eps)
    return x, formed(y, form), gemm_partials(y.to(gate.dtype), gate, out_dtype=torch.float32)


def swiglu(partials: torch.Tensor, form: Form, *, dtype: torch.dtype) -> Formed:
    gate, up = add_up(partials, dtype=dtype).chunk(2, dim=-1)
    return formed(F.silu(gate) * up, form)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """A pair is a complex number, and turning it a product."""
    turn, wide = torch.complex(cos, sin), x.float()
    if interleaved:
        turned = torch.view_as_complex(wide.unflatten(-1, (-1, 2)).contiguous()) * turn
        return torch.view_as_real(turned).flatten(-2).to(x.dtype)
    turned = torch.complex(*wide.chunk(2, dim=-1)) * turn
    return torch.cat([turned.real, turned.imag], dim=-1).to(x.dtype)


def _rotate_heads(x: torch.Tensor, rope: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """`x [T, H, R]` by `rope [T, 2, R/2]`."""
    return rotate(x, rope[:, None, 0], rope[:, None, 1], interleaved)


def _keep(kv: KV, slots: torch.Tensor, blocks: list[torch.Tensor]) -> None:
    """Writes what tokens leave in the cache, in order: `blocks [T, vectors, width]`."""
    if kv.scales is None:
        kv.values.view(-1, kv.width)[slots] = torch.cat([block.flatten(1) for block in blocks], dim=-1)
        return
    wide = [block.float() for block in blocks]
    scales = [_scale_of(block.abs().amax(-1, keepdim=True), None) for block in wide]
    codes = [(block / scale).to(kv.values.dtype).flatten(1) for block, scale in zip(wide, scales, strict=True)]
    page, token = slots // kv.page_size, slots % kv.page_size
    along, across = kv.by_token()
    whole = torch.cat([code.view(torch.uint8) for code in codes], dim=-1)
    along[page, token], across[page, token] = whole.tensor_split([kv.width - kv.across], dim=-1)
    kv.scales[page, :, token] = torch.cat(scales, dim=1)[..., 0]


def _restored(kv: KV, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """`codes [T, width]` by `scales [T, vectors]`, in float32."""
    each = zip(scales.split(1, dim=-1), kv.widths, strict=True)
    return codes.float().mul_(torch.cat([scale.expand(-1, width) for scale, width in each], dim=-1))


def gather_kv(kv: KV, slots: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
    if kv.scales is None:
        return kv.values.view(-1, kv.width)[slots]
    page, token = slots // kv.page_size, slots % kv.page_size
    codes = torch.cat([columns[page, token] for columns in kv.by_token()], dim=-1).view(kv.values.dtype)
    return _restored(kv, codes, kv.scales[page, :, token]).to(dtype)


def rope_heads(
    partials, starts, norms, rope, slots, kv: KV, *, heads: int, eps: float, dtype: torch.dtype, bias=None
) -> torch.Tensor:
    whole = add_up(partials if bias is None else [bias, *partials], dtype=dtype)
    dim, keys = rope.shape[-1] * 2, kv.width // 2
    ends = (heads * dim, starts[1] + keys, starts[2] + keys)
    q, k, v = (whole[:, a:b].unflatten(-1, (-1, dim)) for a, b in zip(starts, ends, strict=True))
    if norms:
        q, k = rms_norm(q, norms[0], eps), rms_norm(k, norms[1], eps)
    _keep(kv, slots, [_rotate_heads(k, rope, False), v])
    return _rotate_heads(q, rope, False)


def _keep_latent(both: torch.Tensor, rope: torch.Tensor, keep: Keep) -> None:
    latent, k_rope = both[:, None, keep.at : keep.at + keep.kv.width].tensor_split([len(keep.norm)], dim=-1)
    _keep(keep.kv, keep.slots, [rms_norm(latent, keep.norm, keep.eps), _rotate_heads(k_rope, rope, True)])


def split_latents(
    partials, q_norm, rope: torch.Tensor, keep: Keep, form: Form | None, *, dtype: torch.dtype, eps: float
) -> Formed | None:
    both = add_up(partials, dtype=dtype)
    _keep_latent(both, rope, keep)
    return None if q_norm is None else formed(rms_norm(both[:, : len(q_norm)], q_norm, eps), form)


def absorb_queries(
    partials, absorb: torch.Tensor, rope: torch.Tensor, keep: Keep | None = None, *, dtype: torch.dtype
) -> torch.Tensor:
    heads, _, nope = absorb.shape
    rotary, whole = rope.shape[-1] * 2, add_up(partials, dtype=dtype)
    if keep:
        _keep_latent(whole, rope, keep)
    q = whole[:, : heads * (nope + rotary)].unflatten(-1, (heads, -1))
    q_nope, q_rope = q.split([nope, rotary], dim=-1)
    return torch.cat([_per_head(q_nope, absorb), _rotate_heads(q_rope, rope, True)], dim=-1)


def _per_head(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x [R, H, K]` times each head's `weight [H, N, K]`, row by row: `[R, H, N]`. The row stands on the left, which a
    CPU's BLAS multiplies five times faster than a column on the right."""
    weight = weight.float().mT
    return torch.cat([torch.bmm(row.float()[:, None], weight).mT for row in x]).view(*x.shape[:2], -1).to(x.dtype)


def _seen(cache: KV, pages: list[int], length: int, window: int | None = None) -> torch.Tensor:
    """What the cache holds of a row, `[length, width]` float32, or of the last `window` tokens; where its pages follow
    each other, without a copy."""
    if window is not None and length > window:
        page, before = divmod(length - window, cache.page_size)
        return _seen(cache, pages[page:], before + window)[before:]
    first, count = pages[0], -(-length // cache.page_size)
    at: slice | torch.Tensor = slice(first, first + count)
    if pages[:count] != list(range(first, first + count)):
        at = torch.tensor(pages[:count], device=cache.values.device)
    if cache.scales is None:
        return cache.values[at].flatten(0, 1)[:length].float()
    codes = torch.cat([columns[at].flatten(0, 1)[:length] for columns in cache.by_token()], dim=-1)
    codes = codes.view(cache.values.dtype)
    return _restored(cache, codes, cache.scales[at].mT.flatten(0, 1)[:length])


def causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, form: Form, *, scale: float, window: int | None = None
) -> Formed:
    mask, grouped, before = None, q.shape[1] // k.shape[1], len(k) - len(q)
    if before or (window is not None and window < len(k)):
        mask = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril(before)
        mask = mask if window is None else mask.triu(before + 1 - window)
        # with a mask, torch's memory-saving form of attention knows no groups: give every head its own keys
        k, v = (t.repeat_interleave(grouped, dim=1) for t in (k, v))
        grouped = 1
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=grouped > 1)
    return formed(out[0].transpose(0, 1).flatten(1), form)


def mla_decode(q, cache, block_table, seq_lens, expand: torch.Tensor, form: Form, *, scale: float) -> Formed:
    value_dim = expand.shape[-1]
    out = torch.empty(*q.shape[:-1], value_dim, dtype=q.dtype, device=q.device)
    for row, (used, length) in enumerate(zip(block_table.tolist(), seq_lens.tolist(), strict=True)):
        keys = _seen(cache, used, length)  # [length, latent]
        probs = ((q[row].float() @ keys.T) * scale).softmax(-1)
        out[row] = (probs @ keys[:, :value_dim]).to(q.dtype)
    return formed(_per_head(out, expand).flatten(1), form)


def gqa_decode(
    q, cache, block_table, seq_lens, form: Form, *, scale: float, kv_heads: int, window: int | None = None
) -> Formed:
    out = torch.empty_like(q)
    for row, (used, length) in enumerate(zip(block_table.tolist(), seq_lens.tolist(), strict=True)):
        seen = _seen(cache, used, length, window).unflatten(-1, (2, kv_heads, -1))
        keys, values = seen.permute(1, 2, 0, 3)  # [G, length, D] each
        probs = (q[row].float().unflatten(0, (kv_heads, -1)) @ keys.mT * scale).softmax(-1)  # [G, H/G, length]
        out[row] = (probs @ values).flatten(0, 1).to(q.dtype)
    return formed(out.flatten(1), form)


@lru_cache(maxsize=1)
def _noise_at(seeds: tuple[int, ...], positions: tuple[int, ...], vocab: int) -> torch.Tensor:
    places = list(zip(seeds, positions, strict=True))
    each = list(dict.fromkeys(places))  # columns that share their noise share an address
    noise = gumbel_noise(*torch.tensor(each).unbind(1), vocab)
    return noise if len(each) == len(places) else noise[[each.index(place) for place in places]]


def _noise(seeds: torch.Tensor, positions: torch.Tensor, vocab: int) -> torch.Tensor:
    """A step's noise, not to be written to. A draw, the draw after a filter and a survey use the same; on a CPU it
    takes longer than each of them."""
    if seeds.is_cuda or len(seeds) > INVARIANT_ROWS:
        return gumbel_noise(seeds, positions.long(), vocab)
    return _noise_at(tuple(seeds.tolist()), tuple(positions.tolist()), vocab)


def _logsumexp(logits: torch.Tensor) -> torch.Tensor:
    """Few rows one by one: torch adds in another order for more of them."""
    rows = logits.split(1) if len(logits) <= INVARIANT_ROWS else [logits]
    return torch.cat([row.logsumexp(-1) for row in rows])


def draw_and_normaliser(
    logits, temperature, seeds, positions, changed=None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    drawn = temperature > 0
    scores = (logits if changed is None else changed).double()
    if bool(drawn.any()):
        noise = _noise(seeds, positions, logits.shape[-1])
        scores = torch.where(drawn[:, None], scores / torch.where(drawn, temperature, 1.0)[:, None] + noise, scores)
    ids = scores.argmax(-1)  # the first of equals
    logsumexp = _logsumexp(logits).float()
    return ids, logits.gather(-1, ids[:, None])[:, 0].float() - logsumexp, logsumexp


def penalise(logits, counts, bias, repetition, frequency, presence, penalised) -> torch.Tensor:
    x, written = logits.double(), (counts % PROMPTED).double()
    repetition, frequency, presence = (t[:, None] for t in (repetition, frequency, presence))
    x = torch.where(counts > 0, torch.where(x > 0, x / repetition, x * repetition), x)
    x = x - frequency * written - torch.where(written > 0, presence, 0.0) + bias.double()
    return torch.where(penalised[:, None] > 0, x.float(), logits)


def cumulative(probs: torch.Tensor) -> torch.Tensor:
    return (probs.double() * UNIT).long().cumsum(-1).double() / UNIT


def look_up(tokens, positions, weight, table) -> tuple[torch.Tensor, torch.Tensor]:
    return F.embedding(tokens, weight), table[positions]


def deliver(tensors, starts, host, turn) -> None:
    for tensor, start in zip(tensors, starts, strict=True):
        words = tensor.view(torch.int32).flatten()
        host[turn, start : start + len(words)] = words


def advance(ids, moves, block_table, *, tokens, positions, lengths, slots, turn, page_size: int) -> None:
    tokens.copy_(ids)
    positions.add_(moves)
    lengths.copy_(positions + 1)
    page = block_table.gather(1, (positions // page_size)[:, None])[:, 0]
    slots.copy_(page * page_size + positions % page_size)
    turn.copy_(1 - turn)


def survey(logits, temperature, seeds, positions, ids, changed=None, scored=True) -> torch.Tensor:
    if changed is not None:
        raw = survey(logits, temperature, seeds, positions, ids, scored=False)
        return torch.cat([raw, survey(changed, temperature, seeds, positions, ids, scored=scored)], dim=-1)

    def best(values: torch.Tensor, count: int, *others: torch.Tensor) -> list[torch.Tensor]:
        ids = values.topk(min(count, values.shape[-1])).indices
        missing = (0, count - ids.shape[-1])
        return [F.pad(ids, missing)] + [F.pad(t.gather(-1, ids), missing, value=float("-inf")) for t in others]

    wide, temperature = logits.double(), torch.where(temperature > 0, temperature, 1.0)
    heated, drawn = wide / temperature[:, None], wide.gather(-1, ids[:, None])
    noise = _noise(seeds, positions, logits.shape[-1])
    totals = [t for x in (wide, heated) for t in (x.logsumexp(-1), torch.special.entr(x.softmax(-1)).sum(-1))]
    single = [temperature, (wide > float("-inf")).sum(-1), *totals, (wide > drawn).sum(-1), drawn[:, 0]]
    candidates = best(heated + noise, SCORED, heated, noise)
    if not scored:
        candidates = [torch.zeros_like(candidates[0]), *(torch.full_like(t, float("-inf")) for t in candidates[1:])]
    lists = [*best(wide, SHOWN, wide), *candidates]
    return torch.cat([*(t[:, None] for t in single), *lists], dim=-1)
