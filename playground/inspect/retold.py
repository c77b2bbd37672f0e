"""A receipt that is run again, as runs that a page can show and branch from."""

from __future__ import annotations

from dataclasses import asdict

from playground.checkpoint.tokenizer import Tokenizer
from playground.engine.client import Stream
from playground.engine.events import Event, FinishEvent, TokenEvent
from playground.inspect.receipt import Receipt
from playground.inspect.run import Run, Written


class Retold:
    """Takes the events of a replay (`inspect.replay`), stream after stream: one run for each segment."""

    def __init__(self, receipt: Receipt, tokenizer: Tokenizer):
        self.receipt, self.tokenizer = receipt, tokenizer
        self.prompt = tokenizer.decode(receipt.prompt)
        self.runs: list[Run] = []
        self.beyond: TokenEvent | None = None  # the draw that a forced token replaced

    def take(self, stream: Stream, event: Event) -> None:
        if not self.runs or self.runs[-1].stream is not stream:
            self.runs.append(self._begun(stream))
        run, segment = self.runs[-1], self.receipt.segments[len(self.runs) - 1]
        if isinstance(event, FinishEvent):
            run.add(event)
            run.stats = asdict(event.stats)
        elif event.index < segment.keep:
            run.add(event)
        else:
            self.beyond = event

    def _begun(self, stream: Stream) -> Run:
        if not self.runs:
            return Run.of(stream, self.tokenizer, self.prompt)
        parent, before = self.runs[-1], self.receipt.segments[len(self.runs) - 1]
        at = parent.taken + before.keep
        given = parent.tokens[:at]
        if before.forced is not None:
            given.append(self._forced(parent, at, before.forced))
        asked = stream.request
        about = (self.tokenizer, self.prompt, self.receipt.prompt, asked.params, asked.max_new_tokens, asked.ignore_eos)
        return Run(stream, *about, parent=parent, at=at, tokens=given)

    def _forced(self, parent: Run, at: int, token: int) -> Written:
        insight = self.beyond.insight if self.beyond else None
        known = dict(insight.raw) if insight else {}
        insight = insight if token in known else None
        return Written(token, parent.text_of(token, at), known.get(token, 0.0), insight, forced=True)
