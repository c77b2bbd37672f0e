"""`tokenizer.json`: text to ids at the boundary, and ids to text one token at a time without breaking UTF-8."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.decoders import DecodeStream

from playground.checkpoint.config import CheckpointError

_MAX_JSON = 16 << 20


class Tokenizer:
    """A tokenizer whose added tokens (special ones, roles, tool marks) can't be typed: text that looks like one is
    encoded as plain text. Only a chat template may write them."""

    def __init__(self, folder: Path, vocab_size: int):
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{folder} has no tokenizer.json, the only kind of tokenizer that is read.")
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            self.inner = tokenizers.Tokenizer.from_str(json.dumps(raw))
            for token in raw.get("added_tokens") or []:
                token["special"] = True  # in this copy, so that all of them can be switched off
            self.plain = tokenizers.Tokenizer.from_str(json.dumps(raw))
        except Exception as error:  # the library raises bare Exception for a damaged file
            raise CheckpointError(f"{path} can't be read: {str(error)[:300]}") from None
        if self.inner.get_vocab_size() > vocab_size:
            raise CheckpointError(f"{path} has {self.inner.get_vocab_size()} tokens, the model only {vocab_size}.")
        self.plain.encode_special_tokens = True
        self.added_tokens = {token.content: number for number, token in self.inner.get_added_tokens_decoder().items()}
        self.first = self._missing_bos(folder)

    def _missing_bos(self, folder: Path) -> list[int]:
        """DeepSeek's tokenizer.json puts nothing before a text; `add_bos_token` in the other file asks for it."""
        config = read_tokenizer_config(folder)
        bos = config.get("bos_token")
        number = self.added_tokens.get(bos.get("content") if isinstance(bos, dict) else bos if bos else "")
        wanted = config.get("add_bos_token") is True and number is not None
        return [number] if wanted and self.plain.encode("a").ids[:1] != [number] else []

    def encode(self, text: str) -> list[int]:
        """Ids with the special tokens that the tokenizer itself puts around a text. ValueError for lone surrogates."""
        return self.first + self.plain.encode(_whole_characters(text)).ids

    def encode_plain(self, text: str) -> list[int]:
        """Ids of the text alone: nothing put around it, and no added token inside it."""
        return self.plain.encode(_whole_characters(text), add_special_tokens=False).ids

    def encode_template(self, text: str) -> list[int]:
        """Ids of a rendered chat template: the added tokens in it are what they say."""
        return self.inner.encode(_whole_characters(text), add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """The text of a whole sequence, special tokens left out."""
        return self.inner.decode(ids, skip_special_tokens=True)

    def spelled(self, token: int) -> str:
        """A token's own text; bytes that are no whole character show as U+FFFD, a special token by its number."""
        return self.decode([token]) or f"<{token}>"


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """`tokenizer_config.json`, empty where there is none. Raises `CheckpointError` for one that can't be read."""
    path = folder / "tokenizer_config.json"
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
    is true, `flush` returns nothing more. `begun` are ids whose text is out already, but for the bytes of a character
    that the next id may complete.
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
        for token_id in begun:
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
