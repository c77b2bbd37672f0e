"""Receipts: what replays, where a replay parts, and hostile ones."""

from __future__ import annotations

import gc
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from running import engine_of, replayed

from playground import RequestError, SamplingParams
from playground.inspect.book import RunBook
from playground.inspect.receipt import FORMAT, MOST_SEGMENTS, read_receipts
from playground.inspect.retold import Retold
from playground.inspect.tokens import explain
from playground.ui.words import in_words

PARAMS = SamplingParams("gumbel", 0.9, top_k=50, seed=5)


def rerun(book, playground, text):
    """A replay of the one receipt in a text."""
    return replayed(book, playground, read_receipts(text)[0])


@pytest.fixture(scope="module")
def book():
    return RunBook()


def finished(run):
    for event in run.stream:
        run.add(event)
    run.stats = {"finish_reason": "length"}
    return run


@pytest.fixture(scope="module")
def tree(book, storyteller):
    """A run, a branch with another token, and one that draws again from inside of that branch."""
    root = finished(book.begin(storyteller, "Once upon a time", [PARAMS], 20)[0])
    other = next(i for i, _ in root.tokens[8].insight.raw if i != root.tokens[8].id)
    branch = finished(book.branch(storyteller, root, 8, other, PARAMS, 10))
    again = finished(book.branch(storyteller, branch, 12, None, SamplingParams("multinomial", 1.1, seed=9), 10))
    return root, branch, again


def test_every_run_of_a_tree_replays_token_by_token(book, storyteller, tree):
    for run in tree:
        found = rerun(book, storyteller, book.receipt(storyteller, run))
        assert found["identical"] and found["checked"] == len(run.tokens), found


def test_a_receipt_opens_as_the_runs_that_it_was_made_of(book, storyteller, tree):
    for run in tree:
        receipt = read_receipts(book.receipt(storyteller, run))[0]
        retold = Retold(receipt, storyteller.tokenizer)
        assert replayed(book, storyteller, receipt, take=retold.take)["identical"]
        own = retold.runs[-1]
        assert (own.ids, own.text, own.params, own.prompt) == (run.ids, run.text, run.params, run.prompt)
        assert own.tokens.forced == run.tokens.forced and len(retold.runs) == len(run.lineage())
        for index in range(len(run.tokens)):  # what stood behind each, forced ones included
            assert explain(own, index) == explain(run, index)
        for mine, theirs in zip(retold.runs, run.lineage(), strict=True):
            assert (book.receipt(storyteller, mine) and mine.parent is None) or mine.at == theirs.at


def test_a_replay_goes_the_ways_of_the_run_itself(book, storyteller, tree, monkeypatch):
    """One prefill for the root, and none for what branched off from its cache."""
    engine, feeds = engine_of(storyteller), []
    feed = engine.runner.prefill.feed
    monkeypatch.setattr(engine.runner.prefill, "feed", lambda *args: feeds.append(args) or feed(*args))
    assert rerun(book, storyteller, book.receipt(storyteller, tree[2]))["identical"]
    assert len(feeds) == 1
    again = finished(book.branch(storyteller, tree[0], 0, None, SamplingParams("gumbel", 1.3, seed=77), 30))
    assert rerun(book, storyteller, book.receipt(storyteller, again))["identical"]


def test_what_a_branch_took_over_is_explained_by_the_settings_that_drew_it(book, storyteller):
    greedy = finished(book.begin(storyteller, "Once upon a time", [SamplingParams("greedy")], 10)[0])
    fifth = greedy.tokens[4].insight.raw[4][0]
    branch = finished(book.branch(storyteller, greedy, 4, fifth, PARAMS, 5))
    assert book.token(branch.id, 2)["why"]["kind"] == "greedy"
    assert book.token(branch.id, 6)["why"]["kind"] == "gumbel"
    forced = book.token(branch.id, 4)
    assert forced["forced"] and forced["rank"] == 4 and branch.marks.split(";")[4].endswith(",4,f")


def test_a_branch_that_starts_in_what_it_took_over_belongs_to_the_ancestor(book, storyteller, tree):
    root, branch, _ = tree
    sibling = finished(book.branch(storyteller, branch, 4, None, PARAMS, 6))
    taken, given = ([(*t[:3], t.insight.raw) for t in run.tokens[:4]] for run in (sibling, root))
    assert sibling.parent is root and taken == given
    assert rerun(book, storyteller, book.receipt(storyteller, sibling))["identical"]


def test_a_run_keeps_nothing_for_a_token_that_the_garbage_collector_would_look_through(tree):
    tokens = tree[0].tokens
    columns = (tokens.ids, tokens.texts, tokens.logprobs, tokens.insights)
    assert all(len(column) == 20 and not any(map(gc.is_tracked, column)) for column in columns)


def test_other_log_probabilities_or_another_text_of_the_same_tokens_are_not_called_identical(book, storyteller, tree):
    receipt = json.loads(book.receipt(storyteller, tree[0]))
    receipt["tokens"][3]["logprob"] -= 1e-6
    found = rerun(book, storyteller, json.dumps(receipt))
    assert not found["identical"] and found["but"]["what"] == "log-probability" and found["but"]["at"] == 3
    assert "same 20 tokens, but another log-probability of token 4" in in_words(found)
    receipt = json.loads(book.receipt(storyteller, tree[0])) | {"text": "Something else."}
    found = rerun(book, storyteller, json.dumps(receipt))
    assert not found["identical"] and found["but"]["what"] == "text" and "Something else." in in_words(found)


