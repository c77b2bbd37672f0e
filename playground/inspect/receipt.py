"""A receipt: the JSON that replays a run. Read as hostile input, checked once, here."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from playground.engine.events import ModelInfo
from playground.engine.settings import SETTINGS, RequestError, SamplingParams
from playground.inspect.columns import MOST
from playground.inspect.run import Run

FORMAT = "fp8-playground receipt, version 2"
LONGEST = 8 << 20  # characters
MOST_SEGMENTS = 100  # each is a run of its own
SHOWN = 5  # alternatives per token
_SAMPLE, _SAMPLES = 1 << 20, 64


@dataclass(frozen=True)
class Segment:
    """A stretch of a run under one setting; `keep` of its tokens stand, then `forced` follows, if anything was. If it
    `branched`, it began on the cache of the stretch before, else with a prefill of its own: their bits may differ."""

    params: SamplingParams
    keep: int
    forced: int | None
    ignore_eos: bool
    branched: bool


@dataclass(frozen=True)
class Receipt:
    model: str  # name, for people
    checkpoint: str  # `fingerprint` of its files
    prompt: tuple[int, ...]
    segments: tuple[Segment, ...]
    goes_on: bool  # whether its text goes on the prompt's, as a chat's answer does not
    text: str | None  # compared where the receipt has it, as are log-probabilities
    ids: tuple[int, ...]
    logprobs: tuple[float | None, ...]
    top: tuple[tuple[tuple[int, float], ...], ...]  # per token the likeliest raw ids and log-probabilities
    weights: str  # the form that they ran in, fp8 or bf16
    cache: str  # that of the KV cache, plain or fp8


@lru_cache(maxsize=8)
def fingerprint(folder: Path) -> str:
    """SHA-256 over a checkpoint's config, tokenizer and weight files: names, sizes and bytes; of files beyond 64 MB 64
    pieces of 1 MB from the header to the end, so that a checkpoint of 700 GB is told from its siblings in seconds."""
    digest = hashlib.sha256()
    files = [folder / "config.json", folder / "tokenizer.json", *sorted(folder.glob("*.safetensors"))]
    files = [file for file in files if file.is_file()]  # a link may lead nowhere, and nothing was read from there
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}:".encode())
        with file.open("rb") as handle:
            if size <= _SAMPLES * _SAMPLE:
                digest.update(handle.read())
                continue
            for number in range(_SAMPLES):
                handle.seek((size - _SAMPLE) * number // (_SAMPLES - 1))
                digest.update(handle.read(_SAMPLE))
    return digest.hexdigest()


def make_receipt(run: Run, info: ModelInfo) -> dict:
    """Everything that the run depends on, and what it wrote."""
    tokens = list(run.tokens)  # the run may still be writing
    lineage, segments = run.lineage(), []
    for part, child in zip(lineage, [*lineage[1:], None], strict=True):
        keep = (len(tokens) if child is None else child.at) - part.taken
        ways = {"ignore_eos": part.ignore_eos, "branched": part.stream.branched}
        segments.append(asdict(part.params) | {"keep": keep, "forced": child.forced if child else None} | ways)
    return {
        "format": FORMAT,
        "model": info.name,
        "checkpoint": fingerprint(Path(info.folder)),
        "device": info.device_name,
        "torch": info.torch,
        "prompt": run.prompt,
        "prompt_ids": list(run.prompt_ids),
        "weights": run.form,
        "cache": info.cache_form,
        "segments": segments,
        "finish_reason": run.stats and run.stats["finish_reason"],
        "goes_on": run.root.stream.request.begun > 0,
        "text": "".join(token.text for token in tokens),
        "tokens": [
            {
                "id": token.id,
                "logprob": token.logprob,
                "top": [list(pair) for pair in token.insight.raw[:SHOWN]] if token.insight else [],
            }
            for token in tokens
        ],
    }


def read_receipts(text: str) -> list[Receipt]:
    """One receipt, or the list of them that a comparison is saved as. Raises `RequestError` for anything that is not a
    receipt of ours, naming what is wrong."""
    if not isinstance(text, str) or len(text) > LONGEST:
        raise RequestError(f"A receipt is a text of at most {LONGEST >> 20} MB.")
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"This is not a receipt: it can't be read as JSON ({error}).") from None
    if isinstance(raw, list) and not 1 <= len(raw) <= MOST:
        raise RequestError(f"This is a list of {len(raw)}; a comparison has 1 to {MOST} receipts.")
    return [_receipt(one) for one in (raw if isinstance(raw, list) else [raw])]


def _receipt(raw: object) -> Receipt:
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise RequestError(f"This is not a receipt of this program: its format is not {FORMAT!r}.")
    try:
        tokens = _list(raw, "tokens")
        receipt = Receipt(
            model=_text(raw, "model"),
            checkpoint=_text(raw, "checkpoint"),
            prompt=tuple(_whole(i) for i in _list(raw, "prompt_ids")),
            segments=tuple(_segment(part) for part in _list(raw, "segments")),
            goes_on=raw.get("goes_on", False) is True,  # before receipts said so, no text did
            text=_text(raw, "text", LONGEST) if "text" in raw else None,
            ids=tuple(_whole(token["id"]) for token in tokens),
            logprobs=tuple(_number(token["logprob"]) if "logprob" in token else None for token in tokens),
            top=tuple(tuple((_whole(i), _number(p)) for i, p in token["top"][:SHOWN]) for token in tokens),
            weights=_text(raw, "weights"),
            cache=_text({"cache": "plain"} | raw, "cache"),  # what there was before receipts said so
        )
    except RequestError:
        raise
    except KeyError as missing:
        raise RequestError(f"This receipt is damaged: its {missing} is missing. Save the run again.") from None
    except (TypeError, ValueError, OverflowError) as error:
        raise RequestError(f"This receipt is damaged: a part of it is of another kind ({error}).") from None
    if len(receipt.segments) > MOST_SEGMENTS:
        raise RequestError(
            f"This receipt has {len(receipt.segments)} branches in a row; {MOST_SEGMENTS} can be replayed."
        )
    if receipt.weights not in ("fp8", "bf16"):
        raise RequestError("This receipt is damaged: its weights are neither fp8 nor bf16.")
    if receipt.cache not in ("plain", "fp8"):
        raise RequestError("This receipt is damaged: its cache is neither plain nor fp8.")
    if not receipt.ids or not receipt.prompt:
        raise RequestError("This receipt is of a run that wrote nothing.")
    forced = sum(part.forced is not None for part in receipt.segments)
    if not receipt.segments or sum(part.keep for part in receipt.segments) + forced != len(receipt.ids):
        raise RequestError("This receipt is damaged: its segments do not add up to its tokens.")
    return receipt


def _segment(raw: dict) -> Segment:
    # a setting that came later than the receipt is as by default
    params = SamplingParams(**{n: raw[n] for n, setting in SETTINGS.items() if n in raw or setting.needed})
    if params.seed < 0:
        raise ValueError("a seed is missing")
    ways = (raw["ignore_eos"], raw["branched"])
    if not all(isinstance(way, bool) for way in ways):
        raise TypeError("ignore_eos and branched are true or false")
    return Segment(params, _whole(raw["keep"]), None if raw.get("forced") is None else _whole(raw["forced"]), *ways)


def _list(raw: dict, name: str) -> list:
    if not isinstance(raw[name], list):
        raise TypeError(f"{name} is no list")
    return raw[name]


def _text(raw: dict, name: str, longest: int = 1000) -> str:
    if not isinstance(raw[name], str) or len(raw[name]) > longest:
        raise TypeError(f"{name} is no text of up to {longest} characters")
    return raw[name]


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 31:
        raise ValueError(f"{repr(value)[:80]} is no token id or count")
    return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -1e6 < value < 1e-6:
        raise ValueError(f"{repr(value)[:80]} is no log-probability")
    return float(value)
