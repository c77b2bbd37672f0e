"""Every family against transformers: a small random checkpoint, written by transformers, read by us."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from compare import assert_close
from conftest import empty_cache
from families import COMMON, FAMILIES, GQA, prefill, theirs, tokens
from safetensors.torch import save_file

import kernels
from playground import CheckpointError
from playground.checkpoint.families import parse_config
from playground.checkpoint.files import Checkpoint
from playground.engine.engine import Engine
from playground.engine.loading import load_model
from playground.engine.pages import PAGE_SIZE
from playground.engine.requests import Request
from playground.engine.settings import SamplingParams
from playground.model.layers import Feed
from playground.model.step import Step

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """transformers' model, and the folder that it wrote."""
    model, folder = theirs(request.param), tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, folder


@torch.inference_mode()
def decode(model, ids: torch.Tensor, start: int) -> torch.Tensor:
    """Logits of the tokens from `start`, one step each after a prefill of what stands before."""
    c, pages = model.config, torch.arange(-(-len(ids) // PAGE_SIZE), dtype=torch.int32)[None]
    cache = empty_cache(c, pages.shape[1])
    before, out = torch.arange(start), []
    model(ids[:start], Step(before, before), cache)
    for at in range(start, len(ids)):
        where = torch.tensor([at])
        step = Step(where, where, pages=pages, lengths=(where + 1).int())
        out.append(model.logits(model(ids[where], step, cache)))
    return torch.cat(out)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_logits_agree_with_transformers_in_one_piece_in_chunks_and_step_by_step(pair):
    model, folder = pair
    ours, _ = load_model(folder, CPU, form="bf16")
    ids = tokens(600)  # past the original context of every scaled rope above
    with torch.inference_mode():
        expected = model(ids[None]).logits[0]
    assert relative(prefill(ours, ids), expected) < 1e-4
    assert relative(prefill(ours, ids, pieces=3), expected) < 1e-4
    assert relative(decode(ours, ids, 560), expected[560:]) < 1e-4
    assert relative(decode(ours, ids[:40], 1), expected[1:40]) < 1e-4


def test_64_greedy_tokens_are_those_of_transformers(pair):
    model, folder = pair
    ours, _ = load_model(folder, CPU, form="bf16")
    prompt = tokens(11)
    expected = model.generate(prompt[None], max_new_tokens=64, do_sample=False, eos_token_id=None)[0, 11:].tolist()
    engine = Engine(ours, None, max_rows=1, prefill_chunk=4)
    (row,) = engine.add([Request(tuple(prompt.tolist()), SamplingParams("greedy"), 64, ignore_eos=True)])
    while engine.busy:
        engine.step()
    assert row.new_ids == expected


def restored(model, ours) -> None:
    """Gives transformers' model the projections as our FP8 holds them."""
    state = model.state_dict()
    for name, part in ours.named_modules():
        if getattr(part, "is_fp8", False):
            rows, cols = part.stored
            state[f"{name}.weight"].copy_(part.dequantised(torch.float32)[:rows, :cols])


@pytest.mark.parametrize("name", FAMILIES)
def test_quantised_on_load_agrees_with_transformers_on_the_restored_weights_within_the_format(name, tmp_path):
    # dense layers only: a rounding that makes the gate choose another expert is no rounding any more
    dense = {"mlp_only_layers": [0, 1, 2]} if name == "qwen3-moe" else {"first_k_dense_replace": 3}
    model = theirs(name, **(dense if FAMILIES[name][0].startswith(("Deepseek", "Qwen3Moe")) else {}))
    model.save_pretrained(tmp_path)
    ours, _ = load_model(tmp_path, CPU)
    restored(model, ours)
    ids = tokens(100)
    with torch.inference_mode():
        expected = model(ids[None]).logits[0]
    # an activation is rounded to 3 mantissa bits, 2^-4 / sqrt(3) relative at most, once for each quantiser of 3 layers
    roundings = sum(isinstance(part, Feed) and part.form.fp8 for part in ours.modules())
    assert 0 < relative(prefill(ours, ids), expected) < 2**-4 / 3**0.5 * roundings**0.5


def test_quantising_on_load_keeps_the_error_of_every_tile(tmp_path):
    model = theirs("deepseek-v2-lite")
    model.save_pretrained(tmp_path)
    ours, _ = load_model(tmp_path, CPU)
    projections = {n: m for n, m in ours.named_modules() if getattr(m, "is_fp8", False)}
    for part in projections.values():
        assert part.tile_errors.shape == part.weight_scale_inv.shape or part.stored != tuple(part.weight.shape)
        assert part.tile_errors.min() > 0 and part.tile_errors.max() < 2**-4
    down = projections["model.layers.0.mlp.down_proj"]
    assert down.stored == (128, 342) and tuple(down.weight.shape) == (128, 384)
    assert not down.weight[:, 342:].float().any()


def write_fp8(model, folder, scale_dtype=torch.float32, **quantization) -> None:
    """The folder of an official FP8 checkpoint: projections in E4M3 tiles, `weight_scale_inv`, one file."""
    model.save_pretrained(folder)
    plain = dict(Checkpoint(folder).tensors())
    out, kept = {}, quantization.get("modules_to_not_convert", [])
    for name, tensor in plain.items():
        if "_proj" in name and not any(name.startswith(k) for k in kept):
            out[name], scale = kernels.weight_quant(tensor, scale_fmt=quantization.get("scale_fmt"))
            out[name + "_scale_inv"] = scale.to(scale_dtype)
        else:
            out[name] = tensor
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file(out, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
    } | quantization  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_an_fp8_checkpoint_restored_on_load_agrees_with_transformers_on_the_same_weights(scales, tmp_path):
    model = theirs("qwen3")
    write_fp8(model, tmp_path, scales, modules_to_not_convert=["lm_head", "model.layers.0.mlp"])
    fp8, _ = load_model(tmp_path, CPU)
    plain, _ = load_model(tmp_path, CPU, form="bf16")
    assert not fp8.model.layers[0].mlp.up_proj.is_fp8 and fp8.model.layers[1].mlp.up_proj.is_fp8
    restored(model, fp8)
    ids = tokens(80)
    with torch.inference_mode():
        assert relative(prefill(plain, ids), model(ids[None]).logits[0]) < 1e-4


def test_ue8m0_scales_are_powers_of_two_for_weights_and_activations(tmp_path):
    write_fp8(theirs("deepseek-v3"), tmp_path, scale_fmt="ue8m0")
    model, _ = load_model(tmp_path, CPU)
    seen = []
    quantise = kernels.reference.act_quant
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels.reference, "act_quant", lambda *given: seen.append(quantise(*given)) or seen[-1])
        prefill(model, tokens(5))
    scales = [s for _, s in seen] + [model.model.layers[1].self_attn.o_proj.weight_scale_inv]
    feeds = sum(isinstance(part, Feed) and part.form.fp8 for part in model.modules())
    assert len(seen) == feeds and all((s.log2() % 1 == 0).all() for s in scales)


def test_the_multi_token_prediction_layer_is_left_in_the_file(tmp_path):
    model = theirs("moonlight")
    model.save_pretrained(tmp_path)
    tensors = dict(Checkpoint(tmp_path).tensors())
    extra = {"model.layers.3.eh_proj.weight": torch.zeros(128, 256), "model.layers.3.enorm.weight": torch.ones(128)}
    for file in tmp_path.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors | extra, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    with pytest.raises(CheckpointError, match=r"model.safetensors: tensor model.layers.3.e\w+.weight is not part"):
        load_model(tmp_path, CPU)
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    assert load_model(tmp_path, CPU)[0].config.num_hidden_layers == 3


def test_the_embedded_checkpoint_opened_by_transformers_writes_the_same_greedy_text(storyteller, tmp_path):
    plain, _ = load_model(storyteller.folder, CPU, form="bf16")
    config = json.loads((storyteller.folder / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    state = {}
    for name, tensor in Checkpoint(storyteller.folder).tensors():
        if not name.endswith("_scale_inv"):
            owner = plain.get_submodule(name.rpartition(".")[0])
            state[name] = owner.weight if hasattr(owner, "stored") else tensor.float()
    save_file({k: v.data.contiguous() for k, v in state.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    model = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    prompt = torch.tensor(storyteller.encode("Once upon a time"))
    expected = model.generate(prompt[None], max_new_tokens=64, do_sample=False)[0, len(prompt) :].tolist()
    engine = Engine(plain, None, max_rows=1)
    (row,) = engine.add([Request(tuple(prompt.tolist()), SamplingParams("greedy"), 64)])
    while engine.busy:
        engine.step()
    assert row.new_ids == expected
    assert_close(prefill(plain, prompt), model(prompt[None]).logits[0].detach(), "float32")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "'gpt2' is not supported; deepseek_v3"),
        ({"sliding_window": 4096, "use_sliding_window": True}, "sliding_window 4096"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method 'fp8'"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128],
                                  "activation_scheme": "static"}}, "activation_scheme must be one of 'dynamic'"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "'longrope' is not supported"),
        ({"rope_parameters": None, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"rope_interleave": False}, "rope_interleave false"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_by_name_with_what_is_supported(change, message):
    config = COMMON | GQA | {"model_type": "qwen3", "rope_theta": 1e6}
    with pytest.raises(CheckpointError, match=message):
        parse_config(config | change)


def test_yarn_over_a_long_original_context_and_a_window_that_is_not_used_are_taken():
    config = COMMON | GQA | {"model_type": "qwen3", "sliding_window": 4096}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262144, "rope_theta": 5e6}
    assert parse_config(config | {"rope_parameters": yarn}).rope.scaling.original_max_position_embeddings == 262144
