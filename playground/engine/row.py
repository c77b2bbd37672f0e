"""One running sequence."""

from __future__ import annotations

from dataclasses import dataclass, field

from playground.checkpoint.tokenizer import TextStream
from playground.engine.batch import History, RowDraw
from playground.engine.events import FinishEvent, Stats
from playground.engine.requests import Request


@dataclass(eq=False)
class Row:
    id: int  # the client's
    request: Request
    limit: int  # tokens it may draw: what was asked for, or what the context leaves
    text: TextStream | None
    submitted: float
    parent: Row | None = None  # whose cache it starts from, if that still holds all but the last token of its prompt
    watch: str = ""  # the projection whose activation scales its events bring
    branched: bool = False  # it did start from its parent's cache
    cached: int = 0  # tokens of its prompt that stood in the cache before it came
    position: int = 0  # its place in line as last told; 0: it did not wait
    pages: list[int] = field(default_factory=list)
    length: int = 0  # tokens that stand in the cache
    new_ids: list[int] = field(default_factory=list)
    prefill_seconds: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0
    finished: bool = False

    @property
    def newest(self) -> int:
        """The token that the next step feeds."""
        return self.new_ids[-1] if self.new_ids else self.request.prompt[-1]

    @property
    def draw(self) -> RowDraw:
        return RowDraw(self.request.params, self.request.trace_scales, self.request.inspect)

    @property
    def history(self) -> History | None:
        if not self.request.params.is_penalised:
            return None
        prompt, end = self.request.prompt, len(self.request.prompt) - self.request.written
        return History(prompt[:end], (*prompt[end:], *self.new_ids))

    def holds(self, prompt: tuple[int, ...]) -> bool:
        """Whether the cache of this row begins with all but the last token of a prompt."""
        count = len(prompt) - 1
        known = self.request.prompt + tuple(self.new_ids[: max(count - len(self.request.prompt), 0)])
        return bool(self.pages) and 0 < count <= self.length and known[:count] == prompt[:count]

    def finish(self, reason: str, cache_total: int) -> FinishEvent:
        """Whatever its tokenizer raises at the end of a text, it raises here."""
        prompt, seconds = len(self.request.prompt), self.last_token - self.first_token
        stats = Stats(
            finish_reason=reason,
            prompt_tokens=prompt,
            cached_tokens=self.cached,
            new_tokens=len(self.new_ids),
            seed=self.request.params.seed,
            ttft=max(self.first_token - self.submitted, 0.0),
            prefill_rate=(prompt - self.cached) / self.prefill_seconds if self.prefill_seconds else 0.0,
            decode_rate=(len(self.new_ids) - 1) / seconds if seconds > 0 else 0.0,
            cache_used=self.length,
            cache_total=cache_total,
        )
        return FinishEvent(self.text.flush() if self.text else "", stats)
