"""How the page serves many streams at once: `python -m playground.bench --page`.

First the engine alone, in a process of its own and behind the bench's gate: what the page is held against. Then
`app.py` as a user starts it, and visitors over HTTP from processes of their own (`visitors.py`), who each ask for one
run of `/generate`. For each number of streams a first pass, whose times to the first text are the cold ones, and two
that are measured: all visitors at once, and one every 100 ms. Triton's cache is as the engine's process has left it.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from playground.arguments import model_options
from playground.bench.crowd import end_of, figures, first_text, spread
from playground.bench.serving import ROOT, Page, check_running, send, serve
from playground.bench.starting import read_once
from playground.checkpoint.config import CheckpointError
from playground.checkpoint.files import Checkpoint
from playground.checkpoint.hub import EMBEDDED, find, local_folder
from playground.checkpoint.tokenizer import Tokenizer
from playground.engine.loading import MAX_ROWS, choose_device
from playground.engine.settings import in_order

WORDS = "the a little girl dog ran to big tree and saw red ball in her garden one day they were happy he said no"


def asked(tokenizer: Tokenizer, prompt: int, tokens: int, streams: int, luck: str) -> list[list]:
    """What each of `streams` visitors sends to `/generate`: a text of about `prompt` tokens of its own, its own seed,
    Gumbel-max at T=1, and past the end, so that all of them write `tokens`."""
    found = []
    for stream in range(streams):
        words = random.Random(f"{luck} {stream}").choices(WORDS.split(), k=prompt)
        text = tokenizer.decode(tokenizer.encode(" ".join(words))[:prompt]).strip() or "Once"
        found.append([text, *in_order(sampler="gumbel", max_new_tokens=tokens, seed=stream, past_end=True)])
    return found


def engine_alone(folder: Path, options: Mapping, rows: list[int], prompt: int, tokens: int) -> dict:
    """`device`, `cache`, `faults` of the gate, and `rates` by number of rows: see `alone.py`."""
    task = json.dumps([str(folder), dict(options), rows, prompt, tokens])
    command = [sys.executable, "-m", "playground.bench.alone", task]
    ended = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if ended.returncode:
        raise CheckpointError("The process that was to measure the engine alone failed; what it said stands above.")
    found = json.loads(ended.stdout.splitlines()[-1])
    return found | {"rates": {int(count): rate for count, rate in found["rates"].items()}}


def measure(page: Page, tokenizer: Tokenizer, prompt: int, tokens: int, streams: int, every: float) -> Iterator[dict]:
    """The figures of both patterns of arrival (of the first alone for one stream, or where `every` is 0), behind a pass
    that warms up. Raises `CheckpointError` where the page itself ends."""
    cold, _ = send(page.port, asked(tokenizer, prompt, tokens, streams, f"cold {streams}"), 0.0)
    check_running(page.process, time.monotonic())
    first = spread([begin - visit["sent"] for visit in cold if (begin := first_text(visit)) is not None])
    failed = sum(visit["ended"] != "complete" for visit in cold)
    for pause in [0.0, every] if every and streams > 1 else [0.0]:
        records, busy = send(page.port, asked(tokenizer, prompt, tokens, streams, f"{pause} {streams}"), pause)
        check_running(page.process, time.monotonic())
        found = figures(records, tokens) | {"every_s": pause, "busiest_visitors": round(busy, 3)}
        yield found | {"cold_first_text_ms": first, "cold_not_completed": failed}


def against(found: dict, rates: Mapping[int, float | None]) -> dict:
    """Figures beside the rate of the engine alone with as many rows, as far as it has rows."""
    rows = min(found["streams"], MAX_ROWS)
    engine = rates.get(rows)
    shares = {}
    for name, share in (("tokens_per_second", "share_of_engine"), ("whole_tokens_per_second", "whole_share_of_engine")):
        shares[share] = round(found[name] / engine, 3) if engine and found[name] else None
    return found | {"engine_rows": rows, "engine_tokens_per_second": engine} | shares


def start_times(folder: Path, options: Mapping, caches: tuple[str, ...], data: list) -> Iterator[dict]:
    """Seconds since starting Python, of a page for each state of Triton's `caches`: until it answers, says that it is
    ready (None where it does not say so), has the first text of the one visitor who then comes, and the last."""
    read_once(folder)
    # idle compilers may still be writing when a page has ended
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        for state in caches:
            with serve(options, TRITON_CACHE_DIR=cache) as page:
                visit = send(page.port, [data], 0.0)[0][0]
            begun = first_text(visit)
            if begun is None:
                raise CheckpointError(f"The page's first run brought no text: {visit['sentence']}")
            moments = {"answers": page.answers, "ready": page.ready, "first_text": begun, "end": end_of(visit)}
            since = {f"{k}_s": None if at is None else round(at - page.started, 2) for k, at in moments.items()}
            since["first_text_after_sending_ms"] = round((begun - visit["sent"]) * 1e3, 1)
            yield {"triton_cache": state, **since, "tokens": visit["stats"].get("new_tokens")}


COLUMNS = {  # of a line of figures: heading -> where its value stands, and how it is shown
    "streams": ("streams", "d"),
    "every s": ("every_s", "g"),
    "tok/s": ("tokens_per_second", ".1f"),
    "share": ("share_of_engine", ".1%"),
    "whole": ("whole_tokens_per_second", ".1f"),
    "first p50": ("first_text_ms.p50", ".1f"),
    "p99": ("first_text_ms.p99", ".1f"),
    "cold p50": ("cold_first_text_ms.p50", ".1f"),
    "gap p50": ("gap_ms.p50", ".1f"),
    "gap p99": ("gap_ms.p99", ".1f"),
    "gap max": ("gap_ms.max", ".1f"),
    "slowest": ("slowest_over_mean", ".2f"),
    "refused": ("refused", "d"),
    "errors": ("errors", "d"),
    "waited": ("waited", "d"),
    "told": ("told_their_position", "d"),
}


def print_lines(lines: list[dict]) -> None:
    print(" ".join(f"{heading:>9}" for heading in COLUMNS))
    for line in lines:
        cells = []
        for path, form in COLUMNS.values():
            value = line
            for key in path.split("."):
                value = value and value[key]
            cells.append("-" if value is None else format(value, form))
        print(" ".join(f"{cell:>9}" for cell in cells))
        for sentence, count in line["sentences"].items():
            print(f"{count:>9} times: {sentence}")


def print_start(lines: list[dict]) -> None:
    (line,) = lines
    ready = "does not say when it is ready" if line["ready_s"] is None else f"is ready after {line['ready_s']} s"
    print(
        f"Triton's cache {line['triton_cache']}: the page answers after {line['answers_s']} s, {ready}, and has the "
        f"first text after {line['first_text_s']} s ({line['first_text_after_sending_ms']} ms after it was asked for), "
        f"the last of {line['tokens']} tokens after {line['end_s']} s"
    )


def checkpoint_of(shape: str | None, model: str | None, device: str, kept: Path) -> tuple[Path, str | None]:
    """The folder of what the page is to load, and the name by which `app.py` gets it: a random checkpoint of a `shape`,
    which is written to `kept` where it is not yet there, or the model."""
    if not shape:
        folder = find(model) if model else EMBEDDED
        return folder, str(folder.resolve()) if model and local_folder(model) else model
    folder = (kept / shape).resolve()
    write = [sys.executable, "-m", "playground.bench.shapes", shape, str(folder), device]
    if subprocess.run(write, cwd=ROOT, check=False).returncode:  # a process, whose memory on the card ends with it
        raise CheckpointError(f"The random {shape} could not be written; what was said stands above.")
    return folder, str(folder)


def bench_page(shape: str | None, args: argparse.Namespace, kept: Path) -> bool:
    """Prints how the page serves a model; False where the gate is red. See `checkpoint_of` for `kept`."""
    folder, model = checkpoint_of(shape, args.model, args.device, kept)
    folder, options = folder.resolve(), model_options(args) | {"model": model}
    config = Checkpoint(folder).config
    limit = min(args.context or config.max_position_embeddings, config.max_position_embeddings)
    if args.prompt + args.tokens > limit:
        raise CheckpointError(f"What is asked for makes {args.prompt + args.tokens} tokens; the context holds {limit}.")
    tokenizer, about = Tokenizer(folder, config.vocab_size), {"shape": shape or args.model or "storyteller"}
    if args.start:
        caches = ("empty", "filled") if choose_device(args.device).type == "cuda" else ("unused",)
        lines = start_times(folder, options, caches, asked(tokenizer, args.prompt, args.tokens, 1, "start")[0])
        _show(about | {"what": "page start"}, ([line] for line in lines), print_start, args.json)
        return True
    rows = sorted({min(streams, MAX_ROWS) for streams in args.streams})
    engine = engine_alone(folder, options, rows, args.prompt, args.tokens)
    if engine["faults"]:
        print(f"{about['shape']}: the gate is red, no figures. {'; '.join(engine['faults'])}", file=sys.stderr)
        return False
    about |= {"what": "page", "device": engine["device"], "cache": engine["cache"]}
    with serve(options) as page:
        each = (measure(page, tokenizer, args.prompt, args.tokens, streams, args.every) for streams in args.streams)
        tables = ([against(line, engine["rates"]) for line in lines] for lines in each)
        _show(about, tables, print_lines, args.json)
    return True


def _show(about: dict, tables: Iterable[list[dict]], table: Callable[[list[dict]], None], as_json: bool) -> None:
    """Each table as soon as it is there, for people unless `as_json`, and a JSON object for each of its lines."""
    for lines in tables:
        if not as_json:
            table(lines)
        for line in lines:
            print(json.dumps({**about, **line}), flush=True)
