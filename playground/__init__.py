"""FP8 Playground: a block-scaled FP8 language model that writes where you can watch it."""

from playground.api import Playground, generate, load
from playground.checkpoint.config import CheckpointError
from playground.engine.client import EngineError
from playground.engine.events import FinishEvent, Stats, TokenEvent
from playground.engine.settings import RequestError, SamplingParams

__all__ = [
    "CheckpointError",
    "EngineError",
    "FinishEvent",
    "Playground",
    "RequestError",
    "SamplingParams",
    "Stats",
    "TokenEvent",
    "generate",
    "load",
]
