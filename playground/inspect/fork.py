"""Where runs on one prompt part, and why each went its own way."""

from __future__ import annotations

import math

from playground.inspect.columns import titles
from playground.inspect.run import Run
from playground.inspect.tokens import why

ROWS = 8


class Alignment:
    """Runs that write side by side: `shared` tokens in common, and, once two of them differ, the `fork`."""

    def __init__(self, runs: list[Run]):
        self.runs, self.shared = runs, 0
        self.fork: dict | None = None

    def update(self) -> None:
        """Takes in what has been written since; a fork stays what it is."""
        while self.fork is None and all(len(run.tokens) > self.shared for run in self.runs):
            if len({run.tokens[self.shared].id for run in self.runs}) > 1:
                self.fork = explain_fork(self.runs, self.shared) | {"labels": titles(self.runs)}
            else:
                self.shared += 1

    @property
    def note(self) -> str | None:
        """Of texts that never differ in a token: that they agree, or that some end where others go on."""
        done = [run.ended and len(run.tokens) == self.shared for run in self.runs]
        if self.fork is not None or not any(done):
            return None
        if all(done):
            return f"All columns wrote the same {self.shared} tokens."
        if all(d or len(run.tokens) == self.shared for d, run in zip(done, self.runs, strict=True)):
            return None  # whether the others go on is not known yet
        names = ", ".join(name for name, d in zip(titles(self.runs), done, strict=True) if d)
        return f"The columns share {self.shared} tokens; there {names} ended, and the rest went on."


def explain_fork(runs: list[Run], at: int) -> dict:
    """Of the token `at` in which the runs differ: what each column chose and why; and for the tokens that mattered the
    raw probability, once where the columns share it (the same weights), else in each column, the processed one and, of
    a Gumbel-max draw, the score."""
    tokens = [run.tokens[at] for run in runs]
    shared = len({run.form for run in runs}) == 1
    raw, cells = {}, []
    for token in tokens:
        i = token.insight
        own = dict(i.raw) | {token.id: i.logprob}
        raw = own | raw
        processed = {n: p for n, p, _ in i.scores} | dict(i.processed) | {token.id: i.processed_logprob}
        scores = {n: p + g for n, p, g in i.scores}
        cells.append((own, processed, scores))
    chosen = list(dict.fromkeys(token.id for token in tokens))
    likely = [n for n in sorted(raw, key=lambda n: -raw[n]) if n not in chosen]
    rows = sorted([*chosen, *likely[: max(ROWS - len(chosen), 0)]], key=lambda n: -raw[n])
    return {
        "at": at,
        "columns": [{"text": r.spelled(t.id), "why": _sentence(r, t)} for r, t in zip(runs, tokens, strict=True)],
        "rows": [
            {
                "text": runs[0].spelled(n),
                "raw": math.exp(raw[n]) if shared else None,
                "cells": [
                    {
                        "raw": math.exp(own[n]) if n in own and not shared else None,
                        "processed": math.exp(processed[n]) if n in processed else None,
                        "score": scores.get(n) if run.params.sampler == "gumbel" and not run.params.is_greedy else None,
                        "chosen": token.id == n,
                    }
                    for run, token, (own, processed, scores) in zip(runs, tokens, cells, strict=True)
                ],
            }
            for n in rows
        ],
    }


def _sentence(run: Run, token) -> str:
    reason = why(run, token)
    if reason["kind"] == "greedy":
        return "the likeliest token"
    if reason["kind"] == "multinomial":
        return f"uniform {reason['uniform']:.4f} fell between {reason['low']:.4f} and {reason['high']:.4f}"
    best = reason["rows"][0]
    return f"log p {best['logprob']:.3f} + noise {best['noise']:.3f} = {best['score']:.3f}, the largest"
