"""The recorded example that the page begins with: whole, explained as a run is, and true of the embedded model."""

from __future__ import annotations

import numpy as np
import pytest

from playground import RequestError
from playground.engine.requests import Score
from playground.inspect.example import PROMPT, example_token, example_view, record, recorded


def test_the_recorded_probabilities_are_those_of_the_model(storyteller):
    tokens = recorded()["tokens"]
    prompt = storyteller.encode(PROMPT)
    scored = storyteller.ask(Score((*prompt, *(token["id"] for token in tokens)))).last()[len(prompt) - 1 :]
    apart = np.abs(scored - [token["logprob"] for token in tokens])
    assert np.median(apart) < 0.02 and apart.max() < 0.5  # prefill and decode round FP8 apart


def test_its_text_marks_and_tokens_belong_together():
    view, tokens = example_view(), recorded()["tokens"]
    records = [mark.split(",") for mark in view["marks"].split(";") if mark]
    assert len(records) == len(tokens) and sum(int(mark[0]) for mark in records) == len(view["text"])
    assert "recorded" in view["title"] and 0 <= view["open"] < len(tokens)
    for index, token in enumerate(tokens):
        found = example_token(index)
        assert found["recorded"] and found["index"] == index and len(found["alternatives"]) >= 10
        assert sum(row["chosen"] for row in found["alternatives"]) == 1
        best = found["why"]["rows"][0]
        assert best["chosen"] and abs(best["logprob"] + best["noise"] - best["score"]) < 1e-5, token


def test_it_has_what_a_new_recording_would_have(storyteller):
    fresh = record(storyteller)
    assert fresh.keys() == recorded().keys() and fresh["tokens"][0].keys() == recorded()["tokens"][0].keys()


@pytest.mark.parametrize("index", [-1, 10**6, True, "0", None])
def test_a_token_that_is_not_there_is_a_sentence(index):
    with pytest.raises(RequestError, match="is not there"):
        example_token(index)
