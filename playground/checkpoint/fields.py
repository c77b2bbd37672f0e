"""Typed access to the JSON of a checkpoint: every complaint names the file and the field."""

from __future__ import annotations

from typing import Any

from playground.checkpoint.config import CheckpointError

LIMITS = {  # the largest known model stays under a quarter of each; more is a damaged file, not a model
    "vocab_size": 1 << 20,
    "hidden_size": 1 << 16,
    "intermediate_size": 1 << 18,
    "moe_intermediate_size": 1 << 16,
    "num_hidden_layers": 512,
    "num_attention_heads": 1024,
    "num_key_value_heads": 1024,
    "n_routed_experts": 4096,
    "num_experts": 4096,
    "num_local_experts": 4096,
    "head_dim": 1024,
    "max_position_embeddings": 1 << 24,
    "original_max_position_embeddings": 1 << 24,
}
_MAX_INT = 1 << 16


class Fields:
    """Typed access to a JSON object; every complaint names the field."""

    def __init__(self, raw: Any, where: str):
        if not isinstance(raw, dict):
            raise CheckpointError(f"{where} must be a JSON object, not {type(raw).__name__}.")
        self.raw, self.where = raw, where

    def _fail(self, name: str, wanted: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {name} must be {wanted}, not {self.raw.get(name)!r}.")

    def integer(self, name: str, default: int | None = None, least: int = 1) -> int:
        value, most = self.raw.get(name), LIMITS.get(name, _MAX_INT)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self._fail(name, f"an integer from {least} to {most}")
        return value

    def number(self, name: str, default: float | None = None, least: float = 0.0) -> float:
        value = self.raw.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < 1e30:
            raise self._fail(name, f"a number of at least {least}")
        return float(value)

    def maybe(self, name: str) -> float | None:
        """A number, or None where there is none."""
        return None if self.raw.get(name) is None else self.number(name)

    def numbers(self, name: str) -> tuple[float, ...]:
        value = self.raw.get(name)
        if not isinstance(value, list) or not all(type(one) in (int, float) and 0 < one < 1e30 for one in value):
            raise self._fail(name, "a list of positive numbers")
        return tuple(map(float, value))

    def choice(self, name: str, options: tuple, default: Any) -> Any:
        value = self.raw.get(name, default)
        if not isinstance(value, (str, bool, type(None))) or value not in options:
            raise self._fail(name, "one of " + ", ".join(map(repr, options)))
        return value

    def list_of(self, name: str, kind: type) -> tuple:
        value = self.raw.get(name)
        value = [] if value is None else value
        if not isinstance(value, list) or not all(type(item) is kind for item in value):
            raise self._fail(name, f"a list of {kind.__name__}")
        return tuple(value)

    def token_ids(self, name: str, vocab_size: int) -> tuple[int, ...]:
        value = self.raw.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(i) is int and 0 <= i < vocab_size for i in ids):
            raise self._fail(name, "token ids below vocab_size")
        return tuple(ids)
