"""How the tests drive an engine and what runs on it."""

from __future__ import annotations

from dataclasses import replace

from playground.engine.engine import Engine
from playground.engine.events import EngineState, FinishEvent, ModelInfo, TokenEvent
from playground.engine.host import STATE, Host
from playground.engine.requests import Options

INFO = ModelInfo(
    "1:", "small", "", "fp8", "plain", 256, 2, 100_000, 256, 8192, 32, "cpu", "cpu", "", "", "self_attn.o_proj",
    ("fp8",),
)  # fmt: skip


def engine_of(playground, form: str = "") -> Engine:
    """The engine behind a playground on a thread. Look, and touch only while it rests."""
    return playground.client.host.engines[form or playground.form]


def replayed(book, playground, receipt, started=lambda stream: None, take=lambda stream, event: None) -> dict:
    """A receipt, run again to its end."""
    replay, event = book.replay(playground, receipt, started), None
    while True:
        try:
            stream = replay.send(event)
        except StopIteration as end:
            return end.value
        event = stream.get()
        if event is not None:
            take(stream, event)


def steps(engine: Engine) -> list:
    """One step's tokens and ends, with their rows."""
    return [(row, event) for row, event in engine.step() if isinstance(event, TokenEvent | FinishEvent)]


def hosted(engine: Engine) -> Host:
    """A host that has this engine already, without a folder behind it."""
    host = Host(Options(device=engine.model.device.type))
    info = replace(INFO, context=engine.context, vocab_size=engine.model.config.vocab_size)
    host.models.engines[info.form], host.models.info, host.loading = engine, info, None
    host.out.append((STATE, EngineState("ready", info=info)))
    return host
