"""What the KV cache buys: time per token as the text grows, with the cache and without it.

With the cache a step feeds one token and its work stays flat; without it every step feeds the whole sequence again.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Generator, Iterator
from itertools import pairwise

import torch

from playground.checkpoint.config import CheckpointError
from playground.engine.engine import Engine
from playground.engine.events import CurvePoint
from playground.engine.requests import Request
from playground.engine.settings import SamplingParams
from playground.model.step import Step

AGREEING = 7  # of nine probes: FP8 prefill and absorbed decode round apart, so a near-tie may fall either way
PROBES = 9
WINDOW = 16  # steps whose median is one point of the cached curve


def uncached_step(engine: Engine, ids: list[int]) -> Generator[None, None, tuple[int, float]]:
    """Layer by layer the next greedy token from a whole sequence, and the seconds that its layers took."""
    model, spent = engine.model, 0.0
    tokens, positions = torch.tensor(ids, device=model.device), torch.arange(len(ids), device=model.device)
    layers = model.in_slices(tokens, Step(positions, slots=None))
    while True:
        began = time.perf_counter()
        engine.runner.use_threads_for(len(ids))
        hidden = next(layers)
        if hidden is not None:
            token = int(model.logits(hidden[-1:]).argmax())
            return token, spent + time.perf_counter() - began
        engine.runner.wait()
        spent += time.perf_counter() - began
        yield


def written(engine: Engine, prompt: tuple[int, ...], tokens: int) -> Generator[None, None, tuple[list, list]]:
    """Greedy ids, and the seconds of each step after the first token."""
    request = Request(prompt, SamplingParams("greedy"), tokens, ignore_eos=True)
    (row,) = engine.add([request])
    times: list[float] = []
    try:
        while not row.finished:
            yield
            if len(row.new_ids) > len(times):
                times.append(row.last_token)
    finally:
        engine.cancel(row, keep=False)
    if len(row.new_ids) < tokens:
        raise CheckpointError("The text that is measured could not be written to its end: no figures.")
    return row.new_ids, [b - a for a, b in pairwise(times)]


def cache_curve(engine: Engine, prompt: tuple[int, ...], tokens: int) -> Iterator[CurvePoint | None]:
    """Points at evenly spaced lengths; None between slices of work. Raises `CheckpointError` at the end if the two
    forms disagree."""
    yield from written(engine, prompt, 8)  # warm-up: kernels are compiled, memory is touched
    ids, seconds = yield from written(engine, prompt, tokens)
    agree = 0
    for probe in range(1, PROBES + 1):
        at, found = (tokens - 1) * probe // PROBES, []
        for _ in range(4):
            found.append((yield from uncached_step(engine, [*prompt, *ids[:at]])))
        agree += found[0][0] == ids[at]
        yield CurvePoint(
            len(prompt) + at,
            statistics.median(seconds[max(at - WINDOW, 0) : at]) * 1e3,
            statistics.median(taken for _, taken in found[1:]) * 1e3,
        )
    if agree < AGREEING:
        raise CheckpointError(f"With and without the cache only {agree} of {PROBES} tokens agree: no figures.")
