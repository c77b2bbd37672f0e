"""FP8 Playground: a block-scaled FP8 language model that writes where you can watch it."""

from playground.api import Playground, load
from playground.checkpoint.config import CheckpointError
from playground.engine.requests import FinishEvent, RequestError, SamplingParams, Stats, TokenEvent

__all__ = [
    "CheckpointError",
    "FinishEvent",
    "Playground",
    "RequestError",
    "SamplingParams",
    "Stats",
    "TokenEvent",
    "load",
]
