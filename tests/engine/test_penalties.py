"""Penalties and biases: what transformers and OpenAI's API say they are, and the promises that every draw keeps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from families import theirs, tokens
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

import kernels
from kernels import PROMPTED, reference
from kernels.sampling import penalties
from playground import RequestError, SamplingParams
from playground.engine.batch import History
from playground.engine.engine import Engine
from playground.engine.events import TokenEvent
from playground.engine.history import Histories
from playground.engine.loading import load_model
from playground.engine.requests import Request
from playground.engine.sampler import Needs, Settings, penalised_rows
from playground.inspect.book import RunBook

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PROMPT = (0, 5, 9, 17, 33, 5)
EVERY = [  # settings that change what is drawn, with every sampler and with filters
    SamplingParams("greedy", repetition_penalty=1.3, logit_bias="7:2 9:-100"),
    SamplingParams("gumbel", 1.0, seed=3, frequency_penalty=0.7, presence_penalty=0.4),
    SamplingParams("multinomial", 0.8, seed=4, repetition_penalty=1.5, top_p=0.9),
    SamplingParams("gumbel", 1.2, seed=5, presence_penalty=-1.5, top_k=40, min_p=0.01),
    SamplingParams("multinomial", 1.0, seed=6, logit_bias="40:3.5"),
]
PLAIN = [SamplingParams("gumbel", 1.0, seed=8), SamplingParams("greedy"), SamplingParams("multinomial", 1.0, seed=9)]


def written(engine: Engine, requests: list[Request]) -> list[list[tuple[int, float]]]:
    """Ids and log-probabilities of rows that write together."""
    found = {row: [] for request in requests for row in engine.add([request])}
    while engine.busy:
        for row, event in engine.step():
            if isinstance(event, TokenEvent):
                found[row].append((event.id, event.logprob))
    return list(found.values())


def request(params: SamplingParams, prompt=PROMPT, count: int = 40, **options) -> Request:
    return Request(prompt, params, count, ignore_eos=True, **options)


def after(logits: torch.Tensor, params: SamplingParams, prompt, text) -> torch.Tensor:
    """`logits [V]` after penalties, by the engine's own way."""
    settings, needs = Settings.of([params], CPU), Needs.of([params])
    histories = Histories.of([History(tuple(prompt), tuple(text))], [params], len(logits), CPU)
    return penalised_rows(logits[None], settings, needs, histories)[0]


@pytest.mark.parametrize("penalty", [0.5, 1.1, 2.0])
def test_repetition_is_that_of_transformers_over_prompt_and_text(penalty):
    logits = torch.randn(256, generator=torch.Generator().manual_seed(1)) * 5
    prompt, text = tokens(20).tolist(), tokens(30).tolist()
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + text]), logits[None])[0]
    got = after(logits, SamplingParams("greedy", repetition_penalty=penalty), prompt, text)
    assert torch.allclose(got, expected, rtol=1e-6, atol=1e-6)


def test_frequency_presence_and_bias_are_those_of_openai_over_the_text_alone():
    logits = torch.randn(64, generator=torch.Generator().manual_seed(2))
    params = SamplingParams("greedy", frequency_penalty=0.5, presence_penalty=1.25, logit_bias="3:-4.5 60:2")
    got = after(logits, params, (1, 2, 3, 3), (2, 5, 5, 5))
    expected = logits.clone()
    for token, times in ((2, 1), (5, 3)):
        expected[token] -= 0.5 * times + 1.25
    expected[3] -= 4.5
    expected[60] += 2
    assert torch.allclose(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("vocab", [48, 1500])
def test_the_kernel_equals_its_twin_bit_by_bit(vocab):
    make = torch.Generator().manual_seed(vocab)
    logits = torch.randn(3, vocab, generator=make) * 4
    logits[1, 7] = float("-inf")
    counts = torch.randint(0, 4, (3, vocab), generator=make, dtype=torch.int32)
    counts += PROMPTED * torch.randint(0, 2, (3, vocab), generator=make, dtype=torch.int32)
    bias = torch.randn(3, vocab, generator=make) * (torch.rand(3, vocab, generator=make) > 0.9)
    settings = Settings.of([EVERY[2], EVERY[1], PLAIN[0]], CPU)
    given = (logits, counts, bias, settings.repetition, settings.frequency, settings.presence, settings.penalised)
    expected = reference.penalise(*given)
    got = penalties.penalise(*(t.to(DEVICE) for t in given)).cpu()
    assert torch.equal(got, expected) and torch.equal(got[2], logits[2]) and not torch.equal(got[0], logits[0])


def test_greedy_text_under_a_repetition_penalty_is_that_of_transformers(tmp_path):
    model, prompt = theirs("llama-3"), tokens(11)
    model.save_pretrained(tmp_path)
    ours, _ = load_model(tmp_path, CPU, form="bf16")
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.3)])
    about = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None, "logits_processor": processors}
    expected = model.generate(prompt[None], **about)[0, 11:].tolist()
    params = SamplingParams("greedy", repetition_penalty=1.3)
    (got,) = written(Engine(ours, None, prefill_chunk=4), [request(params, tuple(prompt.tolist()), 64)])
    assert [token for token, _ in got] == expected
    about.pop("logits_processor")
    assert model.generate(prompt[None], **about)[0, 11:].tolist() != expected


