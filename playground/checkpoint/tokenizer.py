"""`tokenizer.json`: text to ids at the boundary, and ids to text one token at a time without breaking UTF-8."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.decoders import DecodeStream

from playground.checkpoint.config import CheckpointError
from playground.checkpoint.patterns import may_never_end

_LARGEST = 64 << 20  # of a tokenizer: Gemma 3's has 33 MB
_MAX_JSON = 16 << 20
_MARK = re.compile(r"<[|｜].*[|｜]>", re.DOTALL)  # DeepSeek's roles are written so, and not called special
BEHIND = 32  # tokens that say how the ones behind them read: a space before them, bytes of a character


class Tokenizer:
    """Text to ids and back. Control tokens (special ones, and role marks such as `<|User|>`) can't be typed: text that
    looks like one is encoded as plain text. Only a chat template may write them. Added tokens that are ordinary text
    (an umlaut, a run of spaces) are tokens like any other."""

    def __init__(self, folder: Path, vocab_size: int):
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{folder} has no tokenizer.json, the only kind of tokenizer that is read.")
        if path.stat().st_size > _LARGEST:
            raise CheckpointError(f"{path} is larger than {_LARGEST >> 20} MB; that is no tokenizer.")
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            _check_patterns(raw, path)
            self.inner = _library(raw)
            for token in (
                raw.get("added_tokens") or []
            ):  # in these copies control tokens can be switched off, all of them
                token["special"] = bool(token["special"] or _MARK.fullmatch(token["content"]))
            self.plain, self.within = _library(raw), _library(_never_first(raw))
        except (KeyboardInterrupt, SystemExit, CheckpointError):
            raise
        except BaseException as error:  # the library raises bare Exception for a damaged file, and panics
            raise CheckpointError(f"{path} can't be read: {str(error)[:300]}") from None
        self.plain.encode_special_tokens = self.within.encode_special_tokens = True
        self.added_tokens = {token.content: number for number, token in self.inner.get_added_tokens_decoder().items()}
        beyond = [i for i in self.inner.get_vocab().values() if i >= vocab_size]
        if set(beyond) - set(self.added_tokens.values()):  # an added one, such as a pad token, is never written
            raise CheckpointError(f"{path} has tokens up to number {max(beyond)}, the model only {vocab_size}.")
        marks = self.plain.get_added_tokens_decoder().values()
        self.control_tokens = [token.content for token in marks if token.special]
        self.named = named_tokens(folder)  # such as eos_token
        self.first = self._missing_bos(folder)
        letter = self.plain.encode("a", add_special_tokens=False).ids
        self.anchor = letter[-1:] if self.decode(letter[-1:]) else []

    def _missing_bos(self, folder: Path) -> list[int]:
        """DeepSeek's tokenizer.json puts nothing before a text; `add_bos_token` in the other file asks for it."""
        number = self.added_tokens.get(self.named.get("bos_token", ""))
        wanted = read_json(folder, "tokenizer_config.json").get("add_bos_token") is True and number is not None
        return [number] if wanted and self.plain.encode("a").ids[:1] != [number] else []

    @property
    def eos(self) -> tuple[int, ...]:
        """The token that the tokenizer's own files call the end, if any."""
        number = self.inner.token_to_id(self.named.get("eos_token", ""))
        return () if number is None else (number,)

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        """Ids with the special tokens that the tokenizer itself puts around a text; with `parse_special`, control
        tokens in it are what they say. ValueError for lone surrogates."""
        inner = self.inner if parse_special else self.plain
        return self.first + inner.encode(_whole_characters(text)).ids

    def encode_plain(self, text: str, within: bool = False) -> list[int]:
        """Ids of the text alone: nothing put around it, and no control token inside it. `within`: it stands behind
        other text."""
        inner = self.within if within else self.plain
        return inner.encode(_whole_characters(text), add_special_tokens=False).ids

    def encode_template(self, text: str) -> list[int]:
        """Ids of a rendered chat template: the control tokens in it are what they say."""
        return self.inner.encode(_whole_characters(text), add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a whole sequence, special tokens left out."""
        return self.inner.decode(list(ids), skip_special_tokens=True)

    def spelled(self, token: int) -> str:
        """A token's own text, as it stands behind other text: some tokenizers drop a space that begins one. Bytes that
        are no whole character show as U+FFFD, a special token by its number."""
        before, both = self.decode(self.anchor), self.decode([*self.anchor, token])
        return (both[len(before) :] if both.startswith(before) else self.decode([token])) or f"<{token}>"


def _library(raw: dict) -> tokenizers.Tokenizer:
    """What a file says of truncation and padding was for its training: a prompt is taken whole, and nothing but it."""
    inner = tokenizers.Tokenizer.from_str(json.dumps(raw))
    inner.no_truncation()
    inner.no_padding()
    return inner


def _check_patterns(raw: Any, path: Path) -> None:
    """The library gives up a match that takes too long, but one for every character adds up."""
    for part in raw.values() if isinstance(raw, dict) else raw if isinstance(raw, list) else ():
        if isinstance(part, dict) and isinstance(pattern := part.get("Regex"), str) and may_never_end(pattern):
            raise CheckpointError(f"{path} has a pattern that may take forever to match: {pattern[:80]!r}.")
        _check_patterns(part, path)


def _never_first(raw: Any) -> Any:
    """A tokenizer's description for text that stands behind other text: no space is put before it."""
    if isinstance(raw, list):
        return [_never_first(part) for part in raw]
    if not isinstance(raw, dict) or "vocab" in raw:
        return raw
    parts = {name: _never_first(part) for name, part in raw.items()}
    return parts | ({"prepend_scheme": "never"} if parts.get("prepend_scheme") == "first" else {})


def named_tokens(folder: Path) -> dict[str, str]:
    """The special tokens that a folder's files name, `bos_token` and the like, with their text: of two files the older
    kind, `special_tokens_map.json`, counts where `tokenizer_config.json` does not list all tokens itself."""
    config = read_json(folder, "tokenizer_config.json")
    older = {} if "added_tokens_decoder" in config else read_json(folder, "special_tokens_map.json")
    found = {}
    for name, value in (config | older).items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A file beside the tokenizer, empty where there is none. Raises `CheckpointError` for one that can't be read."""
    path = folder / name
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > _MAX_JSON:
            raise CheckpointError(f"{path} is larger than {_MAX_JSON >> 20} MB.")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, RecursionError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} can't be read as JSON: {error}") from None
    return config if isinstance(config, dict) else {}


