"""From streams of events to what the page shows: coalesced, so that a paint costs the same at any token rate."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict

from playground.engine.requests import FinishEvent
from playground.inspect.run import Run

PAINT_SECONDS = 0.045


class Pane:
    """One run, and its figures so far."""

    def __init__(self, run: Run, cache_total: int):
        self.run, self.stream, self.ended = run, run.stream, False
        self.scales: Mapping[str, list[float]] = {}
        self.started = time.perf_counter()
        self.first = 0.0
        self.stats = {
            "run": run.id,
            "finish_reason": None,
            "prompt_tokens": self.stream.prompt_tokens,
            "cached_tokens": 0,
            "new_tokens": 0,
            "seed": None if run.params.is_greedy else run.params.seed,
            "ttft": None,
            "prefill_rate": None,
            "decode_rate": None,
            "cache_used": self.stream.prompt_tokens,
            "cache_total": cache_total,
        }

    def take(self, timeout: float) -> bool:
        """Waits up to `timeout` seconds for an event and takes in all that have come; false if none has."""
        event, any_event = self.stream.get(max(timeout, 0.0001)), False
        while event is not None:
            any_event = True
            self.run.add(event)
            if isinstance(event, FinishEvent):
                self.ended = True
                self.stats |= asdict(event.stats) | {"seed": self.stats["seed"]}
                self.run.stats = self.stats
                return True
            self._count(event)
            event = self.stream.get(0.0001) if not self.stream.events.empty() else None
        return any_event

    def _count(self, event) -> None:
        now, stats = time.perf_counter(), self.stats
        if event.scales is not None:
            self.scales = event.scales
        if event.index == 0:
            self.first, stats["ttft"] = now, now - self.started
            stats["cached_tokens"] = self.stream.row.cached
            if event.prefill_seconds:  # a branch finds all of its prompt in the cache
                stats["prefill_rate"] = (stats["prompt_tokens"] - stats["cached_tokens"]) / event.prefill_seconds
        elif now > self.first:
            stats["decode_rate"] = event.index / (now - self.first)
        stats["new_tokens"] = event.index + 1
        stats["cache_used"] = stats["prompt_tokens"] + event.index


def paints(panes: list[Pane]) -> Iterator[None]:
    """Yields whenever the panes should be shown again: every 45 ms, changed or not, and once when all have ended.

    It yields even without news so that a cancel, which gradio delivers at a yield, never waits for the model.
    """
    while not all(pane.ended for pane in panes):
        deadline = time.perf_counter() + PAINT_SECONDS
        while (left := deadline - time.perf_counter()) > 0 and not all(pane.ended for pane in panes):
            for pane in panes:
                if not pane.ended:
                    pane.take(left / len(panes))
        yield
