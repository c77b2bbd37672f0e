"""One sampling pass over all rows of a step, each with its own sampler, filters, seed and position."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import kernels
from playground.engine.request import Sampler, SamplingParams


def sample(
    logits: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int]
) -> tuple[list[int], list[float]]:
    """Draws a token per row. `logits [R, V]`; `positions[r]` is where the token will stand: its noise's address.

    Returns ids and raw log-probabilities (natural logarithm, softmax at T=1).
    """
    ids = logits.argmax(-1)  # the first of equals, on every device
    for kind, draw in ((Sampler.MULTINOMIAL, kernels.draw_multinomial), (Sampler.GUMBEL, kernels.draw_gumbel)):
        rows = [r for r, p in enumerate(params) if p.sampler is kind and not p.is_greedy]
        if rows:
            chosen = [params[r] for r in rows]

            def column(values, dtype=torch.float64):
                return torch.tensor(values, dtype=dtype, device=logits.device)

            log_probs = kernels.process_logits(
                logits[rows],
                column([p.temperature for p in chosen]),
                column([p.top_k for p in chosen], torch.int64),
                column([p.top_p for p in chosen]),
                column([p.min_p for p in chosen]),
            )
            seeds = column([p.seed for p in chosen], torch.int64)
            ids[rows] = draw(log_probs, seeds, column([positions[r] for r in rows], torch.int64))
    raw = logits.gather(-1, ids[:, None]) - logits.logsumexp(-1, keepdim=True)
    both = torch.cat([ids[:, None].double(), raw.double()], dim=-1).tolist()  # one read-back
    return [int(i) for i, _ in both], [logprob for _, logprob in both]
