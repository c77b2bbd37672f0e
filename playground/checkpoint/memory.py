"""Whether a model fits, reckoned before anything is loaded: weights, KV cache and working space against free memory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from playground.checkpoint.config import CheckpointError, ModelConfig
from playground.engine.cache import token_bytes
from playground.engine.pages import PAGE_SIZE, PREFILL_CHUNK
from playground.model.layers import Linear, Product
from playground.model.loading import SCALE_SUFFIX

UNLIMITED = 1 << 62
RESERVE = 256 << 20  # the CUDA context's own growth, fragmentation, compiled kernels


@dataclass(frozen=True)
class Plan:
    """Bytes, and what they allow: `cache_tokens` in all, `context` per row."""

    weights: int
    workspace: int
    per_token: int  # of the KV cache
    free: int
    context: int
    cache_tokens: int
    cache_dtype: torch.dtype

    @property
    def total(self) -> int:
        return self.weights + self.workspace + self.cache_tokens * self.per_token


def weight_bytes(model: nn.Module, device: torch.device, dtype: torch.dtype) -> int:
    """Of a model without weights, as it will stand on `device`; a CPU also keeps each FP8 weight restored."""
    total = 0
    for name, p in model.named_parameters():
        fixed = p.dtype == torch.float8_e4m3fn or name.endswith((SCALE_SUFFIX, "e_score_correction_bias"))
        total += p.numel() * (p.dtype if fixed else dtype).itemsize
    if device.type == "cpu":
        total += sum(m.weight.numel() for m in model.modules() if isinstance(m, Linear) and m.is_fp8) * dtype.itemsize
    for m in model.modules():
        if isinstance(m, Product):  # room for experts that are stored once more, in the order of the products
            total += m.spare * m.outputs * m.inputs * (1 if m.fp8 else dtype.itemsize)
    c = model.config
    if c.tie_word_embeddings:
        total -= model.lm_head.weight.numel() * dtype.itemsize
    return total + c.num_hidden_layers * c.attention.absorbed_weights * dtype.itemsize


def _chunk_bytes(c: ModelConfig, tokens: int, context: int) -> int:
    """The widest moment of a prefill chunk, in float32."""
    width = 4 * c.width + 2 * c.attention.prefill_width
    width += 3 * max(c.intermediate_size, c.moe.moe_intermediate_size if c.moe else 0)
    return tokens * (width * 4 + context)


def workspace_bytes(c: ModelConfig, context: int, recorded: bool) -> int:
    """A prefill chunk, sampling, and every head's keys and values of the whole context in two copies: generous, and
    small beside the weights. On a card, where graphs are `recorded`, once more, because a chunk runs without a
    recording first; and 32 rows of which one filters, and one has penalties: nine numbers of 8 bytes for each token of
    the vocabulary."""
    seen = 2 * context * c.attention.expanded_width * 4
    once = _chunk_bytes(c, min(PREFILL_CHUNK, context), context) + seen + 32 * c.vocab_size * 8
    return 2 * once + 32 * c.vocab_size * 9 * 8 if recorded else once


def free_bytes(device: torch.device) -> int:
    """What can be had now: of a card, or of this machine as far as its container and its shell let us."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return max(min(_free_in_machine(), _free_in_container(), _free_in_address_space()), 0)


def _free_in_machine() -> int:
    """Without swapping, page cache included."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else UNLIMITED


def _free_in_container(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Under the memory limits of the control groups that this process is in, of either version; cached file pages
    (`inactive_file`) are given up when they are needed."""
    free = UNLIMITED
    try:
        lines = [line.split(":", 2) for line in own.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return free
    for _, controllers, path in lines:
        if controllers not in ("", "memory") and "memory" not in controllers.split(","):
            continue
        base = root / "memory" if controllers else root
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        inner = base / path.lstrip("/")
        for group in [inner, *inner.parents]:  # in a container of its own, what is seen of the path may be the root
            if not group.is_relative_to(base):
                break
            limit, used = (_number_in(group / name) for name in names)
            if limit is not None and used is not None:
                free = min(free, limit - used + _inactive_file(group))
    return free


def _number_in(file: Path) -> int | None:
    """None where there is no such file, or no limit."""
    try:
        text = file.read_text(encoding="utf-8").strip()
        return int(text) if text.isdigit() else None
    except OSError:
        return None


def _inactive_file(group: Path) -> int:
    try:
        lines = (group / "memory.stat").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    found = [int(line.split()[1]) for line in lines if line.startswith(("inactive_file ", "total_inactive_file "))]
    return max(found, default=0)


def _free_in_address_space() -> int:
    """Under `ulimit -v`, which counts what is mapped, used or not."""
    try:
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit == resource.RLIM_INFINITY:
            return UNLIMITED
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
        return limit - pages * resource.getpagesize()
    except (ImportError, OSError):
        return UNLIMITED


def plan(
    model: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    context: int | None,
    free: int,
    cache_dtype: torch.dtype | None = None,
) -> Plan:
    """The largest cache up to `rows` whole contexts; `cache_dtype` defaults to `dtype`. Raises `CheckpointError` with
    the sum, and the largest context that would fit, where not even one row has room."""
    c, cache_dtype = model.config, cache_dtype or dtype
    limit = c.max_position_embeddings
    if context is not None and not 1 <= context <= limit:
        raise CheckpointError(f"--context must be from 1 to {limit} for this model, not {context}.")
    context = context or limit
    weights = weight_bytes(model, device, dtype) + context * c.rope.dim * 4
    recorded = device.type == "cuda"
    workspace = workspace_bytes(c, context, recorded) + RESERVE
    per_token = token_bytes(c, cache_dtype)
    room = max(free - weights - workspace, 0) // (per_token * PAGE_SIZE) * PAGE_SIZE
    one_row = -(-context // PAGE_SIZE) * PAGE_SIZE
    if room < one_row:
        need = weights + workspace + one_row * per_token
        left = free - weight_bytes(model, device, dtype) - RESERVE
        fitting = _largest_context(c, left, per_token, context, recorded)
        hint = f"; --context {fitting} would fit" if fitting else "; not even a short context would fit"
        raise CheckpointError(
            f"{_gib(weights)} of weights, {_gib(one_row * per_token)} of KV cache for {context} tokens and "
            f"{_gib(workspace)} of working space make {_gib(need)}, but {_gib(free)} is free on {device}{hint}."
        )
    return Plan(weights, workspace, per_token, free, context, min(room, rows * one_row), cache_dtype)


def _largest_context(c: ModelConfig, room: int, per_token: int, below: int, recorded: bool) -> int:
    """In whole pages; 0 where there is no room for one."""
    low, high = 0, below // PAGE_SIZE
    while low < high:
        middle = (low + high + 1) // 2
        tokens = middle * PAGE_SIZE
        need = tokens * (per_token + c.rope.dim * 4) + workspace_bytes(c, tokens, recorded)
        low, high = (middle, high) if need <= room else (low, middle - 1)
    return low * PAGE_SIZE


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
