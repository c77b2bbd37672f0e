"""What a card needs before the first text comes at once: kernels compiled, steps and prompts recorded. First those that
a first run needs, whatever its sampler; later batch sizes and variants when the engine has nothing else to do."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import product
from typing import NamedTuple

import torch

from kernels.compiling import only_compiled
from playground.engine.decoder import GraphDecoder, State, Variant, draw_output, run_step
from playground.engine.events import Progress
from playground.engine.pages import pages_for
from playground.engine.prefill import DOUBLED, Chunk, Kind
from playground.engine.runner import Runner
from playground.engine.sampler import Needs, Settings
from playground.engine.settings import SamplingParams

LOOK = 0.02  # seconds between looks at what has been compiled
NEEDS = [Needs(filtered, summed) for filtered, summed in product((False, True), repeat=2)]


class Work(NamedTuple):
    """Prompts of so many tokens, and steps of so many rows, with all that a page shows of them."""

    prompts: tuple[int, ...]
    rows: tuple[int, ...]
    traced: bool  # with activation scales


FIRST = (Work((32, 64), (1,), True), Work((32, 64), (4,), False))
"""A first run by any sampler, with filters or without, and a comparison of three or four."""
LATER = (
    Work((128, 256, DOUBLED), (2, 4, 8, 16, 32), True),
    Work((128, 256), (1, 2), False),
)


def prepare(runner: Runner, works: tuple[Work, ...]) -> Iterator[Progress]:
    """Compiles what `works` need on all cores, telling how many kernels are there, then records it. Between two yields
    at most one dry run or one recording is made."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures: list[Future] = []
        for work in works:
            for dry_run in dry_runs(runner, work):
                with only_compiled(pool) as asked, torch.inference_mode():
                    dry_run()
                futures += asked
                yield told(futures)
        while not all(future.done() for future in futures):
            time.sleep(LOOK)
            yield told(futures)
    for work in works:
        for _ in record(runner, work):
            yield told(futures)


def told(futures: list[Future]) -> Progress:
    return Progress("preparing", sum(future.done() for future in futures), len(futures))


def dry_runs(runner: Runner, work: Work) -> Iterator[Callable[[], object]]:
    """Everything that the work would launch, piece by piece, on the page that is nobody's."""
    for size in work.prompts:
        yield Chunk(runner.model, runner.cache, Kind(0, size, work.traced, True)).run
    for rows, needs in product(work.rows, NEEDS):
        yield partial(dry_step, runner, rows, Variant(needs, work.traced, True))


def dry_step(runner: Runner, rows: int, variant: Variant) -> None:
    """A decode step, and the draw behind a prompt, whose logits its rows share."""
    model, cache = runner.model, runner.cache
    settings = Settings.of([SamplingParams("greedy")] * rows, model.device)
    resting = State.resting(rows, pages_for(runner.context), cache.scratch)
    run_step(model, cache, State(*(t.to(model.device) for t in resting)), settings, variant)
    at = torch.ones(rows, dtype=torch.int64, device=model.device)
    logits = torch.zeros(rows, model.config.vocab_size, device=model.device)
    draw_output(logits, settings, at, variant, None)


def record(runner: Runner, work: Work) -> Iterator[None]:
    """Makes the recordings, one at a time."""
    scratch, decoder = runner.cache.scratch, runner.decoder
    for size in work.prompts:
        pages = [scratch] * pages_for(size)
        for _ in range(2):  # the second time, a prompt is recorded
            with torch.inference_mode():
                runner.prefill.feed([0] * size, 0, pages, work.traced, True)
            yield
    for rows, needs in product(work.rows, NEEDS):
        if isinstance(decoder, GraphDecoder):
            with torch.inference_mode():
                decoder.recorded(rows, Variant(needs, work.traced, True))
            yield
