"""The columns of a comparison: their settings, checked, and what to call them."""

from __future__ import annotations

from dataclasses import replace

from playground.engine.requests import RequestError, SamplingParams, whole_number
from playground.inspect.run import Run

MOST = 4
NAMES = ("sampler", "temperature", "top_k", "top_p", "min_p", "seed", "weights")
PLAIN = {
    "sampler": "gumbel", "temperature": 0.8, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": -1, "weights": "",
}  # fmt: skip
FORMS = {"": "as loaded", "fp8": "FP8", "bf16": "BF16"}


def read_columns(settings: list[dict], shared_noise: bool) -> tuple[list[SamplingParams], list[str]]:
    """Settings of the columns with their seeds drawn, and the form of the weights of each, one of `FORMS`; with shared
    noise all take the first seed that one of them names. Raises `RequestError`."""
    if (
        not isinstance(settings, list)
        or not 2 <= len(settings) <= MOST
        or not all(isinstance(s, dict) for s in settings)
    ):
        raise RequestError(f"Compare 2 to {MOST} settings, each an object with some of {', '.join(NAMES)}.")
    if unknown := {name for s in settings for name in s} - set(NAMES):
        raise RequestError(f"A setting has no {sorted(unknown)[0]!r}; it has {', '.join(NAMES)}.")
    whole = {"top_k": "Top-k", "seed": "Seed"}
    given = [PLAIN | s | {n: whole_number(label, (PLAIN | s)[n]) for n, label in whole.items()} for s in settings]
    forms = [s.pop("weights") or "" for s in given]
    if wrong := [form for form in forms if form not in list(FORMS)]:  # JSON may bring what can't be hashed
        raise RequestError(f"Weights is {repr(wrong[0])[:80]}; choose fp8 or bf16, or leave it out.")
    params = [SamplingParams(**s) for s in given]
    if shared_noise:
        seed = next((p.seed for p in params if p.seed >= 0), params[0].with_drawn_seed().seed)
        return [replace(p, seed=seed) for p in params], forms
    return [p.with_drawn_seed() for p in params], forms


def labels(runs: list[Run]) -> list[str]:
    """Each run's setting, and its weights where they differ."""
    differ = len({run.form for run in runs}) > 1
    return [label(run.params) + (f", {FORMS[run.form]} weights" if differ else "") for run in runs]


def label(params: SamplingParams) -> str:
    """A column's setting in a few words."""
    if params.is_greedy:
        return "Greedy"
    filters = [
        f"{n.replace('_', '-')} {v:g}"
        for n, v, off in (("top_k", params.top_k, 0), ("top_p", params.top_p, 1), ("min_p", params.min_p, 0))
        if v != off
    ]
    name = "Gumbel-max" if params.sampler == "gumbel" else "Multinomial"
    return ", ".join([f"{name} {params.temperature:g}", *filters, f"seed {params.seed}"])
