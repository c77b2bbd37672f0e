"""What the page says in whole sentences."""

from __future__ import annotations

from playground import Playground


def in_words(found: dict) -> str:
    """What `RunBook.replay` found."""
    note = "" if found["same_checkpoint"] else f" The receipt is of another checkpoint, {found['recorded_model']}."
    if found["identical"]:
        return f"Identical: all {found['checked']} tokens.{note}"
    lines = [f"First differs at token {found['at'] + 1}, after {found['checked']} equal ones.{note}"]
    for name, side in (("Recorded", found["recorded"]), ("Now", found["now"])):
        if side:
            top = ", ".join(f"{best['text']!r} {best['probability']:.2%}" for best in side["top"])
            lines.append(f"{name}: {side['text']!r}; likeliest were {top}")
        else:
            lines.append(f"{name}: the text had ended.")
    return "\n".join(lines)


def title(playground: Playground) -> str:
    """The page's first lines."""
    config = playground.config
    form = "FP8 E4M3 in 128x128 tiles" if config.quantization else "unquantised"
    kept = "; KV cache in E4M3, a scale for each vector" if playground.cache_form == "fp8" else ""
    where = f"{config.num_hidden_layers} layers, {form}{kept}; {playground.path}."
    return f"# FP8 Playground\nModel **{playground.name}**, {where}"


def defaults_note(playground: Playground) -> str:
    """Where the sampling settings come from, if the checkpoint says."""
    d = playground.defaults
    if d.source is None:
        return ""
    return f"From the checkpoint's `{d.source}`: temperature {d.temperature:g}, top-k {d.top_k}, top-p {d.top_p:g}."
