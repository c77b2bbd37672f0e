"""Experiments with one next-token distribution: what settings do to it, and whether the samplers agree."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import torch

import kernels
from playground.engine.events import Counts, Likeliest
from playground.engine.sampler import Needs, Settings, draw_rows
from playground.engine.settings import RequestError, Sampler, SamplingParams

MOST_DRAWS = 1_000_000
FIRST_SLICE, SLICE_SECONDS = 1000, 0.03  # draws, and what as many may take
CPU = torch.device("cpu")
NEEDS = Needs(filtered=True, summed=True)  # every sampler on the same processed distribution


def likeliest(logits: torch.Tensor, count: int) -> Likeliest:
    """Of `logits [V]`."""
    best = logits.cpu().double().log_softmax(-1).topk(min(count, len(logits)))
    return Likeliest(best.indices.numpy(), best.values.numpy(), best.values.exp().sum().item())


def shaped(logprobs: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Probabilities `[C]` after temperature and filters; 0 where a filter cut. Greedy: all on the best."""
    if params.is_greedy:
        return np.eye(1, len(logprobs))[0]
    s = Settings.of([params], CPU)
    logits = torch.from_numpy(logprobs.copy())[None]
    return kernels.process_logits(logits, s.temperature, s.top_k, s.top_p, s.min_p)[0].exp().numpy()


def noise(seed: int, position: int, count: int) -> np.ndarray:
    return kernels.gumbel_noise(torch.tensor([seed]), torch.tensor([position]), count)[0].numpy()


def count_draws(logprobs: np.ndarray, params: SamplingParams, draws: int) -> Iterator[Counts]:
    """Draws by every sampler from the same distribution, some at a time. Raises `RequestError`."""
    if not 1 <= draws <= MOST_DRAWS:
        raise RequestError(f"Draws is {draws}; use a whole number from 1 to {MOST_DRAWS}.")
    if params.is_greedy:
        raise RequestError("At temperature 0 every draw is greedy; use a temperature above 0 to compare samplers.")
    expected, logits = shaped(logprobs, params), torch.from_numpy(logprobs.copy())[None]
    counts = torch.zeros(len(Sampler), len(logprobs), dtype=torch.int64)
    done, slice_ = 0, FIRST_SLICE
    while done < draws:
        began, count = time.perf_counter(), min(slice_, draws - done)
        positions = torch.arange(done, done + count)
        for number, sampler in enumerate(Sampler):
            one = SamplingParams(**(vars(params) | {"sampler": sampler}))
            settings = Settings(*(column.expand(count) for column in Settings.of([one], CPU)))
            ids, _ = draw_rows(logits.expand(count, -1), settings, positions, NEEDS)
            counts[number] += torch.bincount(ids, minlength=len(logprobs))
        done += count
        slice_ = max(int(count * SLICE_SECONDS / (time.perf_counter() - began)), 100)
        tests = tuple(_chi_square(counts[number], torch.from_numpy(expected)) for number in range(len(Sampler)))
        yield Counts(counts.numpy().copy(), expected, done, draws, tests)


def _chi_square(counts: torch.Tensor, expected: torch.Tensor) -> tuple[float, int, float]:
    """Pearson's test: statistic, degrees of freedom (0: one token only, nothing to test) and p. Cells of which fewer
    than 5 are due are joined, as its approximation asks."""
    due = expected * int(counts.sum())
    wide = due >= 5
    seen, due = [torch.cat([t[wide], t[~wide].sum()[None]]).double() for t in (counts.double(), due)]
    seen, due = seen[due > 1e-9], due[due > 1e-9]
    if len(due) < 2:
        return 0.0, 0, 1.0
    statistic, half = ((seen - due) ** 2 / due).sum(), torch.tensor((len(due) - 1) / 2, dtype=torch.float64)
    return statistic.item(), len(due) - 1, torch.special.gammaincc(half, statistic / 2).item()
