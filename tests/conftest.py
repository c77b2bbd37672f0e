"""Shared fixtures. Without a CUDA card, Triton runs in its interpreter: set before anything imports it."""

from __future__ import annotations

import os
import shutil

import pytest

if "OMP_NUM_THREADS" not in os.environ:  # torch reads it as it is imported; processes that a test starts inherit it
    # By itself torch takes a thread for every core. Where several test processes share a machine, those wait at each
    # barrier for threads that have no core to run on, and a CPU twin takes minutes instead of seconds
    os.environ["OMP_NUM_THREADS"] = str(min(os.cpu_count() or 1, 2))

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from playground import load
from playground.checkpoint.config import ModelConfig
from playground.checkpoint.families import parse_config
from playground.engine.pages import PAGE_SIZE
from playground.model.transformer import Transformer
from playground.train.__main__ import CONFIG

SMALL = CONFIG | {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "q_lora_rank": 128,
    "max_position_embeddings": 256,
    "rope_scaling": CONFIG["rope_scaling"] | {"original_max_position_embeddings": 64},
    "eos_token_id": 0,
}
FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}


def pytest_collection_modifyitems(items):
    """GPU tests need the card. A missing browser is a skip on a developer's machine and a failure in CI."""
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA card"))
        if "browser" in item.keywords and not shutil.which("chromium") and not os.environ.get("CI"):
            item.add_marker(pytest.mark.skip(reason="no chromium; apt-get install chromium"))


def random_tensors(config: ModelConfig, seed: int = 0):
    """Well-behaved random weights under a checkpoint's names, plain or FP8 as the config says."""
    import kernels

    generator = torch.Generator().manual_seed(seed)
    for name, slot in Transformer(config).named_parameters():
        if name.endswith("weight_scale_inv") or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        if slot.ndim == 1:
            yield name, torch.rand(slot.shape, generator=generator) * 0.2 + (0 if "bias" in name else 0.9)
        elif slot.dtype == torch.float8_e4m3fn:
            q, s = kernels.weight_quant(torch.randn(slot.shape, generator=generator) * 0.05)
            yield name, q
            yield name + "_scale_inv", s
        else:
            yield name, torch.randn(slot.shape, generator=generator) * 0.05


def empty_cache(config: ModelConfig, pages: int, dtype: torch.dtype = torch.float32):
    """In which every number that nobody wrote is NaN."""
    import kernels

    shape, a = (config.num_hidden_layers, pages, PAGE_SIZE), config.attention
    cache = kernels.KV.zeros(*shape, widths=a.cache_widths, dtype=dtype, device="cpu", across=a.cache_across)
    if cache.scales is None:
        cache.values.fill_(float("nan"))
    else:
        cache.values.view(torch.uint8).fill_(0x7F)
        cache.scales.fill_(float("nan"))
    return cache


def small_model(device: str = "cpu", dtype: torch.dtype = torch.float32, fp8: bool = True, **changes) -> Transformer:
    config = parse_config(SMALL | (FP8 if fp8 else {}) | changes)
    return Transformer(config).load(random_tensors(config), torch.device(device), dtype)


@pytest.fixture(scope="session")
def small():
    return small_model


@pytest.fixture(scope="session")
def small_config():
    return SMALL


@pytest.fixture(scope="session")
def storyteller():
    with load(device="cpu") as playground:
        yield playground
