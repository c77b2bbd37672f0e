"""What the page says in whole sentences."""

from __future__ import annotations

from playground.engine.events import EngineState, ModelInfo
from playground.engine.settings import FOLDED, SETTINGS, in_a_word


def in_words(found: dict) -> str:
    """What `RunBook.replay` found."""
    note = "" if found["same_checkpoint"] else f" The receipt is of another checkpoint, {found['recorded_model']}."
    if found["identical"]:
        return f"Identical: all {found['checked']} tokens.{note}"
    if but := found["but"]:
        place = "" if but["at"] is None else f" of token {but['at'] + 1}"
        recorded, now = (repr(but[side])[:200] for side in ("recorded", "now"))
        return f"The same {found['checked']} tokens, but another {but['what']}{place}: {recorded}, now {now}.{note}"
    lines = [f"First differs at token {found['at'] + 1}, after {found['checked']} equal ones.{note}"]
    for name, side in (("Recorded", found["recorded"]), ("Now", found["now"])):
        if side:
            top = ", ".join(f"{best['text']!r} {best['probability']:.2%}" for best in side["top"])
            lines.append(f"{name}: {side['text']!r}; likeliest were {top}")
        else:
            lines.append(f"{name}: the text had ended.")
    return "\n".join(lines)


def defaults_note(info: ModelInfo) -> str:
    """Where the sampling settings come from, if the checkpoint says."""
    if not info.suggested:
        return ""
    shown = [name for name in FOLDED if info.defaults[name] != SETTINGS[name].off]
    first = "greedy" if info.defaults["sampler"] == "greedy" else in_a_word("temperature", info.defaults["temperature"])
    values = ", ".join([first, *(in_a_word(name, info.defaults[name]) for name in shown)])
    return f"From the checkpoint's `generation_config.json`: {values}."


def state_in_words(state: EngineState) -> str:
    """What the engine is doing, where that is more than being ready."""
    match state.phase:
        case "ready":
            return ""
        case "starting":
            return "The engine is starting…"
        case "loading" if state.total:
            return f"Loading {state.done / 1e9:.1f} of {state.total / 1e9:.1f} GB…"
        case "loading":
            return "Loading the model…"
        case "preparing":
            return f"Preparing kernels, {state.done} of {state.total}…"
        case "restarting":
            return "The engine ended unexpectedly and is being started again…"
        case _:
            return state.message
