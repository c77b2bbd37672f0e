"""Experiments with one next-token distribution: what settings do to it, and whether the samplers agree. All of the
vocabulary takes part."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

import kernels
from playground.engine.batch import History
from playground.engine.events import Agreement, Counts
from playground.engine.history import Histories
from playground.engine.requests import Draws, Shape
from playground.engine.sampler import Needs, Settings, draw_rows, penalised_rows, processed_rows
from playground.engine.settings import RequestError, Sampler, SamplingParams

MOST_DRAWS = 1_000_000
FIRST_SLICE, SLICE_SECONDS = 200_000, 0.03  # numbers of draws times vocabulary, and what a slice may take
CPU = torch.device("cpu")


def penalised(logits: torch.Tensor, params: SamplingParams, prompt: tuple[int, ...]) -> torch.Tensor:
    """`logits [1, V]` after the penalties that a prompt's end meets."""
    if not params.is_penalised:
        return logits
    histories = Histories.of([History(prompt, ())], [params], logits.shape[1], CPU)
    return penalised_rows(logits, Settings.of([params], CPU), Needs.of([params]), histories)


def shaped(job: Shape) -> np.ndarray:
    """Probabilities `[V]` after penalties, temperature and filters. Greedy: all on the best."""
    changed = penalised(torch.from_numpy(job.logits.copy())[None], job.params, job.prompt)
    if job.params.is_greedy:
        return torch.zeros(changed.shape[1], dtype=torch.float64).index_fill_(0, changed.argmax(-1), 1.0).numpy()
    return processed_rows(changed, Settings.of([job.params], CPU), Needs.of([job.params]))[0].exp().numpy()


def noise(seed: int, position: int, count: int) -> np.ndarray:
    return kernels.gumbel_noise(torch.tensor([seed]), torch.tensor([position]), count)[0].numpy()


def count_draws(job: Draws) -> Iterator[Counts]:
    """Draws by every sampler from the same distribution, some at a time, at the positions behind each other. Raises
    `RequestError`."""
    params, draws, vocab = job.params, job.draws, len(job.logits)
    if not 1 <= draws <= MOST_DRAWS:
        raise RequestError(f"Draws is {draws}; use a whole number from 1 to {MOST_DRAWS}.")
    if params.is_greedy:
        raise RequestError("Greedy always draws the same; choose another sampler and a temperature above 0.")
    expected = shaped(Shape(job.logits, params, job.prompt))
    changed = penalised(torch.from_numpy(job.logits.copy())[None], params, job.prompt)
    counts = torch.zeros(len(Sampler), vocab, dtype=torch.int64)
    needs = Needs(filtered=params.is_filtered, summed=True)
    done, slice_ = 0, max(FIRST_SLICE // vocab, 1)
    while done < draws:
        began, count = time.perf_counter(), min(slice_, draws - done)
        positions = torch.arange(done, done + count)
        for number, sampler in enumerate(Sampler):
            one = replace(params, sampler=sampler)
            settings = Settings(*(column.expand(count) for column in Settings.of([one], CPU)))
            ids, _ = draw_rows(changed.expand(count, -1), settings, positions, needs)
            counts[number] += torch.bincount(ids, minlength=vocab)
        done += count
        slice_ = max(int(count * SLICE_SECONDS / (time.perf_counter() - began)), 1)
        yield _summed(counts.numpy(), expected, done, job)


def _summed(counts: np.ndarray, expected: np.ndarray, done: int, job: Draws) -> Counts:
    shown = list(job.shown)
    tests = tuple(_agreement(torch.from_numpy(row), torch.from_numpy(expected)) for row in counts)
    rows = [np.append(row[shown], row.sum() - row[shown].sum()) for row in (*counts, expected)]
    return Counts(np.stack(rows[:-1]), rows[-1], done, job.draws, tests)


def _agreement(counts: torch.Tensor, expected: torch.Tensor) -> Agreement:
    """Pearson's test, and how far apart the two distributions are. Cells of which fewer than 5 are due are joined, as
    the test's approximation asks."""
    total = int(counts.sum())
    distance = (counts / total - expected).abs().sum().item() / 2
    due = expected * total
    wide = due >= 5
    seen, due = [torch.cat([t[wide], t[~wide].sum()[None]]).double() for t in (counts.double(), due)]
    seen, due = seen[due > 1e-9], due[due > 1e-9]
    if len(due) < 2:
        return Agreement(distance, 0.0, 0, 1.0)
    statistic, half = ((seen - due) ** 2 / due).sum(), torch.tensor((len(due) - 1) / 2, dtype=torch.float64)
    p = torch.special.gammaincc(half, statistic / 2).item()
    return Agreement(distance, statistic.item(), len(due) - 1, p)
