"""Filters that shape a distribution, and the multinomial draw from what they leave."""

from __future__ import annotations

import torch

from kernels.sampling.noise import uniform_noise


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
