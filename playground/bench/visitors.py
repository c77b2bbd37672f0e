"""A process full of visitors of the page, over plain HTTP: what `python -m playground.bench --page` measures with.

It is run by its path, `python -I playground/bench/visitors.py`, and lives on the standard library alone: a client that
shares its process with torch or gradio hands events over in bursts of seconds, and then it is the client that is timed.

It reads a task, one line of JSON on its standard input, says `ready`, reads the moment when the first visitor comes,
and prints one line of JSON when the last has left. All times are seconds of `time.monotonic()`, a clock that the
processes of one machine share.
"""

from __future__ import annotations

import http.client
import json
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

SILENCE = 60.0  # seconds without a byte after which a stream is given up; gradio sends a heartbeat every 15
CALL = "/gradio_api/call/"


class Refused(Exception):
    """The page said no, in a sentence."""


def frames(lines: Iterable[bytes]) -> Iterator[tuple[float, str, bytes]]:
    """Server-sent events: when each had come, its name, its data as it was sent."""
    name = ""
    for line in lines:
        if line.startswith(b"event:"):
            name = line[6:].strip().decode()
        elif line.startswith(b"data:"):
            yield time.monotonic(), name, line[5:]


def sentence_of(body: bytes) -> str:
    """What an error says: gradio puts it under `error` in an event, under `detail` in the answer to a POST."""
    try:
        said = json.loads(body)
    except ValueError:
        said = body.decode(errors="replace").strip()
    if isinstance(said, dict):
        said = said.get("error") or said.get("detail")
    return said if isinstance(said, str) and said else "an error without a sentence"


def call(connection: http.client.HTTPConnection, name: str, data: list) -> Iterator[tuple[float, str, bytes]]:
    """Calls an endpoint of the page and yields its events, heartbeats too. Raises `Refused` for an HTTP error."""
    connection.request("POST", CALL + name, json.dumps({"data": data}), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    body = answer.read()
    if answer.status != 200:
        raise Refused(f"HTTP {answer.status}: {sentence_of(body)}")
    connection.request("GET", f"{CALL}{name}/{json.loads(body)['event_id']}")
    stream = connection.getresponse()
    if stream.status != 200:
        raise Refused(f"HTTP {stream.status}: {sentence_of(stream.read())}")
    yield from frames(stream)


def visit(host: str, port: int, data: list, patience: float) -> dict:
    """One run of `/generate`, given up after `patience` seconds.

    `sent`: when the POST was; `events`: for each the time, its new tokens, its characters of text; `told`: whether one
    of them named a `position` in the queue; `bytes` of data; `ended`: "complete", "refused" (by an `error` event or an
    HTTP error) or "broken" (anything else), with a `sentence` if not complete; `stats`: the last figures.
    """
    sent = time.monotonic()
    record = {"sent": sent, "events": [], "told": False, "bytes": 0, "ended": "broken", "stats": {}}
    record["sentence"] = "the stream broke off"
    connection = http.client.HTTPConnection(host, port, timeout=SILENCE)
    try:
        for when, name, body in call(connection, "generate", data):
            record["bytes"] += len(body)
            if name == "error":
                raise Refused(sentence_of(body))
            if name in ("generating", "complete"):
                _take(record, when, json.loads(body))
            if name == "complete":
                record |= {"ended": "complete", "sentence": None}
                break
            if when - sent > patience:
                raise TimeoutError(f"given up after {patience:g} s")
    except Refused as refusal:
        record |= {"ended": "refused", "sentence": str(refusal)}
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError) as error:
        record["sentence"] = f"{type(error).__name__}: {error}"
    finally:
        connection.close()
    return record


def _take(record: dict, when: float, value: list[Any]) -> None:
    """An event's `[text, figures, scales]`."""
    text, stats = value[0], value[1]
    record["stats"] = stats
    record["told"] |= stats.get("position") is not None
    record["events"].append([when, stats.get("new_tokens") or 0, len(text)])


def main() -> int:
    task = json.loads(sys.stdin.readline())
    records: list[dict | None] = [None] * len(task["visits"])
    print("ready", flush=True)
    opening = float(sys.stdin.readline())

    def come(index: int, after: float, data: list) -> None:
        time.sleep(max(0.0, opening + after - time.monotonic()))
        records[index] = visit(task["host"], task["port"], data, task["patience"])

    # A thread each: they wait in `recv`, without the interpreter's lock, and code that blocks is code that can be read.
    threads = [threading.Thread(target=come, args=(index, *one)) for index, one in enumerate(task["visits"])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    busy = time.process_time() / max(time.monotonic() - opening, 1e-9)
    print(json.dumps({"visits": records, "busy": busy}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
