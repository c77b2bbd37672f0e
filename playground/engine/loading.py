"""From a folder or a Hub id to a model on a device, tensor by tensor, so that whoever loads can do other things between
two of them."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import kernels
from playground.checkpoint.chat import ChatTemplate
from playground.checkpoint.config import CheckpointError, ModelConfig, QuantizationConfig
from playground.checkpoint.files import Checkpoint
from playground.checkpoint.memory import Plan, free_bytes, plan
from playground.checkpoint.tokenizer import Tokenizer
from playground.engine.bar import Bar
from playground.engine.events import Progress
from playground.model.loading import check_headers, unused_scales
from playground.model.transformer import Transformer

MAX_ROWS = kernels.INVARIANT_ROWS


def choose_device(name: str) -> torch.device:
    """`auto` takes a CUDA card where there is one. Raises `CheckpointError` for cuda without a card."""
    if name not in ("auto", "cuda", "cpu"):
        raise CheckpointError(f"Unknown device {name!r}; choose auto, cuda or cpu.")
    if name == "cuda" and not torch.cuda.is_available():
        raise CheckpointError("No CUDA card can be used here; choose --device cpu or auto.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def choose_form(config: ModelConfig, form: str) -> ModelConfig:
    """The config with its projections in the form asked for: `auto` and `fp8` run FP8, quantising a plain checkpoint
    as it is loaded; `bf16` keeps projections plain, restoring an FP8 checkpoint."""
    if form not in ("auto", "fp8", "bf16"):
        raise CheckpointError(f"Unknown dtype {form!r}; choose auto, fp8 or bf16.")
    return replace(config, quantization=None if form == "bf16" else config.quantization or QuantizationConfig())


def choose_cache(form: str, dtype: torch.dtype) -> torch.dtype:
    """Of the KV cache of a model with this `dtype`: `plain` the same, `fp8` E4M3 with a scale for each vector."""
    if form not in ("plain", "fp8"):
        raise CheckpointError(f"Unknown cache dtype {form!r}; choose plain or fp8.")
    return torch.float8_e4m3fn if form == "fp8" else dtype


def plain_dtype(device: torch.device) -> torch.dtype:
    """Of everything that is not FP8: bfloat16 on a GPU, float32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@dataclass(frozen=True)
class Loading:
    """A checkpoint that is one and fits, before its weights are read. Made in no time, however large it is."""

    checkpoint: Checkpoint
    model: Transformer  # without weights
    room: Plan
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(
        cls,
        folder: Path | Checkpoint,
        device: torch.device,
        dtype: torch.dtype | None = None,
        form: str = "auto",
        context: int | None = None,
        cache_dtype: str = "plain",
    ) -> Loading:
        """Raises `CheckpointError` for what is no checkpoint of ours, or does not fit."""
        checkpoint = folder if isinstance(folder, Checkpoint) else Checkpoint(folder)
        dtype = dtype or plain_dtype(device)
        config = choose_form(checkpoint.config, form)
        model = Transformer(config)
        check_headers(model, checkpoint.headers)
        model.unused_scales = unused_scales(checkpoint.headers)
        room = plan(model, device, dtype, MAX_ROWS, context, free_bytes(device), choose_cache(cache_dtype, dtype))
        model.config = replace(config, max_position_embeddings=room.context)
        return cls(checkpoint, model, room, device, dtype)

    def read(self) -> Generator[Progress, None, Transformer]:
        """Reads the weights; yields behind every tensor, and returns the model."""
        total, done = self.checkpoint.bytes, 0

        def counted() -> Iterator[tuple[str, torch.Tensor]]:
            nonlocal done
            for name, tensor in self.checkpoint.tensors(self.device):
                done += tensor.nbytes
                yield name, tensor

        for _ in self.model.loading(counted(), self.device, self.dtype):
            yield Progress("loading", done, total)
        return self.model


def load_model(folder: Path | Checkpoint, device: torch.device, *choices, **more) -> tuple[Transformer, Plan]:
    """Reads a whole checkpoint, having made sure first that it is one and that it fits; arguments of `Loading.of`."""
    loading, bar = Loading.of(folder, device, *choices, **more), Bar()
    for progress in loading.read():
        bar(progress.done, progress.total)
    return loading.model, loading.room


def check(folder: Path, dtype: str = "auto") -> None:
    """Whether a folder holds a checkpoint that we run, without loading a weight. Raises `CheckpointError`."""
    checkpoint = Checkpoint(folder)
    ChatTemplate.read(checkpoint.folder, Tokenizer(checkpoint.folder, checkpoint.config.vocab_size))
    check_headers(Transformer(choose_form(checkpoint.config, dtype)), checkpoint.headers)
