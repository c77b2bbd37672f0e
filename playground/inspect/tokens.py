"""One token of a run, explained: the alternatives it had, and why the draw chose it. Plain data for any view."""

from __future__ import annotations

import math
from collections.abc import Sequence

from playground.checkpoint.tokenizer import Tokenizer
from playground.engine.insight import Insight
from playground.engine.settings import SETTINGS
from playground.inspect.run import Run, Written

MOST_CHIPS = 400  # a prompt may have thousands of tokens


def explain(run: Run, index: int) -> dict:
    """The token at `index`: `alternatives` (raw and processed probability, best first, the token itself always among
    them), `others` (what is left of both), `filter` and `why`. Raises IndexError."""
    token = run.tokens[index]
    while run.parent and index < run.taken and not token.forced:
        run = run.parent  # who drew it, under settings of its own
    base = {"index": index, "id": token.id, "text": run.spelled(token.id), "forced": token.forced}
    base |= {"probability": math.exp(token.logprob), "logprob": token.logprob}
    if (i := token.insight) is None:
        return base
    if run.params.is_penalised and not token.forced:
        base["after_penalties"] = math.exp(i.penalised_logprob)
    rows = alternatives(run, i, None if token.forced else token.id)
    seen = (math.fsum(row[part] or 0.0 for row in rows) for part in ("raw", "processed"))
    return base | {
        "rank": token.rank,
        "entropy": i.entropy,
        "processed_entropy": i.processed_entropy,
        "alternatives": rows,
        "others": dict(zip(("raw", "processed"), (max(0.0, 1.0 - s) for s in seen), strict=True)),
        "filter": {"kept": i.kept, "cut": i.cut},
        "settings": settings(run),
        "why": {"kind": "forced"} if token.forced else why(run, token),
    }


def alternatives(run: Run, i: Insight, drawn: int | None) -> list[dict]:
    """The likeliest tokens, and the one `drawn` where it is not among them. Temperature and filters keep the order: a
    likely token without a processed probability was cut, unless penalties have moved it out of sight."""
    raw, processed, moved = dict(i.raw), dict(i.processed), run.params.is_penalised
    if drawn is not None:
        raw[drawn], processed[drawn] = i.logprob, i.processed_logprob
    return [
        {
            "id": token,
            "text": run.spelled(token),
            "raw": math.exp(logprob),
            "processed": math.exp(processed[token]) if token in processed else None,
            "cut": token not in processed and not moved,
            "chosen": token == drawn,
        }
        for token, logprob in raw.items()
    ]


def why(run: Run, token: Written) -> dict:
    """What decided, in the draw's own numbers."""
    i, params = token.insight, run.params
    if params.is_greedy:
        best = [{"id": n, "text": run.spelled(n), "logprob": p} for n, p in i.processed[:2]]
        margin = best[0]["logprob"] - best[1]["logprob"] if len(best) > 1 else None
        return {"kind": "greedy", "best": best, "margin": margin}
    if params.sampler == "multinomial":
        low, high = i.interval
        return {"kind": "multinomial", "uniform": i.uniform, "low": low, "high": high}
    rows = [
        {
            "id": n,
            "text": run.spelled(n),
            "logprob": p,
            "noise": g,
            "score": p + g,
            "chosen": n == token.id,
        }
        for n, p, g in i.scores
    ]
    return {"kind": "gumbel", "rows": rows}


def settings(run: Run) -> dict:
    return {name: getattr(run.params, name) for name in SETTINGS} | {"sampler": run.params.sampler.value}


def chips(ids: Sequence[int], tokenizer: Tokenizer) -> dict:
    """A prompt's tokens, each an `id`, its `text` and whether it is `special`, and a `note` of how many there are."""
    special = set(tokenizer.control_tokens)
    names = [tokenizer.inner.id_to_token(token) or "" for token in ids[:MOST_CHIPS]]
    tokens = [
        {"id": token, "text": name if name in special else tokenizer.spelled(token), "special": name in special}
        for token, name in zip(ids, names, strict=False)
    ]
    more = f", of which these are the first {MOST_CHIPS}" if len(ids) > MOST_CHIPS else ""
    return {"tokens": tokens, "note": f"{len(ids):,} {'token' if len(ids) == 1 else 'tokens'}{more}."}
