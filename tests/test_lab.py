"""The Lab's numbers are those of the whole vocabulary, and its draws the model's own."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import special

from playground import RequestError, SamplingParams
from playground.engine.experiments import count_draws
from playground.engine.requests import Draws, Logits, Noise, Shape
from playground.inspect.lab import SHOWN, Distribution, counted, draw_in_steps, entropy, temperature_table

PROMPT = "Once upon a time there was a"


@pytest.fixture(scope="module")
def distribution(storyteller):
    ids = storyteller.encode(PROMPT)
    return Distribution(ids, storyteller.ask(Logits(ids)).last(), storyteller.tokenizer.spelled)


def shaped(storyteller, d: Distribution, **settings) -> np.ndarray:
    return storyteller.ask(Shape(d.logits, SamplingParams(**settings), d.prompt)).last()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_probabilities_and_entropies_are_a_softmax_of_the_whole_vocabulary(storyteller, distribution, temperature):
    d, after = distribution, shaped(storyteller, distribution, temperature=temperature)
    raw = special.softmax(d.logits.astype(np.float64))
    warm = special.softmax(d.logits.astype(np.float64) / temperature)
    assert len(after) == 4096 and np.abs(d.probabilities - raw).max() < 1e-12 and np.abs(after - warm).max() < 1e-9
    assert abs(entropy(after) - float(special.entr(warm).sum())) < 1e-6
    table = temperature_table(d, after)
    best = np.argsort(-raw)[:SHOWN]
    for column, exact in enumerate((raw, warm)):
        values = [row["values"][column] for row in table["rows"]]
        assert np.abs(np.array(values[:-1]) - exact[best]).max() < 1e-6 and abs(sum(values) - 1) < 1e-9
    assert table["rows"][-1]["label"] == "others" and "4,096 of 4,096 tokens stay" in table["note"]


def test_filters_and_penalties_change_it_as_they_change_a_run(storyteller, distribution):
    d = distribution
    kept = shaped(storyteller, d, top_k=5, temperature=0.7)
    assert (kept > 0).sum() == 5 and abs(kept.sum() - 1) < 1e-9
    seen, logits = torch.tensor(d.prompt), torch.from_numpy(d.logits.astype(np.float64))
    logits[seen] = torch.where(logits[seen] > 0, logits[seen] / 1.5, logits[seen] * 1.5)
    penalised = shaped(storyteller, d, repetition_penalty=1.5)
    assert np.abs(penalised - special.softmax(logits.numpy())).max() < 1e-6
    assert shaped(storyteller, d, sampler="greedy").tolist() == np.eye(1, 4096, d.shown[0])[0].tolist()


@pytest.mark.parametrize("seed", range(20))
def test_draws_follow_the_probabilities_of_all_tokens(storyteller, distribution, seed):
    d, params = distribution, SamplingParams("gumbel", 0.9, seed=seed)
    *_, found = count_draws(Draws(d.logits, params, 2000, d.shown, d.prompt))
    assert found.counts.shape == (3, SHOWN + 1) and (found.counts.sum(1) == 2000).all()
    assert np.abs(found.expected.sum() - 1) < 1e-9
    assert all(test.p > 0.001 and test.freedom > 3 for test in found.tests[1:])
    assert found.tests[0].p < 1e-9  # greedy is no draw from it
    table = counted(d, found)
    assert len(table["rows"]) == SHOWN + 1 and "p: how often" in table["note"]


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("settings", [{}, {"top_p": 0.9}, {"repetition_penalty": 1.3, "temperature": 1.4}], ids=str)
def test_the_first_draw_taken_apart_is_the_token_that_a_run_writes(storyteller, distribution, seed, settings):
    d, params = distribution, replace(SamplingParams("gumbel", 0.8, seed=seed), **settings)
    after = storyteller.ask(Shape(d.logits, params, d.prompt)).last()
    noise = storyteller.ask(Noise(seed, len(d.prompt), len(d.logits))).last()
    table = draw_in_steps(d, after, noise, seed, len(d.prompt))
    event = next(iter(storyteller.stream(PROMPT, params, 1)))
    assert [row["label"] for row in table["rows"] if row["chosen"]] == [storyteller.tokenizer.spelled(event.id)]
    ratios, scores = ([row["values"][i] for row in table["rows"]] for i in (2, 3))
    assert ratios == sorted(ratios, reverse=True) and scores == sorted(scores, reverse=True)
    assert all(
        math.isclose(math.log(ratio), score, rel_tol=1e-9, abs_tol=1e-9)
        for ratio, score in zip(ratios, scores, strict=True)
    )


def test_greedy_is_refused_where_there_is_nothing_to_draw(distribution):
    d = distribution
    with pytest.raises(RequestError, match="Greedy always draws the same"):
        next(count_draws(Draws(d.logits, SamplingParams("greedy"), 10, d.shown)))
