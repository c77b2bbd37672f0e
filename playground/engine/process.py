"""The engine in a process of its own, over a socket that the two of them share: end-of-file tells each side of the
other's death. `ProcessClient` is the page's side, `serve` the engine's (`python -m playground.engine`).
"""

from __future__ import annotations

import gc
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from playground.checkpoint.config import CheckpointError
from playground.engine import wire
from playground.engine.client import CLOSED, STATE, Answers, Client, EngineError, received
from playground.engine.events import EngineState, Failure, ModelInfo, TokenEvent
from playground.engine.requests import Ask, Options

BAD_MODEL = 2  # exit code: what was asked for can't be loaded, and won't be the next time
MOST_FAILURES = 3  # restarts in a row that never got ready
MOST_DEATHS, SOON = 5, 60.0  # so many in so many seconds, ready or not
LOST = "The engine ended unexpectedly, and with it what was running. It is being started again; run again."


class ProcessClient(Client):
    """Starts the engine, starts it again where it dies, and after three starts that failed says so for good."""

    def __init__(self, options: Options, tell: Callable[[EngineState], object] = lambda state: None):
        super().__init__(tell)
        self.options, self.failures, self.starts = options, 0, 0
        self.deaths: deque[float] = deque(maxlen=MOST_DEATHS)
        self.sending = threading.RLock()  # also held while one engine takes another's place
        self.changed = threading.Condition()  # of the engine's state
        self.bad_model = ""
        self._start()
        self.thread = threading.Thread(target=self._listen, name="engine events", daemon=True)
        self.thread.start()

    def command(self, descriptor: int) -> list[str]:
        return [sys.executable, "-m", "playground.engine", "--socket", str(descriptor)]

    def send(self, message: Any) -> None:
        with self.sending, suppress(OSError):  # the listener hears of it, and tells those who wait
            wire.send(self.socket, message)

    def until_ready(self) -> ModelInfo:
        """Waits until the engine says so. Raises `CheckpointError` and `EngineError`."""
        with self.changed:
            self.changed.wait_for(lambda: self.closed or self.state.phase == "ready")
        self._check_open()
        return self.info

    def until_known(self, seconds: float | None = None) -> ModelInfo | None:
        """Waits, for so long at most, until it is known what model it will be, before its weights are there."""
        with self.changed:
            self.changed.wait_for(lambda: self.closed or self.info, seconds)
        self._check_open()
        return self.info

    def close(self) -> None:
        self._close(CLOSED)
        with self.sending, suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        try:
            self.process.wait(2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.thread.join(2)

    def _check_open(self) -> None:
        if self.bad_model:
            raise CheckpointError(self.bad_model)
        if self.closed:
            raise EngineError(self.closed)

    def _submit(self, ask: Ask, answers: Sequence[Answers]) -> None:
        with self.sending:  # either the engine that dies has it, and its end is told, or the next one
            super()._submit(ask, answers)

    def _close(self, why: str) -> None:
        with self.changed:
            self.closed = self.closed or why
            self.changed.notify_all()
        self._end_all(Failure(self.closed))

    def _start(self) -> None:
        self.starts += 1
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):  # a burst of events must not make the engine wait for the page
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # we may have been started from any folder
        with theirs:
            self.process = subprocess.Popen(
                self.command(theirs.fileno()),
                pass_fds=[theirs.fileno()],
                env=os.environ | path,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.socket = ours
        with suppress(OSError):  # it is gone already, as its end-of-file says
            wire.send(ours, self.options)

    def _listen(self) -> None:
        """Hands out what the engine says, as long as there is one."""
        try:
            while not self.closed:
                reader = wire.Reader(self.socket)
                with suppress(EOFError):
                    while True:
                        self._hear(reader.read())
                if self.closed:  # while what was running came to its end
                    self._end_all(Failure(LOST))
                else:
                    self._again()
        except BaseException as error:  # nobody would hear anything any more
            self._give_up(f"The engine can't be heard any more ({type(error).__name__}: {error}). Start it anew.")

    def _hear(self, told: tuple) -> None:
        for part in told:
            self._deliver(wire.unpack(part) if isinstance(part, wire.Tokens) else [part])
            if not isinstance(part, wire.Tokens) and part[0] == STATE:
                if self.state.phase == "ready":
                    self.failures = 0
                    serial, _, name = self.info.key.partition(":")  # what pages know is what comes back
                    self.options = replace(self.options, current=name, serial=int(serial) - 1)
                self._notify()

    def _notify(self) -> None:
        with self.changed:
            self.changed.notify_all()

    def _again(self) -> None:
        """The engine is gone: everybody who waits is told at once, and the next one is started."""
        self._end_all(Failure(LOST))
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(1)
        self.process.kill()
        code, last = self.process.wait(), self.state
        self.deaths.append(time.monotonic())
        if code == BAD_MODEL and self.starts == 1 and last.message:
            self.bad_model = last.message
            self._give_up(last.message)
            return
        self.failures += last.phase != "ready"
        why = last.message or f"it ended with exit code {code}"
        if self.failures >= MOST_FAILURES:
            self._give_up(f"The engine could not be started {MOST_FAILURES} times in a row: {why}. Start it anew.")
            return
        if len(self.deaths) == MOST_DEATHS and self.deaths[-1] - self.deaths[0] < SOON:
            self._give_up(f"The engine ended {MOST_DEATHS} times within a minute: {why}. Start it anew.")
            return
        self._deliver([(STATE, EngineState("restarting", info=self.info))])
        self._notify()
        time.sleep(0.2 * self.failures)
        with self.sending:
            self.socket.close()
            self._end_all(Failure(LOST))  # who came meanwhile spoke to nobody
            if not self.closed:
                self._start()

    def _give_up(self, why: str) -> None:
        self._close(why)
        self._deliver([(STATE, EngineState("failed", message=why, info=self.info))])


def serve(descriptor: int) -> int:
    """The engine's side: reads requests, writes events, and ends when the page is gone."""
    for one in (signal.SIGINT, signal.SIGTERM):  # the page decides when to end, and takes its time
        signal.signal(one, signal.SIG_IGN)
    link = socket.socket(fileno=descriptor)
    reader, inbox, outbox = wire.Reader(link), queue.SimpleQueue(), queue.SimpleQueue()
    options = reader.read()
    threading.Thread(target=_receive, args=(reader, inbox), name="requests", daemon=True).start()
    writer = threading.Thread(target=_write, args=(link, outbox), name="events", daemon=True)
    writer.start()
    from kernels.compiling import compilers
    from playground.engine.host import Host  # imports torch: what comes meanwhile waits in the inbox

    try:
        host = Host(options, None if options.device == "cpu" else compilers())
        gc.freeze()  # what is imported stays: to look through it stops all rows for a tenth of a second
        while True:
            for message in received(inbox, wait=not host.busy):
                host.receive(message)
            if told := host.step():
                outbox.put(told)
    except CheckpointError as error:
        outbox.put([(STATE, EngineState("ending", message=str(error)))])
        code = BAD_MODEL
    except BaseException as error:  # of the device, or of ours: a new process mends the one, and tells of the other
        print(f"engine: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        outbox.put([(STATE, EngineState("ending", message=str(error) or type(error).__name__))])
        code = 1
    outbox.put(None)
    writer.join(2)
    return code


def _receive(reader: wire.Reader, inbox: queue.SimpleQueue) -> None:
    try:
        while True:
            inbox.put(reader.read())
    except BaseException:  # the page is gone, or speaks in tongues: there is nobody to compute for
        os._exit(0)


def _write(link: socket.socket, outbox: queue.SimpleQueue) -> None:
    """Sends events; what has come up while a frame was on its way goes into the next one together."""
    ending = False
    while not ending:
        told: list[tuple[int, Any]] = []
        for batch in received(outbox, wait=True):
            if batch is None:
                ending = True
                break
            told += batch
        try:
            wire.send(link, tuple(parts_of(told)))
        except OSError:
            os._exit(0)
        except BaseException as error:  # an engine that can't speak is of no use
            print(f"engine: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)


def parts_of(told: list[tuple[int, Any]]) -> Iterator[Any]:
    """Events in order, tokens that follow each other as columns."""
    tokens: list[tuple[int, TokenEvent]] = []
    for number, event in told:
        if isinstance(event, TokenEvent):
            tokens.append((number, event))
            continue
        if tokens:
            yield wire.pack(tokens)
            tokens = []
        yield number, event
    if tokens:
        yield wire.pack(tokens)
