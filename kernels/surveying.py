"""What stood behind a draw, in Triton: sums over the vocabulary, its largest logits, and the best scores of Gumbel-max.

One pass in tiles, as `drawing.py` draws, and a kernel that joins them; `reference.py` says what each number is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.drawing import philox_word
from kernels.forms import SCORED, SHOWN, Survey
from kernels.launch import let_next_start, overlap, wait_for_previous

TILE = 1024
LOWEST = tl.constexpr(-(2**63))


@triton.jit
def sortable(value, token):
    """One int64 by which a larger float32 comes first, and of equals the lower id."""
    bits = value.to(tl.float32).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    return (ordered << 32) | (0x7FFFFFFF - token).to(tl.int64)


@triton.jit
def sums(x, real):
    """Largest value, sum of exponentials against it, and sum of those times their exponents."""
    top = tl.max(tl.where(real, x, float("-inf")), axis=0)
    shifted = x - tl.where(top == float("-inf"), 0.0, top)
    weight = tl.where(real & (x > float("-inf")), tl.exp(shifted), 0.0)
    return top, tl.sum(weight, axis=0), tl.sum(tl.where(weight > 0, weight * shifted, 0.0), axis=0)


@triton.jit
def survey_kernel(
    logits_ptr, temperature_ptr, seeds_ptr, positions_ptr, ids_ptr, sums_ptr, above_ptr, keys_ptr, score_ptr, best_ptr,
    vocab, tiles, TILE: tl.constexpr, SHOWN: tl.constexpr, SCORED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One tile of a row: sums at T=1 and at the row's temperature, how many logits are above that of the token drawn,
    keys of the largest logits, and the best scores with their ids."""
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = tile * TILE + tl.arange(0, TILE)
    real = token < vocab
    temperature = tl.load(temperature_ptr + row)
    temperature = tl.where(temperature > 0, temperature, 1.0)
    word = philox_word(tl.load(seeds_ptr + row), tl.load(positions_ptr + row).to(tl.int64), token)
    noise = -tl.log(-tl.log(1.0 - (word.to(tl.float64) + 0.5) * 2.3283064365386963e-10))
    let_next_start(PDL)
    wait_for_previous(PDL)
    x = tl.load(logits_ptr + row * vocab + token, mask=real, other=float("-inf")).to(tl.float64)
    drawn = tl.load(logits_ptr + row * vocab + tl.load(ids_ptr + row)).to(tl.float64)
    heated = x / temperature
    out = row * tiles + tile
    top, total, weighted = sums(x, real)
    tl.store(sums_ptr + out * 6, top)
    tl.store(sums_ptr + out * 6 + 1, total)
    tl.store(sums_ptr + out * 6 + 2, weighted)
    top, total, weighted = sums(heated, real)
    tl.store(sums_ptr + out * 6 + 3, top)
    tl.store(sums_ptr + out * 6 + 4, total)
    tl.store(sums_ptr + out * 6 + 5, weighted)
    tl.store(above_ptr + out, tl.sum((real & (x > drawn)).to(tl.int32), axis=0))
    key = tl.where(real, sortable(x, token), LOWEST)
    for place in tl.static_range(SHOWN):
        best = tl.max(key, axis=0)
        tl.store(keys_ptr + out * SHOWN + place, best)
        key = tl.where(key == best, LOWEST, key)
    score = tl.where(real, heated + noise, float("-inf"))
    for place in tl.static_range(SCORED):
        best = tl.max(score, axis=0)
        which = tl.min(tl.where(real & (score == best), token, 2147483647), axis=0)
        tl.store(score_ptr + out * SCORED + place, best)
        tl.store(best_ptr + out * SCORED + place, which)
        score = tl.where(token == which, float("-inf"), score)


@triton.jit
def join_sums(sums_ptr, tile, there):
    """Logsumexp and entropy of the whole row, from its tiles."""
    tops = tl.load(sums_ptr + tile * 6, mask=there, other=float("-inf"))
    top = tl.max(tops, axis=0)
    shift = tl.where(tops == float("-inf"), 0.0, tops - top)
    weight = tl.where(tops == float("-inf"), 0.0, tl.exp(shift))
    totals = tl.load(sums_ptr + tile * 6 + 1, mask=there, other=0.0)
    total = tl.sum(weight * totals, axis=0)
    weighted = tl.sum(weight * (tl.load(sums_ptr + tile * 6 + 2, mask=there, other=0.0) + shift * totals), axis=0)
    return top + tl.log(total), tl.log(total) - weighted / total


