"""Prompts that begin alike: what one has left in the cache, the next one does not feed again."""

from __future__ import annotations

import pytest

from playground import FinishEvent, SamplingParams, TokenEvent
from playground.engine.engine import Engine
from playground.engine.requests import Request

PIECE = 64
DOCUMENT = tuple(range(1, 2 * PIECE + 1))


def request(prompt, seed: int = 3, tokens: int = 9, **options) -> Request:
    return Request(tuple(prompt), SamplingParams("gumbel", 1.0, seed=seed), tokens, ignore_eos=True, **options)


class Counted(Engine):
    """An engine that notes which tokens it feeds."""

    def __init__(self, model, **options):
        super().__init__(model, None, prefill_chunk=PIECE, **options)
        self.fed, feed = [], self.runner.prefill.feed
        self.runner.prefill.feed = lambda tokens, start, *rest: (
            self.fed.append((start, start + len(tokens))) or feed(tokens, start, *rest)
        )

    def write(self, *requests: Request):
        """Ids and log-probabilities of each row, and its figures."""
        self.fed.clear()
        self.rows, events = self.add(list(requests)), []
        while self.busy:
            events += self.step()
        of = [[event for owner, event in events if owner is row] for row in self.rows]
        drawn = [[(e.id, e.logprob) for e in own if isinstance(e, TokenEvent)] for own in of]
        return drawn, [e.stats for own in of for e in own if isinstance(e, FinishEvent)]


def all_is_back(engine: Engine) -> bool:
    for one in list(engine.scheduler.kept.held):
        engine.scheduler.kept.drop(one)
    return engine.pool.used_pages == 0 and not any(engine.pool.holders) and not engine.scheduler.kept.prefixes.known


@pytest.mark.parametrize("tail", [(7,), (7, 8, 9), tuple(range(9, 90))])
def test_a_prompt_that_begins_like_another_feeds_only_the_rest_and_draws_the_same(small, tail):
    model = small()
    engine, fresh = Counted(model), Counted(model)
    engine.write(request((*DOCUMENT, 5, 6)))
    drawn, (stats,) = engine.write(request((*DOCUMENT, *tail)))
    assert engine.fed[0][0] == 2 * PIECE and stats.cached_tokens == 2 * PIECE
    assert drawn == fresh.write(request((*DOCUMENT, *tail)))[0] and fresh.fed[0] == (0, PIECE)
    assert all_is_back(engine)


def test_the_rate_of_a_prefill_counts_what_was_fed(small):
    engine = Counted(small())
    (first,) = engine.write(request((*DOCUMENT, 5)))[1]
    (again,) = engine.write(request((*DOCUMENT, 5)))[1]
    assert first.cached_tokens == 0 and again.cached_tokens == 2 * PIECE
    assert again.prefill_rate * engine.rows[0].prefill_seconds == pytest.approx(1)


def test_the_last_token_of_a_prompt_is_always_fed(small):
    engine = Counted(small())
    first = engine.write(request(DOCUMENT))[0]
    assert engine.write(request(DOCUMENT))[0] == first and engine.fed == [(PIECE, 2 * PIECE)]


def test_a_piece_counts_only_behind_the_same_pieces(small):
    engine = Counted(small())
    engine.write(request((*DOCUMENT, 5)))
    engine.write(request((*DOCUMENT[PIECE:], 5)))
    assert engine.fed[0] == (0, PIECE)
    engine.write(request((*DOCUMENT[:PIECE], *range(70, 70 + PIECE), 5)))
    assert engine.fed[0] == (PIECE, 2 * PIECE)


def test_a_group_shares_what_is_there_and_every_row_draws_as_alone(small):
    engine, model = Counted(small()), small()
    engine.write(request((*DOCUMENT, 5)))
    group = [request((*DOCUMENT, 5, 6), seed) for seed in (1, 2, 3)]
    drawn, _ = engine.write(*group)
    assert drawn == [Counted(model).write(one)[0][0] for one in group]
    assert all_is_back(engine)


def test_pieces_give_way_to_rows_the_oldest_prompts_last_piece_first(small):
    engine = Counted(small(), cache_tokens=6 * PIECE)
    engine.write(request((*DOCUMENT, 5)))
    engine.write(request((*range(180, 180 + PIECE), 5)))
    assert engine.pool.used_pages == 3
    engine.write(request(range(60, 60 + 3 * PIECE), tokens=PIECE))  # needs four of six
    assert len(engine.scheduler.kept.prefixes.found((*DOCUMENT, 5))) == 1
    whole, _ = engine.write(request((*DOCUMENT, *range(3 * PIECE - len(DOCUMENT))), tokens=PIECE))
    assert whole == Counted(small()).write(request((*DOCUMENT, *range(3 * PIECE - len(DOCUMENT))), tokens=PIECE))[0]
    assert all_is_back(engine)


def test_a_row_that_needs_all_of_the_cache_gets_it_whatever_was_kept(small):
    engine = Counted(small(), cache_tokens=4 * PIECE)
    engine.write(request((*DOCUMENT, 5)))
    engine.write(request((*DOCUMENT[:PIECE], *range(90, 90 + PIECE), 6)))
    drawn, _ = engine.write(request((*DOCUMENT, 5), tokens=2 * PIECE - 1))
    assert drawn == Counted(small()).write(request((*DOCUMENT, 5), tokens=2 * PIECE - 1))[0]
    assert all_is_back(engine)


def test_a_prompt_cancelled_between_its_pieces_leaves_those_that_were_fed(small):
    engine = Counted(small())
    (row,) = engine.add([request((*DOCUMENT, 5))])
    engine.step()
    engine.cancel(row)
    assert engine.pool.used_pages == 1 and not engine.busy
    engine.write(request((*DOCUMENT, 5)))
    assert engine.fed[0] == (PIECE, 2 * PIECE)
    assert all_is_back(engine)


def test_nothing_is_kept_where_it_is_not_wanted_or_pieces_are_no_whole_pages(small):
    engine = Counted(small(), share_prefixes=False)
    engine.write(request((*DOCUMENT, 5)))
    uneven = Engine(small(), None, prefill_chunk=48)
    uneven.add([request((*DOCUMENT, 5))])
    while uneven.busy:
        uneven.step()
    assert engine.pool.used_pages == uneven.pool.used_pages == 0
