"""The engine on a thread of its own: streams for the callers, one step after another for the device."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TypeVar

from playground.engine.engine import Engine
from playground.engine.requests import Event, FinishEvent, Request, TokenEvent
from playground.engine.row import Row

T = TypeVar("T")


class EngineError(RuntimeError):
    """A step failed. The rows of that step ended; the engine goes on with the next request."""


class Stream:
    """The events of one row. Iterate it; `close` (or leaving the `with` block) cancels a row that still runs."""

    def __init__(self, service: Service, row: Row):
        self.service, self.row = service, row
        self.events: queue.SimpleQueue[Event | EngineError] = queue.SimpleQueue()
        self.ended = False

    @property
    def prompt_tokens(self) -> int:
        return len(self.row.request.prompt)

    def get(self, timeout: float | None = None) -> Event | None:
        """The next event, or None when `timeout` seconds pass without one. Raises `EngineError`."""
        try:
            event = self.events.get(timeout=timeout)
        except queue.Empty:
            return None
        self.ended = not isinstance(event, TokenEvent)
        if isinstance(event, EngineError):
            raise event
        return event

    def __iter__(self) -> Iterator[Event]:
        while not self.ended:
            yield self.get()

    def close(self) -> None:
        if not self.ended:
            self.service.cancel(self)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_) -> None:
        self.close()


class Service:
    """Owns the engine: only its thread touches the model and the cache. Callers never block on the device."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.rows: dict[Row, Stream] = {}
        self.cancelled: set[Stream] = set()
        self.jobs: deque[tuple[Callable[[Engine], object], Future]] = deque()
        self.changed = threading.Condition()
        self.closed = False
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.thread.start()

    def submit(self, requests: list[Request], parent: Stream | None = None) -> list[Stream]:
        """Starts rows that share a prompt, branching off from `parent` where its cache allows it. Raises `RequestError`
        before anything is queued."""
        with self.changed:
            if self.closed:
                raise EngineError("The engine is closed.")
            rows = self.engine.add(requests, parent and parent.row)
            streams = [Stream(self, row) for row in rows]
            self.rows.update(zip(rows, streams, strict=True))
            self.changed.notify()
        return streams

    def cancel(self, stream: Stream) -> None:
        """Returns at once; the row and its cache are freed before the next step."""
        with self.changed:
            self.cancelled.add(stream)
            self.changed.notify()

    def call(self, work: Callable[[Engine], T]) -> T:
        """Does `work` on the engine's thread, between two steps; the caller waits, and gets what it raises."""
        result: Future = Future()
        with self.changed:
            if self.closed:
                raise EngineError("The engine is closed.")
            self.jobs.append((work, result))
            self.changed.notify()
        return result.result()

    def close(self) -> None:
        """Cancels everything and ends the thread."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.thread.join()

    def _run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.closed or self.cancelled or self.jobs or self.engine.busy)
                ended = list(self.rows) if self.closed else [r for r, s in self.rows.items() if s in self.cancelled]
                self.cancelled.clear()
                events = [event for row in ended for event in self.engine.cancel(row)]
                self._deliver(events)
                job = self.jobs.popleft() if self.jobs else None
                if self.closed:
                    self._refuse_jobs(job)
                    return
            if job:
                self._do(*job)
            try:
                events = self.engine.step()
            except Exception as error:  # whatever a step can raise (out of memory, a kernel's error) ends its rows only
                self._fail(error)
            else:
                with self.changed:
                    self._deliver(events)

    def _do(self, work: Callable[[Engine], object], result: Future) -> None:
        try:
            self.engine.use_all_threads()
            result.set_result(work(self.engine))
        except Exception as error:  # the caller's, not ours
            result.set_exception(error)

    def _refuse_jobs(self, job: tuple | None) -> None:
        for _, result in [*([job] if job else []), *self.jobs]:
            result.set_exception(EngineError("The engine is closed."))
        self.jobs.clear()

    def _deliver(self, events: list[tuple[Row, Event]]) -> None:
        for row, event in events:
            stream = self.rows.get(row)
            if stream:
                stream.events.put(event)
            if isinstance(event, FinishEvent):
                self.rows.pop(row, None)

    def _fail(self, error: Exception) -> None:
        failure = EngineError(f"The engine failed: {error}. Run again: the next request starts afresh.")
        with self.changed:
            for row, stream in list(self.rows.items()):
                self.engine.cancel(row, keep=False)
                stream.events.put(failure)
            self.rows.clear()
