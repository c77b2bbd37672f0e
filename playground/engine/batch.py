"""What the scheduler tells the runner: frozen, numbers only, and all that another rank would need to be told."""

from __future__ import annotations

from dataclasses import dataclass

from playground.engine.settings import SamplingParams

Copies = tuple[tuple[int, int], ...]
"""Pages to copy, source and target: a fork writes on in a page that it shared."""


@dataclass(frozen=True)
class RowDraw:
    """How one row draws, and what it wants to know of it."""

    params: SamplingParams
    traced: bool = False  # activation scales
    inspected: bool = False  # what was behind the draw


@dataclass(frozen=True)
class History:
    """The tokens that penalties of a row speak of."""

    prompt: tuple[int, ...]
    written: tuple[int, ...]


@dataclass(frozen=True)
class PrefillChunk:
    """The tokens `start` to `start + len(tokens)` of a prompt, into `pages`, which hold all of it up to there. With
    `draws` the prompt ends here, and each of these rows draws its first token; then `copies` are made."""

    tokens: tuple[int, ...]
    start: int
    pages: tuple[int, ...]
    draws: tuple[RowDraw, ...] = ()
    copies: Copies = ()
    histories: tuple[History | None, ...] = ()  # one for each draw


@dataclass(frozen=True)
class DecodeRow:
    """A row's next step: feed `token`, which will stand at `position` in `pages`, and draw."""

    token: int
    position: int
    pages: tuple[int, ...]
    draw: RowDraw
    history: History | None = None  # of a row with penalties


@dataclass(frozen=True)
class DecodeBatch:
    """The rows of the steps from here on; who comes or goes makes a new batch."""

    rows: tuple[DecodeRow, ...]
