"""Who waits, and in which order; without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest
from serving import ROOT

from playground.engine.pages import PagePool
from playground.engine.requests import Request
from playground.engine.scheduler import MOST_WAITING, Scheduler
from playground.engine.settings import RequestError, SamplingParams


def scheduler(max_rows: int = 2, tokens: int = 1024) -> Scheduler:
    return Scheduler(PagePool(tokens), max_rows, context=256, vocab_size=100, chunk=2048, share=False)


def add(one: Scheduler, visitor: str, number: int, rows: int = 1):
    requests = [Request((1, 2, 3), SamplingParams("gumbel", seed=number), 10)] * rows
    return one.add(requests, list(range(number, number + rows)), None, visitor=visitor)


def turns(one: Scheduler) -> list[int]:
    """Rows in the order in which they begin, each of which ends before the next begins."""
    order = []
    while group := one.begin()[0]:
        one.next_chunk()
        order.append(group[0].id)
        for row in group:
            one.leave(row, keep=False)
    return order


def test_it_imports_no_torch():
    code = "import sys, playground.engine.scheduler; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_visitors_take_turns_however_much_each_of_them_asks_for():
    one = scheduler(max_rows=1)
    for number in range(5):
        add(one, "greedy", number)
    add(one, "late", 10)
    add(one, "later", 20)
    add(one, "late", 11)
    assert turns(one) == [0, 10, 20, 1, 11, 2, 3, 4]


def test_places_in_line_are_told_once_and_count_down():
    one = scheduler(max_rows=1)
    rows = [add(one, visitor, number)[0] for number, visitor in enumerate("aab")]
    (running,), _ = one.begin()
    assert running is rows[0] and [row.position for row in one.moved()] == [1, 2] == sorted(
        [rows[1].position, rows[2].position]
    )
    assert rows[2].position == 1  # b has had no turn yet
    assert one.moved() == []
    one.next_chunk()
    one.leave(running, keep=False)
    one.begin()
    assert [(row.id, row.position) for row in one.moved()] == [(1, 1)]


def test_whoever_leaves_the_line_lets_the_others_move_up():
    one = scheduler(max_rows=1)
    rows = [add(one, "abc"[number], number)[0] for number in range(3)]
    one.begin()
    one.moved()
    one.leave(rows[1], keep=False)
    assert [(row.id, row.position) for row in one.moved()] == [(2, 1)]


def test_a_group_waits_until_all_of_its_rows_have_places():
    one = scheduler(max_rows=3)
    first, second = add(one, "a", 0, rows=2), add(one, "b", 10, rows=2)
    assert one.begin()[0] == first
    one.next_chunk()
    assert one.begin()[0] == []
    one.leave(first[0], keep=False)
    assert one.begin()[0] == second


def test_a_line_without_end_is_refused():
    one = scheduler()
    for number in range(MOST_WAITING):
        add(one, str(number), number)
    with pytest.raises(RequestError, match="waiting already"):
        add(one, "z", 9999)
