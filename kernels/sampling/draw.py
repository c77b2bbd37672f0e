"""The draw in Triton: greedy or Gumbel-max over the whole vocabulary, and the log-probability of what was drawn.

One pass over the logits in tiles, each with its own noise made in place; a second kernel joins the tiles. The numbers
are those of `noise.py`, which defines them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.launch import let_next_start, overlap, wait_for_previous
from kernels.sampling.noise import GUMBEL_STREAM

TILE = 1024
_STREAM = tl.constexpr(GUMBEL_STREAM)


@triton.jit
def philox_word(seed, position, token):
    """The 32-bit word (as int64) of Philox4x32-10 at (seed, position, token): four tokens share a counter."""
    mask: tl.constexpr = 0xFFFFFFFF
    c0, c1 = (token // 4).to(tl.int64), (position & mask) + 0 * token
    c2, c3 = 0 * c0 + _STREAM, 0 * c0
    k0, k1 = seed & mask, (seed >> 32) & mask
    for _ in tl.static_range(10):
        # the 64-bit products wrap, but their halves are right once the sign is masked away
        low, high = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c2 = ((high >> 32) & mask) ^ c1 ^ k0, ((low >> 32) & mask) ^ c3 ^ k1
        c1, c3 = high & mask, low & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    word = token % 4
    return tl.where(word < 2, tl.where(word == 0, c0, c1), tl.where(word == 2, c2, c3))


@triton.jit
def gumbel(seed, position, token):
    """The noise of `sampling.gumbel_noise` in float64; 1 - u is exact: 33 bits of it."""
    word = philox_word(seed, position, token)
    return -tl.log(-tl.log(1.0 - (word.to(tl.float64) + 0.5) * 2.3283064365386963e-10))


@triton.jit
def draw_kernel(
    logits_ptr, changed_ptr, temperature_ptr, seeds_ptr, positions_ptr, top_ptr, total_ptr, best_ptr, id_ptr, vocab,
    tiles, CHANGED: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Of one tile of a row: largest logit, sum of exponentials against it, best score and its token. With CHANGED,
    scores are of other logits."""
    row, tile = tl.program_id(0), tl.program_id(1)
    token = tile * TILE + tl.arange(0, TILE)
    real = token < vocab
    temperature = tl.load(temperature_ptr + row)
    noise = tl.zeros((TILE,), dtype=tl.float64)
    if temperature > 0:
        noise = gumbel(tl.load(seeds_ptr + row), tl.load(positions_ptr + row).to(tl.int64), token)
    let_next_start(PDL)
    wait_for_previous(PDL)
    logits = tl.load(logits_ptr + row.to(tl.int64) * vocab + token, mask=real, other=float("-inf"))
    narrow = logits.to(tl.float32)
    top = tl.max(narrow, axis=0)
    finite = tl.where(top == float("-inf"), 0.0, top)
    if CHANGED:
        logits = tl.load(changed_ptr + row.to(tl.int64) * vocab + token, mask=real, other=float("-inf"))
    score = logits.to(tl.float64)
    if temperature > 0:
        score = score / temperature + noise
    score = tl.where(real, score, float("-inf"))
    best = tl.max(score, axis=0)
    out = row * tiles + tile
    tl.store(top_ptr + out, top)
    tl.store(total_ptr + out, tl.sum(tl.exp(narrow - finite), axis=0))
    tl.store(best_ptr + out, best)
    tl.store(id_ptr + out, tl.min(tl.where(score == best, token, vocab), axis=0))


@triton.jit
def join_draw_kernel(
    logits_ptr, top_ptr, total_ptr, best_ptr, id_ptr, ids_ptr, logprobs_ptr, logsumexp_ptr, vocab, tiles,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row, tile = tl.program_id(0), tl.arange(0, BLOCK)
    there = tile < tiles
    at = row * tiles + tile
    let_next_start(PDL)
    wait_for_previous(PDL)
    tops = tl.load(top_ptr + at, mask=there, other=float("-inf"))
    top = tl.max(tops, axis=0)
    finite = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp(tops - finite) * tl.load(total_ptr + at, mask=there, other=0.0), axis=0)
    bests = tl.load(best_ptr + at, mask=there, other=float("-inf"))
    ids = tl.load(id_ptr + at, mask=there, other=2147483647)
    # equals go to the lowest id; where every score is NaN, to an id that exists
    token = tl.minimum(tl.min(tl.where(bests == tl.max(bests, axis=0), ids, vocab), axis=0), vocab - 1)
    tl.store(ids_ptr + row, token.to(tl.int64))
    logit = tl.load(logits_ptr + row.to(tl.int64) * vocab + token).to(tl.float32)
    logsumexp = finite + tl.log(total)
    tl.store(logsumexp_ptr + row, logsumexp)
    tl.store(logprobs_ptr + row, logit - logsumexp)


def draw_and_normaliser(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    changed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, vocab = logits.shape
    tiles, device = triton.cdiv(vocab, TILE), logits.device
    top, total = torch.empty(2, rows, tiles, dtype=torch.float32, device=device)
    best = torch.empty(rows, tiles, dtype=torch.float64, device=device)
    tile_ids = torch.empty(rows, tiles, dtype=torch.int32, device=device)
    ids = torch.empty(rows, dtype=torch.int64, device=device)
    logprobs, logsumexp = torch.empty(2, rows, dtype=torch.float32, device=device)
    logits = logits.contiguous()
    draw_kernel[(rows, tiles)](
        logits, logits if changed is None else changed.contiguous(), temperature, seeds, positions, top, total, best,
        tile_ids, vocab, tiles, CHANGED=changed is not None, TILE=TILE, num_warps=4, **overlap(logits),
    )  # fmt: skip
    join_draw_kernel[(rows,)](
        logits, top, total, best, tile_ids, ids, logprobs, logsumexp, vocab, tiles,
        BLOCK=triton.next_power_of_2(tiles), num_warps=4, **overlap(logits),
    )  # fmt: skip
    return ids, logprobs, logsumexp
