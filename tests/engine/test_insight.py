"""What events say about a draw is what the draw was made of."""

from __future__ import annotations

import math

import pytest
import torch

from kernels import SCORED, SHOWN
from playground.engine.engine import Engine
from playground.engine.events import TokenEvent
from playground.engine.insight import Insight
from playground.engine.requests import Request
from playground.engine.sampler import Needs, Settings, draw_rows, explain_rows
from playground.engine.settings import SamplingParams

SETTINGS = [
    SamplingParams("greedy"),
    SamplingParams("gumbel", 0.7),
    SamplingParams("gumbel", 1.4, top_k=30, top_p=0.9),
    SamplingParams("gumbel", 1.0, min_p=0.02),
    SamplingParams("multinomial", 1.0),
    SamplingParams("multinomial", 0.8, top_p=0.8),
]


def explain(logits: torch.Tensor, params: list[SamplingParams], position: int = 17) -> list[tuple[int, Insight]]:
    settings, at = Settings.of(params, logits.device), torch.full((len(params),), position)
    needs = Needs.of(params)
    ids, _ = draw_rows(logits, settings, at, needs)
    rows = explain_rows(logits, settings, at, ids, needs).tolist()
    return [(token, Insight(row)) for token, row in zip(ids.tolist(), rows, strict=True)]


def check_draw(params: SamplingParams, token: int, insight: Insight) -> None:
    """The numbers shown choose the token drawn, by the rule of its sampler."""
    if params.is_greedy:
        assert insight.rank == 0 and insight.raw[0][0] == token
    elif params.sampler == "gumbel":
        assert max(insight.scores, key=lambda s: s[1] + s[2])[0] == token == insight.scores[0][0]
    else:
        low, high = insight.interval
        assert low < insight.uniform <= high
        assert math.isclose(high - low, math.exp(insight.processed_logprob), rel_tol=1e-6, abs_tol=1e-12)


def test_the_shown_numbers_reproduce_the_choice_for_ten_thousand_written_tokens(small):
    engine, count = Engine(small(), None), 0
    params = {}
    for number in range(42):
        setting = SETTINGS[number % len(SETTINGS)]
        one = SamplingParams(**(vars(setting) | {"seed": number}))
        params[engine.add([Request((0, 5, number + 1), one, 240, ignore_eos=True, inspect=True)])[0]] = one
    while engine.busy:
        for row, event in engine.step():
            if isinstance(event, TokenEvent):
                check_draw(params[row], event.id, event.insight)
                assert math.isclose(event.insight.logprob, event.logprob, abs_tol=1e-3)
                count += 1
    assert count == 42 * 240


@pytest.mark.parametrize("params", SETTINGS, ids=str)
def test_probabilities_agree_with_an_independent_softmax(params):
    logits = torch.randn(1, 500, generator=torch.Generator().manual_seed(5)) * 3
    (token, insight), values = explain(logits, [params])[0], logits[0].tolist()
    top = max(values)
    total = math.fsum(math.exp(v - top) for v in values)
    raw = {i: v - top - math.log(total) for i, v in enumerate(values)}
    best = sorted(raw, key=raw.get, reverse=True)
    assert [i for i, _ in insight.raw] == best[:SHOWN]
    assert all(math.isclose(p, raw[i], abs_tol=1e-6) for i, p in insight.raw)
    assert math.isclose(insight.entropy, -math.fsum(math.exp(p) * p for p in raw.values()), abs_tol=1e-6)
    assert insight.rank == best.index(token) and math.isclose(insight.logprob, raw[token], abs_tol=1e-6)


def plain_processing(values: list[float], params: SamplingParams) -> dict[int, float]:
    """Temperature, top-k, top-p, min-p as their papers say them, one token at a time."""
    heat = [v / params.temperature for v in values]
    weights = {i: math.exp(v - max(heat)) for i, v in enumerate(heat)}
    order = sorted(weights, key=lambda i: (-weights[i], i))
    order = order[: params.top_k or None]
    kept, before, whole = [], 0.0, math.fsum(weights[i] for i in order)
    for i in order:
        if params.top_p >= 1 or before / whole < params.top_p:
            kept.append(i)
        before += weights[i]
    kept = [i for i in kept if weights[i] >= params.min_p * weights[order[0]]]
    total = math.fsum(weights[i] for i in kept)
    return {i: weights[i] / total for i in kept}


