import time
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from running import hosted, steps

from playground import FinishEvent, RequestError, SamplingParams, TokenEvent, generate
from playground.engine.client import EngineError, ThreadClient
from playground.engine.engine import Engine
from playground.engine.requests import Request

PROMPT = (0, 5, 9, 17, 33)
GUMBEL = SamplingParams("gumbel", 1.0, seed=11)


def request(params=GUMBEL, prompt=PROMPT, tokens=20, **options) -> Request:
    return Request(prompt, params, tokens, **({"ignore_eos": True} | options))


def drain(engine: Engine) -> None:
    while engine.busy:
        engine.step()


def alone(model, one: Request) -> list[int]:
    engine = Engine(model, None)
    (row,) = engine.add([one])
    drain(engine)
    return row.new_ids


def test_a_seed_replays_its_row_exactly_alone_in_a_batch_and_as_a_fork(small):
    model, engine = small(), Engine(small(), None)
    requests = [
        request(),
        request(SamplingParams("multinomial", 0.7, top_p=0.9, seed=3), (0, 8), 33),
        request(SamplingParams("greedy"), tuple(range(1, 70)), 15),
        request(SamplingParams("gumbel", 1.3, top_k=9, min_p=0.01, seed=11), (0, 8), 27),
    ]
    rows = [engine.add([r])[0] for r in requests]
    fork = engine.add([replace(requests[0], params=SamplingParams("greedy")), requests[0]])
    drain(engine)
    for row, one in zip(rows, requests, strict=True):
        assert row.new_ids == alone(model, one)
    assert fork[1].new_ids == rows[0].new_ids


def test_a_long_prompt_arrives_in_pieces_between_which_running_rows_write_on(small):
    model = small()
    engine = Engine(model, None, prefill_chunk=16)
    running = engine.add([request(tokens=30)])[0]
    engine.step()
    long = request(replace(GUMBEL, seed=4), tuple(range(1, 101)), 10)
    late = engine.add([long])[0]
    written = []
    while not late.new_ids:
        engine.step()
        written.append(len(running.new_ids))
    steps = [b - a for a, b in pairwise(written)]
    assert written[-1] >= 100 // 16 and not any(a == b == 0 for a, b in pairwise(steps))
    drain(engine)
    quiet = Engine(model, None, prefill_chunk=16)
    expected = [quiet.add([one])[0] for one in (request(tokens=30), long)]
    while quiet.busy:
        quiet.step()
    assert [running.new_ids, late.new_ids] == [row.new_ids for row in expected]


def test_a_fork_outlives_the_row_it_came_with_when_that_is_cancelled_between_pieces(small):
    engine = Engine(small(), None, prefill_chunk=16)
    prompt = tuple(range(1, 71))
    group = engine.add([request(replace(GUMBEL, seed=s), prompt, tokens) for s, tokens in ((1, 20), (2, 9), (3, 5))])
    engine.step()
    engine.cancel(group[0])
    engine.step()
    engine.cancel(group[2])
    drain(engine)
    whole = Engine(small(), None, prefill_chunk=16)
    (expected,) = whole.add([request(replace(GUMBEL, seed=2), prompt, 9)])
    drain(whole)
    assert group[1].new_ids == expected.new_ids and group[0].new_ids == []
    assert engine.pool.used_pages == 0 and len(set(engine.pool.free)) == len(engine.pool.holders)
    cancelled = engine.add([request(prompt=prompt)])[0]
    engine.step()
    engine.cancel(cancelled)
    assert engine.pool.used_pages == 0 and not engine.busy


@pytest.mark.parametrize("failing", ["forward", "logits"])
def test_a_prefill_that_fails_gives_every_page_back_once_and_the_next_request_works(small, failing):
    model = small()
    engine = Engine(model, None, prefill_chunk=16)

    def fail(*_):
        raise RuntimeError("out of something")

    group = engine.add([request(replace(GUMBEL, seed=s), tuple(range(1, 71)), 9) for s in (1, 2)])
    engine.step()
    setattr(model, failing, fail)
    told = [event for _ in range(9) for _, event in engine.step()]
    assert len(told) == 2 and all("failed: out of something" in event.message for event in told)
    delattr(model, failing)
    assert all(row.finished for row in group) and not engine.busy
    assert sorted(engine.pool.free) == list(range(len(engine.pool.holders))) and set(engine.pool.holders) == {0}
    (row,) = engine.add([request()])
    drain(engine)
    assert row.new_ids == alone(model, request())


def test_scales_of_a_prompts_last_token_are_the_same_fed_whole_and_in_pieces(small):
    seen = []
    for chunk in (128, 48):
        engine = Engine(small(), None, prefill_chunk=chunk)
        (row,) = engine.add([request(prompt=tuple(range(1, 101)), tokens=2, trace_scales=True)])
        while not steps(engine):
            pass
        step, place = engine.scales.find(row.id, 0)
        seen.append({name: step.read(place, name) for name in step.layout.places})
    assert any("kv_b_proj" in name for name in seen[0])
    for name, scales in seen[0].items():
        assert scales is None or seen[1][name] == pytest.approx(scales, rel=0.05), name


