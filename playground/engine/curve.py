"""What the KV cache buys: time per token as the text grows, with the cache and without it.

With the cache a step feeds one token and its work stays flat; without it every step feeds the whole sequence again.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from itertools import pairwise

import torch

from playground.checkpoint.config import CheckpointError
from playground.engine.client import Service
from playground.engine.requests import Request, SamplingParams, TokenEvent
from playground.model.step import Step
from playground.model.transformer import Transformer

AGREEING = 7  # of nine probes: FP8 prefill and absorbed decode round apart, so a near-tie may fall either way
PROBES = 9
WINDOW = 16  # steps whose median is one point of the cached curve


@torch.inference_mode()
def uncached_step(model: Transformer, ids: list[int]) -> tuple[int, float]:
    """The next greedy token from a whole sequence, and the seconds it took."""
    began = time.perf_counter()
    tokens = torch.tensor(ids, device=model.device)
    hidden = model(tokens, Step(torch.arange(len(ids), device=model.device), slots=None))
    token = int(model.logits(hidden[-1:]).argmax())
    return token, time.perf_counter() - began


def _write(service: Service, prompt: list[int], tokens: int) -> tuple[list[int], list[float]]:
    """Greedy ids, and the seconds of each step after the first token."""
    ids, times = [], []
    request = Request(tuple(prompt), SamplingParams("greedy"), tokens, ignore_eos=True)
    with service.submit([request])[0] as stream:
        for event in stream:
            if isinstance(event, TokenEvent):
                ids.append(event.id)
                times.append(time.perf_counter())
    return ids, [b - a for a, b in pairwise(times)]


def cache_curve(service: Service, prompt: list[int], tokens: int) -> Iterator[dict]:
    """Milliseconds per token at evenly spaced lengths, one at a time: whoever else uses the engine gets his turn
    between them. Raises `CheckpointError` at the end if the two forms disagree."""
    _write(service, prompt, 8)  # warm-up: kernels are compiled, memory is touched
    ids, seconds = _write(service, prompt, tokens)
    agree = 0
    for probe in range(1, PROBES + 1):
        at = (tokens - 1) * probe // PROBES
        found = [service.call(lambda engine, at=at: uncached_step(engine.model, prompt + ids[:at])) for _ in range(4)]
        agree += found[0][0] == ids[at]
        yield {
            "length": len(prompt) + at,
            "cached_ms": statistics.median(seconds[max(at - WINDOW, 0) : at]) * 1e3,
            "uncached_ms": statistics.median(taken for _, taken in found[1:]) * 1e3,
        }
    if agree < AGREEING:
        raise CheckpointError(f"With and without the cache only {agree} of {PROBES} tokens agree: no figures.")
