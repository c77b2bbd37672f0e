"""How requests and events cross a socket: a frame is a JSON text and the bytes that it refers to. Nothing is unpickled:
what is read are numbers, texts, arrays, and the dataclasses of `requests.py` and `events.py`, by name.

The tokens of one step lie side by side in `Tokens`, columns instead of an object for each.
"""

from __future__ import annotations

import inspect
import json
import socket
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np

from playground.engine import events, requests, settings
from playground.engine.events import TokenEvent
from playground.engine.insight import Insight

LONGEST = 1 << 30  # bytes of a frame
_HEAD = struct.Struct("<II")  # bytes of the JSON text, and how many pieces of bytes follow it


@dataclass(frozen=True)
class Tokens:
    """A step's tokens, several of a row included: R of them, in order."""

    rows: np.ndarray  # [R] int64
    indexes: np.ndarray  # [R] int64
    ids: np.ndarray  # [R] int64
    logprobs: np.ndarray  # [R] float64
    texts: tuple[str, ...]
    prefill: tuple[float | None, ...]
    insights: bytes  # float64 numbers, token after token
    insight_ends: np.ndarray  # [R] int64: where each token's end; where it begins if nobody asked
    scales: bytes  # float32 numbers, likewise
    scale_ends: np.ndarray


def pack(tokens: Sequence[tuple[int, TokenEvent]]) -> Tokens:
    rows, given = zip(*tokens, strict=True)
    return Tokens(
        np.array(rows, dtype=np.int64),
        np.array([e.index for e in given], dtype=np.int64),
        np.array([e.id for e in given], dtype=np.int64),
        np.array([e.logprob for e in given], dtype=np.float64),
        tuple(e.text for e in given),
        tuple(e.prefill_seconds for e in given),
        *_joined([b"" if e.insight is None else bytes(e.insight.numbers) for e in given]),
        *_joined([b"" if e.scales is None else e.scales.tobytes() for e in given]),
    )


def _joined(pieces: list[bytes]) -> tuple[bytes, np.ndarray]:
    return b"".join(pieces), np.cumsum([len(piece) for piece in pieces], dtype=np.int64)


def _parted(joined: bytes, ends: np.ndarray) -> list[bytes]:
    ends = ends.tolist()
    return [joined[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def unpack(t: Tokens) -> list[tuple[int, TokenEvent]]:
    columns = (t.rows.tolist(), t.indexes.tolist(), t.ids.tolist(), t.logprobs.tolist())
    return [
        (
            row,
            TokenEvent(
                index,
                token,
                text,
                logprob,
                seconds,
                Insight(memoryview(insight).cast("d")) if insight else None,
                np.frombuffer(scales, np.float32) if scales else None,
            ),
        )
        for row, index, token, logprob, text, seconds, insight, scales in zip(
            *columns,
            t.texts,
            t.prefill,
            _parted(t.insights, t.insight_ends),
            _parted(t.scales, t.scale_ends),
            strict=True,
        )
    ]


_KNOWN = {
    name: kind
    for module in (events, requests, settings, sys.modules[__name__])
    for name, kind in inspect.getmembers(module, is_dataclass)
    if inspect.isclass(kind)
}
_FIELDS = {kind: tuple(f.name for f in fields(kind)) for kind in _KNOWN.values()}


def encode(message: Any) -> list[bytes]:
    """A frame's pieces, in order."""
    pieces: list[bytes] = []

    def plain(value: Any) -> Any:
        if isinstance(value, (bool, int, float, str)) or value is None:
            return value
        if isinstance(value, (tuple, list)):
            return [plain(one) for one in value]
        if isinstance(value, bytes):
            pieces.append(value)
            return {"@": "bytes", "piece": len(pieces) - 1}
        if isinstance(value, np.ndarray):
            pieces.append(value.tobytes())
            return {"@": "array", "piece": len(pieces) - 1, "dtype": value.dtype.str, "shape": value.shape}
        if type(value) in _FIELDS:
            return {"@": type(value).__name__, **{n: plain(getattr(value, n)) for n in _FIELDS[type(value)]}}
        if isinstance(value, dict):
            return {"@": "dict", "items": [[plain(k), plain(v)] for k, v in value.items()]}
        raise TypeError(f"{type(value).__name__} does not cross")

    text = json.dumps(plain(message), separators=(",", ":")).encode()
    sizes = struct.pack(f"<{len(pieces)}I", *map(len, pieces))
    return [_HEAD.pack(len(text), len(pieces)), sizes, text, *pieces]


def decode(text: bytes, pieces: Sequence[bytes]) -> Any:
    """Raises ValueError for what `encode` does not write."""

    def live(value: Any) -> Any:
        if isinstance(value, list):
            return tuple(map(live, value))
        if not isinstance(value, dict):
            return value
        name = value.pop("@", None)
        if name == "bytes":
            return pieces[value["piece"]]
        if name == "array":
            return np.frombuffer(pieces[value["piece"]], value["dtype"]).reshape(value["shape"])
        if name == "dict":
            return {live(k): live(v) for k, v in value["items"]}
        if name not in _KNOWN:
            raise ValueError(f"unknown kind of message {name!r}")
        return _KNOWN[name](**{n: live(v) for n, v in value.items()})

    return live(json.loads(text))


def send(to: socket.socket, message: Any) -> None:
    """Raises OSError once the other side is gone."""
    to.sendall(b"".join(encode(message)))


class Reader:
    """Frames from a socket, one after the other."""

    def __init__(self, of: socket.socket):
        self.file = of.makefile("rb", buffering=1 << 20)

    def read(self) -> Any:
        """The next message. Raises EOFError where the other side has gone."""
        size, count = _HEAD.unpack(self._exactly(_HEAD.size))
        sizes = struct.unpack(f"<{count}I", self._exactly(4 * count))
        if size + sum(sizes) > LONGEST:
            raise EOFError(f"a frame of {size + sum(sizes)} bytes")
        text = self._exactly(size)
        return decode(text, [self._exactly(n) for n in sizes])

    def _exactly(self, size: int) -> bytes:
        try:
            data = self.file.read(size)
        except OSError:
            data = b""
        if len(data) < size:
            raise EOFError("the other side has gone")
        return data
