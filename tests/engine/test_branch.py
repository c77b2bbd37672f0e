"""Rows that branch off from another row's cache."""

from __future__ import annotations

import pytest
import torch

from playground.engine.engine import Engine
from playground.engine.events import TokenEvent
from playground.engine.requests import Request
from playground.engine.settings import SamplingParams

PROMPT = tuple(range(5, 75))  # more than one page
GUMBEL, PLAIN = SamplingParams("gumbel", 1.0, seed=3), SamplingParams("greedy")


def run(engine: Engine) -> list:
    events = []
    while engine.busy:
        events += engine.step()
    return events


def write(engine: Engine, prompt, limit: int, params=GUMBEL, parent=None, keep=True):
    """One row run to its end, and its log-probabilities."""
    row = engine.add([Request(tuple(prompt), params, limit, ignore_eos=True, keep=keep)], parent)[0]
    events = [e for r, e in run(engine) if r is row and isinstance(e, TokenEvent)]
    return row, [e.logprob for e in events]


@pytest.mark.parametrize("at", [1, 2, 40, 58, 59, 69])
def test_a_branch_that_takes_the_same_token_goes_on_with_the_same_bits(small, at):
    engine = Engine(small(), None)
    row, logprobs = write(engine, PROMPT, 70)
    prefills = []
    engine.runner.prefill.feed = lambda *args: prefills.append(args)
    branch, found = write(engine, PROMPT + tuple(row.new_ids[:at]), 70 - at, parent=row)
    assert branch.new_ids == row.new_ids[at:] and found == logprobs[at:] and not prefills


def test_a_branch_equals_the_run_with_that_one_token_forced(small):
    model, at, other = small(), 12, 77
    engine = Engine(model, None)
    row, _ = write(engine, PROMPT, 30)
    assert row.new_ids[at] != other
    branch, found = write(engine, (*PROMPT, *row.new_ids[:at], other), 30 - at - 1, parent=row)

    logits, count = model.logits, iter(range(30))

    def forcing(hidden):
        scores = logits(hidden)
        if next(count) == at:
            scores = torch.full_like(scores, -1e30)
            scores[:, other] = 0.0
        return scores

    model.logits = forcing
    forced, logprobs = write(Engine(model, None), PROMPT, 30)
    assert forced.new_ids[: at + 1] == [*row.new_ids[:at], other]
    assert branch.new_ids == forced.new_ids[at + 1 :] and found == logprobs[at + 1 :]


def test_a_branch_leaves_its_parent_as_it_is_and_both_can_branch_again(small):
    engine = Engine(small(), None)
    row, logprobs = write(engine, PROMPT, 40)
    write(engine, (*PROMPT, *row.new_ids[:5], 9), 40, parent=row)
    again, found = write(engine, PROMPT + tuple(row.new_ids[:5]), 35, parent=row)
    assert again.new_ids == row.new_ids[5:] and found == logprobs[5:]
    third, found = write(engine, PROMPT + tuple(row.new_ids[:20]), 20, parent=again)
    assert third.new_ids == row.new_ids[20:] and found == logprobs[20:]


def test_a_running_row_can_be_branched_from(small):
    engine = Engine(small(), None)
    row = engine.add([Request(PROMPT, GUMBEL, 40, ignore_eos=True)])[0]
    while len(row.new_ids) < 10:
        engine.step()
    branch = engine.add([Request(PROMPT + tuple(row.new_ids[:6]), GUMBEL, 34, ignore_eos=True)], row)[0]
    run(engine)
    assert branch.new_ids == row.new_ids[6:]


def test_kept_pages_give_way_when_others_need_them_and_the_branch_is_prefilled_instead(small):
    engine = Engine(small(), None, 2, cache_tokens=4 * 64, context=192)
    row, _ = write(engine, PROMPT, 20)
    kept = engine.pool.used_pages
    assert kept == 2 and row.pages
    write(engine, PROMPT, 100, keep=False)  # three pages, and three were free with the two kept ones: one row yields
    assert not row.pages and engine.pool.used_pages == 0
    branch, _ = write(engine, PROMPT + tuple(row.new_ids[:5]), 5, parent=row, keep=False)
    assert len(branch.new_ids) == 5


def test_a_parent_with_another_text_is_not_used(small):
    engine = Engine(small(), None)
    row, _ = write(engine, PROMPT, 10)
    other = (*PROMPT[:-1], 99, 98)
    alone, logprobs = write(Engine(small(), None), other, 10)
    branch, found = write(engine, other, 10, parent=row)
    assert branch.new_ids == alone.new_ids and found == logprobs


def test_rows_that_keep_nothing_and_rows_that_failed_leave_every_page_free(small):
    engine = Engine(small(), None)
    write(engine, PROMPT, 10, keep=False)
    row = engine.add([Request(PROMPT, GUMBEL, 30, keep=True)])[0]
    for _ in range(4):
        engine.step()
    engine.cancel(row, keep=False)
    assert engine.pool.used_pages == 0 and not engine.scheduler.kept.held


def test_against_a_fresh_prefill_a_branch_agrees_within_the_tolerance_of_the_format(small):
    model = small(fp8=False)
    engine = Engine(model, None)
    row, _ = write(engine, PROMPT, 20)
    prompt = PROMPT + tuple(row.new_ids[:8])
    _, branch = write(engine, prompt, 8, PLAIN, parent=row)
    _, fresh = write(Engine(model, None), prompt, 8, PLAIN)
    assert torch.allclose(torch.tensor(branch), torch.tensor(fresh), atol=1e-3)


def test_a_group_that_branches_from_a_prompt_of_whole_pages_takes_the_pages_that_it_reckoned_with(small):
    engine = Engine(small(), None, 3, cache_tokens=5 * 64, context=192)
    prompt = tuple(range(5, 69))  # one page exactly
    row, _ = write(engine, prompt, 3)
    group = engine.add([Request(prompt, GUMBEL, 60, ignore_eos=True) for _ in range(2)], row)
    run(engine)
    assert [len(one.new_ids) for one in group] == [60, 60]
    assert engine.pool.used_pages == len(row.pages)


def test_kept_pages_stay_where_their_loss_would_not_make_room(small):
    engine = Engine(small(), None, 2, cache_tokens=5 * 64, context=192)
    kept, _ = write(engine, PROMPT, 20)  # two pages
    running = engine.add([Request(PROMPT, GUMBEL, 100, ignore_eos=True)])[0]  # three
    engine.step()
    waiting = engine.add([Request(PROMPT, GUMBEL, 100, ignore_eos=True)])[0]
    while not running.finished:
        engine.step()
        assert kept.pages or running.finished
    run(engine)
    assert len(waiting.new_ids) == 100


def test_logits_after_a_prompt_are_those_that_its_row_draws_from(small):
    engine = Engine(small(), None, prefill_chunk=32)
    row, logprobs = write(engine, PROMPT, 1, PLAIN, keep=False)
    *_, fed = engine.feed_alone(PROMPT)
    logits = fed.logits[0]
    assert logits.argmax() == row.new_ids[0] and logits.log_softmax(-1).max().item() == pytest.approx(
        logprobs[0], abs=1e-6
    )
    assert engine.pool.used_pages == 0
