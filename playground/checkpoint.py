"""Model folders in the Hub's DeepSeek-V3 format: `config.json`, `tokenizer.json`, sharded safetensors with an index."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import kernels
from playground.config import BLOCK_SIZE, CheckpointError, ModelConfig, parse_config

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 9_000_000  # a plain push to a Space refuses files over 10 MB
SCALE_SUFFIX = "_scale_inv"
KEPT_IN_BF16 = ("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight")


def is_quantised(name: str, tensor: torch.Tensor) -> bool:
    """Whether DeepSeek-V3's format stores this tensor as FP8: every projection, but not embedding, head and gate."""
    return tensor.ndim == 2 and not name.endswith(KEPT_IN_BF16)


def _stored_form(state: dict[str, torch.Tensor], fp8: bool) -> dict[str, torch.Tensor]:
    stored = {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu()
        if fp8 and is_quantised(name, tensor):
            # quantise what the BF16 checkpoint holds, so that both forms descend from the same weights
            stored[name], stored[name + SCALE_SUFFIX] = kernels.weight_quant(tensor.bfloat16())
        else:
            stored[name] = tensor.float() if name.endswith("e_score_correction_bias") else tensor.bfloat16()
    return stored


def save_checkpoint(folder: Path, config: dict[str, Any], state: dict[str, torch.Tensor], tokenizer, fp8: bool) -> None:
    """Writes a whole model folder; `fp8` chooses block-scaled FP8 projections, otherwise everything is BF16."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in _stored_form(state, fp8).items():
        if size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.contiguous()
        size += tensor.nbytes
    where, total = {}, 0
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(shard, file))
        total += sum(t.nbytes for t in shard.values())
    quantization = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK_SIZE, BLOCK_SIZE],
    }
    files = {
        INDEX: {"metadata": {"total_size": total}, "weight_map": where},
        "config.json": config | ({"quantization_config": quantization} if fp8 else {}),
        "generation_config.json": {k: config[k] for k in ("bos_token_id", "eos_token_id")},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|endoftext|>",
            "eos_token": "<|endoftext|>",
            "model_max_length": config["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"))


def _read_json(folder: Path, name: str) -> Any:
    try:
        return json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} has no {name}: a model folder holds config.json, tokenizer.json and safetensors files."
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / name} can't be read as JSON: {error}") from None


def _shards(folder: Path) -> dict[str, set[str] | None]:
    """Each safetensors file and the tensors that the index expects in it (None: whatever it holds)."""
    if not (folder / INDEX).exists():
        if not (folder / "model.safetensors").exists():
            raise CheckpointError(f"{folder} has neither {INDEX} nor model.safetensors.")
        return {"model.safetensors": None}
    index = _read_json(folder, INDEX)
    where = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(where, dict) or not all(isinstance(v, str) for v in where.values()):
        raise CheckpointError(f"{folder / INDEX} has no weight_map of tensor names to files.")
    shards: dict[str, set[str] | None] = {}
    for tensor, file in where.items():
        if Path(file).name != file or not (folder / file).is_file():
            raise CheckpointError(f"{INDEX} places {tensor} in {file!r}, which is not a file in {folder}.")
        shards.setdefault(file, set()).add(tensor)
    return shards


def read_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields every tensor of the folder once, memory-mapped, shard by shard; nothing is ever unpickled."""
    for file, expected in _shards(folder).items():
        try:
            with safe_open(folder / file, framework="pt") as shard:
                names = set(shard.keys())
                if expected is not None and names != expected:
                    odd = sorted(names ^ expected)[0]
                    raise CheckpointError(f"{file} and {INDEX} disagree about tensor {odd}.")
                for name in sorted(names):
                    yield name, shard.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{folder / file} is not a whole safetensors file: {error}") from None


def read_config(folder: Path) -> ModelConfig:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; name one that holds config.json and safetensors files.")
    return parse_config(_read_json(folder, "config.json"))
