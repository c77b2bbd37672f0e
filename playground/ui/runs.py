"""The runs that open pages may still ask about, and what can be done with one: explain a token, branch off, replay."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence

from playground import Playground, RequestError, SamplingParams
from playground.inspect.receipt import make_receipt, read_receipt
from playground.inspect.replay import replay
from playground.inspect.run import Run, Written
from playground.inspect.tokens import explain

KEPT = 200  # runs: 2,000 tokens each take 1.5 MB
GONE = "This run is no longer kept; run again."


class RunBook:
    """Runs by their id, which nobody can guess; the oldest are forgotten."""

    def __init__(self):
        self.runs: OrderedDict[str, Run] = OrderedDict()
        self.lock = threading.Lock()

    def begin(
        self, playground: Playground, prompt: str, params: Sequence[SamplingParams], limit: int, **options
    ) -> list[Run]:
        """Starts one row per setting on one prompt."""
        streams = playground.compare(prompt, params, limit, inspect=True, keep=True, **options)
        ids, tokenizer = streams[0].row.request.prompt, playground.tokenizer
        past_end = bool(options.get("ignore_eos"))
        return [
            self.keep(Run(stream, tokenizer, prompt, ids, p, limit, past_end))
            for stream, p in zip(streams, params, strict=True)
        ]

    def branch(
        self, playground: Playground, source: Run, at: int, token: int | None, params: SamplingParams, limit: int
    ) -> Run:
        """Goes on from `source` after its first `at` tokens, with `token` forced there where one is given. Raises
        `RequestError`."""
        if source.stream.service is not playground.service:
            raise RequestError("This run was written by a model that is no longer loaded; run again.")
        if not 0 <= at <= len(source.tokens):
            raise RequestError(f"The run has {len(source.tokens)} tokens; branch at one of them.")
        given = source.tokens[:at]
        if token is not None:
            given = [*given, self._forced(source, at, token)]
        ids = (*source.prompt_ids, *(t.id for t in given))
        options = {"ignore_eos": source.ignore_eos, "trace_scales": True, "inspect": True, "keep": True}
        # without a token of its own the prompt's logits come from its prefill, as in the first run
        parent = source.stream if given else None
        stream = playground.resume(ids, [params], limit, parent, **options)[0]
        origin = source
        while origin.parent and at < origin.taken:  # the token belongs to an ancestor
            origin = origin.parent
        run = Run(
            stream,
            source.tokenizer,
            source.prompt,
            source.prompt_ids,
            params,
            limit,
            source.ignore_eos,
            origin,
            at,
            given,
        )
        return self.keep(run)

    @staticmethod
    def _forced(source: Run, at: int, token: int) -> Written:
        insight = source.tokens[at].insight if at < len(source.tokens) else None
        known = dict(insight.raw) if insight else {}
        if token not in known:
            raise RequestError("Choose one of the alternatives that are shown for this token.")
        return Written(token, source.tokenizer.decode([token]), known[token], insight, forced=True)

    def keep(self, run: Run) -> Run:
        with self.lock:
            self.runs[run.id] = run
            while len(self.runs) > KEPT:
                self.runs.popitem(last=False)
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
            raise RequestError(f"Token {index!r} is not there; the run has {len(run.tokens)}.")
        return explain(run, index)

    def receipt(self, playground: Playground, run: Run) -> str:
        if run.stream.service is not playground.service:
            raise RequestError("This run was written by a model that is no longer loaded; run again.")
        return json.dumps(make_receipt(run, playground.name, playground.folder, playground.device), indent=1)

    def replay(self, playground: Playground, text: str) -> dict:
        """Runs a receipt again. Raises `RequestError` for one that can't be."""
        receipt = read_receipt(text)
        if not receipt.ids or not receipt.prompt:
            raise RequestError("This receipt is of a run that wrote nothing.")

        def start(ids, params, limit, parent):
            options = {"ignore_eos": receipt.ignore_eos, "inspect": True, "keep": True}
            return playground.resume(ids, [params], limit, parent, **options)[0]

        found = replay(receipt, start, playground.tokenizer.spelled)
        same = receipt.checkpoint == playground.fingerprint
        return found | {"same_checkpoint": same, "model": playground.name, "recorded_model": receipt.model}
