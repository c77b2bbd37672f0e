"""From streams of events to what the page shows: coalesced, so that a paint costs the same at any token rate, and
paced, so that many who watch make the page paint less often instead of everybody late."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any

import gradio as gr
import numpy as np

from playground.engine.client import Answers, EngineError
from playground.engine.events import FinishEvent, ModelInfo, TokenEvent
from playground.engine.settings import RequestError
from playground.inspect.run import Run

PAINT_SECONDS = 0.045
SLOWEST_SECONDS = 0.5
BUSY = 0.6  # share of a core that painting may take before it slows down
FIRST_LOOK = 0.005  # seconds between looks for a first token
NEWS_SECONDS = 0.5  # a paint at least this often: gradio notices at a paint that nobody is there any more
FIRST_SECONDS = 0.08  # a run that has no text by then is shown without: before, the browser has nothing to do but wait
UNREAD_SECONDS = 5.0


class Pace:
    """How long to wait between paints, so that the event loop, which all visitors share, has time for the next one."""

    def __init__(self):
        self.seconds = PAINT_SECONDS
        self.measured, self.worked = time.perf_counter(), time.thread_time()

    def next(self) -> float:
        """Seconds until the next paint. Called on the event loop."""
        now = time.perf_counter()
        if (past := now - self.measured) > 0.2:
            worked = time.thread_time()
            share = (worked - self.worked) / past
            self.measured, self.worked = now, worked
            change = min(max(share / BUSY, 0.7), 1.5)
            self.seconds = min(max(self.seconds * change, PAINT_SECONDS), SLOWEST_SECONDS)
        return self.seconds


class Listener:
    """Whether somebody reads what is sent to a visitor. A request whose answer nobody fetches would run to its end."""

    def __init__(self, page: gr.Blocks | None, request: gr.Request | None):
        self.queues = page._queue.pending_messages_per_session if page is not None else {}
        self.session = getattr(request, "session_hash", None)
        self.size, self.read = 0, time.monotonic()

    @property
    def gone(self) -> bool:
        """Asked before every message: true once none of them has been taken for some seconds."""
        messages = self.queues.get(self.session) if self.session else None
        size, now = messages.qsize() if messages is not None else 0, time.monotonic()
        if size <= self.size:  # there is one message more since, and so one was taken
            self.read = now
        self.size = size
        return now - self.read > UNREAD_SECONDS


class Pane:
    """One run, and its figures so far."""

    def __init__(self, run: Run, info: ModelInfo):
        self.run, self.stream, self.ended = run, run.stream, False
        self.scales: np.ndarray | None = None  # of the newest token, of the projection that is watched
        self.failure = ""
        self.started = time.perf_counter()
        self.first = 0.0
        self.stats = {
            "run": run.id,
            "finish_reason": None,
            "position": None,  # in line, while it waits
            "prompt_tokens": self.stream.prompt_tokens,
            "cached_tokens": 0,
            "new_tokens": 0,
            "seed": None if run.params.is_greedy else run.params.seed,
            "ttft": None,
            "prefill_rate": None,
            "decode_rate": None,
            "cache_used": self.stream.prompt_tokens,
            "cache_total": info.cache_tokens,
            "context": info.context,  # what a row may have
        }

    def take(self) -> bool:
        """Takes in all events that have come; whether there is any news."""
        position, news = self.stats["position"], False
        try:
            while not self.ended and (event := self.stream.get(0)) is not None:
                news = True
                self._see(event)
        except (RequestError, EngineError) as error:
            self.failure, self.ended, news = str(error), True, True
            self.stats["finish_reason"] = "failed"
            self.run.stats = self.stats
        self.stats["position"] = self.stream.position
        return news or self.stats["position"] != position

    def _see(self, event: TokenEvent | FinishEvent) -> None:
        self.run.add(event)
        if isinstance(event, FinishEvent):
            self.ended = True
            self.stats |= asdict(event.stats) | {"seed": self.stats["seed"]}
            self.run.stats = self.stats
            return
        now, stats = time.perf_counter(), self.stats
        self.scales = event.scales
        if event.index == 0:
            self.first, stats["ttft"] = now, now - self.started
            stats["cached_tokens"] = self.stream.cached
            if event.prefill_seconds:  # a branch finds all of its prompt in the cache
                stats["prefill_rate"] = (stats["prompt_tokens"] - stats["cached_tokens"]) / event.prefill_seconds
        elif now > self.first:
            stats["decode_rate"] = event.index / (now - self.first)
        stats["new_tokens"] = event.index + 1
        stats["cache_used"] = stats["prompt_tokens"] + event.index


async def paints(panes: list[Pane], pace: Pace, listener: Listener) -> AsyncIterator[None]:
    """Yields whenever the panes should be shown again, once when all have ended, and now and then without news."""
    shown, news, writing = time.monotonic() - NEWS_SECONDS + FIRST_SECONDS, False, False
    while not all(pane.ended for pane in panes):
        pause = pace.next()
        await asyncio.sleep(pause / 3 if writing else FIRST_LOOK)  # the first text and the end are shown at once
        news |= any([pane.take() for pane in panes])
        ended, past = all(pane.ended for pane in panes), time.monotonic() - shown
        first = not writing and any(pane.stats["new_tokens"] for pane in panes)
        if first or ended or (writing and news and past > pause * 0.9) or past > NEWS_SECONDS:
            shown, news, writing = time.monotonic(), False, writing or first
            if listener.gone:
                return
            yield


async def next_of(asked: Answers, pause: float = FIRST_LOOK) -> Any:
    """The next of what a request brings, without holding a thread; None once all has come. Raises as `Answers` does."""
    while not asked.ended:
        if (answer := asked.get(0)) is not None:
            return answer
        await asyncio.sleep(pause)
    return None


async def answers_of(asked: Answers, pause: float = FIRST_LOOK) -> AsyncIterator[Any]:
    """What a job brings; leaving early stops it."""
    try:
        while (answer := await next_of(asked, pause)) is not None:
            yield answer
    finally:
        asked.close()


async def answer_of(asked: Answers) -> Any:
    """The last answer of a job."""
    return [None, *[answer async for answer in answers_of(asked, 0.003)]][-1]
