"""A run as it was written, token by token: what the views show, what a branch starts from, what a receipt says."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, overload

import numpy as np

from playground.checkpoint.tokenizer import TextStream, Tokenizer
from playground.engine.client import Stream
from playground.engine.events import FinishEvent, TokenEvent
from playground.engine.insight import Insight
from playground.engine.settings import SamplingParams


class Written(NamedTuple):
    """One token of a run. A forced one was chosen by a person: its insight is of the draw that it replaced."""

    id: int
    text: str  # what became certain with it
    logprob: float
    insight: Insight | None
    forced: bool = False

    @property
    def rank(self) -> int:
        """How many tokens were likelier, whether it was drawn or forced: only what is shown can be forced."""
        return [i for i, _ in self.insight.raw].index(self.id) if self.forced else self.insight.rank


class Tokens(Sequence[Written]):
    """The tokens of a run, in columns. A page keeps hundreds of thousands of them; Python's garbage collector, which
    stops the program while it looks through all objects, has nothing to look for in numbers, texts and bytes."""

    def __init__(self):
        self.ids: list[int] = []
        self.texts: list[str] = []
        self.logprobs: list[float] = []
        self.insights: list[bytes | None] = []
        self.forced: set[int] = set()  # places

    def append(self, token: Written) -> None:
        if token.forced:
            self.forced.add(len(self.ids))
        self.texts.append(token.text)
        self.logprobs.append(token.logprob)
        self.insights.append(token.insight and np.asarray(token.insight.numbers, np.float64).tobytes())
        self.ids.append(token.id)  # last: whoever reads meanwhile finds whole tokens

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, place: int) -> Written: ...
    @overload
    def __getitem__(self, place: slice) -> list[Written]: ...
    def __getitem__(self, place):
        if isinstance(place, slice):
            return [self[index] for index in range(len(self))[place]]
        index = range(len(self))[place]
        numbers = self.insights[index]
        insight = None if numbers is None else Insight(memoryview(numbers).cast("d"))
        return Written(self.ids[index], self.texts[index], self.logprobs[index], insight, index in self.forced)


@dataclass(eq=False)
class Run:
    """`tokens` and `text` follow the prompt; of a branch they begin with what it took over from its parent."""

    stream: Stream
    tokenizer: Tokenizer
    prompt: str
    prompt_ids: tuple[int, ...]  # of the root's prompt
    params: SamplingParams
    limit: int
    ignore_eos: bool = False
    parent: Run | None = None
    at: int = 0  # how many of its parent's tokens it took over
    tokens: Sequence[Written] = ()
    id: str = field(default_factory=lambda: secrets.token_urlsafe(12))
    text: str = ""
    marks: str = ""  # per token `length,logprob,entropy,rank,flag;` with the length in UTF-16 units, as scripts count
    stats: dict | None = None  # the figures that it ended with

    def __post_init__(self):
        given, self.tokens = self.tokens, Tokens()
        self.taken = len(given)  # from its parent, a forced token included
        self.depth = self.parent.depth + 1 if self.parent else 0
        self.ended = False
        for token in given:
            self._append(token)

    @property
    def form(self) -> str:
        """Of the weights."""
        return self.stream.form

    @property
    def parse_special(self) -> bool:
        """Whether these are the prompt's ids only where special tokens in it are read as such."""
        return tuple(self.tokenizer.encode(self.prompt)) != self.prompt_ids

    @property
    def forced(self) -> int | None:
        """The token that a person chose for this branch."""
        token = self.tokens[self.taken - 1] if self.taken > self.at else None
        return token.id if token and token.forced else None

    def _append(self, token: Written) -> None:
        self.tokens.append(token)
        self.text += token.text
        units, i = len(token.text.encode("utf-16-le", "surrogatepass")) // 2, token.insight
        entropy, rank = (f"{i.entropy:.4g}", token.rank) if i else ("", "")
        self.marks += f"{units},{token.logprob:.5g},{entropy},{rank},{'f' if token.forced else ''};"

    def add(self, event: TokenEvent | FinishEvent) -> None:
        """Takes in what the stream brought."""
        if isinstance(event, TokenEvent):
            self._append(Written(event.id, event.text, event.logprob, event.insight))
            return
        self.ended = True
        if event.text:  # held back until the end: a token's text that had not become certain
            self.text += event.text
            self.marks += f"{len(event.text.encode('utf-16-le', 'surrogatepass')) // 2},,,,;"

    @classmethod
    def of(cls, stream: Stream, tokenizer: Tokenizer, prompt: str) -> Run:
        """A run that begins with its prompt."""
        asked = stream.request
        return cls(stream, tokenizer, prompt, asked.prompt, asked.params, asked.max_new_tokens, asked.ignore_eos)

    def text_of(self, token: int, at: int) -> str:
        """What `token` would add to the text behind its first `at` tokens, which may have begun a character."""
        begun = self.prompt_ids[len(self.prompt_ids) - self.root.stream.request.begun :]
        return TextStream(self.tokenizer, begun=(*begun, *self.ids[:at])).push(token)

    def spelled(self, token: int) -> str:
        return self.tokenizer.spelled(token)

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(self.tokens.ids)

    def piece(self, start: int, end: int | None = None) -> tuple[str, str]:
        """Text and marks of the tokens from `start` to `end`; what came after the last belongs to the end."""
        marks = self.marks.split(";")
        texts, text = self.tokens.texts, self.text
        before = sum(map(len, texts[:start]))
        if end is not None:
            text = text[: before + sum(map(len, texts[start:end]))]
            marks = [*marks[:end], ""]
        return text[before:], ";".join(marks[start:])

    @property
    def root(self) -> Run:
        return self.lineage()[0]

    def lineage(self) -> list[Run]:
        """The root first, this run last."""
        line = [self]
        while line[-1].parent:
            line.append(line[-1].parent)
        return line[::-1]