EDGES = {
    "all cut but one": ([5.0, 1.0, 0.0, -1.0], {"min_p": 1.0}),
    "top-1": ([1.0, 3.0, 2.0], {"top_k": 1}),
    "exact ties at top-k go to the lowest ids": ([2.0, 1.0, 2.0, 2.0, 0.0], {"top_k": 2}),
    "exact ties at min-p all stay": ([2.0, 2.0, 0.0], {"min_p": 1.0}),
    "one token alone reaches top-p": ([9.0, 0.0, 0.0, 0.0], {"top_p": 0.9}),
    "one token more than top-p needs": ([math.log(0.5), math.log(0.3), math.log(0.2)], {"top_p": 0.51}),
    "exactly at top-p": ([math.log(0.5), math.log(0.25), math.log(0.25)], {"top_p": 0.5}),
    "all three": ([3.0, 2.5, 2.0, 1.0, 0.5, -3.0], {"top_k": 4, "top_p": 0.85, "min_p": 0.1, "temperature": 0.7}),
}


@pytest.mark.parametrize(("values", "filters"), EDGES.values(), ids=EDGES)
def test_what_a_filter_leaves_is_what_a_plain_reference_leaves(values, filters):
    params = SamplingParams("gumbel", **({"temperature": 1.0} | filters))
    _, insight = explain(torch.tensor([values], dtype=torch.float64), [params])[0]
    expected = plain_processing(values, params)
    assert {i for i, _ in insight.processed} == set(expected) and insight.kept == len(expected)
    assert all(math.isclose(math.exp(p), expected[i], rel_tol=1e-9) for i, p in insight.processed)
    heat = [math.exp(v / params.temperature) for v in values]
    lost = math.fsum(h for i, h in enumerate(heat) if i not in expected) / math.fsum(heat)
    assert math.isclose(insight.cut, lost, abs_tol=1e-9)


def test_equal_processed_distributions_choose_the_same_token_on_shared_noise():
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(9))
    hot, same = SamplingParams("gumbel", 2.0, seed=4), SamplingParams("gumbel", 1.0, seed=4)
    for position in range(200):
        first, second = explain(torch.cat([logits * 2, logits]), [hot, same], position)
        assert first[0] == second[0]


def test_a_temperature_towards_zero_chooses_what_greedy_chooses():
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(2)) * 2
    cold, greedy = SamplingParams("gumbel", 0.01, seed=1), SamplingParams("greedy")
    gap = logits.topk(2).values.diff().abs().item()
    assert gap > 0.01 * 30  # more than noise can bridge
    for position in range(100):
        (a, _), (b, _) = explain(logits.expand(2, -1), [cold, greedy], position)
        assert a == b


def test_a_vocabulary_smaller_than_what_is_shown_leaves_the_rest_out():
    token, insight = explain(torch.tensor([[0.5, 0.1, 0.2]]), [SamplingParams("gumbel", 1.0)])[0]
    assert len(insight.raw) == len(insight.processed) == len(insight.scores) == 3 < min(SHOWN, SCORED)
    assert insight.scores[0][0] == token


def test_a_greedy_row_is_explained_alike_alone_and_beside_one_that_filters():
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(6))
    greedy, other = SamplingParams("greedy", top_k=2), SamplingParams("gumbel", 1.0, top_k=20)
    alone, beside = explain(logits, [greedy])[0][1], explain(logits.expand(2, -1), [greedy, other])[0][1]
    assert alone.kept == beside.kept == 300
    assert math.isclose(alone.processed_entropy, beside.processed_entropy, abs_tol=1e-9)
