"""What a card needs before the first text comes at once: kernels compiled, steps and prompts recorded. First those that
a first run needs, whatever its sampler; later batch sizes and variants when the engine has nothing else to do."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise, product
from typing import NamedTuple

import torch
from torch import nn

from kernels import INVARIANT_ROWS
from kernels.compiling import Compilers, only_asked_for
from playground.engine.decoder import GraphDecoder, Variant, draw_output
from playground.engine.events import Progress
from playground.engine.pages import pages_for
from playground.engine.prefill import DOUBLED, Chunk, Kind
from playground.engine.runner import Runner
from playground.engine.sampler import Needs, Settings
from playground.engine.settings import SamplingParams
from playground.model.layers import Product
from playground.model.transformer import Transformer

LOOK = 0.002  # seconds to wait for a compiler
NEEDS = [Needs(filtered, summed) for filtered, summed in product((False, True), repeat=2)]
PLAINEST, FULLEST = (Variant(needs, traced=True, inspected=True) for needs in (NEEDS[0], NEEDS[-1]))


class Work(NamedTuple):
    """Prompts of so many tokens, and steps of so many rows, with all that a page shows of them."""

    prompts: tuple[int, ...]
    rows: tuple[int, ...]
    needs: list[Needs]
    traced: bool = True  # with activation scales


PENALISED, PENALISED_ROWS = [needs._replace(penalised=True) for needs in NEEDS], (1, INVARIANT_ROWS)
PROMPTS, GROUPS = (32, 64, 128), (1, 4)  # of a first run, alone or compared: compiled before the page is ready
ROWS = (1, 2, 4, 8, 16, INVARIANT_ROWS)
LATER = (  # first what a crowd needs
    Work((), ROWS, NEEDS[:1]),
    Work((*PROMPTS, 256, DOUBLED), ROWS, NEEDS[1:]),
    Work((), PENALISED_ROWS, PENALISED),  # those alone that can stand in for the others
    Work((*PROMPTS, 256), (1, 2, 4), NEEDS, traced=False),
)


def prepare_first(runner: Runner, compilers: Compilers) -> Iterator[Progress]:
    """What a first run needs, whatever its sampler and filters: its kernels, told how many of them are there, and the
    plainest step recorded."""
    first = ((1, PLAINEST), (INVARIANT_ROWS, FULLEST))
    runs = [partial(dry_prompt, runner, size, traced) for size in PROMPTS for traced in (True, False)]
    runs += [partial(dry_step, runner, rows, variant) for rows, variant in first]
    runs += [partial(dry_draw, runner, rows, Variant(needs, False, True)) for rows in GROUPS for needs in NEEDS]
    yield from compiled(runner, runs, compilers)
    with torch.inference_mode():
        runner.decoder.recorded(1, PLAINEST)
    yield told(compilers)


def prepare_later(runner: Runner, compilers: Compilers) -> Iterator[Progress]:
    """First the step that can serve for all others until theirs are recorded; then all batch sizes and variants."""
    for _ in record_step(runner, INVARIANT_ROWS, FULLEST):
        yield told(compilers)
    runs = []
    for work in LATER:
        runs += [partial(dry_prompt, runner, size, work.traced) for size in work.prompts]
        runs += [partial(dry_step, runner, *one) for one in steps_of(work)]
    yield from compiled(runner, runs, compilers)
    compilers.close()
    for work in LATER:
        for _ in record(runner, work):
            yield told(compilers)


def compiled(runner: Runner, runs: Sequence[Callable[[], object]], compilers: Compilers) -> Iterator[Progress]:
    """Makes dry runs, and waits until what they ask for is compiled."""
    for dry_run in runs:
        with only_asked_for(compilers.ask), shallow(runner.model), torch.inference_mode():
            dry_run()
        yield told(compilers)
    while not compilers.look(LOOK):
        yield told(compilers)
    for failure in compilers.failed:
        print(f"A kernel could not be compiled ahead: {failure}", file=sys.stderr, flush=True)
    compilers.failed.clear()


@contextmanager
def shallow(model: Transformer) -> Iterator[None]:
    """Within it, the model has no more layers than show all there is: each kind of layer behind each kind that it
    follows somewhere, and the last. A dry run asks for the same kernels in a fraction of the time, but for the one that
    hands results to the host, which is compiled for the sizes of a whole model's trace."""
    body, layers = model.model, model.model.layers
    kept, seen = {0, len(layers) - 1}, set()
    for at, pair in enumerate(pairwise(kind_of(model, index) for index in range(len(layers)))):
        if pair not in seen or at + 2 == len(layers):
            kept |= {at, at + 1}
        seen.add(pair)
    body.layers = nn.ModuleList(layers[index] for index in sorted(kept))
    try:
        yield
    finally:
        body.layers = layers


def kind_of(model: Transformer, index: int) -> tuple:
    """All by which a layer's kernels differ from another's."""
    products = tuple(part.fp8 for part in model.model.layers[index].modules() if isinstance(part, Product))
    return model.config.is_moe(index), model.config.window_of(index), products


def told(compilers: Compilers) -> Progress:
    return Progress("preparing", compilers.done, len(compilers.asked))


def dry_prompt(runner: Runner, size: int, traced: bool) -> None:
    """The end of a prompt that begins with its last chunk, on the page that is nobody's."""
    Chunk(runner.model, runner.cache, Kind(0, size, traced, True)).run()


def dry_step(runner: Runner, rows: int, variant: Variant) -> None:
    """A decode step of rows that are nobody's, as it is recorded, but for the recording."""
    runner.decoder.made(rows, variant, lambda run: (None, run()))


def dry_draw(runner: Runner, rows: int, variant: Variant) -> None:
    """The draw behind a prompt that `rows` share."""
    device = runner.model.device
    settings = Settings.of([SamplingParams("greedy")] * rows, device)
    logits = torch.zeros(rows, runner.model.config.vocab_size, device=device)
    draw_output(logits, settings, torch.ones(rows, dtype=torch.int64, device=device), variant, None)


def record(runner: Runner, work: Work) -> Iterator[None]:
    """Makes the recordings, one at a time."""
    scratch = runner.cache.scratch
    for size in work.prompts:
        pages = [scratch] * pages_for(size)
        for _ in range(2):  # the second time, a prompt is recorded
            with torch.inference_mode():
                runner.prefill.feed([0] * size, 0, pages, work.traced, True)
            yield
    for step in steps_of(work):
        yield from record_step(runner, *step)


def record_step(runner: Runner, rows: int, variant: Variant) -> Iterator[None]:
    """In two slices, since a request that comes meanwhile waits for the end of one: a run that loads its kernels, and
    the recording."""
    decoder = runner.decoder
    if not isinstance(decoder, GraphDecoder) or (rows, variant) in decoder.graphs:
        return
    with torch.inference_mode():
        dry_step(runner, rows, variant)
    yield
    with torch.inference_mode():
        decoder.recorded(rows, variant, compiled=True)
    yield


def steps_of(work: Work) -> list[tuple[int, Variant]]:
    return [(rows, Variant(needs, work.traced, True)) for rows, needs in product(work.rows, work.needs)]
