"""How pages and programs speak to the engine: one interface, wherever the engine lives. Here are what all homes share
and the two inside this process; `process.py` has the third.

`InlineClient` is driven by whoever waits for an event; `ThreadClient` has a thread of its own.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import count
from typing import Any

from playground.checkpoint.config import CheckpointError
from playground.engine.events import Done, EngineState, Event, Failure, FinishEvent, ModelInfo, Started, Waiting
from playground.engine.requests import Ask, Cancel, Generate, Job, Request, Watch
from playground.engine.settings import RequestError

STATE = -1  # the id under which an engine tells of itself
CLOSED = "The engine is closed."


class EngineError(RuntimeError):
    """The engine could not carry out a request. The next one starts afresh."""


def raise_failure(failure: Failure) -> None:
    kinds = {"request": RequestError, "checkpoint": CheckpointError}
    raise kinds.get(failure.kind, EngineError)(failure.message)


class Answers:
    """What one request brings. Iterate it; `close` (or leaving the `with` block) stops a request that still runs.
    Raises `RequestError`, `CheckpointError` and `EngineError` where the request fails."""

    def __init__(self, client: Client, number: int):
        self.client, self.id = client, number
        self.events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.ended = False

    def get(self, timeout: float | None = None) -> Any:
        """The next event, or None when `timeout` seconds pass without one, or when all have come."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.ended:
            left = None if deadline is None else deadline - time.monotonic()
            event = self.client.wait(self.events, left)
            if event is None:
                return None
            if (shown := self._take(event)) is not None:
                return shown
        return None

    def _take(self, event: Any) -> Any:
        if isinstance(event, Failure):
            self.ended = True
            raise_failure(event)
        self.ended = isinstance(event, Done)
        return None if self.ended else event

    def __iter__(self) -> Iterator[Any]:
        while not self.ended:
            if (event := self.get()) is not None:
                yield event

    def last(self) -> Any:
        """The last answer, once all have come."""
        *_, answer = (None, *self)
        return answer

    def close(self) -> None:
        if not self.ended:
            self.client.send(Cancel(self.id))

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *_) -> None:
        self.close()


class Stream(Answers):
    """The events of one row: `TokenEvent`s, and a `FinishEvent` at the end."""

    def __init__(self, client: Client, number: int, request: Request, model: str, form: str):
        super().__init__(client, number)
        self.request, self.model, self.form = request, model, form
        self.position: int | None = None  # in line, while it waits
        self.cached, self.branched = 0, False  # of its prompt; whether it began on its parent's cache

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt)

    def watch(self, projection: str) -> None:
        """From now on tokens bring the activation scales of this projection."""
        self.client.send(Watch((self.id,), projection))

    def _take(self, event: Any) -> Event | None:
        if isinstance(event, Waiting):
            self.position = event.position
            return None
        if isinstance(event, Started):
            self.position, self.cached, self.branched = None, event.cached, event.branched
            return None
        event = super()._take(event)
        self.ended = self.ended or isinstance(event, FinishEvent)
        return event


class Client:
    """What all homes have in common. `state` and `info` are what the engine said last of itself and of its model."""

    def __init__(self, tell: Callable[[EngineState], object] = lambda state: None):
        self.tell = tell  # called with every state of the engine, on the thread that hears it
        self.state = EngineState("starting")
        self.info: ModelInfo | None = None
        self.closed = ""  # why nothing is taken any more
        self._ids = count()
        self._open: dict[int, Answers] = {}
        self._failed_for_good = ""

    # --- for callers

    def ask(self, job: Job, model: str = "") -> Answers:
        """Starts a job. Raises `EngineError` where the engine takes no more."""
        answers = Answers(self, next(self._ids))
        self._submit(Ask(answers.id, job, model), [answers])
        return answers

    def generate(
        self,
        requests: Sequence[Request],
        model: str = "",
        form: str = "",
        parent: Stream | None = None,
        visitor: str = "",
    ) -> list[Stream]:
        """Starts rows that share a prompt, branching off from `parent` where its cache allows it."""
        streams = [Stream(self, next(self._ids), request, model, form) for request in requests]
        rows = tuple(stream.id for stream in streams)
        asked = Generate(rows, tuple(requests), -1 if parent is None else parent.id, visitor, form)
        self._submit(Ask(rows[0], asked, model), streams)
        return streams

    @property
    def running(self) -> int:
        """How many requests have not ended."""
        return len(self._open)

    def until_ready(self) -> ModelInfo:
        """Waits for the model. Raises `CheckpointError` and `EngineError`."""
        raise NotImplementedError

    def send(self, message: Any) -> None:
        raise NotImplementedError

    def wait(self, events: queue.SimpleQueue, timeout: float | None) -> Any:
        """The next of an answer's events, None where there is none in time."""
        try:
            return events.get(timeout=timeout) if timeout is None or timeout > 0 else events.get_nowait()
        except queue.Empty:
            return None

    def close(self) -> None:
        """Ends the engine."""
        raise NotImplementedError

    # --- for homes

    def _submit(self, ask: Ask, answers: Sequence[Answers]) -> None:
        if self.closed:
            raise EngineError(self.closed)
        self._open.update({one.id: one for one in answers})
        try:
            self.send(ask)
        except BaseException:
            for one in answers:
                self._open.pop(one.id, None)
            raise
        if self.closed:  # meanwhile, and those that it told may not have been all
            for one in answers:
                one.events.put(Failure(self.closed))

    def _deliver(self, told: Iterable[tuple[int, Any]]) -> None:
        for number, event in told:
            if number == STATE:
                self.state, self.info = event, event.info or self.info
                with suppress(Exception):  # whoever listens has no part in this
                    self.tell(event)
            elif (answers := self._open.get(number)) is not None:
                answers.events.put(event)
                if isinstance(event, (Done, Failure, FinishEvent)):
                    self._open.pop(number, None)

    def _end_all(self, failure: Failure) -> None:
        """Tells everybody who waits."""
        for number in list(self._open):
            if answers := self._open.pop(number, None):
                answers.events.put(failure)


