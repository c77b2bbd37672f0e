"""The batch form: a list of ragged prompts in, a list of completions out."""

from __future__ import annotations

from dataclasses import replace

import kernels
from playground.engine.engine import Engine
from playground.engine.requests import FinishEvent, Request, RequestError, Sampler, SamplingParams
from playground.model.transformer import Transformer


def generate(
    model: Transformer,
    prompt_tokens: list[list[int]],
    max_new_tokens: int,
    eos_id: int | None,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[list[int]]:
    """Continues every prompt and returns the new ids of each, without the EOS that ended it.

    Gumbel-max sampling at `temperature` (0: greedy); row i draws with `seed + i`. Each row stops at `eos_id` (None:
    never), at `max_new_tokens`, or where the batch's table ends, `min(max_seq_len, max_new_tokens + longest prompt)`
    tokens. Raises `RequestError` for an empty prompt or one over the context, with both numbers.
    """
    if not prompt_tokens:
        return []
    longest, limit = max(map(len, prompt_tokens)), model.config.max_position_embeddings
    if longest > limit:
        raise RequestError(f"A prompt has {longest} tokens and the context holds {limit}; shorten it.")
    table = min(limit, longest + max(max_new_tokens, 1))
    engine = Engine(model, None, min(len(prompt_tokens), kernels.INVARIANT_ROWS), context=table)
    params = SamplingParams(Sampler.GUMBEL, temperature)
    rows = []
    for number, prompt in enumerate(prompt_tokens):
        request = Request(tuple(prompt), replace(params, seed=seed + number), max_new_tokens, ignore_eos=True)
        rows += engine.add([request])
    while engine.busy:
        for row, event in engine.step():
            if not isinstance(event, FinishEvent) and event.id == eos_id:
                engine.cancel(row)
    return [row.new_ids[:-1] if row.new_ids[-1:] == [eos_id] else row.new_ids for row in rows]