def test_a_prompt_is_prefilled_once_for_all_its_forks_and_full_pages_are_shared(small):
    model, lengths = small(), []
    forward = model.forward
    model.forward = lambda tokens, *rest: lengths.append(len(tokens)) or forward(tokens, *rest)
    engine = Engine(model, None)
    prompt = tuple(range(1, 101))  # one full page of 64 and a part of the next
    rows = engine.add([request(replace(GUMBEL, seed=s), prompt, 5) for s in range(3)])
    engine.step()
    assert lengths == [100] and len({row.pages[0] for row in rows}) == 1 and len({row.pages[1] for row in rows}) == 3
    assert engine.pool.used_pages == 4
    drain(engine)
    assert lengths == [100, 3, 3, 3, 3] and engine.pool.used_pages == 0


def test_cancel_frees_the_row_and_its_cache_at_once_and_leaves_its_neighbours(small):
    model = small()
    engine = Engine(model, None)
    first, second = (engine.add([request(tokens=40)])[0] for _ in range(2))
    for _ in range(6):
        engine.step()
    used = engine.pool.used_pages
    ((row, event),) = engine.cancel(first)
    assert row is first and event.stats.finish_reason == "cancelled" and engine.pool.used_pages < used
    drain(engine)
    assert second.new_ids == alone(model, request(tokens=40)) and engine.pool.used_pages == 0
    assert engine.cancel(first) == []


def test_rows_wait_for_room_and_all_of_them_finish(small):
    engine = Engine(small(), None, max_rows=2, cache_tokens=256)
    rows = [engine.add([request(replace(GUMBEL, seed=s), tokens=70)])[0] for s in range(5)]
    widest = 0
    while engine.busy:
        engine.step()
        widest = max(widest, len(engine.scheduler.running))
    assert widest == 2 and all(len(row.new_ids) == 70 for row in rows) and engine.pool.used_pages == 0


def test_a_row_ends_at_eos_at_its_limit_and_at_the_context(small):
    model = small()
    text = alone(model, request(tokens=60))
    model.config = replace(model.config, eos_token_ids=(text[7],))
    first = text.index(text[7]) + 1
    assert len(alone(model, request(tokens=60, ignore_eos=False))) == first
    assert len(alone(model, request(tokens=3))) == 3
    long = tuple(1 for _ in range(250))
    assert len(alone(model, request(prompt=long, tokens=100))) == 256 - 250


def test_generate_batches_ragged_prompts_and_stops_each_row_at_eos(storyteller):
    prompts = [[0, 4], [0, 9, 3, 7, 8, 1], list(range(1, 90))]
    out = generate(storyteller, prompts, 12, temperature=0.0)
    assert [len(ids) for ids in out] == [12, 12, 12]
    for prompt, ids in zip(prompts, out, strict=True):
        (alone_,) = storyteller.resume(prompt, [SamplingParams("greedy")], 12, ignore_eos=True)
        assert ids == [event.id for event in alone_ if isinstance(event, TokenEvent)]
    stopped = generate(storyteller, prompts, 12, out[0][4], temperature=0.0)
    assert stopped[0] == out[0][: out[0].index(out[0][4])]


def test_generate_cuts_what_does_not_fit_and_refuses_a_prompt_that_does_not(storyteller):
    assert generate(storyteller, [[0, 4]], 0) == [[]] and generate(storyteller, [], 5) == []
    assert [len(ids) for ids in generate(storyteller, [[5] * 2046], 10**6)] == [2]
    assert generate(storyteller, [[5] * 2048], 3) == [[]]
    with pytest.raises(RequestError, match=r"3000 tokens .* 2048"):
        generate(storyteller, [[1] * 3000], 1)
    with pytest.raises(RequestError, match="empty"):
        generate(storyteller, [[1], []], 1)


def test_decode_work_per_token_does_not_grow_with_what_was_written(small):
    model, seen = small(), []
    forward = model.forward
    model.forward = lambda tokens, *rest: seen.append(len(tokens)) or forward(tokens, *rest)
    alone(model, request(tokens=200))
    assert seen == [len(PROMPT)] + [1] * 199


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"sampler": "beam"}, "choose greedy, multinomial or gumbel"),
        ({"temperature": -1}, "from 0.01 to 10"),
        ({"temperature": float("nan")}, "from 0.01 to 10"),
        ({"temperature": 1e9}, "from 0.01 to 10"),
        ({"temperature": 1e-9}, "from 0.01 to 10"),
        ({"temperature": "hot"}, "from 0.01 to 10"),
        ({"top_p": 0}, "above 0"),
        ({"top_p": 1.1}, "above 0"),
        ({"min_p": -0.1}, "from 0"),
        ({"top_k": -1}, "whole number"),
        ({"top_k": 2.5}, "whole number"),
        ({"seed": -2}, "or -1 to draw one"),
        ({"seed": 2**53}, "or -1 to draw one"),
        ({"seed": True}, "or -1 to draw one"),
    ],
)
def test_sampling_parameters_out_of_range_are_told_what_to_do(values, words):
    with pytest.raises(RequestError, match=words):
        SamplingParams(**values)


