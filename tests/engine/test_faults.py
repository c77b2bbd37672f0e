"""A fault stays in its row: whatever one request raises ends that request with a sentence, and its neighbours write the
same tokens as if it had never been."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from running import hosted, steps
from tokenizers import Regex, Tokenizer, decoders, models

from playground.checkpoint.tokenizer import TextStream
from playground.engine import runner as runner_module
from playground.engine import sampler
from playground.engine.client import EngineError, InlineClient, ThreadClient
from playground.engine.engine import DeviceFault, Engine
from playground.engine.events import Failure, FinishEvent, TokenEvent
from playground.engine.requests import Request
from playground.engine.settings import SamplingParams

PROMPTS = [(0, 5, 9), (0, 8), tuple(range(1, 70)), (3, 4)]
BAD_SEED = 666


def request(prompt, seed: int, tokens: int = 12, **options) -> Request:
    return Request(tuple(prompt), SamplingParams("gumbel", 1.0, seed=seed), tokens, ignore_eos=True, **options)


def run(engine: Engine, limit: int = 400) -> list:
    told = []
    while engine.busy and limit:
        limit -= 1
        told += engine.step()
    assert not engine.busy
    return told


@pytest.fixture
def model(small):
    return small()


@pytest.fixture
def expected(model):
    """What each prompt's row writes when nobody does anything wrong."""
    engine = Engine(model, None)
    rows = [engine.add([request(prompt, seed)])[0] for seed, prompt in enumerate(PROMPTS)]
    run(engine)
    return [row.new_ids for row in rows]


def check(engine: Engine, bad: Request, expected, words: str, prepare=lambda row: None) -> None:
    """One bad request among good ones: it alone ends, with a sentence, and nothing is left behind."""
    rows = [engine.add([request(prompt, seed)])[0] for seed, prompt in enumerate(PROMPTS[:2])]
    (culprit,) = engine.add([bad])
    prepare(culprit)
    rows += [engine.add([request(prompt, seed + 2)])[0] for seed, prompt in enumerate(PROMPTS[2:])]
    told = run(engine)
    (failure,) = [event for row, event in told if row is culprit and isinstance(event, Failure)]
    assert words in failure.message and "\n" not in failure.message
    assert [row.new_ids for row in rows] == expected
    assert sum(isinstance(event, FinishEvent) for _, event in told) == len(rows)
    assert engine.pool.used_pages == 0 and not engine.scheduler.running
    (again,) = engine.add([request(PROMPTS[0], 0)])
    run(engine)
    assert again.new_ids == expected[0]


class Raising:
    """In place of a row's text."""

    stopped = False

    def __init__(self, error: BaseException, at: int = 3, in_flush: bool = False):
        self.error, self.left, self.in_flush = error, at, in_flush

    def push(self, token: int) -> str:
        self.left -= 1
        if self.left <= 0 and not self.in_flush:
            raise self.error
        return ""

    def flush(self) -> str:
        if self.in_flush:
            raise self.error
        return ""


class Panic(BaseException):
    """What a Rust panic looks like from here."""


@pytest.mark.parametrize("in_flush", [False, True])
@pytest.mark.parametrize("error", [ValueError("bad bytes"), Panic("bad bytes\nat line 3"), MemoryError("bad bytes")])
def test_what_a_tokenizer_raises_ends_its_row_alone(model, expected, error, in_flush):
    def plant(row):
        row.text = Raising(error, in_flush=in_flush)

    check(Engine(model, None), request((0, 7), 9), expected, "bad bytes", plant)


def test_a_sampler_that_fails_for_one_row_ends_that_row_alone(model, expected, monkeypatch):
    of = sampler.Settings.of

    def picky(params, device):
        if any(p.seed == BAD_SEED for p in params):
            raise RuntimeError("no luck")
        return of(params, device)

    monkeypatch.setattr(sampler.Settings, "of", picky)
    check(Engine(model, None), request((0, 7), BAD_SEED), expected, "no luck")


def test_a_step_that_fails_for_one_row_ends_that_row_alone(model, expected, monkeypatch):
    """It runs for all rows together: done again row by row, the others lose nothing."""
    engine, forward = Engine(model, None), model.forward

    def picky(tokens, step, *rest):
        if step.is_decode and (step.positions == 33).any():
            raise RuntimeError("position 33")
        return forward(tokens, step, *rest)

    monkeypatch.setattr(model, "forward", picky)
    check(engine, request(range(1, 31), 9), expected, "position 33")


def test_a_prompt_whose_prefill_fails_ends_alone(model, expected, monkeypatch):
    engine = Engine(model, None)
    feed = engine.runner.prefill.feed

    def picky(tokens, *rest):
        if tokens[-1] == 77:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return feed(tokens, *rest)

    monkeypatch.setattr(engine.runner.prefill, "feed", picky)
    check(engine, request((0, 77), 9), expected, "not enough memory")


