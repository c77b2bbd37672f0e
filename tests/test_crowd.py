"""Many visitors at once, over plain HTTP: every text is what it is alone, and nothing is left behind."""

from __future__ import annotations

import http.client
import json
import os
import random
import threading
import time
from itertools import product
from pathlib import Path

import pytest
from serving import serve_page

from playground import SamplingParams
from playground.engine.settings import in_order

PROMPTS = [
    "Once upon a time",
    "One day, a little girl named Lily found a",
    "The fox looked at the old clock and said,",
    "Tom and his grandmother went to the sea. There",
    "A frog and a mouse lived",
]
PAIRS = list(product(PROMPTS, range(8)))  # 40 of prompt and seed
TOKENS = 30
CLIENTS, SECONDS = 32, 180


def post(connection: http.client.HTTPConnection, path: str, data: list) -> None:
    connection.request("POST", path, json.dumps({"data": data}), {"Content-Type": "application/json"})


def call(connection: http.client.HTTPConnection, name: str, data: list) -> list:
    """The last outputs of an endpoint. Raises AssertionError for anything but a good end."""
    post(connection, f"/gradio_api/call/{name}", data)
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    event = json.load(answer)["event_id"]
    connection.request("GET", f"/gradio_api/call/{name}/{event}")
    *_, kind, last = [line for line in connection.getresponse().read().decode().splitlines() if line]
    assert kind == "event: complete", (kind, last)
    return json.loads(last.removeprefix("data: "))


def asked(prompt: str, seed: int) -> list:
    return [prompt, *in_order(sampler="gumbel", temperature=0.9, max_new_tokens=TOKENS, seed=seed, past_end=True)]


def held_by(pid: int) -> dict[str, int]:
    """Threads and open files of a process."""
    process = Path(f"/proc/{pid}")
    return {"threads": len(list(process.glob("task/*"))), "files": len(os.listdir(process / "fd"))}


@pytest.fixture(scope="module")
def alone(storyteller):
    params = {seed: SamplingParams("gumbel", 0.9, seed=seed) for _, seed in PAIRS}
    return {
        (prompt, seed): "".join(e.text for e in storyteller.stream(prompt, params[seed], TOKENS, ignore_eos=True))
        for prompt, seed in PAIRS
    }


def come_and_go(port: int, alone: dict, seconds: float, luck: int, done: list, wrong: list) -> None:
    connection, chance, end = http.client.HTTPConnection("127.0.0.1", port), random.Random(luck), time.monotonic()
    while time.monotonic() < end + seconds and not wrong:
        pair = chance.choice(PAIRS)
        try:
            text, stats, _ = call(connection, "generate", asked(*pair))
            assert text == alone[pair] and stats["finish_reason"] == "length", (pair, text)
            done.append(pair)
        except Exception as error:
            wrong.append(error)
    connection.close()


def crowd(page, alone: dict, clients: int, seconds: float) -> list:
    """What was written; all of it right."""
    port, done, wrong = int(page.url.rpartition(":")[2]), [], []
    threads = [
        threading.Thread(target=come_and_go, args=(port, alone, seconds, luck, done, wrong)) for luck in range(clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[0]
    return done


def check_idle_again(page, before: list[dict]) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", int(page.url.rpartition(":")[2]))
    deadline = time.monotonic() + 20
    while True:
        (status,) = call(connection, "status", [])
        after = [held_by(pid) for pid in (page.process.pid, page.engine)]
        # gradio keeps threads for its quick handlers, up to 200 of them: they are the page's, not a run's
        back = all(a["files"] <= b["files"] + 3 for a, b in zip(after, before, strict=True))
        if back and after[1]["threads"] <= before[1]["threads"] and status["running"] == 0:
            break
        assert time.monotonic() < deadline, (before, after, status)
        time.sleep(0.2)
    assert status["ready"]


@pytest.mark.long
def test_a_crowd_for_a_few_seconds_reads_what_each_would_alone(alone):
    with serve_page() as page:
        crowd(page, alone, 2, 1)
        before = [held_by(pid) for pid in (page.process.pid, page.engine)]
        assert len(crowd(page, alone, 40, 6)) >= 40
        check_idle_again(page, before)


@pytest.mark.long
@pytest.mark.timeout(400)
def test_a_crowd_for_three_minutes_reads_what_each_would_alone(alone):
    with serve_page() as page:
        crowd(page, alone, 2, 1)
        before = [held_by(pid) for pid in (page.process.pid, page.engine)]
        done = crowd(page, alone, CLIENTS, SECONDS)
        print(f"{len(done)} texts of {len(set(done))} pairs")
        assert set(done) == set(PAIRS)
        check_idle_again(page, before)


def test_a_request_whose_stream_nobody_opens_is_given_up_in_seconds():
    with serve_page() as page:
        connection = http.client.HTTPConnection("127.0.0.1", int(page.url.rpartition(":")[2]))
        data = ["Once upon a time", *in_order(sampler="gumbel", max_new_tokens=2000, seed=1, past_end=True)]
        post(connection, "/gradio_api/call/generate", data)
        connection.getresponse().read()
        running, deadline = [], time.monotonic() + 30
        while running[-1:] != [0] or not any(running):  # a busy machine takes a while to begin
            assert time.monotonic() < deadline, f"it runs on, or never began: {running}"
            (status,) = call(connection, "status", [])
            running.append(status["running"])
            time.sleep(0.3)
        assert sum(running) > 8  # a few seconds, not at once
        assert call(connection, "generate", asked(*PAIRS[0]))[1]["new_tokens"] == TOKENS


@pytest.mark.long
def test_those_who_wait_see_their_place_in_line():
    with serve_page("--context", "128") as page:
        port, seen = int(page.url.rpartition(":")[2]), []

        def come(number: int) -> None:
            connection = http.client.HTTPConnection("127.0.0.1", port)
            data = ["Once upon a time", *in_order(sampler="gumbel", max_new_tokens=100, seed=number, past_end=True)]
            post(connection, "/gradio_api/call/generate", data)
            event = json.load(connection.getresponse())["event_id"]
            connection.request("GET", f"/gradio_api/call/generate/{event}")
            lines = connection.getresponse().read().decode().splitlines()
            told = [json.loads(line[6:]) for line in lines if line.startswith("data: [")]
            seen.append(([stats["position"] for _, stats, _ in told], told[-1][1]["finish_reason"]))

        threads = [threading.Thread(target=come, args=(number,)) for number in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [reason for _, reason in seen] == ["length"] * 40
        waited = [[place for place in places if place] for places, _ in seen]
        waited = [places for places in waited if places]
        assert len(waited) >= 6 and max(map(max, waited)) <= 40
        assert all(places == sorted(places, reverse=True) for places in waited)
