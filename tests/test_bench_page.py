"""The bench of the page: figures of visitors over HTTP, who must be a true meter and see every way to be sent off."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from playground import CheckpointError, SamplingParams, load
from playground.bench import __main__ as bench
from playground.bench import crowd, shapes, visitors

STATS = {"new_tokens": 1, "finish_reason": None}


@contextmanager
def fake_page(*sent: bytes, status: int = 200, detail: object = None, whole: bool = True):
    """A server that takes every POST with `status`, and streams `sent`; a stream that is not `whole` breaks off."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            body = json.dumps({"event_id": "e"} if status == 200 else {"detail": detail}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            assert self.path == "/gradio_api/call/generate/e"
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for piece in sent:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            if whole:
                self.wfile.write(b"0\r\n\r\n")
            self.close_connection = True

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


def frame(name: str, data: object) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


def value(text: str, tokens: int, **more) -> list:
    return [text, STATS | {"new_tokens": tokens} | more, {}]


def test_a_visitor_keeps_what_came_and_when():
    whole = frame("generating", value("", 0, position=2)) + frame("heartbeat", None)
    whole += frame("generating", value("a\nb", 2)) + frame("complete", value("a\nb", 2, finish_reason="length"))
    with fake_page(whole[:50], whole[50:51], whole[51:]) as port:  # pieces end where they like
        seen = visitors.visit("127.0.0.1", port, [], 10)
    assert seen["ended"] == "complete" and seen["sentence"] is None and seen["told"]
    assert [event[1:] for event in seen["events"]] == [[0, 0], [2, 3], [2, 3]]
    assert seen["sent"] < seen["events"][0][0] <= seen["events"][1][0] == crowd.end_of(seen) == crowd.first_text(seen)
    assert seen["stats"]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("page", "ended", "sentence"),
    [
        ({"sent": [frame("error", {"error": "The page is full."})]}, "refused", "The page is full."),
        ({"sent": [frame("error", "Broken.")]}, "refused", "Broken."),
        ({"sent": [frame("error", None)]}, "refused", "an error without a sentence"),
        ({"status": 503, "detail": "Queue is full."}, "refused", "HTTP 503: Queue is full."),
        ({"sent": [frame("generating", value("a", 1))], "whole": False}, "broken", "the stream broke off"),
        ({"sent": [frame("generating", value("a", 1))]}, "broken", "the stream broke off"),
        ({"sent": [frame("generating", ["no figures"])]}, "broken", "IndexError: list index out of range"),
    ],
)
def test_a_visitor_who_is_sent_off_knows_how(page, ended, sentence):
    with fake_page(*page.pop("sent", []), **page) as port:
        seen = visitors.visit("127.0.0.1", port, [], 10)
    assert (seen["ended"], seen["sentence"]) == (ended, sentence)
    found = crowd.figures([seen], 5)
    assert found["sentences"] == {sentence: 1} and found["refused" if ended == "refused" else "errors"] == 1


def test_nobody_listens():
    with fake_page() as port:
        pass
    assert visitors.visit("127.0.0.1", port, [], 10)["sentence"].startswith("ConnectionRefusedError")


