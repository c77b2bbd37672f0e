"""The draw: noise with an address, and the filters that shape a distribution.

Noise is a pure function of (seed, position, token id), by Philox4x32-10 (Salmon et al., SC 2011), a counter-based
generator: the same number on every device, in any batch order, with no state. This room is plain torch on every
device, because integers and float64 give the same bits everywhere; it has no twin because it is its own definition.
"""

from __future__ import annotations

import torch

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
GUMBEL_STREAM, UNIFORM_STREAM = 0, 1  # third counter word: the two kinds of noise never share a number


def philox(counter: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Philox4x32-10 on int64 tensors that hold uint32 words: `counter [4, ...]` and `key [2, ...]` to `[4, ...]`."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        # the 64-bit products wrap in int64, but their low 64 bits, and so both halves, are right
        low, high = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = ((high >> 32) & _MASK) ^ c1 ^ k0, ((low >> 32) & _MASK) ^ c3 ^ k1
        c1, c3 = high & _MASK, low & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.stack([c0, c1, c2, c3])


def _words(seeds: torch.Tensor, positions: torch.Tensor, counters: torch.Tensor, stream: int) -> torch.Tensor:
    """Words `[4, R, C]` at the addresses (seed, position) of R rows and C counters."""
    shape = (len(seeds), len(counters))
    words = [counters[None, :], positions[:, None], torch.full_like(positions, stream)[:, None], seeds[:, None] * 0]
    key = torch.stack([seeds & _MASK, (seeds >> 32) & _MASK])[..., None]
    return philox(torch.stack([w.expand(shape) for w in words]), key)


def gumbel_noise(seeds: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Standard Gumbel noise `[R, vocab_size]` float64 for rows with `seeds [R]` and `positions [R]`, both int64.

    From a full 32-bit uniform, taken in float64 at its middle `(w + 0.5) / 2^32`: neither end is ever 0 or 1, and the
    upper tail, where a float32 uniform loses its bits, reaches 22.9 nats.
    """
    groups = torch.arange(-(-vocab_size // 4), device=seeds.device)
    words = _words(seeds, positions, groups, GUMBEL_STREAM).permute(1, 2, 0).flatten(1)[:, :vocab_size]
    # w is mirrored so that the largest noise comes from the smallest uniform, where log1p is exact
    exponential = -torch.log1p(-(words.double() + 0.5) * 2.0**-32)
    return -torch.log(exponential)


def uniform_noise(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One uniform in (0, 1) per row, `[R]` float64, from 52 random bits: the multinomial draw's only number."""
    one = torch.zeros(1, dtype=torch.int64, device=seeds.device)
    high, low, _, _ = _words(seeds, positions, one, UNIFORM_STREAM)[..., 0]
    return ((high << 20 | low >> 12).double() + 0.5) * 2.0**-52


def process_logits(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> torch.Tensor:
    """The processed distribution: log-probabilities `[R, V]` float64, `-inf` where a filter cut.

    In this order: temperature (> 0); top-k keeps the k likeliest (0: all; of equals, the lowest ids); top-p keeps the
    shortest prefix of what is left, renormalised, that reaches top_p (1: all); min-p drops what is less likely than
    min_p times the likeliest (0: none). The likeliest token always stays. All parameters are `[R]` tensors. A row that
    filters nothing keeps its bits whatever the others filter.
    """
    log_probs = torch.log_softmax(logits.double() / temperature.double()[:, None], dim=-1)
    ordered, order = log_probs.sort(dim=-1, descending=True, stable=True)
    probs = ordered.exp()
    ranks = torch.arange(logits.shape[-1], device=logits.device)[None, :]
    limit = torch.where(top_k > 0, top_k, logits.shape[-1])[:, None]
    probs = probs.masked_fill(ranks >= limit, 0.0)
    before = (probs.cumsum(-1) - probs) / probs.sum(-1, keepdim=True)
    kept = (ranks < limit) & ((before < top_p[:, None]) | (top_p >= 1)[:, None])
    kept &= probs >= min_p[:, None] * probs[:, :1]
    kept[:, 0] = True
    cut = torch.empty_like(kept).scatter(-1, order, ~kept)
    filtered = torch.log_softmax(log_probs.masked_fill(cut, float("-inf")), dim=-1)
    return torch.where(((top_k > 0) | (top_p < 1) | (min_p > 0))[:, None], filtered, log_probs)


def draw_multinomial(log_probs: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Ids `[R]` by inverting the cumulative distribution at one uniform per row."""
    cumulative = log_probs.exp().cumsum(-1)
    target = uniform_noise(seeds, positions)[:, None] * cumulative[:, -1:]
    # the first id whose cumulative probability reaches the target, which is above 0: never one of probability zero
    return (cumulative < target).sum(-1)