class InlineClient(Client):
    """Whoever waits for an event drives the engine. Not for several threads."""

    def __init__(self, host):
        super().__init__()
        self.host = host

    def send(self, message: Any) -> None:
        if not self.closed:
            self.host.receive(message)

    def wait(self, events: queue.SimpleQueue, timeout: float | None) -> Any:
        deadline = None if timeout is None else time.monotonic() + timeout
        while events.empty() and self.host.busy and not self.closed:
            self._step()
            if deadline is not None and time.monotonic() > deadline:
                break
        return None if events.empty() else events.get()

    def until_ready(self) -> ModelInfo:
        while self.state.phase != "ready":
            if self.closed:
                raise EngineError(self.closed)
            self._step()
        return self.info

    def _step(self) -> None:
        """Raises `CheckpointError` where the model can't be loaded. A lost device ends the engine, as all are told."""
        try:
            self._deliver(self.host.step())
        except BaseException as error:
            self._end(ended_by(error))
            if isinstance(error, (CheckpointError, KeyboardInterrupt, SystemExit)):
                raise

    def close(self) -> None:
        self._end(CLOSED)

    def _end(self, why: str) -> None:
        if not self.closed:
            self.closed = why
            self._end_all(Failure(why))
            with suppress(Exception):  # of a card that is lost
                self.host.close()


class ThreadClient(Client):
    """The engine on a thread of its own: only that touches the model. It can't mend a device fault, which it reports
    and ends with."""

    def __init__(self, host, tell: Callable[[EngineState], object] = lambda state: None):
        super().__init__(tell)
        self.host = host  # the thread's: tests look at it
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.ready = threading.Event()
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, args=(host,), name="engine", daemon=True)
        self.thread.start()

    def send(self, message: Any) -> None:
        self.inbox.put(message)

    def until_ready(self) -> ModelInfo:
        self.ready.wait()
        if isinstance(self.error, CheckpointError):
            raise self.error
        if self.closed:
            raise EngineError(self.closed)
        return self.info

    def close(self) -> None:
        self.closed = self.closed or CLOSED
        self.inbox.put(None)
        self.thread.join()

    def _run(self, host) -> None:
        try:
            self._loop(host)
        except BaseException as error:  # of the device, or of ours: whoever waits is told
            self.error = error.with_traceback(None)  # which would hold on to what was half loaded
            self.closed = self.closed or ended_by(error)
        self.closed = self.closed or CLOSED
        self.ready.set()
        self._end_all(Failure(self.closed))
        with suppress(Exception):  # of a card that is lost
            host.close()

    def _loop(self, host) -> None:
        while not self.closed:
            for message in received(self.inbox, wait=not host.busy):
                if message is None:
                    return
                host.receive(message)
            self._deliver(host.step())
            if self.state.phase == "ready":
                self.ready.set()


def ended_by(error: BaseException) -> str:
    return f"The engine has ended: {str(error).strip() or type(error).__name__}"


def received(inbox: queue.SimpleQueue, wait: bool) -> Iterator[Any]:
    """What has come; with `wait`, at least one message."""
    if wait:
        yield inbox.get()
    while True:
        try:
            yield inbox.get_nowait()
        except queue.Empty:
            return
