"""What can be asked of the engine besides writing: each kind of request as a generator, cut into slices of at most some
50 ms, which yields answers, and None where a slice ends without one."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import torch

from playground.engine.curve import cache_curve
from playground.engine.engine import Engine
from playground.engine.events import TokenScales, WeightScales
from playground.engine.experiments import count_draws, noise, shaped
from playground.engine.gate import faults
from playground.engine.requests import (
    Check,
    Curve,
    Draws,
    Job,
    Logits,
    Noise,
    Scales,
    Score,
    Shape,
    Weights,
    check_prompt,
)
from playground.engine.settings import RequestError
from playground.model.layers import Linear
from playground.model.step import Step
from playground.model.transformer import Transformer

LOGITS_AT_ONCE = 128  # positions: a large vocabulary times all of a text would not fit


def slices(engine: Engine, job: Job) -> Iterator[Any]:
    """The work of one request. Raises `RequestError` and `CheckpointError`."""
    match job:
        case Logits():
            check_prompt(job.prompt, engine.context, engine.model.config.vocab_size)
            fed = yield from fed_alone(engine, job.prompt)
            yield fed.logits[0].float().cpu().numpy()
        case Shape():
            yield shaped(job)
        case Noise():
            yield noise(job.seed, job.position, job.count)
        case Draws():
            yield from count_draws(job)
        case Score():
            yield (yield from score(engine, job.ids))
        case Curve():
            check_prompt(job.prompt, engine.context, engine.model.config.vocab_size)
            yield from cache_curve(engine, job.prompt, job.tokens)
        case Weights():
            yield weight_scales(engine, job.layer, job.projection)
        case Scales():
            yield (yield from token_scales(engine, job))
        case Check():
            yield from faults(engine.model, engine)
        case _:
            raise RequestError(f"The engine has no {type(job).__name__}.")


def fed_alone(engine: Engine, prompt: tuple[int, ...], traced: bool = False) -> Generator:
    """Feeds a prompt, chunk by chunk, of which nothing stays; returns what its end leaves."""
    fed = None
    for fed in engine.feed_alone(prompt, traced):
        if fed is None:  # behind the last chunk nothing may come between: others would overwrite what it left
            yield None
    return fed


def score(engine: Engine, ids: tuple[int, ...]) -> Generator[None, None, np.ndarray]:
    """The raw log-probability of every token behind the first, `[T - 1]` float64."""
    if not 2 <= len(ids) <= engine.context:
        raise RequestError(f"The text has {len(ids)} tokens; 2 to {engine.context} can be scored.")
    model = engine.model
    tokens = torch.tensor(ids, device=model.device)
    layers = model.in_slices(tokens, Step(torch.arange(len(ids), device=model.device), slots=None))
    while (hidden := next(layers)) is None:
        yield None
    found = []
    for start in range(0, len(ids) - 1, LOGITS_AT_ONCE):
        end = min(start + LOGITS_AT_ONCE, len(ids) - 1)
        logprobs = model.logits(hidden[start:end]).double().log_softmax(-1)
        found.append(logprobs.gather(-1, tokens[start + 1 : end + 1, None])[:, 0].cpu().numpy())
        yield None
    return np.concatenate(found)


def projections(model: Transformer, layer: int) -> list[str]:
    """The names of a layer's FP8 projections, such as `self_attn.o_proj` or `mlp.experts.3.up_proj`."""
    modules = model.model.layers[layer].named_modules()
    return [name for name, part in modules if isinstance(part, Linear) and part.is_fp8]


def weight_scales(engine: Engine, layer: int, projection: str) -> WeightScales:
    layer = min(max(layer, 0), engine.model.config.num_hidden_layers - 1)
    names = tuple(projections(engine.model, layer))
    if not names:
        return WeightScales(layer, "", ())
    projection = projection if projection in names else names[0]
    linear = engine.model.model.layers[layer].get_submodule(projection)
    error = linear.tile_errors
    return WeightScales(
        layer,
        projection,
        names,
        linear.weight_scale_inv.float().cpu().numpy(),
        tuple(linear.stored),
        None if error is None else (error.median().item(), error.max().item()),
        linear.twice,
        engine.model.unused_scales,
    )


def token_scales(engine: Engine, asked: Scales) -> Generator[None, None, TokenScales]:
    """As the step that wrote the token left them, or, where that is forgotten, by feeding the text again."""
    if found := engine.scales.find(asked.row, asked.index):
        step, place = found
        return TokenScales(step.read(place, asked.projection), recomputed=False)
    if not asked.ids:
        raise RequestError("The scales of this token are no longer kept.")
    check_prompt(asked.ids, engine.context, engine.model.config.vocab_size)
    fed = yield from fed_alone(engine, asked.ids, traced=True)
    flat = fed.trace.flat().cpu().numpy()
    return TokenScales(fed.trace.layout().read(flat, 0, asked.projection), recomputed=True)
