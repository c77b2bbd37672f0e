"""What stood behind a draw, in Triton: sums over the vocabulary, its largest logits, and the best scores of Gumbel-max.

One pass in tiles, as `draw.py` draws, and a kernel that joins them; `reference.py` says what each number is. Sums,
largest logits and best scores are programs of their own in both: each is a chain of reductions, which waits for none of
the others.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.launch import let_next_start, overlap, wait_for_previous
from kernels.sampling.draw import gumbel
from kernels.sampling.layout import SCORED, SHOWN, SINGLE, SURVEYED

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
def store_sums(x, heated, drawn, real, sums_ptr, counts_ptr):
    """Sums at T=1 and at the row's temperature; how many logits are above that of the token drawn, and above -inf."""
    top, total, weighted = sums(x, real)
    tl.store(sums_ptr, top)
    tl.store(sums_ptr + 1, total)
    tl.store(sums_ptr + 2, weighted)
    top, total, weighted = sums(heated, real)
    tl.store(sums_ptr + 3, top)
    tl.store(sums_ptr + 4, total)
    tl.store(sums_ptr + 5, weighted)
    tl.store(counts_ptr, tl.sum((real & (x > drawn)).to(tl.int32), axis=0))
    tl.store(counts_ptr + 1, tl.sum((real & (x > float("-inf"))).to(tl.int32), axis=0))


@triton.jit
def largest(key, SHOWN: tl.constexpr, ROOM: tl.constexpr):
    """The SHOWN largest of the keys, in order, in `[ROOM]`."""
    place, found = tl.arange(0, ROOM), tl.full((ROOM,), LOWEST, tl.int64)
    for number in tl.static_range(SHOWN):
        best = tl.max(key, axis=0)
        found = tl.where(place == number, best, found)
        key = tl.where(key == best, LOWEST, key)
    return found


@triton.jit
def best_scores(score, token, SCORED: tl.constexpr, ROOM: tl.constexpr):
    """The SCORED best scores and their tokens, in order, in `[ROOM]`; of equals the first."""
    place = tl.arange(0, ROOM)
    scores, tokens = tl.full((ROOM,), float("-inf"), tl.float64), tl.zeros((ROOM,), tl.int32)
    at = tl.arange(0, score.shape[0])
    for number in tl.static_range(SCORED):
        best, which = tl.max(score, axis=0, return_indices=True)
        scores = tl.where(place == number, best, scores)
        tokens = tl.where(place == number, tl.sum(tl.where(at == which, token, 0), axis=0), tokens)
        score = tl.where(at == which, float("-inf"), score)
    return scores, tokens


