"""Pages of the KV cache under everything that can happen, with steps that begin before the last one was read, as on a
card: what rows and prefixes hold is what the pool has given out, and a row's text is its own."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from playground.engine.decoder import EagerDecoder
from playground.engine.engine import Engine
from playground.engine.requests import Request
from playground.engine.settings import RequestError, SamplingParams


class AheadDecoder(EagerDecoder):
    """Whose steps may begin before the last one was read."""

    runs_ahead = True


def ahead(model, **options) -> Engine:
    engine = Engine(model, None, **options)
    engine.runner.decoder = AheadDecoder(model, engine.runner.cache)
    return engine


def request(prompt, seed: int, tokens: int, keep: bool = False) -> Request:
    return Request(tuple(prompt), SamplingParams("gumbel", 1.0, seed=seed), tokens, ignore_eos=True, keep=keep)


def drain(engine: Engine) -> None:
    while engine.busy:
        engine.step()


def check_pool(engine: Engine, rows: list) -> None:
    """Every page is held as often as somebody has it, and free if nobody does."""
    scheduler, held = engine.scheduler, Counter()
    for one in {*scheduler.running, *scheduler.kept.held, *(row for row in rows if row.pages)}:
        held.update(one.pages)
    if scheduler.filling:
        held.update(scheduler.filling.pages)
        for pages in scheduler.filling.forks.values():
            held.update(pages)
    assert engine.pool.holders == [held[page] for page in range(len(engine.pool.holders))]
    assert sorted(engine.pool.free) == [page for page in range(len(engine.pool.holders)) if not held[page]]


@pytest.mark.parametrize("make", [Engine, ahead], ids=["step by step", "ahead"])
@pytest.mark.parametrize("seed", range(6))
def test_pages_add_up_whatever_happens(small, make, seed):
    chance, rows = random.Random(seed), []
    options = {"max_rows": 4, "cache_tokens": 10 * 64, "context": 192, "prefill_chunk": 64}
    engine = ahead(small(), **options) if make is ahead else Engine(small(), None, **options)
    feeding = None
    for turn in range(160):
        what = chance.choice(["add", "branch", "cancel", "fail", "feed", *["step"] * 5])
        try:
            if what == "add":
                prompt = range(1, chance.choice([4, 65, 100, 140]))
                rows += engine.add([request(prompt, turn, chance.randrange(1, 50), True)] * chance.randrange(1, 4))
            elif what == "branch" and rows:
                parent = chance.choice(rows)
                ids = (*parent.request.prompt, *parent.new_ids)
                rows += engine.add([request(ids[: max(len(ids) - 2, 1)], turn, 20, True)], parent)
            elif what in ("cancel", "fail") and rows:
                row = chance.choice(rows)
                engine.cancel(row, keep=chance.random() < 0.5) if what == "cancel" else engine.fail(row, "no")
            elif what == "feed" and feeding is None:
                feeding = engine.feed_alone(tuple(range(1, 150)))
                next(feeding)
        except RequestError:
            feeding = None if what == "feed" else feeding
        if feeding and chance.random() < 0.4:
            feeding.close()
            feeding = None
        engine.step()
        if feeding is None:
            check_pool(engine, rows)
    if feeding:
        feeding.close()
    drain(engine)
    check_pool(engine, rows)


@pytest.mark.parametrize("leaves", [False, True])
def test_a_branch_that_begins_beside_a_step_under_way_keeps_its_text(small, leaves):
    """Its parent's pages may have another owner before its own first step; so may its own, if it leaves."""
    model = small()

    def write(crowded: bool) -> list[list[int]]:
        engine = ahead(model, max_rows=4, cache_tokens=8 * 64, context=192)
        (parent,) = engine.add([request(range(1, 71), 1, 10, keep=True)])
        drain(engine)
        if crowded:
            engine.add([request((0, 5), 2, 60)])
            for _ in range(4):
                engine.step()
        ids = (*parent.request.prompt, *parent.new_ids[:4])
        (branch,) = engine.add([request(ids, 3, 30)], parent)
        if crowded:
            engine.step()
            if leaves:
                engine.cancel(branch, keep=False)
        others = [engine.add([request(range(5, 5 + 100), seed, 20)])[0] for seed in ((4, 5) if crowded else ())]
        drain(engine)
        assert branch.branched
        return [branch.new_ids, *(other.new_ids for other in others)]

    branch, *others = write(True)
    if not leaves:
        assert branch == write(False)[0]
    for seed, ids in zip((4, 5), others, strict=True):
        alone = Engine(model, None)
        (row,) = alone.add([request(range(5, 5 + 100), seed, 20)])
        drain(alone)
        assert row.new_ids == ids
