"""What one page may do at a time, without a browser."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import gradio as gr
import pytest

from playground import SamplingParams, load
from playground.inspect.columns import NAMES, PLAIN
from playground.ui.compare import CompareHandlers
from playground.ui.handlers import Handlers
from playground.ui.session import Session, run_of, stop


@pytest.fixture
def handlers(storyteller):
    return Handlers(SimpleNamespace(current=storyteller))


def test_of_many_clicks_at_once_one_runs(handlers):
    session, ran, start, leave = Session(), [], threading.Barrier(8), threading.Event()

    def click():
        start.wait()
        try:
            with run_of(session):
                session.streams = [SimpleNamespace(ended=False)]
                ran.append(True)
                leave.wait(20)
        except gr.Error:
            ran.append(False)
            if ran.count(False) == 7:
                leave.set()

    threads = [threading.Thread(target=click) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(ran) == [False] * 7 + [True] and not session.running


def test_stop_ends_a_replay_and_the_next_one_runs(handlers, storyteller):
    params = SamplingParams("gumbel", 0.9, seed=5)
    run = handlers.book.begin(storyteller, "Once upon a time", [params], 300, ignore_eos=True)[0]
    for event in run.stream:
        run.add(event)
    receipt, session, said = handlers.book.receipt(storyteller, run).encode(), Session(), []
    replaying = threading.Thread(target=lambda: said.append(handlers.replay(receipt, session)))
    replaying.start()
    while not session.streams:
        replaying.join(0.01)
    stop(session)
    replaying.join(30)
    assert said == ["The replay was stopped; run it again."] and not session.running
    run.tokens = run.tokens[:20]
    short = handlers.book.receipt(storyteller, run).encode()
    assert handlers.replay(short, session) == "Identical: all 20 tokens."


def test_a_replay_that_is_refused_leaves_the_run_under_way_alone(handlers, storyteller):
    session = Session()
    writing = handlers.generate("Once upon a time", "gumbel", 0.8, 60, 3, 0, 1.0, 0.0, True, session)
    next(writing)
    assert "already writing" in handlers.replay(b"{}", session)
    *_, last = writing
    assert last[1]["finish_reason"] == "length" and last[1]["new_tokens"] == 60


def test_continue_does_not_write_on_behind_an_end_of_text(handlers, storyteller):
    session = Session()
    for seed in range(40):
        *_, last = handlers.generate("Once upon a time", "gumbel", 0.8, 250, seed, 0, 1.0, 0.0, False, session)
        if last[1]["finish_reason"] == "eos":
            break
    assert last[1]["finish_reason"] == "eos"
    settings = ("gumbel", 0.8, 5, -1, 0, 1.0, 0.0)
    with pytest.raises(gr.Error, match="come to its end"):
        list(handlers.go_on(*settings, False, session))
    *_, more = handlers.go_on(*settings, True, session)
    assert more[1]["new_tokens"] == 5


def test_a_comparison_says_that_it_loads_the_other_form_of_the_weights_and_does_so_once():
    settings = [PLAIN | {"weights": form} for form in ("fp8", "bf16")] + [PLAIN] * 2
    values = [setting[name] for setting in settings for name in NAMES]
    with load(device="cpu") as playground:
        comparing = CompareHandlers(Handlers(SimpleNamespace(current=playground)))
        for first in (True, False):
            shown = comparing.compare("A", 3, False, 2, True, *values, Session())
            notes = [fork and fork.get("note", "") for _, fork, *_ in shown]
            assert (notes[0] == "Loading the BF16 weights; they stay at hand.") == first
            assert not any("Loading" in (note or "") for note in notes[1:])
