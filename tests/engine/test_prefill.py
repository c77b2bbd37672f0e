"""Recorded prompts, with a stand-in for a card's recorder: what it recorded it runs again, into the same memory."""

from __future__ import annotations

import pytest
import torch

from playground.engine.engine import Engine
from playground.engine.prefill import RECORDED, Prefill


class StandIn:
    full = False

    def __init__(self):
        self.recorded = 0

    def __call__(self, run):
        self.recorded += 1
        held = run()

        class Graph:
            def replay(self):
                fresh = run()
                held.logits.copy_(fresh.logits)

        return Graph(), held


@pytest.mark.parametrize("length", [3, 32, 33, 90])
def test_a_recorded_prompt_leaves_what_an_eager_one_leaves_and_nothing_behind_it(small, length):
    model = small(fp8=False, max_position_embeddings=100)  # fewer than the recording of the longest prompt has places
    engine = Engine(model, None, 2)
    prompt = torch.randint(3, 90, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    pages, recorder = [0, 1], StandIn()
    eager = Prefill(model, engine.cache, None).feed(prompt, 0, length, pages, True)
    cache = engine.cache.kv.values[:, :-1].clone()
    engine.cache.kv.values.zero_()
    recorded = Prefill(model, engine.cache, recorder)
    for _ in range(2):
        fed = recorded.feed(prompt, 0, length, pages, True)
        assert torch.allclose(fed.logits, eager.logits, atol=1e-4)
        assert torch.allclose(engine.cache.kv.values[:, :-1], cache, atol=1e-4)  # the last page is nobody's
    assert recorder.recorded == 1


def test_long_prompts_and_later_pieces_run_eagerly(small):
    engine, recorder = Engine(small(), None, 1), StandIn()
    prefill, prompt = Prefill(small(), engine.cache, recorder), list(range(5, 65))
    assert prefill._graph(RECORDED + 1, False) is None
    assert prefill.feed(prompt, 0, 30, [0], False) is None
    assert prefill.feed(prompt, 30, 60, [0], False).logits.shape[0] == 1
    assert recorder.recorded == 0


def test_where_there_is_no_memory_for_a_recording_prompts_run_eagerly_from_then_on(small):
    class NoRoom(StandIn):
        def __call__(self, run):
            raise torch.OutOfMemoryError("no room")

    model = small()
    engine, recorder = Engine(model, None, 1), NoRoom()
    prefill = Prefill(model, engine.cache, recorder)
    right = Prefill(model, engine.cache, None).feed([5, 6, 7], 0, 3, [0], False).logits
    assert torch.equal(prefill.feed([5, 6, 7], 0, 3, [0], False).logits, right) and recorder.full
