"""Running a receipt again, and where the two runs part."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence

from playground.engine.client import Stream
from playground.engine.events import Event, FinishEvent, TokenEvent
from playground.engine.settings import RequestError, SamplingParams
from playground.inspect.receipt import Receipt

Spelled = Callable[[int], str]
TextOf = Callable[[Sequence[int]], str]  # of ids behind the prompt
# token ids, setting, limit, whether to write past the end, the stream to branch from
Start = Callable[[tuple[int, ...], SamplingParams, int, bool, Stream | None], Stream]
STOPPED = "The replay was stopped; run it again."


def replay(receipt: Receipt, start: Start, spelled: Spelled, text_of: TextOf) -> Generator[Stream, Event, dict]:
    """Runs every segment as it was run, each on the cache of the one before, until a token differs. Yields the stream
    whose next event it waits for, so that whoever drives it may wait in a way of his own. Returns `identical`, how many
    tokens were `checked`, and where the first difference is, `at`, what was `recorded` there and what came `now`: the
    token and the likeliest ones. Where the tokens are the same and something else is not, `but` says what: the first
    log-probability that differs, or the text that these tokens make here."""
    parent, done, but = None, 0, None
    for segment in receipt.segments:
        ids = (*receipt.prompt, *receipt.ids[:done])
        # as in the run itself: a token is forced behind one that was fed, and a prompt's own logits are its prefill's
        limit = max(segment.keep, 1) + (segment.forced is not None)
        parent = start(ids, segment.params, limit, segment.ignore_eos, parent if segment.branched else None)
        with parent:
            while not parent.ended:
                event = yield parent
                if isinstance(event, FinishEvent):
                    if event.stats.finish_reason == "cancelled":
                        raise RequestError(STOPPED)
                    continue
                if parent.branched != segment.branched:
                    raise RequestError(
                        "Other runs took the memory of this replay's branches; try again when they ended."
                    )
                if event.index >= segment.keep:
                    continue
                if event.id != receipt.ids[done]:
                    return _difference(receipt, done, event, spelled)
                if receipt.logprobs[done] not in (None, event.logprob):
                    but = but or _but("log-probability", receipt.logprobs[done], event.logprob, at=done)
                done += 1
        if segment.forced is not None and done < len(receipt.ids):
            if receipt.ids[done] != segment.forced:
                return _found(done, at=done)
            done += 1
    if done < len(receipt.ids):  # the replay ended earlier, at an end of text that the recorded run did not meet
        return _found(done, at=done, recorded=_recorded(receipt, done, spelled))
    if not but and receipt.text not in (None, text := text_of(receipt.ids)):
        but = _but("text", receipt.text, text)
    return _found(done, but=but)


def _but(what: str, recorded: float | str, now: float | str, at: int | None = None) -> dict:
    return {"what": what, "at": at, "recorded": recorded, "now": now}


def _found(
    checked: int,
    at: int | None = None,
    recorded: dict | None = None,
    now: dict | None = None,
    but: dict | None = None,
) -> dict:
    same = at is None and but is None
    return {"identical": same, "checked": checked, "at": at, "recorded": recorded, "now": now, "but": but}


def _recorded(receipt: Receipt, at: int, spelled: Spelled) -> dict:
    return _side(receipt.ids[at], receipt.top[at], spelled)


def _difference(receipt: Receipt, at: int, event: TokenEvent, spelled: Spelled) -> dict:
    now = _side(event.id, event.insight.raw[:5] if event.insight else [], spelled)
    return _found(at, at, _recorded(receipt, at, spelled), now)


def _side(token: int, top, spelled: Spelled) -> dict:
    best = [{"id": i, "text": spelled(i), "probability": math.exp(p)} for i, p in top]
    return {"id": token, "text": spelled(token), "top": best}
