"""The command line, as a user types it, and the tokenizer's stream behind it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from running import engine_of

from playground import RequestError, SamplingParams
from playground.__main__ import main

ROOT = Path(__file__).parents[1]
STORY = (
    "Once upon a time there was a small mouse called Pip. Pip wanted to see the moon. One night he climbed up the "
    "tall tree in the garden. The owl saw him and asked what he was doing. Pip said he wanted to touch the moon. "
    "The owl laughed and said the moon was too far away, but that they could look at it together. They sat on the "
    "branch and looked at the moon all night. Pip was very happy, and the owl was his friend."
)


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_the_command_line_streams_json_that_replays_in_python(storyteller):
    options = [
        "--sampler",
        "gumbel",
        "--temperature",
        "0.8",
        "--max-new-tokens",
        "16",
        "--seed",
        "7",
        "--device",
        "cpu",
        "--json",
    ]
    done = run("playground", "Once upon a time", *options)
    *tokens, last = map(json.loads, done.stdout.splitlines())
    assert done.returncode == 0 and len(tokens) == 16 and last["stats"]["new_tokens"] == 16
    assert all({"id", "text", "logprob"} <= set(t) and t["logprob"] <= 0 for t in tokens)
    events = list(storyteller.stream("Once upon a time", SamplingParams("gumbel", 0.8, seed=7), max_new_tokens=16))
    assert [e.id for e in events[:-1]] == [t["id"] for t in tokens]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([""], "prompt is empty"),
        (["Once", "--sampler", "beam"], "choose greedy"),
        (["Once", "--temperature", "nan"], "from 0.01 to 10"),
        (["Once", "--max-new-tokens", "0"], "from 1 to 2048"),
        (["Once", "--seed", "-9"], "-1 to draw one"),
        (["Once", "--top-p", "0"], "above 0"),
        (["Once", "--model", "/nowhere"], "neither a folder"),
        (["Once", "--device", "tpu"], "choose auto, cuda or cpu"),
        (["Once", "--cache-dtype", "int4"], "choose plain or fp8"),
        (["Once \udc80 upon"], "surrogate"),
    ],
)
def test_bad_input_is_one_sentence_on_stderr_and_exit_code_2(arguments, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["playground", *arguments])
    assert main() == 2
    out, errors = capsys.readouterr()
    assert words in errors and errors.startswith("error: ") and out == ""


def test_evaluate_prints_bits_per_byte_of_documents(tmp_path):
    file = tmp_path / "stories.txt"
    file.write_text("Once upon a time, there was a little dog.\n<|endoftext|>\nTom was sad. His mom helped him.\n")
    done = run("playground.evaluate", str(file), "--device", "cpu")
    value = json.loads(done.stdout)["bits_per_byte"]
    assert 0.2 < value < 1.2
    assert run("playground.evaluate", str(tmp_path / "none.txt")).returncode == 2


def test_a_long_document_is_scored_in_windows_that_overlap_by_half(small):
    from dataclasses import replace

    from playground.evaluate import document_nats
    from playground.model.step import Step

    model = small(fp8=False)
    model.config = replace(model.config, max_position_embeddings=16)
    ids = torch.randint(1, 256, (53,), generator=torch.Generator().manual_seed(4))
    nats = 0.0
    with torch.inference_mode():
        for at in range(1, len(ids)):
            start = (
                0 if at < 16 else 8 * ((at - 16) // 8 + 1)
            )  # each token once, with at least half a context before it
            before = ids[start:at]
            logits = model.logits(model(before, Step(torch.arange(len(before)), slots=None))[-1:])
            nats -= logits.log_softmax(-1)[0, ids[at]].item()
    assert document_nats(model, ids.tolist()) == pytest.approx(nats, rel=1e-5)


def test_a_special_token_typed_by_a_user_is_plain_text(storyteller):
    ids = storyteller.tokenizer.encode("a<|endoftext|>b")
    assert ids.count(0) == 1 and ids[0] == 0 and storyteller.tokenizer.decode(ids) == "a<|endoftext|>b"


def test_a_stop_string_ends_the_text_before_it_even_across_tokens(storyteller):
    params = SamplingParams("gumbel", 0.8, seed=7)
    whole = "".join(e.text for e in storyteller.stream("Once upon a time", params, 60))
    stop = whole[20:29]
    events = list(storyteller.stream("Once upon a time", params, 60, stop=(stop,)))
    assert "".join(e.text for e in events) == whole[: whole.index(stop)]
    assert events[-1].stats.finish_reason == "stop"


def test_a_prompt_over_the_context_is_refused_with_both_numbers(storyteller):
    with pytest.raises(RequestError, match="3003 tokens and the context holds 2048"):
        storyteller.stream("word " * 3000)


def test_the_storyteller_compresses_unseen_prose(storyteller):
    from playground.evaluate import bits_per_byte

    assert bits_per_byte(engine_of(storyteller).model, storyteller.tokenizer, [STORY]) < 0.9


def test_compare_prints_the_columns_and_why_they_part():
    columns = ["--column", "sampler=greedy", "--column", "temperature=1.4,seed=3"]
    done = run("playground", "compare", "Once upon a time", *columns, "--max-new-tokens", "20", "--device", "cpu")
    assert done.returncode == 0 and "They part at token" in done.stdout and "noise" in done.stdout
    assert "Gumbel-max, T = 1.4, seed 3" in done.stdout


def test_compare_refuses_a_column_that_it_does_not_know_before_loading():
    done = run("playground", "compare", "Once", "--column", "heat=3", "--column", "seed=1")
    assert done.returncode == 2 and "no 'heat'" in done.stderr and "Traceback" not in done.stderr
