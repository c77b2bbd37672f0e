"""The columns of a comparison: their settings, checked, and what to call them."""

from __future__ import annotations

from dataclasses import replace

from playground.engine.settings import (
    FOLDED,
    PENALTIES,
    SAMPLER_NAMES,
    SETTINGS,
    SUGGESTED,
    RequestError,
    SamplingParams,
    in_a_word,
)
from playground.inspect.run import Run

MOST = 4
NAMES = (*SETTINGS, "weights")
PLAIN = SUGGESTED | {"weights": ""}
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
    given = [dict(setting) for setting in settings]
    forms = [setting.pop("weights", "") or "" for setting in given]
    if unknown := {name for setting in given for name in setting} - set(SETTINGS):
        raise RequestError(f"A setting has no {sorted(map(str, unknown))[0]!r}; it has {', '.join(NAMES)}.")
    if wrong := [form for form in forms if form not in list(FORMS)]:  # JSON may bring what can't be hashed
        raise RequestError(f"Weights is {repr(wrong[0])[:80]}; choose fp8 or bf16, or leave it out.")
    params = [SamplingParams.read(SUGGESTED | setting) for setting in given]
    if shared_noise:
        seed = next((p.seed for p in params if p.seed >= 0), params[0].with_drawn_seed().seed)
        return [replace(p, seed=seed) for p in params], forms
    return [p.with_drawn_seed() for p in params], forms


def titles(runs: list[Run], whole: bool = False) -> list[str]:
    """What tells each run from the others, in a few words, or the `whole` setting of each."""
    parts = [_parts(run) for run in runs]
    differ = [name for name in parts[0] if len({part[name] for part in parts} - {None}) > 1]
    names = [name for name in parts[0] if name in differ or (whole and name != "weights")]
    found = [", ".join(part[name] for name in names if part[name]) for part in parts]
    return [title or f"Column {n}" for n, title in enumerate(found, 1)]


def _parts(run: Run) -> dict[str, str | None]:
    """None: that has no meaning here."""
    p = run.params
    drawn = not p.is_greedy
    more = {name: getattr(p, name) for name in (FOLDED if drawn else PENALTIES)}
    more = {name: in_a_word(name, value) for name, value in more.items() if value != SETTINGS[name].off}
    return {
        "sampler": SAMPLER_NAMES[p.sampler] if drawn else "Greedy",
        "temperature": f"T = {p.temperature:g}" if drawn else None,
        **{name: more.get(name, "") for name in FOLDED},
        "weights": f"{FORMS[run.form]} weights",
        "seed": f"seed {p.seed}" if drawn else None,
    }
