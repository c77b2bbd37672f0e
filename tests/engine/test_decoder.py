"""Which recorded step a batch runs on; with a stand-in for recordings, which only a card can make."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from playground.engine import decoder
from playground.engine.batch import DecodeBatch, DecodeRow, RowDraw
from playground.engine.decoder import PATIENCE, GraphDecoder, Variant
from playground.engine.sampler import Needs
from playground.engine.settings import SamplingParams

PLAIN, TOP_P = SamplingParams("gumbel", 1.0), SamplingParams("gumbel", 1.0, top_p=0.9)


class Recorded:
    def __init__(self, model, cache, size, width, variant, record, histories):
        self.size, self.variant, self.loaded = size, variant, []

    def load(self, rows):
        self.loaded.append(len(rows))

    def replay(self, count):
        return lambda: (self.size, count)


@pytest.fixture
def graphs(monkeypatch):
    monkeypatch.setattr(decoder, "Graph", Recorded)
    return GraphDecoder(None, None, 256, SimpleNamespace(full=False))


def batch(rows: int, params=PLAIN, **flags) -> DecodeBatch:
    return DecodeBatch(tuple(DecodeRow(1, 5, (0,), RowDraw(params, **flags)) for _ in range(rows)))


def test_a_batch_runs_on_the_next_power_of_two(graphs):
    for rows, size in ((1, 1), (2, 2), (3, 4), (5, 8), (32, 32)):
        graphs.load(batch(rows))
        assert graphs.step()() == (size, rows) and graphs.lent is None


def test_a_larger_recording_serves_until_one_is_worth_making(graphs):
    everything = Variant(Needs(True, True), True, True)
    graphs.recorded(32, everything)
    graphs.load(batch(3, TOP_P, inspected=True))
    for _ in range(PATIENCE):
        assert not graphs.wants_reload and graphs.step()() == (32, 3)
    assert graphs.wants_reload
    graphs.load(batch(3, TOP_P, inspected=True))
    assert graphs.step()() == (4, 3) and not graphs.wants_reload
    graphs.load(batch(4, TOP_P, inspected=True))
    assert graphs.step()() == (4, 4)


def test_the_smallest_that_does_enough_serves(graphs):
    for rows, needs in (
        (32, Needs(True, True)),
        (8, Needs(True, True)),
        (8, Needs(True, False)),
        (4, Needs(False, False)),
    ):
        graphs.recorded(rows, Variant(needs, False, False))
    graphs.load(batch(2, TOP_P))
    assert graphs.graph.size == 8 and graphs.graph.variant.needs == Needs(True, False)
    graphs.load(batch(2))
    assert graphs.graph.size == 4


def test_what_does_less_never_serves(graphs):
    graphs.recorded(32, Variant(Needs(False, False), False, True))
    graphs.load(batch(1, TOP_P))
    assert graphs.graph.size == 1 and graphs.lent is None
    graphs.load(batch(1, traced=True))
    assert graphs.graph.size == 1 and graphs.graph.variant.traced
