"""The runs that open pages may still ask about, and what can be done with one: explain a token, branch off, replay."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

from playground.api import Playground
from playground.checkpoint.tokenizer import TextStream
from playground.engine.client import Stream
from playground.engine.events import Event
from playground.engine.settings import RequestError, SamplingParams
from playground.inspect.receipt import MOST_SEGMENTS, Receipt, fingerprint, make_receipt
from playground.inspect.replay import replay
from playground.inspect.run import Run, Written
from playground.inspect.tokens import explain

KEPT = 200  # runs: 2,000 tokens each take 1.5 MB
GONE = "This run is no longer kept; run again."


class RunBook:
    """Runs by their id, which nobody can guess; the oldest are forgotten."""

    def __init__(self):
        self.runs: dict[str, Run] = {}  # the oldest first

    def begin(
        self,
        playground: Playground,
        prompt: str,
        params: Sequence[SamplingParams],
        limit: int,
        forms: Sequence[str] | None = None,
        ids: Sequence[int] = (),
        **options,
    ) -> list[Run]:
        """Starts one row per setting on one prompt, each on the weights of its form; none: those that are loaded. `ids`
        of the prompt, where they are known."""
        ids = ids or playground.encode(prompt)
        streams = playground.fork(ids, params, limit, forms, inspect=True, keep=True, **options)
        return [self.keep(Run.of(stream, playground.tokenizer, prompt)) for stream in streams]

    def branch(
        self,
        playground: Playground,
        source: Run,
        at: int,
        token: int | None,
        params: SamplingParams,
        limit: int,
        ignore_eos: bool = False,
        **options,
    ) -> Run:
        """Goes on from `source` after its first `at` tokens, with `token` forced there where one is given. Raises
        `RequestError`."""
        writer = playground.writer_of(source.stream)
        if not 0 <= at <= len(source.tokens):
            raise RequestError(f"The run has {len(source.tokens)} tokens; branch at one of them.")
        origin = source
        while origin.parent and at < origin.taken:  # the token belongs to an ancestor
            origin = origin.parent
        if origin.depth + 1 >= MOST_SEGMENTS:
            raise RequestError(f"This text has {MOST_SEGMENTS} branches in a row; branch from an earlier one.")
        given = source.tokens[:at]
        if token is not None:
            given = [*given, self._forced(source, at, token)]
        ids = (*source.prompt_ids, *(t.id for t in given))
        begun = len(given) + source.root.stream.request.begun
        options |= {"inspect": True, "keep": True, "begun": begun, "written": len(given), "ignore_eos": ignore_eos}
        # without a token of its own the prompt's logits come from its prefill, as in the first run
        parent = source.stream if given else None
        stream = writer.resume(ids, [params], limit, parent, **options)[0]
        about = (source.tokenizer, source.prompt, source.prompt_ids, stream.request.params, limit, ignore_eos)
        return self.keep(Run(stream, *about, parent=origin, at=at, tokens=given))

    @staticmethod
    def _forced(source: Run, at: int, token: int) -> Written:
        insight = source.tokens[at].insight if at < len(source.tokens) else None
        known = dict(insight.raw) if insight else {}
        if token not in known:
            raise RequestError("Choose one of the alternatives that are shown for this token.")
        return Written(token, source.text_of(token, at), known[token], insight, forced=True)

    def keep(self, run: Run) -> Run:
        self.runs[run.id] = run
        while len(self.runs) > KEPT:
            del self.runs[next(iter(self.runs))]
        return run

    def get(self, run_id: object) -> Run:
        run = self.runs.get(run_id) if isinstance(run_id, str) else None
        if run is None:
            raise RequestError(GONE)
        return run

    def explain(self, asked: dict) -> dict:
        """For a view's script: a token, or an `error`."""
        try:
            return self.token(asked["run"], asked["index"])
        except (RequestError, KeyError, TypeError) as error:
            return {"error": str(error) if isinstance(error, RequestError) else GONE}

    def token(self, run_id: object, index: object) -> dict:
        run = self.get(run_id)
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(run.tokens):
            raise RequestError(f"Token {repr(index)[:80]} is not there; the run has {len(run.tokens)}.")
        return explain(run, index)

    def receipt(self, playground: Playground, *runs: Run) -> str:
        """One receipt; of several runs a list of them."""
        receipts = [make_receipt(run, playground.writer_of(run.stream).info) for run in runs]
        return json.dumps(receipts if len(receipts) > 1 else receipts[0])

    def replay(
        self, playground: Playground, receipt: Receipt, started: Callable[[Stream], object] = lambda stream: None
    ) -> Generator[Stream, Event, dict]:
        """Runs a receipt again, as `inspect.replay.replay` does; `started` is told of each stream, which may be closed
        to stop it. The weights' form has to be loaded. Raises `RequestError`."""
        if receipt.cache != playground.info.cache_form:
            raise RequestError(
                f"This run's KV cache was {receipt.cache}, and here it is {playground.info.cache_form}: its tokens "
                f"can't be checked. Start the playground with --cache-dtype {receipt.cache}."
            )
        writer = playground.in_form(receipt.weights)

        def start(ids, params, limit, ignore_eos, parent):
            written = len(ids) - len(receipt.prompt)
            begun = written + (len(receipt.prompt) if receipt.goes_on else 0)
            options = {"ignore_eos": ignore_eos, "inspect": True, "keep": True, "written": written, "begun": begun}
            stream = writer.resume(ids, [params], limit, parent, **options)[0]
            started(stream)
            return stream

        def text_of(ids: Sequence[int]) -> str:
            stream = TextStream(writer.tokenizer, begun=receipt.prompt if receipt.goes_on else ())
            return "".join(map(stream.push, ids))

        found = yield from replay(receipt, start, writer.tokenizer.spelled, text_of)
        same = receipt.checkpoint == fingerprint(Path(writer.info.folder))
        return found | {"same_checkpoint": same, "model": writer.name, "recorded_model": receipt.model}
