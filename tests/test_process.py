"""The page and its engine as two processes: what either does when the other dies, and how both end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from serving import ROOT, command_of, serve_page

from playground import CheckpointError, EngineError, SamplingParams
from playground.api import Playground
from playground.engine.process import ProcessClient
from playground.engine.requests import Options

LONG = {"prompt": "Once upon a time", "sampler": "gumbel", "temperature": 0.8, "max_new_tokens": 1500, "past_end": True}
SHORT = LONG | {"max_new_tokens": 40}


def wait_until(condition, seconds: float, what: str) -> float:
    """The seconds that it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"waited {seconds} s for {what}"
        time.sleep(0.02)
    return time.monotonic() - began


def writing(client: Client, count: int, request: dict) -> list:
    """Jobs, all of which have text."""
    jobs = [client.submit(api_name="/generate", **request, seed=seed) for seed in range(count)]
    wait_until(lambda: all(any(text for text, *_ in job.outputs()) for job in jobs), 60, "text")
    return jobs


def test_when_the_engine_is_killed_everybody_is_told_at_once_and_the_page_goes_on():
    with serve_page() as page:
        client = Client(page.url, verbose=False)
        before = client.predict(api_name="/generate", **SHORT, seed=7)[0]
        jobs, engine = writing(client, 3, LONG), page.engine
        os.kill(engine, signal.SIGKILL)
        assert wait_until(lambda: all(job.done() for job in jobs), 4, "the news") < 2
        for job in jobs:
            with pytest.raises(AppError, match="ended unexpectedly"):
                job.result()
        assert client.predict(api_name="/generate", **SHORT, seed=7)[0] == before
        assert page.engine != engine and client.predict(api_name="/status")["ready"]


def test_when_the_page_is_killed_the_engine_leaves():
    with serve_page() as page:
        writing(Client(page.url, verbose=False), 2, LONG)
        engine = page.engine
        page.process.kill()
        page.process.wait()
        assert wait_until(lambda: b"playground.engine" not in command_of(engine), 4, "the engine's end") < 2


@pytest.mark.parametrize("way", ["SIGTERM", "Ctrl-C to the whole group"])
def test_told_to_end_the_page_lets_runs_come_to_their_end_and_refuses_others(way):
    with serve_page(start_new_session=True) as page:
        client = Client(page.url, verbose=False)
        jobs, engine = writing(client, 8, SHORT), page.engine
        if way == "SIGTERM":
            page.process.send_signal(signal.SIGTERM)
        else:
            os.killpg(page.process.pid, signal.SIGINT)
        with pytest.raises(Exception, match="shutting down"):
            client.predict(api_name="/generate", **SHORT, seed=1)
        results = [job.result(timeout=20) for job in jobs]
        assert [stats["finish_reason"] for _, stats, _ in results] == ["length"] * 8
        assert page.process.wait(10) == 0 and command_of(engine) == b""


def test_a_bad_model_ends_with_a_sentence_and_exit_code_2_wherever_one_is(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    command = [sys.executable, str(ROOT / "app.py"), "--device", "cpu", "--model", ".", "--port", "0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "'gpt2' is not supported" in said


class Failing(ProcessClient):
    """Whose engine can't be started any more, once it has been started."""

    def command(self, descriptor: int) -> list[str]:
        return super().command(descriptor) if self.starts == 1 else [sys.executable, "-c", "raise SystemExit(1)"]


def test_three_starts_that_fail_end_in_a_message():
    states = []
    client = Failing(Options(device="cpu", context=128), tell=lambda state: states.append(state.phase))
    playground = Playground(client, client.until_ready())
    os.kill(client.process.pid, signal.SIGKILL)
    wait_until(lambda: client.state.phase == "failed", 30, "giving up")
    assert "3 times in a row" in client.state.message and states.count("restarting") == 3
    with pytest.raises(EngineError, match="3 times in a row"):
        playground.stream("Once")
    client.close()


def test_rows_from_before_a_restart_are_branched_from_by_a_prefill():
    client = ProcessClient(Options(device="cpu", context=128))
    playground = Playground(client, client.until_ready())
    params = SamplingParams("gumbel", 0.8, seed=7)
    with playground.stream("Once upon a time", params, 8, keep=True) as stream:
        ids = [event.id for event in stream if hasattr(event, "id")]
    os.kill(client.process.pid, signal.SIGKILL)
    wait_until(lambda: client.state.phase == "restarting", 5, "the restart")
    prompt = (*playground.encode("Once upon a time"), *ids[:4])
    (branch,) = playground.resume(prompt, [params], 4, parent=stream)
    assert [event.id for event in branch if hasattr(event, "id")] == ids[4:] and not branch.branched
    client.close()
    assert client.process.returncode is not None


def test_a_model_that_can_not_be_loaded_is_told_before_anything_else():
    client = ProcessClient(Options(("/nowhere",), device="cpu"))
    with pytest.raises(CheckpointError, match="neither a folder nor a Hub id"):
        client.until_known()
    client.close()
