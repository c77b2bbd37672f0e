"""What a card needs before the first text comes at once: kernels compiled, steps and prompts recorded. First those that
a first run needs, whatever its sampler; later batch sizes and variants when the engine has nothing else to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import NamedTuple

import torch

from kernels.compiling import Compilers, only_asked_for
from playground.engine.decoder import GraphDecoder, State, Variant, draw_output, run_step
from playground.engine.events import Progress
from playground.engine.pages import pages_for
from playground.engine.prefill import DOUBLED, Chunk, Kind
from playground.engine.runner import Runner
from playground.engine.sampler import Needs, Settings
from playground.engine.settings import SamplingParams

LOOK = 0.02  # seconds to wait for a compiler
NEEDS = [Needs(filtered, summed) for filtered, summed in product((False, True), repeat=2)]


class Work(NamedTuple):
    """Prompts of so many tokens, and steps of so many rows, with all that a page shows of them."""

    prompts: tuple[int, ...]
    rows: tuple[int, ...]
    traced: bool  # with activation scales


FIRST = (Work((32, 64, 128), (1,), True), Work((32, 64, 128), (4,), False))
"""A first run by any sampler, with filters or without, and a comparison of three or four: compiled before the page is
ready, of which the plainest step is recorded. The others are when they are first asked for: it takes 0.2 s."""
LATER = (
    Work((256, DOUBLED), (2, 4, 8, 16, 32), True),
    Work((256,), (1, 2), False),
)


def prepare_first(runner: Runner, compilers: Compilers) -> Iterator[Progress]:
    """Compiles what a first run needs, telling how many kernels are there, and records a step."""
    yield from compiled(runner, compilers, FIRST)
    with torch.inference_mode():
        runner.decoder.recorded(1, Variant(NEEDS[0], True, True))
    yield told(compilers)


def prepare_later(runner: Runner, compilers: Compilers) -> Iterator[Progress]:
    """The same for all batch sizes and variants, piece by piece."""
    yield from compiled(runner, compilers, LATER)
    compilers.close()
    for work in (*FIRST, *LATER):
        for _ in record(runner, work):
            yield told(compilers)


def compiled(runner: Runner, compilers: Compilers, works: tuple[Work, ...]) -> Iterator[Progress]:
    for work in works:
        for dry_run in dry_runs(runner, work):
            with only_asked_for(compilers.ask), torch.inference_mode():
                dry_run()
            yield told(compilers)
    while not compilers.look(LOOK):
        yield told(compilers)


def told(compilers: Compilers) -> Progress:
    return Progress("preparing", compilers.done, len(compilers.asked))


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