def test_a_row_with_penalties_writes_the_same_alone_and_among_others_who_do_not_notice(small):
    model = small()
    alone = [written(Engine(model, None), [request(params)])[0] for params in EVERY + PLAIN]
    together = written(Engine(model, None), [request(params) for params in EVERY + PLAIN])
    assert together == alone
    plain = [
        replace(p, repetition_penalty=1.0, frequency_penalty=0.0, presence_penalty=0.0, logit_bias="") for p in EVERY
    ]
    without = [written(Engine(model, None), [request(params)])[0] for params in plain]
    assert all(a != b for a, b in zip(alone, without, strict=False))


def test_rows_that_come_and_go_leave_the_others_histories_alone(small):
    model, engine = small(), Engine(small(), None)
    expected = [written(Engine(model, None), [request(params, count=30)])[0] for params in EVERY]
    rows, found = [], {}
    for params in EVERY:  # each comes three steps after the one before it
        rows += engine.add([request(params, count=30)])
        for _ in range(4):
            for row, event in engine.step():
                if isinstance(event, TokenEvent):
                    found.setdefault(row, []).append((event.id, event.logprob))
    while engine.busy:
        for row, event in engine.step():
            if isinstance(event, TokenEvent):
                found.setdefault(row, []).append((event.id, event.logprob))
    assert [found[row] for row in rows] == expected


def test_a_step_that_is_done_again_row_by_row_counts_nothing_twice(small, monkeypatch):
    model, engine = small(), Engine(small(), None)
    expected = [written(Engine(model, None), [request(params)])[0] for params in EVERY[:2]]
    start, failures = engine.runner.start, []

    def failing(batch):
        read = start(batch)
        if len(batch.rows) == 2 and len(failures) < 3:
            failures.append(batch)
            raise RuntimeError("planted")
        return read

    monkeypatch.setattr(engine.runner, "start", failing)
    assert written(engine, [request(params) for params in EVERY[:2]]) == expected and len(failures) == 3


@pytest.mark.parametrize("params", EVERY, ids=lambda p: f"{p.sampler}-{p.temperature}")
def test_what_a_branch_takes_over_counts_as_text_and_a_replay_is_identical(storyteller, params):
    from test_receipt import finished, rerun

    book = RunBook()
    whole = finished(book.begin(storyteller, "Once upon a time", [params], 24)[0])
    begun = finished(book.begin(storyteller, "Once upon a time", [params], 12)[0])
    more = finished(book.branch(storyteller, begun, 12, None, params, 12))
    assert more.ids == whole.ids
    assert rerun(book, storyteller, book.receipt(storyteller, more))["identical"]


def test_the_inspector_has_log_probabilities_before_and_after_penalties(storyteller):
    params = SamplingParams("gumbel", 0.7, seed=2, repetition_penalty=1.4, presence_penalty=0.5, top_p=0.95)
    ids, seen = storyteller.encode("Once upon a time there was a cat. The cat"), []
    draw = kernels.draw_and_normaliser

    def watched(logits, *more):
        seen.append(logits[0].clone())
        return draw(logits, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "draw_and_normaliser", watched)
        events = list(storyteller.resume(ids, [params], 8, inspect=True)[0])[:-1]
    assert len(seen) == len(events) == 8
    text: list[int] = []
    for event, logits in zip(events, seen, strict=True):
        changed = after(logits, params, ids, text).double().log_softmax(-1)
        raw = logits.double().log_softmax(-1)
        assert abs(event.insight.penalised_logprob - changed[event.id].item()) < 1e-9
        assert abs(event.insight.logprob - raw[event.id].item()) < 1e-9
        assert event.insight.processed_logprob != event.insight.penalised_logprob != event.insight.logprob
        text.append(event.id)


@pytest.mark.parametrize(
    ("given", "canonical"),
    [("", ""), ("13:-5", "13:-5"), ("13:-5, 262:2.50", "13:-5 262:2.5"), ({"7": 1, "9": -0.25}, "7:1 9:-0.25")],
)
def test_a_bias_is_spelled_in_one_way(given, canonical):
    params = SamplingParams(logit_bias=given)
    assert params.logit_bias == canonical and SamplingParams.read({"logit_bias": canonical}) == params
    assert params.is_penalised == bool(canonical)


@pytest.mark.parametrize("given", ["13", "a:1", "13:x", "13:101", "-1:2", "1:1 1:2", "1:nan", 7, None, ["1:2"],
                                   {"1": "x"}, {"1": [2]}, " ".join(f"{i}:1" for i in range(301))])  # fmt: skip
def test_what_is_no_bias_is_refused_in_a_sentence(given):
    with pytest.raises(RequestError, match=r"Logit bias is .*; write up to 300 token ids"):
        SamplingParams(logit_bias=given)


def test_a_bias_beyond_the_vocabulary_is_refused_by_its_token(storyteller):
    with pytest.raises(RequestError, match="token 4096; the vocabulary has 4096"):
        storyteller.stream("Once", SamplingParams("greedy", logit_bias="4096:1"), 4)
