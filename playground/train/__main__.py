"""`python -m playground.train`: trains the embedded model and writes it as an FP8 checkpoint.

The recipe: a byte-level BPE of 4,096 tokens; most steps on windows of 512 tokens in which documents do not see each
other; then YaRN switches the rotary embedding to four times the context and the rest trains on windows of 2,048
tokens, the last tenth of all steps on stories and fables alone. Matrices learn by Muon, everything else by AdamW.
Experts are balanced without an auxiliary loss, by moving the gate's correction bias (DeepSeek-V3, section 2.1.2).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from playground.checkpoint.config import ModelConfig
from playground.checkpoint.families import parse_config
from playground.checkpoint.files import save_checkpoint
from playground.model.reference import ReferenceModel
from playground.model.rope import rope_table
from playground.train import corpus
from playground.train.muon import Muon

SHORT, LONG = 512, 2048
CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 512,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "routed_scaling_factor": 1.0,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "q_lora_rank": 256,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "max_position_embeddings": LONG,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": LONG / SHORT,
        "original_max_position_embeddings": SHORT,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}


@dataclass(frozen=True)
class Recipe:
    """Everything that the result depends on, besides the corpus."""

    vocab_size: int = 4096
    steps: int = 2400
    batch_tokens: int = 65536
    muon_lr: float = 0.006
    adam_lr: float = 0.003
    weight_decay: float = 1.0
    adam_weight_decay: float = 0.1
    dropout: float = 0.4
    long_share: float = 0.2
    story_share: float = 0.1
    balance_rate: float = 0.001
    seed: int = 1


def learning_rate(step: int, steps: int) -> float:
    """Multiplier: 2% warm-up, flat to 30%, then linearly down to nothing."""
    return min(1.0, (step + 1) / (0.02 * steps), (steps - step) / (0.7 * steps))


def build_model(config: ModelConfig, recipe: Recipe, device: str) -> ReferenceModel:
    torch.manual_seed(recipe.seed)
    model = ReferenceModel(config, recipe.dropout)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            last = name.endswith(("o_proj.weight", "down_proj.weight"))
            torch.nn.init.normal_(p, std=0.02 / (math.sqrt(2 * config.num_hidden_layers) if last else 1.0))
    model.to(device)
    if device == "cuda":
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    return model


def build_optimizers(model: ReferenceModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    matrices, vectors = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            hidden = p.ndim == 2 and not name.endswith(("embed_tokens.weight", "lm_head.weight", "gate.weight"))
            (matrices if hidden else vectors).append(p)
    muon = Muon(matrices, lr=recipe.muon_lr, weight_decay=recipe.weight_decay)
    adam = torch.optim.AdamW(
        vectors, lr=recipe.adam_lr, betas=(0.9, 0.95), weight_decay=recipe.adam_weight_decay, fused=True
    )
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return [muon, adam]


def batch_to(device: str, tokens: np.ndarray, documents: np.ndarray, isolate: bool):
    """Inputs, targets `[B, S]` and, where `isolate`, the mask that keeps attention causal inside one document."""
    ids = torch.from_numpy(tokens.astype(np.int64)).to(device, non_blocking=True)
    mask = None
    if isolate:
        docs = torch.from_numpy(documents[:, :-1]).to(device, non_blocking=True)
        mask = (docs[:, None, :, None] == docs[:, None, None, :]).tril()
    return ids[:, :-1], ids[:, 1:], mask


@torch.no_grad()
def balance_experts(model: ReferenceModel, loads: list[torch.Tensor], rate: float) -> None:
    gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    for gate, load in zip(gates, loads, strict=True):
        gate.e_score_correction_bias += rate * torch.sign(load.mean() - load)


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # every batch has its own shape
def bits_per_byte(model: ReferenceModel, rope: torch.Tensor, tokenizer, documents: list[str], device: str) -> float:
    """Of whole documents, each cut to the context; the same measure as `playground.evaluate`, in the training form."""
    model.eval()
    nats, size = 0.0, 0
    encoded = sorted((e.ids[: len(rope)] for e in tokenizer.encode_batch(documents)), key=len)
    for start in range(0, len(encoded), 32):
        part = encoded[start : start + 32]
        ids = torch.full((len(part), len(part[-1])), -100)
        for row, doc in enumerate(part):
            ids[row, : len(doc)] = torch.tensor(doc)
        size += sum(len(tokenizer.decode(doc).encode()) for doc in part)
        ids = ids.to(device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits, _ = model(ids[:, :-1].clamp(min=0), rope[: ids.shape[1] - 1])
        nats += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=-100, reduction="sum").item()
    model.train()
    return nats / math.log(2) / size


class Data:
    """The three corpus files, tokenised, with their held-out documents kept apart."""

    NAMES = ("tinystories", "fables", "gutenberg-children")

    def __init__(self, folder: Path, vocab_size: int):
        documents = {name: corpus.read_documents(folder / f"{name}.txt") for name in self.NAMES}
        self.held_out = {name: [d for d in docs if corpus.is_held_out(d)] for name, docs in documents.items()}
        train = {name: [d for d in docs if not corpus.is_held_out(d)] for name, docs in documents.items()}
        self.tokenizer = corpus.train_tokenizer([d for docs in train.values() for d in docs], vocab_size)
        encoded = {name: corpus.encode_all(self.tokenizer, docs) for name, docs in train.items()}
        stories, fables, books = (encoded[name] for name in self.NAMES)
        self.everything = [(stories, 3.0), (fables, 2.0), (books, 0.75)]
        self.stories = [(stories, 3.0), (fables, 2.0)]
        self.pass_tokens = sum(sum(map(len, docs)) * copies for docs, copies in self.everything)


def stages(recipe: Recipe, data: Data):
    """Yields `(sources, window, isolate documents, steps)` in order."""
    long, story = int(recipe.steps * recipe.long_share), int(recipe.steps * recipe.story_share)
    yield data.everything, SHORT, True, recipe.steps - long
    yield data.everything, LONG, False, long - story
    yield data.stories, LONG, False, story


def train(recipe: Recipe, data: Data, device: str, log_every: int) -> tuple[ReferenceModel, list[dict]]:
    config = parse_config(CONFIG | {"vocab_size": recipe.vocab_size})
    short = parse_config(CONFIG | {"vocab_size": recipe.vocab_size, "rope_scaling": None})
    model = build_model(config, recipe, device)
    optimizers = build_optimizers(model, recipe)
    rng, step, log = np.random.default_rng(recipe.seed), 0, []
    ropes = {SHORT: rope_table(short.rope, SHORT, device), LONG: rope_table(config.rope, LONG, device)}
    bar, began = tqdm(total=recipe.steps, mininterval=5, unit="step"), time.perf_counter()
    for sources, window, isolate, steps in stages(recipe, data):
        model.use_softmax_scale(config if window == LONG else short)
        batches = corpus.windows(sources, window, recipe.batch_tokens // window, rng)
        for _ in range(steps):
            inputs, targets, mask = batch_to(device, *next(batches), isolate)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["base_lr"] * learning_rate(step, recipe.steps)
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                logits, loads = model(inputs, ropes[window], mask)
                loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            balance_experts(model, loads, recipe.balance_rate)
            step += 1
            bar.update()
            if step % log_every == 0 or step == recipe.steps:
                bpb = bits_per_byte(model, ropes[window], data.tokenizer, data.held_out["tinystories"], device)
                log.append({"step": step, "loss": loss.item(), "held_out_stories": bpb})
                log[-1]["seconds"] = time.perf_counter() - began
                tqdm.write(json.dumps(log[-1]))
    return model, log


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m playground.train", description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True, help="folder with " + ", ".join(Data.NAMES) + " (.txt)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint: bf16/ and fp8/ inside it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--log-every", type=int, default=250, help="steps between held-out measurements")
    for name, value in asdict(Recipe()).items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(value), default=value, help=f"default {value}")
    args = parser.parse_args()
    recipe = Recipe(**{name: getattr(args, name) for name in asdict(Recipe())})
    torch.set_float32_matmul_precision("high")
    data = Data(args.corpus, recipe.vocab_size)
    print(f"a pass is {data.pass_tokens / 1e6:.1f} M tokens", flush=True)
    model, log = train(recipe, data, args.device, args.log_every)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "log.json").write_text(json.dumps({"recipe": asdict(recipe), "log": log}, indent=1), encoding="utf-8")
    config = CONFIG | {"vocab_size": recipe.vocab_size}
    for form in ("bf16", "fp8"):
        save_checkpoint(args.out / form, config, model.state_dict(), data.tokenizer, fp8=form == "fp8")
    for name, docs in data.held_out.items():
        text = f"\n{corpus.END_OF_TEXT}\n".join(docs)
        (args.out / f"held-out-{name}.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
