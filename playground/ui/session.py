"""What one open page remembers, and how its runs are kept apart."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import gradio as gr

from playground import CheckpointError, RequestError
from playground.checkpoint.chat import Message
from playground.engine.client import EngineError, Stream
from playground.inspect.run import Run

SECOND_RUN = "This page is already writing; press Stop first, or wait for the end."
_claiming = threading.Lock()  # of all pages, for an instant: a session is copied by gradio, which no lock survives


class Session:
    """What one open page remembers between events. Handlers of the page share the object, so that a choice in the
    panel takes effect in a run that is under way."""

    def __init__(self):
        self.running = False
        self.streams: list[Stream] = []  # of the run under way
        self.layer, self.projection = 0, None  # None: the layer's first
        self.seed: int | None = None  # of the last run that drew with one
        self.tree: list[Run] = []  # the last run, and what branched off from it
        self.current: Run | None = None  # the one of them that is shown
        self.columns: list[Run] = []  # of the last comparison
        self.lab: tuple | None = None  # what the lab drew from last: a key, and a `Distribution`
        self.drawn = 0  # single draws in the lab: each takes the next position's noise
        self.scales: Mapping[str, list[float]] = {}
        self.chat: list[Message] = []

    def forget_model(self) -> None:
        """What belonged to a model that is no longer the one loaded."""
        self.layer, self.projection, self.scales, self.chat = 0, None, {}, []
        self.tree, self.current, self.columns, self.lab = [], None, [], None


@contextmanager
def told() -> Iterator[None]:
    """Whatever goes wrong inside becomes a sentence for the page and the API."""
    try:
        yield
    except (RequestError, CheckpointError, EngineError) as error:
        raise gr.Error(str(error), print_exception=False) from None


@contextmanager
def run_of(session: Session) -> Iterator[None]:
    """One run per page at a time; whatever goes wrong inside is told."""
    refuse_during_a_run(session, claim=True)
    try:
        with told():
            yield
    finally:
        session.running = False


def refuse_during_a_run(session: Session, claim: bool = False) -> None:
    """One run per page; who may `claim` it is the one that runs. A run that has ended, and whose last words are still
    being painted, gets a moment to leave."""
    patience = time.monotonic() + 1.0
    while True:
        with _claiming:
            if not session.running:
                session.running = claim
                return
        if not all(stream.ended for stream in session.streams) or time.monotonic() > patience:
            raise gr.Error(SECOND_RUN, print_exception=False)
        time.sleep(0.02)


def stop(session: Session) -> None:
    """Cancels the rows of the run under way. Its generator then ends by itself, with the engine's own last figures;
    to cancel the generator instead would leave the footer to whichever message comes last."""
    for stream in session.streams:
        stream.close()
    session.streams = []
