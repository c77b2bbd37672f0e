"""The page's named endpoint, used by gradio's own client as a program would."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from itertools import pairwise

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError

from playground.engine.settings import in_order

GOOD = {
    "prompt": "Once upon a time",
    "sampler": "gumbel",
    "temperature": 0.8,
    "max_new_tokens": 12,
    "seed": 7,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
}


@pytest.fixture(scope="module")
def client(server):
    return Client(server, verbose=False)


def test_generate_has_the_documented_parameters_and_no_other_endpoint_shows(client):
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert sorted(endpoints) == [
        "/chat",
        "/compare",
        "/draws",
        "/generate",
        "/inspect",
        "/receipt",
        "/replay",
        "/status",
    ]
    assert [p["parameter_name"] for p in endpoints["/generate"]["parameters"]][: len(GOOD)] == list(GOOD)
    returned = {name: [r["label"] for r in endpoint["returns"]] for name, endpoint in endpoints.items()}
    assert returned["/generate"] == ["text", "figures", "scales"]
    assert returned["/compare"] == ["texts", "figures", "fork"]
    assert not [label for labels in returned.values() for label in labels if label[0].isdigit()], "a number for a name"


def test_generate_streams_and_replays_by_seed_what_the_library_writes(client, storyteller):
    from playground import SamplingParams

    job = client.submit(api_name="/generate", **GOOD)
    text, stats, _ = job.result(timeout=60)
    pieces = [o[0] for o in job.outputs()]
    assert len(pieces) > 2 and all(b.startswith(a) for a, b in pairwise(pieces))
    assert stats["new_tokens"] == 12 and stats["finish_reason"] == "length" and stats["seed"] == 7
    params = SamplingParams("gumbel", 0.8, seed=7)
    assert text == "".join(e.text for e in storyteller.stream(GOOD["prompt"], params, 12))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": None}, "prompt is empty"),
        ({"prompt": "word " * 3000}, "3003 tokens and the context holds 2048"),
        ({"prompt": "a" * 1_000_000}, "1000000 characters"),
        ({"sampler": "beam"}, "choose greedy, multinomial or gumbel"),
        ({"temperature": -1}, "from 0.01 to 10"),
        ({"temperature": "NaN"}, "from 0.01 to 10"),
        ({"temperature": 1e9}, "from 0.01 to 10"),
        ({"max_new_tokens": 0}, "from 1 to 2048"),
        ({"max_new_tokens": 10**9}, "from 1 to 2048"),
        ({"seed": -5}, "-1 to draw one"),
        ({"seed": 2**63}, "-1 to draw one"),
        ({"seed": 1.5}, "whole number"),
        ({"top_p": 0}, "above 0"),
        ({"top_k": -3}, "whole number"),
        ({"min_p": 2}, "from 0"),
    ],
)
def test_bad_input_is_answered_with_a_sentence_and_the_next_request_works(client, change, words):
    with pytest.raises(AppError, match=words):
        client.predict(api_name="/generate", **(GOOD | change))
    assert client.predict(api_name="/generate", **(GOOD | {"max_new_tokens": 1}))[1]["new_tokens"] == 1


def test_lone_surrogates_in_a_raw_request_are_answered_with_a_sentence(server):
    """No client library sends these; a hostile one can, as a JSON escape."""
    data = ["PROMPT", *in_order(sampler="greedy", max_new_tokens=2)]
    body = json.dumps({"data": data}).replace("PROMPT", "Once \\ud800 upon").encode()
    call = urllib.request.Request(f"{server}/gradio_api/call/generate", body, {"Content-Type": "application/json"})
    try:
        event = json.load(urllib.request.urlopen(call, timeout=20))["event_id"]
        answer = urllib.request.urlopen(f"{server}/gradio_api/call/generate/{event}", timeout=20).read().decode()
    except urllib.error.HTTPError as error:
        assert 400 <= error.code < 500
    else:
        assert "surrogate" in answer


def test_control_characters_are_text_like_any_other(client):
    _, stats, _ = client.predict(api_name="/generate", **(GOOD | {"prompt": "Once\x00\x07\x1b[31m <script>"}))
    assert stats["new_tokens"] == 12


def test_streaming_keeps_up_with_the_engine_for_400_tokens(client):
    """The client sees the last token within 5% of the time that the engine took, its own figures say."""
    began = time.perf_counter()
    job = client.submit(api_name="/generate", **(GOOD | {"max_new_tokens": 400}), past_end=True)
    _, stats, _ = job.result(timeout=200)
    wall = time.perf_counter() - began
    engine = stats["ttft"] + (stats["new_tokens"] - 1) / stats["decode_rate"]
    assert stats["new_tokens"] == 400
    print(f"\n400 tokens: engine {engine:.2f} s, client {wall:.2f} s, {stats['decode_rate']:.1f} tokens/s")
    assert wall <= engine * 1.05 + 0.3  # 0.3 s: connecting and the request itself


def test_inspect_explains_every_token_of_a_run_in_the_numbers_that_chose_it(client):
    _, stats, _ = client.predict(api_name="/generate", **GOOD)
    tokens = client.predict(run=stats["run"], token=-1, api_name="/inspect")
    assert len(tokens) == 12
    for token in tokens:
        rows = token["why"]["rows"]
        assert max(rows, key=lambda row: row["logprob"] + row["noise"])["id"] == token["id"]
        assert sum(row["raw"] for row in token["alternatives"]) + token["others"]["raw"] == pytest.approx(1)
    assert client.predict(run=stats["run"], token=3, api_name="/inspect") == [tokens[3]]


@pytest.mark.parametrize(("run", "token"), [("nobody's", 0), ("", -1)])
def test_a_run_that_is_not_known_is_answered_with_a_sentence(client, run, token):
    with pytest.raises(AppError, match="no longer kept"):
        client.predict(run=run, token=token, api_name="/inspect")


def test_a_column_of_a_comparison_is_the_same_alone_and_in_another_order(client):
    settings = [
        {"sampler": "gumbel", "temperature": 1.2, "seed": 5},
        {"sampler": "multinomial", "temperature": 0.7, "top_p": 0.9, "seed": 6},
        {"sampler": "greedy"},
    ]
    texts, _, fork = client.predict("Once upon a time", settings, 20, False, api_name="/compare")
    turned, _, _ = client.predict("Once upon a time", settings[::-1], 20, False, api_name="/compare")
    assert turned == texts[::-1]
    assert len(fork["columns"]) == 3 and len({column["text"] for column in fork["columns"]}) > 1
    for setting, text in zip(settings, texts, strict=True):
        one = GOOD | {"temperature": 1.0, "max_new_tokens": 20} | setting
        assert client.predict(api_name="/generate", **one)[0] == text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ([{}], "2 to 4 settings"),
        ([{}] * 5, "2 to 4 settings"),
        ([{"heat": 3}, {}], "no 'heat'"),
        ([{"temperature": 99}, {}], "from 0.01 to 10"),
        ([{"seed": 1.5}, {}], "whole number"),
    ],
)
def test_a_comparison_that_can_not_be_made_is_answered_with_a_sentence(client, settings, words):
    with pytest.raises(AppError, match=words):
        client.predict("Once", settings, 5, api_name="/compare")


def test_draws_agree_with_the_softmax(client):
    table = client.predict("Once upon a time", 20000, 1.0, 3, api_name="/draws")
    assert table["done"] is None and not table["stale"]
    for row in table["rows"]:
        softmax, _, multinomial, gumbel = row["values"]
        assert abs(multinomial - softmax) < 0.02 and abs(gumbel - softmax) < 0.02
    with pytest.raises(AppError, match="1 to 1000000"):
        client.predict("Once", 10**7, api_name="/draws")


def test_a_receipt_replays_identically(client):
    _, stats, _ = client.predict(api_name="/generate", **GOOD)
    receipt = client.predict(run=stats["run"], api_name="/receipt")
    found = client.predict(receipt=receipt, api_name="/replay")
    assert found["identical"] and found["checked"] == 12 and found["same_checkpoint"]


def test_special_tokens_of_a_prompt_are_parsed_where_that_is_asked_for_and_a_receipt_keeps_them(client):
    prompt = {"prompt": "The end.<|endoftext|>Once upon"}
    receipts = []
    for parse in (False, True):
        _, stats, _ = client.predict(api_name="/generate", **(GOOD | prompt), parse_special=parse)
        receipts.append(client.predict(run=stats["run"], api_name="/receipt"))
        assert client.predict(receipt=receipts[-1], api_name="/replay")["identical"]
    plain, parsed = (json.loads(receipt)["prompt_ids"] for receipt in receipts)
    assert len(parsed) < len(plain) and parsed.count(0) == plain.count(0) + 1


def test_penalties_work_over_http_and_show_in_the_inspector(client):
    penalties = {"repetition_penalty": 1.4, "presence_penalty": 0.5, "logit_bias": "13:-5"}
    _, stats, _ = client.predict(api_name="/generate", **GOOD, **penalties)
    token = client.predict(run=stats["run"], token=5, api_name="/inspect")[0]
    assert 0 < token["after_penalties"] < 1 and token["settings"]["logit_bias"] == "13:-5"
    with pytest.raises(AppError, match="Logit bias is 'x'; write up to 300 token ids"):
        client.predict(api_name="/generate", **GOOD, logit_bias="x")
