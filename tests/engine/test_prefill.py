"""Recorded pieces of prompts, with a stand-in for a card's recorder: it runs what it recorded into the same memory."""

from __future__ import annotations

import pytest
import torch

from playground.engine.engine import Engine
from playground.engine.prefill import KINDS, Prefill


class StandIn:
    full = False

    def __init__(self):
        self.recorded = 0

    def __call__(self, run, compiled):
        assert compiled  # a piece has run before it is recorded
        self.recorded += 1
        held = run()

        class Graph:
            def replay(self):
                fresh = run()
                if held:
                    held.logits.copy_(fresh.logits)

        return Graph(), held


@pytest.mark.parametrize("length", [3, 32, 33, 90])
def test_a_recorded_prompt_leaves_what_an_exact_one_leaves_and_nothing_behind_it(small, length):
    model = small(fp8=False, max_position_embeddings=100)  # fewer than the recording of the longest prompt has places
    engine = Engine(model, None, 2)
    prompt = torch.randint(3, 90, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    pages, recorder = [0, 1], StandIn()
    exact = Prefill(model, engine.runner.cache, None).feed(prompt, 0, pages, True, True)
    cache = engine.runner.cache.kv.values[:, :-1].clone()
    engine.runner.cache.kv.values.zero_()
    recorded, fed = Prefill(model, engine.runner.cache, recorder), []
    for _ in range(3):
        fed.append(recorded.feed(prompt, 0, pages, True, True).logits.clone())
        assert torch.allclose(fed[-1], exact.logits, atol=1e-4)
        assert torch.allclose(engine.runner.cache.kv.values[:, :-1], cache, atol=1e-4)  # the last page is nobody's
    assert recorder.recorded == 1
    assert torch.equal(fed[0], fed[1]) and torch.equal(fed[1], fed[2])  # before, at and after its recording


def read(trace) -> dict:
    flat, layout = trace.flat().numpy(), trace.layout()
    found = {name: layout.read(flat, 0, name) for name in layout.places}
    return {name: scales for name, scales in found.items() if scales is not None}


@pytest.mark.parametrize("mla", [False, True])
def test_later_pieces_are_recorded_by_where_they_begin_and_tell_the_last_tokens_scales(small, mla):
    model = small(mla=mla)
    engine, recorder = Engine(model, None, 1, context=128), StandIn()
    exact, recorded = Prefill(model, engine.runner.cache, None), Prefill(model, engine.runner.cache, recorder)
    prompt = list(range(5, 65))
    for _ in range(3):
        feds = []
        for prefill in (exact, recorded):
            assert prefill.feed(prompt[0:40], 0, [0], True, False) is None
            feds.append(prefill.feed(prompt[40:60], 40, [0], True, True))
        want, fed = feds
        assert torch.allclose(fed.logits, want.logits, atol=1e-2)
        scales, right = (read(f.trace) for f in (fed, want))
        assert sorted(scales) == sorted(right)
        assert all(torch.allclose(torch.tensor(scales[n]), torch.tensor(right[n]), rtol=0.05) for n in right)
    assert recorder.recorded == 2 and [k.start for k in recorded.chunks] == [0, 40]


def test_the_kinds_used_last_are_remembered_and_no_more(small):
    model = small()
    engine = Engine(model, None, 1, context=128)
    prefill = Prefill(model, engine.runner.cache, StandIn())
    for start in range(KINDS + 2):
        prefill.feed([5 + start], start, [0, 1], False, False)
        prefill.feed([5], 0, [0, 1], False, False)
    starts = [kind.start for kind in prefill.chunks]
    assert len(starts) == KINDS and starts[-1] == 0 and 1 not in starts and KINDS + 1 in starts


def test_where_there_is_no_memory_for_a_recording_pieces_run_as_before_from_then_on(small):
    class NoRoom(StandIn):
        def __call__(self, run, compiled):
            raise torch.OutOfMemoryError("no room")

    model = small()
    engine, recorder = Engine(model, None, 1), NoRoom()
    prefill = Prefill(model, engine.runner.cache, recorder)
    right = prefill.feed([5, 6, 7], 0, [0], False, True).logits
    for _ in range(2):
        assert torch.equal(prefill.feed([5, 6, 7], 0, [0], False, True).logits, right) and recorder.full