def test_visitors_load_neither_torch_nor_gradio_nor_anything_of_ours():
    script = (
        f"import runpy, sys; runpy.run_path({visitors.__file__!r}); print(*{{m.split('.')[0] for m in sys.modules}})"
    )
    loaded = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "gradio", "numpy", "playground", "kernels"} & set(loaded.split())
    with open(visitors.__file__, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    names = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names


def test_a_percentile_is_a_value_that_was_measured():
    values = [float(v) for v in range(100, 0, -1)]
    assert [crowd.percentile(values, share) for share in (0.0, 0.5, 0.99, 1.0)] == [1, 50, 99, 100]
    assert crowd.percentile([7.0], 0.99) == 7.0 and crowd.spread([]) is None
    assert crowd.spread([0.003, 0.001, 0.002]) == {"p50": 2.0, "p99": 3.0, "max": 3.0}


def visitor(start: float, end: float, tokens: int, step: float = 0.05) -> dict:
    """Who comes at 0, has text at `start`, and writes evenly."""
    count = round((end - start) / step)
    events = [[start + k * step, 1 + (tokens - 1) * k // count, 1 + k] for k in range(count + 1)]
    stats = {"new_tokens": tokens, "prompt_tokens": 4}
    ended = {"ended": "complete", "sentence": None, "told": False, "bytes": 9, "stats": stats}
    return {"sent": 0.0, "events": [[0.0, 0, 0], *events, [end + 0.01, tokens, 99]], **ended}


def test_the_rate_is_of_the_time_in_which_all_that_were_admitted_write():
    together = [visitor(1.0, 3.0, 201), visitor(2.0, 4.0, 201)]
    found = crowd.figures(together, 201)
    assert found["tokens_per_second"] == pytest.approx(200) and found["together_s"] == 1.0
    assert found["whole_tokens_per_second"] == pytest.approx(402 / 4, abs=0.1) and found["waited"] == 0
    late = crowd.figures([*together, visitor(3.5, 5.5, 201)], 201)
    assert late["tokens_per_second"] == found["tokens_per_second"] and late["writing_together"] == 2
    assert late["waited"] == 1 and late["told_their_position"] == 0 and late["slowest_over_mean"] == 1.32
    assert crowd.figures([visitor(1.0, 1.05, 9)], 9)["tokens_per_second"] is None, "too short for a rate"
    assert late["gap_ms"]["p50"] == late["gap_ms"]["max"] == pytest.approx(50), "what only repeats the last is no gap"


@pytest.mark.long
def test_the_page_is_measured_from_end_to_end(monkeypatch, capsys):
    options = ["--device", "cpu", "--json", "--streams", "1", "3", "--tokens", "12", "--prompt", "9", "--context", "64"]
    monkeypatch.setattr(sys, "argv", ["bench", "--page", *options])
    assert bench.main() == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["streams"], line["every_s"]) for line in lines] == [(1, 0), (3, 0), (3, 0.1)]
    for line in lines:
        assert line["completed"] == line["streams"] and line["total_tokens"] == 12 * line["streams"]
        assert not line["refused"] + line["errors"] + line["other_length"] + line["cold_not_completed"]
        assert line["prompt_tokens"] == 9 and line["sentences"] == {}
        assert 1 <= line["slowest_over_mean"] < 3 and 0 < line["busiest_visitors"] < 1
        for name in ("first_text_ms", "cold_first_text_ms", "gap_ms", "news_gap_ms"):
            assert 0 < line[name]["p50"] <= line[name]["p99"] <= line[name]["max"]
        assert line["first_text_ms"]["max"] < line["wall_s"] * 1e3
        assert 0 < line["whole_tokens_per_second"] == pytest.approx(line["total_tokens"] / line["wall_s"], rel=0.01)
        assert line["engine_rows"] == line["streams"] and line["engine_tokens_per_second"] > 0
        assert line["tokens_per_second"] is None or line["tokens_per_second"] > line["whole_tokens_per_second"]


@pytest.mark.long
def test_a_new_page_says_when_it_answered_and_when_the_first_text_was_there(monkeypatch, capsys):
    options = ["--device", "cpu", "--json", "--tokens", "8", "--prompt", "9", "--context", "64"]
    monkeypatch.setattr(sys, "argv", ["bench", "--page", "--start", *options])
    assert bench.main() == 0
    line = json.loads(capsys.readouterr().out)
    assert 0 < line["answers_s"] <= (line["ready_s"] or line["answers_s"]) < line["first_text_s"] <= line["end_s"] < 60
    assert line["tokens"] == 8 and 0 < line["first_text_after_sending_ms"] < line["first_text_s"] * 1e3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--streams", "0"], "1 to 1024 streams"),
        (["--every", "-1"], "0 to 60 seconds"),
        (["--tokens", "4000"], "the context holds 2048"),
        (["--model", "/nowhere"], "neither a folder"),
    ],
)
def test_a_page_that_can_not_be_measured_is_refused_with_a_sentence(options, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "--page", "--device", "cpu", *options])
    assert bench.main() == 2
    assert words in capsys.readouterr().err


def test_a_random_checkpoint_is_written_once_and_every_token_has_a_text(monkeypatch, tmp_path):
    changes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    tiny = shapes.SHAPES["qwen3-8b"] | changes | {"num_key_value_heads": 1, "head_dim": 64, "vocab_size": 5000}
    monkeypatch.setitem(shapes.SHAPES, "tiny", tiny | {"max_position_embeddings": 64, "eos_token_id": 7})
    assert shapes.write_random("tiny", tmp_path, torch.device("cpu"))
    assert not shapes.write_random("tiny", tmp_path, torch.device("cpu")), "it is there"
    with pytest.raises(CheckpointError, match="another checkpoint"):
        shapes.write_random("qwen3-8b", tmp_path, torch.device("cpu"))
    with load(tmp_path, device="cpu") as playground:
        *tokens, last = playground.stream("Once", SamplingParams(seed=1), 40, ignore_eos=True)
        assert last.stats.new_tokens == 40 and any(event.id >= 4096 for event in tokens)
        assert all(event.text == f" {event.id}#" for event in tokens if event.id >= 4096)
