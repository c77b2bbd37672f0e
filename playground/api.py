"""`load(...)`: a model folder becomes a running playground that writes, compares and explains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

import kernels
from playground.checkpoint import read_config, read_tensors
from playground.config import CheckpointError
from playground.engine.engine import Engine
from playground.engine.request import Request, RequestError, SamplingParams
from playground.engine.service import Service, Stream
from playground.model.transformer import Transformer
from playground.tokenizer import Tokenizer

EMBEDDED = Path(__file__).parent / "assets" / "storyteller"


def choose_device(name: str) -> torch.device:
    """`auto` takes a CUDA card where there is one. Raises `CheckpointError` for cuda without a card."""
    if name not in ("auto", "cuda", "cpu"):
        raise CheckpointError(f"Unknown device {name!r}; choose auto, cuda or cpu.")
    if name == "cuda" and not torch.cuda.is_available():
        raise CheckpointError("No CUDA card can be used here; choose --device cpu or auto.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def load_model(folder: Path, device: torch.device, dtype: torch.dtype | None = None) -> Transformer:
    """Reads a whole checkpoint; `dtype` of everything that is not FP8: bfloat16 on a GPU, float32 on a CPU."""
    config = read_config(folder)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    return Transformer.build(config, read_tensors(folder), device, dtype)


class Playground:
    """A loaded model and its engine. Close it, or use it as a context manager, to end the engine's thread."""

    def __init__(self, folder: Path, device: torch.device, model: Transformer, tokenizer: Tokenizer):
        self.name, self.folder, self.device = folder.name, folder, device
        self.model, self.tokenizer, self.config = model, tokenizer, model.config
        self.service = Service(Engine(model, tokenizer))

    @property
    def path(self) -> str:
        """In words, what computes: which depends on whether this device has FP8 units."""
        if self.device.type == "cpu":
            return "torch twins on the CPU"
        if kernels.has_fp8_units(self.device):
            return "Triton kernels on the GPU's FP8 units"
        return "Triton kernels that decode FP8 themselves, as this GPU has no FP8 units"

    def stream(
        self,
        prompt: str,
        params: SamplingParams | None = None,
        max_new_tokens: int = 256,
        **options,
    ) -> Stream:
        """Starts one row and returns its stream of `TokenEvent`s, ended by a `FinishEvent`.

        `options` are those of `Request`: `stop`, `ignore_eos`, `trace_scales`. Raises `RequestError`.
        """
        return self.compare(prompt, [params or SamplingParams()], max_new_tokens, **options)[0]

    def compare(
        self, prompt: str, params: Sequence[SamplingParams], max_new_tokens: int = 256, **options
    ) -> list[Stream]:
        """Starts one row per setting: the prompt is prefilled once, the rows stream together as one batch."""
        ids = self.encode(prompt)
        requests = [Request(ids, p.with_drawn_seed(), max_new_tokens, **options) for p in params]
        return self.service.submit(requests)

    def encode(self, prompt: str) -> tuple[int, ...]:
        if not isinstance(prompt, str) or not prompt.strip():
            raise RequestError("The prompt is empty; write a few words for the model to continue.")
        if len(prompt) > 64 * self.config.max_position_embeddings:  # no token is that long: don't even tokenise it
            raise RequestError(
                f"The prompt has {len(prompt)} characters and the context holds "
                f"{self.config.max_position_embeddings} tokens; shorten the prompt."
            )
        try:
            return tuple(self.tokenizer.encode(prompt))
        except ValueError as error:
            raise RequestError(f"The prompt is not valid text: {error}; remove it and run again.") from None

    def close(self) -> None:
        self.service.close()

    def __enter__(self) -> Playground:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def load(model: str | Path | None = None, device: str = "auto") -> Playground:
    """Loads a model folder (default: the embedded model) onto `auto`, `cuda` or `cpu`.

    Raises `CheckpointError`, whose message says what is wrong with the folder or the device.
    """
    folder, chosen = Path(model) if model else EMBEDDED, choose_device(device)
    config = read_config(folder)
    tokenizer = Tokenizer(folder, config.vocab_size)
    return Playground(folder, chosen, load_model(folder, chosen), tokenizer)
