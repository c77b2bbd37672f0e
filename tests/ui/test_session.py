"""What one page may do at a time, without a browser."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import gradio as gr
import pytest

from playground import SamplingParams, load
from playground.inspect.columns import NAMES as COLUMN
from playground.inspect.columns import PLAIN
from playground.ui.compare import CompareHandlers
from playground.ui.generate import GenerateHandlers
from playground.ui.handlers import Handlers
from playground.ui.session import Session, run_of, stop
from playground.ui.settings import DEFAULTS, NAMES


def waited_for(coroutine):
    """In a thread: where browser tests went before, a loop is running in this one."""
    with ThreadPoolExecutor(1) as aside:
        return aside.submit(asyncio.run, coroutine).result()


def writer_for(playground) -> GenerateHandlers:
    return GenerateHandlers(Handlers(SimpleNamespace(current=playground, client=playground.client)))


@pytest.fixture
def writer(storyteller):
    return writer_for(storyteller)


def settings(**changes) -> list:
    given = DEFAULTS | {"sampler": "gumbel", "temperature": 0.8, "max_new_tokens": 60, "seed": 3} | changes
    return [given[name] for name in NAMES]


def generate(writer, session, prompt="Once upon a time", **changes) -> list:
    async def collect():
        return [shown async for shown in writer.generate(None, session, prompt, *settings(**changes))]

    return waited_for(collect())


def test_of_many_clicks_at_once_one_runs():
    session, ran = Session(), []

    async def click():
        try:
            async with run_of(session):
                session.streams = [SimpleNamespace(ended=False)]
                ran.append(True)
                await asyncio.sleep(0.2)
        except gr.Error:
            ran.append(False)

    async def clicks():
        await asyncio.gather(*(click() for _ in range(8)))

    waited_for(clicks())
    assert sorted(ran) == [False] * 7 + [True] and not session.running


def test_stop_ends_a_replay_and_the_next_one_runs(writer, storyteller):
    params, book = SamplingParams("gumbel", 0.9, seed=5), writer.book
    (run,) = book.begin(storyteller, "Once upon a time", [params], 300, ignore_eos=True)
    for event in run.stream:
        run.add(event)
    receipt, session = book.receipt(storyteller, run).encode(), Session()

    async def replay_and_stop():
        replaying = asyncio.create_task(writer.replay(receipt, session))
        while not session.streams:
            await asyncio.sleep(0.01)
        stop(session)
        return await replaying

    assert waited_for(replay_and_stop())[0] == "The replay was stopped; run it again." and not session.running
    run.tokens = run.tokens[:20]
    short = book.receipt(storyteller, run).encode()
    assert waited_for(writer.replay(short, session))[0] == "Identical: all 20 tokens."


def test_a_stop_between_two_segments_of_a_replay_ends_it(writer, storyteller, monkeypatch):
    book, params = writer.book, SamplingParams("gumbel", 0.9, seed=5)
    (root,) = book.begin(storyteller, "Once upon a time", [params], 4)
    for event in root.stream:
        root.add(event)
    branch = book.branch(storyteller, root, 4, None, params, 4)
    for event in branch.stream:
        branch.add(event)
    session, resume = Session(), type(storyteller).resume

    def stopped_before_the_second(self, *args, **options):
        if session.streams:
            session.stopping = True  # as a click does whose moment falls between two streams
        return resume(self, *args, **options)

    monkeypatch.setattr(type(storyteller), "resume", stopped_before_the_second)
    receipt = book.receipt(storyteller, branch).encode()
    assert waited_for(writer.replay(receipt, session))[0] == "The replay was stopped; run it again."


def test_a_replay_that_is_refused_leaves_the_run_under_way_alone(writer):
    session, found, last = Session(), [], []

    async def write_and_replay():
        async for shown in writer.generate(None, session, "Once upon a time", *settings(past_end=True)):
            last.append(shown)
            if not found:
                found.append(await writer.replay(b"{}", session))

    waited_for(write_and_replay())
    assert "already writing" in found[0][0]
    assert last[-1][1]["finish_reason"] == "length" and last[-1][1]["new_tokens"] == 60


def test_continue_does_not_write_on_behind_an_end_of_text(writer):
    session = Session()
    for seed in range(40):
        *_, last = generate(writer, session, seed=seed, max_new_tokens=250)
        if last[1]["finish_reason"] == "eos":
            break
    assert last[1]["finish_reason"] == "eos"

    async def go_on(past_end):
        given = settings(seed=-1, max_new_tokens=5, past_end=past_end)
        return [shown async for shown in writer.go_on(None, session, *given)]

    with pytest.raises(gr.Error, match="come to its end"):
        waited_for(go_on(False))
    *_, more = waited_for(go_on(True))
    assert more[1]["new_tokens"] == 5


def test_a_comparison_says_that_it_loads_the_other_form_of_the_weights_and_does_so_once():
    given = [PLAIN | {"weights": form} for form in ("fp8", "bf16")] + [PLAIN] * 2
    values = [setting[name] for setting in given for name in COLUMN]
    with load(device="cpu") as playground:
        comparing = CompareHandlers(writer_for(playground).handlers)

        async def notes():
            shown = comparing.compare(None, Session(), "A", 3, False, 2, True, *values)
            return [fork and fork.get("note", "") async for _, fork, *_ in shown]

        for first in (True, False):
            said = waited_for(notes())
            assert (said[0] == "Loading the BF16 weights; they stay at hand.") == first
            assert not any("Loading" in (note or "") for note in said[1:])


def test_a_choice_in_the_panel_takes_effect_in_a_run_under_way_and_behind_its_end(writer):
    session = Session()

    async def write_and_choose():
        notes, strips = [], []
        async for _, stats, strip, _ in writer.generate(
            None, session, "Once upon a time", *settings(max_new_tokens=80, past_end=True)
        ):
            strips.append(strip)
            if stats["new_tokens"] >= 10 and not notes:
                _, weights, _ = await writer.handlers.choose(2, "mlp.shared_experts.down_proj", session)
                notes.append(weights["note"])
        _, _, after = await writer.handlers.choose(1, "self_attn.o_proj", session)
        return notes, strips[-1], after

    (weights,), strip, after = waited_for(write_and_choose())
    assert "512 x 256 weight" in weights and "256 values enter" in strip["note"]
    assert "values enter" in after["note"] and "Recomputed" not in after["note"]


def test_a_model_that_is_not_quantised_is_said_to_have_no_activation_scales(storyteller):
    session = Session()
    session.newest, session.projection = SimpleNamespace(tokens=[1]), ""
    view = Handlers(SimpleNamespace(current=storyteller)).activation_view(session)
    assert "This model is not quantised" in str(view) and "expert" not in str(view)


def test_what_a_visitor_wrote_stands_in_an_error_as_text(writer):
    with pytest.raises(gr.Error) as caught:
        generate(writer, Session(), logit_bias="13:-5 <img src=//example.org/x>")
    assert "Logit bias is '13:-5 \u2039img src" in caught.value.message and "<" not in caught.value.message
