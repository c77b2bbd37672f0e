"""Filters that shape a distribution, and the multinomial draw from what they leave."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.sampling.contract import cumulative
from kernels.sampling.noise import uniform_noise


def log_softmax(x: torch.Tensor) -> torch.Tensor:
    """Along each row of `x [R, V]` float64, with the same bits in any company. On a card torch splits a row by where it
    lies in memory, so every row begins at 16 bytes."""
    if x.is_cuda and x.shape[-1] % 2:
        return torch.log_softmax(F.pad(x, (0, 1), value=float("-inf")), dim=-1)[:, :-1].contiguous()
    return torch.log_softmax(x, dim=-1)


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
    log_probs = log_softmax(logits.double() / temperature.double()[:, None])
    ordered, order = log_probs.sort(dim=-1, descending=True, stable=True)
    probs = ordered.exp()
    ranks = torch.arange(logits.shape[-1], device=logits.device)[None, :]
    limit = torch.where(top_k > 0, top_k, logits.shape[-1])[:, None]
    probs = probs.masked_fill(ranks >= limit, 0.0)
    kept = (ranks < limit) & ((_mass_before(probs) < top_p[:, None]) | (top_p >= 1)[:, None])
    kept &= probs >= min_p[:, None] * probs[:, :1]
    kept[:, 0] = True
    cut = torch.empty_like(kept).scatter(-1, order, ~kept)
    filtered = log_softmax(log_probs.masked_fill(cut, float("-inf")))
    return torch.where(((top_k > 0) | (top_p < 1) | (min_p > 0))[:, None], filtered, log_probs)


def _mass_before(probs: torch.Tensor) -> torch.Tensor:
    """The share of a row's probability that stands before each of its columns."""
    sums = cumulative(probs)
    return F.pad(sums[:, :-1], (1, 0)).div_(sums[:, -1:])


def draw_multinomial(log_probs: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Ids `[R]` by inverting the cumulative distribution at one uniform per row."""
    sums = cumulative(log_probs.exp())
    target = uniform_noise(seeds, positions)[:, None] * sums[:, -1:]
    # the first id whose cumulative probability reaches the target, which is above 0: never one of probability zero
    return (sums < target).sum(-1)