@triton.jit
def join_survey_kernel(
    logits_ptr, temperature_ptr, seeds_ptr, positions_ptr, ids_ptr, sums_ptr, above_ptr, keys_ptr, score_ptr, best_ptr,
    single_ptr, top_ptr, top_logits_ptr, scored_ptr, heated_ptr, noise_ptr, vocab, tiles,
    SHOWN: tl.constexpr, SCORED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_B: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    seed, position = tl.load(seeds_ptr + row), tl.load(positions_ptr + row).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    temperature = tl.where(temperature > 0, temperature, 1.0)
    let_next_start(PDL)
    wait_for_previous(PDL)
    logits_ptr += row * vocab
    tile = tl.arange(0, BLOCK)
    there = tile < tiles
    at = row * tiles
    logsumexp, entropy = join_sums(sums_ptr + at * 6, tile, there)
    tl.store(single_ptr + row * 6, logsumexp)
    tl.store(single_ptr + row * 6 + 1, entropy)
    logsumexp, entropy = join_sums(sums_ptr + at * 6 + 3, tile, there)
    tl.store(single_ptr + row * 6 + 2, logsumexp)
    tl.store(single_ptr + row * 6 + 3, entropy)
    above = tl.sum(tl.load(above_ptr + at + tile, mask=there, other=0), axis=0)
    tl.store(single_ptr + row * 6 + 4, above.to(tl.float64))
    tl.store(single_ptr + row * 6 + 5, tl.load(logits_ptr + tl.load(ids_ptr + row)).to(tl.float64))
    i = tl.arange(0, BLOCK_S)
    key = tl.load(keys_ptr + at * SHOWN + i, mask=i < tiles * SHOWN, other=LOWEST)
    for place in tl.static_range(SHOWN):
        best = tl.max(key, axis=0)
        token = 0x7FFFFFFF - (best & 0xFFFFFFFF)
        found = best > LOWEST
        tl.store(top_ptr + row * SHOWN + place, tl.where(found, token, 0))
        logit = tl.load(logits_ptr + token, mask=found, other=float("-inf"))
        tl.store(top_logits_ptr + row * SHOWN + place, logit.to(tl.float64))
        key = tl.where(key == best, LOWEST, key)
    i = tl.arange(0, BLOCK_B)
    inside = i < tiles * SCORED
    score = tl.load(score_ptr + at * SCORED + i, mask=inside, other=float("-inf"))
    token = tl.load(best_ptr + at * SCORED + i, mask=inside, other=2147483647)
    for place in tl.static_range(SCORED):
        best = tl.max(score, axis=0)
        which = tl.min(tl.where(score == best, token, 2147483647), axis=0)
        found = best > float("-inf")
        tl.store(scored_ptr + row * SCORED + place, tl.where(found, which, 0).to(tl.int64))
        logit = tl.load(logits_ptr + which, mask=found, other=float("-inf")).to(tl.float64)
        tl.store(heated_ptr + row * SCORED + place, logit / temperature)
        word = philox_word(seed, position, which)
        gumbel = -tl.log(-tl.log(1.0 - (word.to(tl.float64) + 0.5) * 2.3283064365386963e-10))
        tl.store(noise_ptr + row * SCORED + place, tl.where(found, gumbel, float("-inf")))
        score = tl.where(token == which, float("-inf"), score)


def survey(logits, temperature, seeds, positions, ids) -> Survey:
    (rows, vocab), device = logits.shape, logits.device
    tiles, logits = triton.cdiv(vocab, TILE), logits.contiguous()
    wide = {"dtype": torch.float64, "device": device}
    parts, above = torch.empty(rows, tiles, 6, **wide), torch.empty(rows, tiles, dtype=torch.int32, device=device)
    keys = torch.empty(rows, tiles, SHOWN, dtype=torch.int64, device=device)
    score = torch.empty(rows, tiles, SCORED, **wide)
    best = torch.empty(rows, tiles, SCORED, dtype=torch.int32, device=device)
    survey_kernel[(rows, tiles)](
        logits, temperature, seeds, positions, ids, parts, above, keys, score, best, vocab, tiles,
        TILE=TILE, SHOWN=SHOWN, SCORED=SCORED, num_warps=4, **overlap(logits),
    )  # fmt: skip
    single, top_logits, heated, noise = (torch.empty(rows, n, **wide) for n in (6, SHOWN, SCORED, SCORED))
    top, scored = (torch.empty(rows, n, dtype=torch.int64, device=device) for n in (SHOWN, SCORED))
    join_survey_kernel[(rows,)](
        logits, temperature, seeds, positions, ids, parts, above, keys, score, best, single, top, top_logits, scored,
        heated, noise, vocab, tiles,
        SHOWN=SHOWN, SCORED=SCORED, BLOCK=triton.next_power_of_2(tiles),
        BLOCK_S=triton.next_power_of_2(tiles * SHOWN), BLOCK_B=triton.next_power_of_2(tiles * SCORED),
        num_warps=8, **overlap(logits),
    )  # fmt: skip
    return Survey(*single.unbind(-1), top, top_logits, scored, heated, noise)
