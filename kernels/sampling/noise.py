"""Noise with an address.

Noise is a pure function of (seed, position, token id), by Philox4x32-10 (Salmon et al., SC 2011), a counter-based
generator: the same number on every device, in any batch order, with no state. This module is plain torch on every
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
