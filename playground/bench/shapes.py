"""Models of known shapes with random weights, made on the device, for `python -m playground.bench --shape`.

`python -m playground.bench.shapes NAME FOLDER DEVICE` writes one as a checkpoint, for a page to load.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from playground.checkpoint.config import CheckpointError
from playground.checkpoint.families import parse_config
from playground.checkpoint.files import save_shards
from playground.checkpoint.hub import EMBEDDED
from playground.engine.loading import choose_device
from playground.model.loading import SCALE_SUFFIX, expected_parameters, stored_shape
from playground.model.transformer import Transformer

_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
_QWEN3 = {
    "model_type": "qwen3", "vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960, "rope_theta": 1000000, "hidden_act": "silu", "eos_token_id": 151645,
    "tie_word_embeddings": False, "quantization_config": _FP8,
}  # fmt: skip
SHAPES = {
    "qwen3-0.6b": _QWEN3 | {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "qwen3-8b": _QWEN3 | {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
    },
    "qwen3-30b-a3b": _QWEN3 | {
        "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
    },
    "moonlight-16b-a3b": {
        "model_type": "deepseek_v3", "vocab_size": 163840, "hidden_size": 2048, "intermediate_size": 11264,
        "moe_intermediate_size": 1408, "num_hidden_layers": 27, "num_attention_heads": 16, "n_routed_experts": 64,
        "n_shared_experts": 2, "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.446, "scoring_func": "sigmoid", "norm_topk_prob": True, "topk_method": "noaux_tc",
        "q_lora_rank": None, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 50000.0, "tie_word_embeddings": False,
        "eos_token_id": 163586, "hidden_act": "silu", "quantization_config": _FP8,
    },
}  # fmt: skip


def _random_tensors(model: Transformer, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """Normal weights of deviation 0.02 under a checkpoint's names, FP8 where the model wants it."""
    generator = torch.Generator(device).manual_seed(0)
    for name, slot in expected_parameters(model).items():
        shape = stored_shape(model, name, slot)
        if len(shape) == 1:
            yield name, torch.zeros(shape, device=device) if "bias" in name else torch.ones(shape, device=device)
            continue
        weight = torch.randn(shape, device=device, generator=generator)
        if slot.dtype == torch.float8_e4m3fn:
            yield name, weight.mul_(60).clamp_(-448, 448).to(slot.dtype)
            yield name + SCALE_SUFFIX, torch.full([-(-n // 128) for n in shape], 0.02 / 60, device=device)
        else:
            yield name, weight.mul_(0.02).bfloat16()


def random_model(shape: str, device: torch.device, dtype: torch.dtype) -> Transformer:
    model = Transformer(parse_config(SHAPES[shape]))
    return model.load(_random_tensors(model, device), device, dtype)


def _tokenizer(vocab_size: int) -> dict:
    """The embedded model's tokenizer, with a made-up word for every id that it lacks: random weights draw from the
    whole vocabulary, and a token without text would be neither seen nor sent."""
    raw = json.loads((EMBEDDED / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = raw["model"]["vocab"]
    vocab |= {f"Ġ{number}#": number for number in range(len(vocab), vocab_size)}
    return raw


def write_random(shape: str, folder: Path, device: torch.device) -> bool:
    """Writes a random model as a checkpoint; false where the folder already holds it. Raises `CheckpointError` where
    it holds something else. `config.json` is written last: where it stands, all the rest does."""
    config, stands = json.dumps(SHAPES[shape]), folder / "config.json"
    if stands.exists() and stands.read_text(encoding="utf-8") == config:
        return False
    if stands.exists():
        raise CheckpointError(f"{folder} holds another checkpoint than {shape}; name a folder of its own.")
    folder.mkdir(parents=True, exist_ok=True)
    model = Transformer(parse_config(SHAPES[shape]))
    save_shards(folder, ((name, tensor.cpu()) for name, tensor in _random_tensors(model, device)), shard_bytes=1 << 30)
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer(model.config.vocab_size)), encoding="utf-8")
    stands.write_text(config, encoding="utf-8")
    return True


def main() -> int:
    shape, folder, device = sys.argv[1:]
    try:
        write_random(shape, Path(folder), choose_device(device))
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