@triton.jit
def survey_kernel(
    logits_ptr, changed_ptr, temperature_ptr, seeds_ptr, positions_ptr, ids_ptr, sums_ptr, counts_ptr, keys_ptr,
    score_ptr, best_ptr, vocab, tiles, CHANGED: tl.constexpr, TILE: tl.constexpr, SHOWN: tl.constexpr,
    SCORED: tl.constexpr, ROOM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One tile of a row: sums and counts, keys of the largest logits, or the best scores with their ids. With CHANGED,
    the first two of the logits, then all of the others."""
    row, tile, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    out = row * tiles + tile
    if CHANGED:  # noqa: SIM102  decided when it is compiled
        if part >= 2:
            logits_ptr, part, out = changed_ptr, part - 2, out + tl.num_programs(0) * tiles
    token, place = tile * TILE + tl.arange(0, TILE), tl.arange(0, ROOM)
    real = token < vocab
    temperature = tl.load(temperature_ptr + row)
    temperature = tl.where(temperature > 0, temperature, 1.0)
    noise = tl.zeros((TILE,), dtype=tl.float64)
    if part == 2:
        noise = gumbel(tl.load(seeds_ptr + row), tl.load(positions_ptr + row).to(tl.int64), token)
    let_next_start(PDL)
    wait_for_previous(PDL)
    x = tl.load(logits_ptr + row * vocab + token, mask=real, other=float("-inf")).to(tl.float64)
    if part == 0:
        drawn = tl.load(logits_ptr + row * vocab + tl.load(ids_ptr + row)).to(tl.float64)
        store_sums(x, x / temperature, drawn, real, sums_ptr + out * 6, counts_ptr + out * 2)
    elif part == 1:
        keys = largest(tl.where(real, sortable(x, token), LOWEST), SHOWN, ROOM)
        tl.store(keys_ptr + out * SHOWN + place, keys, mask=place < SHOWN)
    else:
        score = x / temperature + noise
        score = tl.where(real & (score == score), score, float("-inf"))  # NaN never wins, as in a draw
        scores, tokens = best_scores(score, token, SCORED, ROOM)
        tl.store(score_ptr + out * SCORED + place, scores, mask=place < SCORED)
        tl.store(best_ptr + out * SCORED + place, tokens, mask=place < SCORED)


@triton.jit
def join_sums(sums_ptr, tile, there):
    """Logsumexp and entropy of the whole row, from its tiles."""
    tops = tl.load(sums_ptr + tile * 6, mask=there, other=float("-inf"))
    totals = tl.load(sums_ptr + tile * 6 + 1, mask=there, other=0.0)
    weighted = tl.load(sums_ptr + tile * 6 + 2, mask=there, other=0.0)
    top = tl.max(tops, axis=0)
    shift = tl.where(tops == float("-inf"), 0.0, tops - top)
    weight = tl.where(tops == float("-inf"), 0.0, tl.exp(shift))
    total = tl.sum(weight * totals, axis=0)
    weighted = tl.sum(weight * (weighted + shift * totals), axis=0)
    return top + tl.log(total), tl.log(total) - weighted / total


@triton.jit
def join_single(logits_ptr, id_ptr, sums_ptr, counts_ptr, out_ptr, temperature, tiles, BLOCK: tl.constexpr):
    tile = tl.arange(0, BLOCK)
    there = tile < tiles
    logit = tl.load(logits_ptr + tl.load(id_ptr)).to(tl.float64)
    above = tl.sum(tl.load(counts_ptr + tile * 2, mask=there, other=0), axis=0)
    count = tl.sum(tl.load(counts_ptr + tile * 2 + 1, mask=there, other=0), axis=0)
    logsumexp, entropy = join_sums(sums_ptr, tile, there)
    heated_logsumexp, heated_entropy = join_sums(sums_ptr + 3, tile, there)
    tl.store(out_ptr, temperature)
    tl.store(out_ptr + 1, count.to(tl.float64))
    tl.store(out_ptr + 2, logsumexp)
    tl.store(out_ptr + 3, entropy)
    tl.store(out_ptr + 4, heated_logsumexp)
    tl.store(out_ptr + 5, heated_entropy)
    tl.store(out_ptr + 6, above.to(tl.float64))
    tl.store(out_ptr + 7, logit)


@triton.jit
def join_largest(
    logits_ptr, keys_ptr, out_ptr, candidates, BLOCK: tl.constexpr, SHOWN: tl.constexpr, ROOM: tl.constexpr
):  # fmt: skip
    i, place = tl.arange(0, BLOCK), tl.arange(0, ROOM)
    key = largest(tl.load(keys_ptr + i, mask=i < candidates, other=LOWEST), SHOWN, ROOM)
    found, shown = key > LOWEST, place < SHOWN
    token = tl.where(found, 0x7FFFFFFF - (key & 0xFFFFFFFF), 0)
    logit = tl.load(logits_ptr + token, mask=found, other=float("-inf"))
    tl.store(out_ptr + place, token.to(tl.float64), mask=shown)
    tl.store(out_ptr + SHOWN + place, logit.to(tl.float64), mask=shown)


@triton.jit
def join_best(
    logits_ptr, score_ptr, best_ptr, out_ptr, candidates, temperature, seed, position,
    BLOCK: tl.constexpr, SCORED: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    i, place = tl.arange(0, BLOCK), tl.arange(0, ROOM)
    score = tl.load(score_ptr + i, mask=i < candidates, other=float("-inf"))
    score, token = best_scores(score, tl.load(best_ptr + i, mask=i < candidates, other=0), SCORED, ROOM)
    found, shown = score > float("-inf"), place < SCORED
    logit = tl.load(logits_ptr + token, mask=found, other=float("-inf")).to(tl.float64)
    tl.store(out_ptr + place, tl.where(found, token, 0).to(tl.float64), mask=shown)
    tl.store(out_ptr + SCORED + place, logit / temperature, mask=shown)
    noise = tl.where(found, gumbel(seed, position, token), float("-inf"))
    tl.store(out_ptr + 2 * SCORED + place, noise, mask=shown)


@triton.jit
def join_survey_kernel(
    logits_ptr, changed_ptr, temperature_ptr, seeds_ptr, positions_ptr, ids_ptr, sums_ptr, counts_ptr, keys_ptr,
    score_ptr, best_ptr, out_ptr, vocab, tiles, CHANGED: tl.constexpr, CANDIDATES: tl.constexpr, SINGLE: tl.constexpr,
    SHOWN: tl.constexpr, SCORED: tl.constexpr, ROOM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_B: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A row's SINGLE numbers, its largest logits with their ids, or its best scores with theirs: in the order of
    `Survey`. With CHANGED, of the logits, then of the others, which alone have scores."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at, out_ptr = row * tiles, out_ptr + row * (1 + CHANGED) * (SINGLE + 2 * SHOWN + 3 * SCORED)
    scored = CANDIDATES
    if CHANGED:
        scored = CANDIDATES and part >= 3
        if part >= 3:
            logits_ptr, part, at = changed_ptr, part - 3, at + tl.num_programs(0) * tiles
            out_ptr += SINGLE + 2 * SHOWN + 3 * SCORED
    seed, position = tl.load(seeds_ptr + row), tl.load(positions_ptr + row).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    temperature = tl.where(temperature > 0, temperature, 1.0)
    let_next_start(PDL)
    wait_for_previous(PDL)
    logits_ptr += row * vocab
    if part == 0:
        sums_ptr, counts_ptr = sums_ptr + at * 6, counts_ptr + at * 2
        join_single(logits_ptr, ids_ptr + row, sums_ptr, counts_ptr, out_ptr, temperature, tiles, BLOCK)
    elif part == 1:
        join_largest(logits_ptr, keys_ptr + at * SHOWN, out_ptr + SINGLE, tiles * SHOWN, BLOCK_S, SHOWN, ROOM)
    elif scored:
        join_best(
            logits_ptr, score_ptr + at * SCORED, best_ptr + at * SCORED, out_ptr + SINGLE + 2 * SHOWN, tiles * SCORED,
            temperature, seed, position, BLOCK_B, SCORED, ROOM,
        )  # fmt: skip
    else:
        out_ptr, place = out_ptr + SINGLE + 2 * SHOWN, tl.arange(0, ROOM)
        tl.store(out_ptr + place, tl.zeros((ROOM,), tl.float64), mask=place < SCORED)
        for number in tl.static_range(1, 3):
            none = tl.full((ROOM,), float("-inf"), tl.float64)
            tl.store(out_ptr + number * SCORED + place, none, mask=place < SCORED)


def survey(logits, temperature, seeds, positions, ids, changed=None, scored=True) -> torch.Tensor:
    (rows, vocab), device = logits.shape, logits.device
    tiles, logits, surveys = triton.cdiv(vocab, TILE), logits.contiguous(), 1 if changed is None else 2
    sums = torch.empty(surveys, rows, tiles, 6, dtype=torch.float64, device=device)
    counts = torch.empty(surveys, rows, tiles, 2, dtype=torch.int32, device=device)
    keys = torch.empty(surveys, rows, tiles, SHOWN, dtype=torch.int64, device=device)
    score = torch.empty(surveys, rows, tiles, SCORED, dtype=torch.float64, device=device)
    best = torch.empty(surveys, rows, tiles, SCORED, dtype=torch.int32, device=device)
    other = logits if changed is None else changed.contiguous()
    given = (logits, other, temperature, seeds, positions, ids, sums, counts, keys, score, best)
    shown = {"SHOWN": SHOWN, "SCORED": SCORED, "ROOM": triton.next_power_of_2(max(SHOWN, SCORED))}
    survey_kernel[(rows, tiles, 2 * surveys + scored)](
        *given, vocab, tiles, CHANGED=surveys > 1, TILE=TILE, **shown, num_warps=4, **overlap(logits)
    )
    out = torch.empty(rows, surveys * SURVEYED, dtype=torch.float64, device=device)
    join_survey_kernel[(rows, 3 * surveys)](
        *given, out, vocab, tiles, CHANGED=surveys > 1, CANDIDATES=scored, SINGLE=SINGLE, **shown,
        BLOCK=triton.next_power_of_2(tiles), BLOCK_S=triton.next_power_of_2(tiles * SHOWN),
        BLOCK_B=triton.next_power_of_2(tiles * SCORED), num_warps=8, **overlap(logits),
    )  # fmt: skip
    return out