def test_a_changed_token_is_named_with_both_distributions(book, storyteller, tree):
    receipt = json.loads(book.receipt(storyteller, tree[0]))
    receipt["tokens"][5]["id"] = 7
    found = rerun(book, storyteller, json.dumps(receipt))
    assert not found["identical"] and found["at"] == found["checked"] == 5
    assert found["recorded"]["id"] == 7 and found["now"]["id"] == tree[0].tokens[5].id
    assert found["now"]["top"] == found["recorded"]["top"]


def test_a_setting_changed_in_a_receipt_shows_in_the_replay(book, storyteller, tree):
    receipt = json.loads(book.receipt(storyteller, tree[0]))
    receipt["segments"][0]["seed"] = 6
    assert not rerun(book, storyteller, json.dumps(receipt))["identical"]


def test_a_branch_that_found_no_cache_says_so_and_replays_by_a_prefill_as_well(book, storyteller, tree):
    kept = engine_of(storyteller).scheduler.kept
    kept.drop(next(row for row in kept.held if getattr(row, "id", None) == tree[0].stream.id))
    late = finished(book.branch(storyteller, tree[0], 6, None, PARAMS, 8))
    receipt = book.receipt(storyteller, late)
    assert [part["branched"] for part in json.loads(receipt)["segments"]] == [False, False]
    assert [part["branched"] for part in json.loads(book.receipt(storyteller, tree[1]))["segments"]] == [False, True]
    assert rerun(book, storyteller, receipt)["identical"]


def test_a_run_on_the_other_form_of_the_weights_replays_on_that_form(book, storyteller):
    runs = [finished(r) for r in book.begin(storyteller, "The old fox", [PARAMS] * 2, 12, ["fp8", "bf16"])]
    both = read_receipts(book.receipt(storyteller, *runs))
    assert [receipt.weights for receipt in both] == ["fp8", "bf16"]
    for receipt in both:
        streams = []
        assert replayed(book, storyteller, receipt, streams.append)["identical"]
        assert [s.form for s in streams] == [receipt.weights]


def test_branches_in_a_row_end_where_receipts_do(book, storyteller, tree):
    deep = tree[2]
    deep.depth = MOST_SEGMENTS - 1
    with pytest.raises(RequestError, match="branches in a row"):
        book.branch(storyteller, deep, len(deep.tokens), None, PARAMS, 3)


GOOD = {
    "format": FORMAT,
    "model": "m",
    "checkpoint": "c",
    "prompt_ids": [1, 2],
    "weights": "fp8",
    "segments": [
        vars(PARAMS) | {"sampler": "gumbel", "keep": 1, "forced": None, "ignore_eos": False, "branched": False}
    ],
    "tokens": [{"id": 3, "top": [[3, -0.5]]}],
}


def test_the_smallest_receipt_is_read():
    assert read_receipts(json.dumps(GOOD))[0].ids == (3,)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "other"}, "not a receipt of this program"),
        ({"prompt_ids": "12"}, "damaged"),
        ({"prompt_ids": [1.5]}, "damaged"),
        ({"prompt_ids": [True]}, "damaged"),
        ({"tokens": [{"id": -1, "top": []}]}, "damaged"),
        ({"tokens": [{"id": 3, "top": [[3, "x"]]}]}, "damaged"),
        ({"tokens": [{"id": 3, "top": [[3, 1e999]]}]}, "damaged"),
        ({"tokens": [{"id": 3, "top": [[3, 1000]]}]}, "damaged"),
        ({"segments": [GOOD["segments"][0] | {"temperature": 10**400}]}, "Temperature"),
        ({"tokens": []}, "wrote nothing"),
        ({"prompt_ids": []}, "wrote nothing"),
        ({"tokens": GOOD["tokens"] * 2}, "do not add up"),
        ({"weights": "int4"}, "neither fp8 nor bf16"),
        ({"segments": [GOOD["segments"][0] | {"branched": 1}]}, "damaged"),
        ({"segments": []}, "do not add up"),
        ({"segments": [{"keep": 1}]}, "its 'sampler' is missing"),
        ({"tokens": [{"id": 3}]}, "its 'top' is missing"),
        ({"segments": GOOD["segments"] * 101}, "branches in a row"),
        ({"segments": [GOOD["segments"][0] | {"keep": 10**12}]}, "damaged"),
        ({"segments": [GOOD["segments"][0] | {"temperature": "hot"}]}, "Temperature"),
        ({"segments": [GOOD["segments"][0] | {"seed": -1}]}, "seed is missing"),
        ({"model": "x" * 10_000}, "damaged"),
    ],
)
def test_a_damaged_receipt_is_refused_with_a_sentence(change, words):
    with pytest.raises(RequestError, match=words):
        read_receipts(json.dumps(GOOD | change))


@pytest.mark.parametrize("text", ["", "[", "[" * 100_000, "null", "[]", '{"format": 1}', None, "x" * 9_000_000])
def test_what_is_no_receipt_is_refused_with_a_sentence(text):
    with pytest.raises(RequestError):
        read_receipts(text)


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
KEYS = st.sampled_from([*GOOD, "id", "top", "keep", "seed"])
JSON = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4))


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from([n for n in GOOD if n != "format"]), JSON, max_size=4))
def test_no_receipt_raises_anything_but_a_sentence(change):
    try:
        read_receipts(json.dumps(GOOD | change))
    except RequestError as error:
        assert str(error)