def test_a_row_whose_numbers_are_no_numbers_ends_alone(model, expected, monkeypatch):
    engine, forward = Engine(model, None), model.forward

    def poisoned(tokens, step, *rest):
        hidden = forward(tokens, step, *rest)
        if step.is_decode:
            hidden[step.positions == 33] = float("nan")
        return hidden

    monkeypatch.setattr(model, "forward", poisoned)
    check(engine, request(range(1, 31), 9), expected, "not a number")


def test_no_memory_for_a_step_of_all_rows_runs_them_one_by_one(model, expected, monkeypatch):
    forward = model.forward

    def small_steps(tokens, step, *rest):
        if step.is_decode and len(tokens) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(tokens, step, *rest)

    engine = Engine(model, None)
    monkeypatch.setattr(model, "forward", small_steps)
    rows = [engine.add([request(prompt, seed)])[0] for seed, prompt in enumerate(PROMPTS)]
    run(engine)
    assert [row.new_ids for row in rows] == expected


def test_a_fault_of_the_device_is_no_rows_fault(model, monkeypatch):
    engine = Engine(model, None)
    engine.add([request((0, 7), 9)])

    def lost(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(model, "forward", lost)
    with pytest.raises(DeviceFault, match="illegal memory access"):
        run(engine)


def test_a_thread_that_lost_its_device_tells_everybody_and_takes_no_more(model, monkeypatch):
    client = ThreadClient(hosted(Engine(model, None)))
    forward, seen = model.forward, []

    def lost(tokens, step, *rest):
        seen.append(1)
        if len(seen) > 20:
            raise RuntimeError("CUDA error: unspecified launch failure")
        return forward(tokens, step, *rest)

    monkeypatch.setattr(model, "forward", lost)
    streams = [client.generate([request(prompt, 1, 200)])[0] for prompt in PROMPTS]
    for stream in streams:
        with pytest.raises(EngineError, match="launch failure"):
            list(stream)
    with pytest.raises(EngineError, match="launch failure"):
        client.generate([request((0, 7), 1)])
    client.close()


def test_a_fault_of_the_engines_own_ends_its_rows_and_the_next_request_works(model, expected, monkeypatch):
    engine = Engine(model, None)
    client = InlineClient(hosted(engine))
    streams = [client.generate([request(prompt, 1)])[0] for prompt in PROMPTS]
    step, broken = engine.step, [True]
    monkeypatch.setattr(engine, "step", lambda: step() if not broken.pop() else 1 / 0)
    broken.append(True)
    for stream in streams:
        broken.append(False) if not broken else None
        with pytest.raises(EngineError, match="division by zero"):
            list(stream)
    monkeypatch.setattr(engine, "step", step)
    (stream,) = client.generate([request(PROMPTS[0], 0)])
    assert [event.id for event in stream if isinstance(event, TokenEvent)] == expected[0]


def byte_fallback() -> Tokenizer:
    """Tokens that are single bytes, as Llama's and Gemma's have them for what no other token says."""
    words = {"<unk>": 0, "a": 1, "▁b": 2} | {f"<0x{byte:02X}>": byte + 3 for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


class Plain:
    """As much of our tokenizer as a text under way needs."""

    def __init__(self, inner: Tokenizer):
        self.inner = inner

    def decode(self, ids: list[int]) -> str:
        return self.inner.decode(ids)


@given(st.lists(st.sampled_from([1, 2, *range(3, 259)]), min_size=1, max_size=12))
def test_bytes_that_form_no_character_end_no_text(ids):
    """They show as U+FFFD, and the text goes on: every whole character comes out once, in order."""
    tokenizer = Plain(byte_fallback())
    text = TextStream(tokenizer)
    written = "".join(map(text.push, ids)) + text.flush()
    whole = tokenizer.decode(ids)
    assert written == whole or "\ufffd" in whole
    letters = [{1: "a", 2: "b"}[token] for token in ids if token in (1, 2)]
    assert [c for c in written if c in "ab"] == letters or any(token in (0x61 + 3, 0x62 + 3) for token in ids)


def test_a_decoder_that_panics_ends_its_row_alone(model, expected):
    inner = byte_fallback()
    inner.decoder = decoders.Replace(Regex("(a+)+$"), "x")
    panicking = Plain(inner)

    def decode(*_):
        raise Panic("thread panicked at regex")

    def plant(row):
        row.text = TextStream(panicking)
        row.text.decoder = type("Stream", (), {"step": decode})()

    check(Engine(model, None), request((0, 7), 9), expected, "panicked", plant)


def test_a_runner_that_fails_once_between_steps_loses_no_token(model, expected, monkeypatch):
    engine, failed = Engine(model, None), []
    again = runner_module.Runner.again

    def once(self):
        if len(failed) < 1:
            failed.append(True)
            raise RuntimeError("hiccup")
        return again(self)

    monkeypatch.setattr(runner_module.Runner, "again", once)
    rows = [engine.add([request(prompt, seed)])[0] for seed, prompt in enumerate(PROMPTS)]
    while engine.busy:
        steps(engine)
    assert failed and [row.new_ids for row in rows] == expected
