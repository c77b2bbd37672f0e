"""What visitors of the page saw, as figures: plain arithmetic on the records of `visitors.py`."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence

SHORTEST = 0.1  # seconds of writing together that make a rate; a page paints every 45 ms


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all do not exceed: one that was measured, never one in between."""
    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)]


def spread(seconds: Sequence[float]) -> dict[str, float] | None:
    """Of times in seconds, milliseconds: half of them, 99% of them, all of them took no longer. None of none."""
    if not seconds:
        return None
    cuts = {"p50": percentile(seconds, 0.5), "p99": percentile(seconds, 0.99), "max": max(seconds)}
    return {name: round(value * 1e3, 2) for name, value in cuts.items()}


def first_text(visit: dict) -> float | None:
    """When the first event with text came."""
    return next((when for when, _, characters in visit["events"] if characters), None)


def end_of(visit: dict) -> float:
    """When the last token was there: the event behind it, `complete`, only repeats it."""
    last = visit["events"][-1][1]
    return next(when for when, tokens, _ in visit["events"] if tokens == last)


def tokens_at(visit: dict, moment: float) -> float:
    """Tokens that a visit had at a moment; between two events with tokens as if they had been written evenly, which
    they are, while what is seen of them comes in paints."""
    events = visit["events"]
    after = bisect_right(events, moment, key=lambda event: event[0])
    if after in (0, len(events)):
        return events[max(after - 1, 0)][1] if after else 0.0
    (before, had, _), (then, has, _) = events[after - 1], events[after]
    return 0.0 if had == 0 else had + (has - had) * (moment - before) / (then - before)


def rate_together(visits: list[dict]) -> tuple[float | None, int, float]:
    """Tokens per second of all while those that the page admitted at first write together, how many these are, and for
    how many seconds. Admitted at first is who has text before anybody ends; the time runs from the last of their first
    texts to the first end. No rate where that is shorter than `SHORTEST`."""
    writers = [visit for visit in visits if first_text(visit) is not None]
    if not writers:
        return None, 0, 0.0
    ended = min(map(end_of, writers))
    begun = [begin for visit in writers if (begin := first_text(visit)) < ended]
    if not begun or ended - max(begun) < SHORTEST:
        return None, len(begun), max(ended - max(begun, default=ended), 0.0)
    window = ended - max(begun)
    written = sum(tokens_at(visit, ended) - tokens_at(visit, max(begun)) for visit in writers)
    return round(written / window, 1), len(begun), window


def gaps(visits: list[dict], news: bool) -> list[float]:
    """Seconds between neighbouring events of a visit that has its first text, the repeating last one left out; `news`:
    of those events only that brought tokens."""
    found = []
    for visit in visits:
        last, seen, ended = None, 0, end_of(visit) if visit["events"] else 0.0
        for when, tokens, characters in visit["events"]:
            if not characters or when > ended or (news and tokens == seen):
                continue
            if last is not None:
                found.append(when - last)
            last, seen = when, tokens
    return found


def _waited(visits: list[dict]) -> list[dict]:
    """Those that had no text yet when the first of the others ended."""
    ends = [end_of(visit) for visit in visits if first_text(visit) is not None]
    late = [v for v in visits if ends and v["sent"] < min(ends) and (first_text(v) or math.inf) >= min(ends)]
    return [visit for visit in late if visit["ended"] != "refused"]


def figures(visits: list[dict], tokens: int) -> dict:
    """Of visits that asked for `tokens` tokens each. Rates in tokens per second of all visits together; times in
    milliseconds where the name says so, in seconds elsewhere."""
    done = [visit for visit in visits if visit["ended"] == "complete"]
    rate, writing, window = rate_together(visits)
    first = [begin - visit["sent"] for visit in visits if (begin := first_text(visit)) is not None]
    took = [end_of(visit) - visit["sent"] for visit in done if visit["events"]]
    waited, total = _waited(visits), sum(visit["events"][-1][1] for visit in visits if visit["events"])
    wall = max((end_of(v) for v in visits if v["events"]), default=0.0) - min(visit["sent"] for visit in visits)
    return {
        "streams": len(visits),
        "tokens": tokens,
        "prompt_tokens": max((visit["stats"].get("prompt_tokens", 0) for visit in visits), default=0),
        "tokens_per_second": rate,
        "writing_together": writing,
        "together_s": round(window, 3),
        "whole_tokens_per_second": round(total / wall, 1) if total else 0.0,
        "wall_s": round(max(wall, 0.0), 3),
        "first_text_ms": spread(first),
        "gap_ms": spread(gaps(visits, news=False)),
        "news_gap_ms": spread(gaps(visits, news=True)),
        "slowest_over_mean": round(max(took) * len(took) / sum(took), 3) if took else None,
        "total_tokens": total,
        "completed": len(done),
        "other_length": sum(visit["stats"].get("new_tokens") != tokens for visit in done),
        "refused": sum(visit["ended"] == "refused" for visit in visits),
        "errors": sum(visit["ended"] == "broken" for visit in visits),
        "sentences": dict(Counter(visit["sentence"] for visit in visits if visit["sentence"])),
        "waited": len(waited),
        "told_their_position": sum(visit["told"] for visit in waited),
        "kb_per_stream": round(sum(visit["bytes"] for visit in visits) / len(visits) / 1e3, 1),
    }