@pytest.mark.parametrize(
    ("one", "words"),
    [
        (lambda: request(prompt=()), "prompt is empty"),
        (lambda: request(prompt=(1,) * 256), "256 tokens and the context holds 256"),
        (lambda: request(tokens=0), "from 1 to 256"),
        (lambda: request(tokens=10**9), "from 1 to 256"),
        (lambda: request(prompt=(999,)), "outside the vocabulary"),
        (lambda: request(stop=("",)), "stop strings"),
    ],
)
def test_a_request_out_of_range_is_told_what_to_do_and_the_next_one_runs(small, one, words):
    engine = Engine(small(), None)
    with pytest.raises(RequestError, match=words):
        engine.add([one()])
    assert not engine.busy
    engine.add([request(tokens=2)])
    drain(engine)


def test_a_step_that_fails_ends_its_rows_with_a_sentence_and_the_next_request_works(small):
    engine = Engine(small(), None)
    client = ThreadClient(hosted(engine))
    broken, forward = [True], engine.model.forward

    def fail_once(*args):
        if broken:
            raise RuntimeError("out of memory")
        return forward(*args)

    engine.model.forward = fail_once
    (stream,) = client.generate([request()])
    with pytest.raises(EngineError, match=r"failed: out of memory.*starts afresh"):
        list(stream)
    broken.clear()
    (stream,) = client.generate([request(tokens=4)])
    assert len(list(stream)) == 5 and engine.pool.used_pages == 0
    client.close()


def test_closing_a_stream_frees_its_row_while_another_goes_on(small):
    engine = Engine(small(), None)
    client = ThreadClient(hosted(engine))
    (kept,), (left,) = client.generate([request(tokens=60)]), client.generate([request(tokens=200)])
    assert isinstance(left.get(), TokenEvent)
    left.close()
    events = list(kept)
    assert isinstance(events[-1], FinishEvent) and len(events) == 61
    deadline = time.monotonic() + 5
    while engine.busy and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not engine.busy and engine.pool.used_pages == 0
    client.close()


def test_traced_scales_are_those_of_the_row_and_leave_its_text_alone(small):
    model, watched = small(), "layers.0.self_attn.o_proj"
    engine = Engine(model, None)
    traced = [request(replace(GUMBEL, seed=s), tokens=6, trace_scales=s != 2, watch=watched) for s in range(3)]
    rows = [engine.add([one])[0] for one in traced]
    shown = {row: [] for row in rows}
    while engine.busy:
        for row, event in steps(engine):
            if isinstance(event, TokenEvent):
                shown[row].append(event.scales)
    assert shown[rows[2]] == [None] * 6 and engine.scales.find(rows[2].id, 0) is None
    assert rows[0].new_ids == alone(model, request(replace(GUMBEL, seed=0), tokens=6))
    last = scales_of(engine, rows[1], 5)
    assert last[watched].tolist() == shown[rows[1]][5].tolist() and last[watched][0] > 0
    experts = {
        name.split(".")[4]
        for name in last
        if ".experts." in name and name.endswith("down_proj") and "shared" not in name
    }
    assert len(experts) == model.config.moe.num_experts_per_tok
    # who chose no expert shows none of its scales, and a shared one shows what enters it once
    assert experts == {name.split(".")[4] for name in last if ".experts." in name and name.endswith("gate_proj")}
    shared = next(name for name in last if name.endswith("shared_experts.gate_proj"))
    assert len(last[shared]) == model.config.hidden_size // 128
    other = Engine(model, None)
    (row,) = other.add([request(replace(GUMBEL, seed=1), tokens=6, trace_scales=True)])
    drain(other)
    for index in range(6):
        found, expected = scales_of(other, row, index), scales_of(engine, rows[1], index)
        assert {n: s.tolist() for n, s in found.items()} == {n: s.tolist() for n, s in expected.items()}


def scales_of(engine: Engine, row, index: int) -> dict:
    """Those of every projection that the token met."""
    step, place = engine.scales.find(row.id, index)
    read = {name: step.read(place, name) for name in step.layout.places}
    return {name: scales for name, scales in read.items() if scales is not None}


def test_the_cache_makes_no_difference_to_greedy_text(small):
    """Cache off: the whole sequence is prefilled again for every token."""
    from playground.model.step import Step

    model = small(fp8=False)  # unquantised, prefill and decode compute the same function
    ids = list(PROMPT)
    with torch.inference_mode():
        for _ in range(25):
            hidden = model(torch.tensor(ids), Step(torch.arange(len(ids)), slots=None))
            ids.append(model.logits(hidden[-1:]).argmax().item())
    assert ids[len(PROMPT) :] == alone(model, request(SamplingParams("greedy"), tokens=25))
