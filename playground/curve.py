"""What the KV cache buys: time per token as the text grows, with the cache and without it.

With the cache a step feeds one token and its work stays flat; without it every step feeds the whole sequence again.
"""

from __future__ import annotations

import statistics
import time

import torch

from playground.config import CheckpointError
from playground.engine.engine import Engine
from playground.engine.request import Request, SamplingParams
from playground.model.step import Step
from playground.model.transformer import Transformer

AGREEING = 7  # of nine probes: FP8 prefill and absorbed decode round apart, so a near-tie may fall either way
PROBES = 9


@torch.inference_mode()
def cached_seconds(model: Transformer, prompt: list[int], tokens: int) -> tuple[list[int], list[float]]:
    """Greedy ids and the seconds of each decode step."""
    engine = Engine(model, tokenizer=None, max_rows=1, context=len(prompt) + tokens)
    (row,) = engine.add([Request(tuple(prompt), SamplingParams("greedy"), tokens, ignore_eos=True)])
    engine.step()
    seconds = []
    while engine.busy:
        began = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - began)
    return row.new_ids, seconds


@torch.inference_mode()
def uncached_step(model: Transformer, ids: list[int]) -> tuple[int, float]:
    """The next greedy token from a whole sequence, and the seconds it took."""
    began = time.perf_counter()
    tokens = torch.tensor(ids, device=model.device)
    hidden = model(tokens, Step(torch.arange(len(ids), device=model.device), slots=None))
    token = int(model.logits(hidden[-1:]).argmax())
    return token, time.perf_counter() - began


def cache_curve(model: Transformer, prompt: list[int], tokens: int) -> list[dict]:
    """Milliseconds per token at evenly spaced lengths. Raises `CheckpointError` if the two forms disagree."""
    cached_seconds(model, prompt, 8)  # warm-up: kernels are compiled, memory is touched
    ids, seconds = cached_seconds(model, prompt, tokens)
    rows, agree = [], 0
    for probe in range(1, PROBES + 1):
        at = (tokens - 1) * probe // PROBES
        near = seconds[max(at - 16, 0) : at]
        token, _ = uncached_step(model, prompt + ids[:at])
        agree += token == ids[at]
        without = statistics.median(uncached_step(model, prompt + ids[:at])[1] for _ in range(3))
        rows.append(
            {"length": len(prompt) + at, "cached_ms": statistics.median(near) * 1e3, "uncached_ms": without * 1e3}
        )
    if agree < AGREEING:
        raise CheckpointError(f"With and without the cache only {agree} of {PROBES} tokens agree: no figures.")
    return rows
