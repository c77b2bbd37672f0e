"""Who is given up, how often is painted, and what a visitor costs."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
from gradio.state_holder import SessionState

from playground.ui import painting
from playground.ui.painting import PAINT_SECONDS, SLOWEST_SECONDS, UNREAD_SECONDS, Listener, Pace


class Messages:
    """A visitor's queue: one message comes between two looks, and so many are taken on average."""

    def __init__(self, taken: float):
        self.size, self.taken = 0.0, taken

    def qsize(self) -> int:
        return int(self.size)

    def paint(self) -> None:
        self.size = max(self.size + 1 - self.taken, 0)


@pytest.mark.parametrize(("taken", "gone"), [(0.0, True), (0.02, False), (0.4, False), (0.9, False), (1.0, False)])
def test_only_who_reads_nothing_is_given_up(monkeypatch, taken, gone):
    messages, now = Messages(taken), [0.0]
    monkeypatch.setattr(painting.time, "monotonic", lambda: now[0])
    page = SimpleNamespace(_queue=SimpleNamespace(pending_messages_per_session={"me": messages}))
    listener, given_up = Listener(page, SimpleNamespace(session_hash="me")), False
    while now[0] < 60 and not given_up:
        given_up = listener.gone
        messages.paint()
        now[0] += PAINT_SECONDS
    assert given_up == gone
    if gone:
        assert UNREAD_SECONDS <= now[0] < UNREAD_SECONDS + 1


def test_painting_slows_down_where_it_takes_all_of_a_core_and_comes_back(monkeypatch):
    clock = {"wall": 0.0, "work": 0.0}
    monkeypatch.setattr(painting.time, "perf_counter", lambda: clock["wall"])
    monkeypatch.setattr(painting.time, "thread_time", lambda: clock["work"])
    pace = Pace()

    def live(share: float, seconds: float) -> float:
        for _ in range(int(seconds / 0.25)):
            clock["wall"], clock["work"] = clock["wall"] + 0.25, clock["work"] + 0.25 * share
            found = pace.next()
        return found

    assert live(0.1, 2) == PAINT_SECONDS
    assert live(1.0, 20) == SLOWEST_SECONDS
    assert live(0.1, 20) == PAINT_SECONDS


def test_a_new_visitor_costs_little_and_shares_nothing(storyteller):
    from playground.shelf import Shelf
    from playground.ui.page import build_page

    shelf = Shelf(storyteller.client)
    page = build_page(shelf)
    began = time.perf_counter()
    one, other = SessionState(page), SessionState(page)
    assert (time.perf_counter() - began) / 2 < 0.02
    assert one.config_values == other.config_values
    number = next(n for n, block in page.blocks.items() if getattr(block, "elem_id", None) == "prompt")
    one._update_value_in_config(number, "mine alone")
    assert other.config_values[number]["props"]["value"] == "Once upon a time"
    assert SessionState(page).config_values[number]["props"]["value"] == "Once upon a time"
