"""What comes before the model is there, and what is stopped at every stage."""

from __future__ import annotations

import pytest
from running import hosted

from playground.engine.client import EngineError, InlineClient
from playground.engine.engine import Engine
from playground.engine.events import FinishEvent, TokenEvent
from playground.engine.host import Host
from playground.engine.requests import Check, Curve, Draws, Load, Logits, Options, Request, Score
from playground.engine.settings import RequestError, SamplingParams


def request(tokens: int = 5, seed: int = 1) -> Request:
    return Request((0, 5, 9), SamplingParams("gumbel", 1.0, seed=seed), tokens, ignore_eos=True)


def test_requests_that_come_before_the_model_wait_for_it_and_can_be_stopped_one_by_one():
    client = InlineClient(Host(Options(device="cpu", context=128)))
    first, second = client.generate([request(seed=1), request(seed=2)])
    alone, job = client.generate([request()])[0], client.ask(Logits((0, 5, 9)))
    stopped = client.ask(Logits((0, 5, 9)))
    for one in (first, alone, stopped):
        one.close()
    (end,) = list(first)
    assert isinstance(end, FinishEvent) and end.stats.finish_reason == "cancelled"
    assert list(alone)[-1].stats.finish_reason == "cancelled"
    with pytest.raises(RequestError, match="stopped"):
        stopped.last()
    assert len(list(second)) == 6 and len(job.last()) == 4096
    assert not client.running and not client.host.rows and not client.host.jobs
    client.close()


@pytest.fixture
def client(small):
    client = InlineClient(hosted(Engine(small(), None, prefill_chunk=16)))
    client.until_ready()
    yield client
    client.close()


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 7, 12])
def test_a_row_can_be_stopped_at_every_stage_and_leaves_nothing(client, steps):
    long = Request(tuple(range(1, 60)), SamplingParams("gumbel", seed=3), 100, ignore_eos=True)
    (stream,), host = client.generate([long]), client.host
    for _ in range(steps):
        client._deliver(host.step())
    stream.close()
    *_, end = list(stream)
    assert end.stats.finish_reason == "cancelled" and not host.rows
    pool = host.engines["fp8"].pool
    for prefix in list(host.engines["fp8"].scheduler.kept.held):
        host.engines["fp8"].scheduler.kept.drop(prefix)
    assert pool.used_pages == 0 and not host.busy


@pytest.mark.parametrize(
    "job",
    [
        Logits(tuple(range(1, 60))),
        Score(tuple(range(1, 60))),
        Curve((0, 5, 9), 60),
        Check(),
        pytest.param(None, id="Draws"),
    ],
    ids=lambda job: type(job).__name__,
)
def test_a_job_can_be_stopped_between_two_slices_while_rows_write_on(client, job):
    if job is None:
        job = Draws(client.ask(Logits((0, 5, 9))).last(), SamplingParams("gumbel", seed=3), 10**6, (0, 1))
    (expected,) = client.generate([request(20)])
    ids = [event.id for event in expected if isinstance(event, TokenEvent)]
    (stream,), answers = client.generate([request(20)]), client.ask(job)
    for _ in range(4):
        client._deliver(client.host.step())
    answers.close()
    with pytest.raises(RequestError, match="stopped"):
        answers.last()
    assert [event.id for event in stream if isinstance(event, TokenEvent)] == ids
    assert not client.host.jobs and not client.host.rows
    pool, kept = client.host.engines["fp8"].pool, client.host.engines["fp8"].scheduler.kept
    for prefix in list(kept.held):
        kept.drop(prefix)
    assert pool.used_pages == 0


def test_what_can_not_be_asked_is_told_so_and_the_next_request_works(client):
    for job, words in (
        (Load("int4"), "int4"),
        (Score((1,)), "1 tokens"),
        (Logits(()), "empty"),
        (Logits((9999,)), "outside"),
    ):
        with pytest.raises(Exception, match=words):
            client.ask(job).last()
    with pytest.raises(RequestError, match="not loaded"):
        list(client.generate([request()], form="bf16")[0])
    with pytest.raises(RequestError, match="no longer loaded"):
        list(client.generate([request()], model="0:other")[0])
    assert len(list(client.generate([request()])[0])) == 6


def test_rows_of_a_job_are_nobody_elses(client):
    """Both count their rows; what a job writes reaches no visitor."""
    curve = client.ask(Curve((0, 5, 9), 40))  # the first thing that is asked for: number 0
    (stream,) = client.generate([request(60)])
    events = [event for event in stream if isinstance(event, TokenEvent)]
    assert [event.index for event in events] == list(range(60))
    assert len([point for point in curve if point]) == 9 and not client.running


def test_a_job_on_a_model_that_goes_is_told_so(client):
    curve = client.ask(Curve((0, 5, 9), 40))
    for _ in range(3):
        client._deliver(client.host.step())
    client.host._end_rows()
    with pytest.raises(RequestError, match="no longer loaded"):
        curve.last()
    assert not client.host.jobs and not client.host.engines["fp8"].busy


def test_a_row_whose_text_can_not_even_begin_ends_alone(client, monkeypatch):
    from playground.engine import scheduler

    def broken(*_):
        raise TypeError("no such token")

    client.host.engines["fp8"].tokenizer = object()
    monkeypatch.setattr(scheduler, "TextStream", broken)
    with pytest.raises(EngineError, match="no such token"):
        list(client.generate([request()])[0])
    client.host.engines["fp8"].tokenizer = None
    assert len(list(client.generate([request()])[0])) == 6