def _whole_characters(text: str) -> str:
    try:
        text.encode("utf-8")  # the library would raise a TypeError that says nothing
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start + 1} is half of a surrogate pair, not a character") from None
    return text


class TextStream:
    """Text of a growing sequence: complete characters only, and nothing of a stop string.

    `push` returns the text that became certain; what might still turn into a stop string is held back. Once `stopped`
    is true, `flush` returns nothing more. `begun` are ids whose text is out already: the next id goes on behind it, and
    may complete a character of theirs.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = (), begun: Sequence[int] = ()):
        self.tokenizer, self.stop = tokenizer, stop
        self.decoder = DecodeStream(skip_special_tokens=True)
        self.ids: list[int] = []
        self.pending: list[int] = []  # those that have given no text yet
        self.broken = False  # the text is no longer what its ids decode to as a whole
        self.decoded = 0  # characters that the decoder has given out
        self.held = ""
        self.stopped = False
        for token_id in begun[-BEHIND:]:
            self._decode(token_id)

    def _decode(self, token_id: int) -> str:
        self.ids.append(token_id)
        self.pending.append(token_id)
        try:
            piece = self.decoder.step(self.tokenizer.inner, token_id) or ""
        except Exception as error:
            if "Invalid prefix" not in str(error):
                raise
            # Bytes that form no character make the library see earlier text in another light. What is out is out: what
            # was pending shows as U+FFFD, and the text goes on behind it.
            piece, self.broken = self.tokenizer.decode(self.pending), True
            self.decoder = DecodeStream(skip_special_tokens=True)
        if piece:
            self.pending = []
        self.decoded += len(piece)
        return piece

    def push(self, token_id: int) -> str:
        return self._release(self._decode(token_id))

    def flush(self) -> str:
        """The rest at the end of a sequence: held text, and U+FFFD for bytes that never became a character."""
        if self.stopped:
            return ""
        left = self.tokenizer.decode(self.pending) if self.broken else self.tokenizer.decode(self.ids)[self.decoded :]
        rest = self._release(left)
        rest, self.held = rest + self.held, ""
        return rest

    def _release(self, piece: str) -> str:
        text = self.held + piece
        cuts = [at for s in self.stop if (at := text.find(s)) >= 0]
        if cuts:
            self.stopped, self.held = True, ""
            return text[: min(cuts)]
        keep = max((n for s in self.stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]
