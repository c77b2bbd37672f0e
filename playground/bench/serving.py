"""The page as a user starts it, and visitors sent to it: the processes of `python -m playground.bench --page`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import NamedTuple

from playground.bench import visitors
from playground.checkpoint.config import CheckpointError

ROOT = Path(__file__).parents[2]
# Of streams that a process of visitors reads. An event comes every 45 ms and takes 0.1 to 0.2 ms to read and parse, so
# that 16 streams keep it busy for a few percent of the time; `busiest_visitors` says how much it was. Many more in one
# process would wait for each other, and a process each would take the cores from the page.
STREAMS_A_PROCESS = 16
PATIENCE = 900.0  # seconds for a stream, or for the page to come up


class Page(NamedTuple):
    """A running page. Moments of `time.monotonic()`; `ready` is None where the page does not tell."""

    port: int
    process: subprocess.Popen
    started: float
    answers: float
    ready: float | None


@contextmanager
def serve(options: Mapping[str, str | int | None], **environment: str) -> Iterator[Page]:
    """`python app.py`, with `options` by the names that they have in Python, until the block ends. Raises
    `CheckpointError` where it does not come up."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "app.py", "--host", "127.0.0.1", "--port", str(port)]
    for name, value in options.items():
        if value is not None:
            command += ["--" + name.replace("_", "-"), str(value)]
    started = time.monotonic()
    quiet = 2  # what it prints goes to standard error: the other one is for figures
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, stdout=quiet)
    try:
        answers = _wait_for_answer(port, process)
        yield Page(port, process, started, answers, _wait_until_ready(port, process))
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _get(port: int, path: str) -> bytes | None:
    """What stands there; None while nobody answers."""
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read()
        return body if answer.status == 200 else None
    except (OSError, HTTPException):
        return None
    finally:
        connection.close()


def _wait_for_answer(port: int, process: subprocess.Popen) -> float:
    """The moment when the page's root was there."""
    began = time.monotonic()
    while _get(port, "/") is None:
        check_running(process, began)
        time.sleep(0.02)
    return time.monotonic()


def _wait_until_ready(port: int, process: subprocess.Popen) -> float | None:
    """The moment when the endpoint `/status` said `{"ready": true}`; None where the page has no such endpoint."""
    known = json.loads(_get(port, "/config") or "{}").get("dependencies", [])
    if not any(one.get("api_name") == "status" for one in known):  # to ask all the same fills the page's log
        return None
    began = time.monotonic()
    while (said := _status(port)) is not None:
        if said["ready"]:
            return time.monotonic()
        check_running(process, began)
        time.sleep(0.02)
    return None


def _status(port: int) -> dict | None:
    """What `/status` says, if it says anything of being ready."""
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        for _, name, body in visitors.call(connection, "status", []):
            if name == "complete":
                said = json.loads(body)[0]
                return said if isinstance(said, dict) and "ready" in said else None
    except (visitors.Refused, OSError, HTTPException, ValueError, LookupError, TypeError):
        pass  # an endpoint of that name that is another
    finally:
        connection.close()
    return None


def check_running(process: subprocess.Popen, began: float) -> None:
    if process.poll() is not None:
        raise CheckpointError("The page's process ended; what it said stands above.")
    if time.monotonic() - began > PATIENCE:
        raise CheckpointError(f"The page did not come up in {PATIENCE:g} s.")


def send(port: int, data: list[list], every: float) -> tuple[list[dict], float]:
    """Sends visitors to the page, one every `every` seconds (0: all at once); returns their records, and for which
    share of the time the busiest of their processes computed."""
    count = -(-len(data) // STREAMS_A_PROCESS)
    command = [sys.executable, "-I", visitors.__file__]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(count)]
    try:
        for first, process in enumerate(processes):
            visits = [(index * every, data[index]) for index in range(first, len(data), count)]
            task = {"host": "127.0.0.1", "port": port, "patience": PATIENCE, "visits": visits}
            _say(process, json.dumps(task))
        for process in processes:
            _hear(process)  # it is ready
        opening = time.monotonic() + 0.05
        for process in processes:
            _say(process, repr(opening))
        seen = [json.loads(_hear(process)) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    records = [seen[index % count]["visits"][index // count] for index in range(len(data))]
    return records, max(one["busy"] for one in seen)


def _say(process: subprocess.Popen, line: str) -> None:
    process.stdin.write(line + "\n")
    process.stdin.flush()


def _hear(process: subprocess.Popen) -> str:
    line = process.stdout.readline()
    if not line:
        raise CheckpointError("A process of visitors ended; what it said stands above.")
    return line
