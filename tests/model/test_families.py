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
from transformers.quantizers.quantizers_utils import should_convert_module

import kernels
from playground import CheckpointError
from playground.checkpoint.config import Unconverted
from playground.checkpoint.families import parse_config
from playground.checkpoint.files import Checkpoint
from playground.engine.engine import Engine
from playground.engine.loading import load_model
from playground.engine.pages import PAGE_SIZE
from playground.engine.requests import Request
from playground.engine.settings import SamplingParams, suggested_by
from playground.model.layers import Feed, Linear
from playground.model.rope import rope_table
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
    ids = tokens(700)  # past the original context of every scaled rope, and past the windows
    with torch.inference_mode():
        expected = model(ids[None]).logits[0]
    for length in (1, 127, 128, 129, 700):
        assert relative(prefill(ours, ids[:length]), expected[:length]) < 1e-4
    assert relative(prefill(ours, ids, pieces=3), expected) < 1e-4
    assert relative(decode(ours, ids, 670), expected[670:]) < 1e-4
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
            state[f"{name}.weight"].copy_(part.as_stored(torch.float32))


def of_the_format(ours) -> float:
    """The relative error that FP8 allows: an activation is rounded to 3 mantissa bits, 2^-4 / sqrt(3) at most, once for
    each quantiser."""
    roundings = sum(isinstance(part, Feed) and part.form.fp8 for part in ours.modules())
    return 2**-4 / 3**0.5 * roundings**0.5


@pytest.mark.parametrize("name", FAMILIES)
def test_quantised_on_load_agrees_with_transformers_on_the_restored_weights_within_the_format(name, tmp_path):
    # dense layers only: a rounding that makes the gate choose another expert is no rounding any more
    dense = {"Qwen3Moe": {"mlp_only_layers": [0, 1, 2]}, "Deepseek": {"first_k_dense_replace": 3}}
    model = theirs(name, **next((more for kind, more in dense.items() if FAMILIES[name][0].startswith(kind)), {}))
    model.save_pretrained(tmp_path)
    ours, _ = load_model(tmp_path, CPU)
    restored(model, ours)
    ids = tokens(100)
    with torch.inference_mode():
        expected = model(ids[None]).logits[0]
    assert 0 < relative(prefill(ours, ids), expected) < of_the_format(ours)


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
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
    } | quantization  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


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
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"model.safetensors: tensor model.layers.3.e\w+.weight is not part"):
        load_model(tmp_path, CPU)
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}), encoding="utf-8")
    assert load_model(tmp_path, CPU)[0].config.num_hidden_layers == 3


def test_the_embedded_checkpoint_opened_by_transformers_writes_the_same_greedy_text(storyteller, tmp_path):
    plain, _ = load_model(storyteller.folder, CPU, form="bf16")
    config = json.loads((storyteller.folder / "config.json").read_text(encoding="utf-8"))
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    state = {}
    for name, tensor in Checkpoint(storyteller.folder).tensors():
        if not name.endswith("_scale_inv"):
            owner = plain.get_submodule(name.rpartition(".")[0])
            state[name] = owner.weight if isinstance(owner, Linear) else tensor.float()
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
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method 'fp8'"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}}, "weight_block_size must be"),
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}, "quant_algo must be one of"),
        ({"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {
            "num_bits": 4, "type": "int"}}}}}, "only weights of type float and 8 bits"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "short_factor must be a list of positive numbers"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}}, "16 numbers each"),
        ({"rope_scaling": {"rope_type": "mrope"}}, "'mrope' is not supported"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16,
                           "original_max_position_embeddings": 1}}, "an integer from 2"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128],
                                  "modules_to_not_convert": [".*.*.*.*x"]}}, "too intricate"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "1 entries for 3 layers"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128],
                                  "modules_to_not_convert": ["(a*)*b"]}}, "too intricate"),
        ({"hidden_act": "gelu"}, "'gelu'"),
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


BEFORE = 512  # tokens of an original context
SPELLINGS = {  # rotary embedding, as files spell it: each must give the angles of transformers
    "type": {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": BEFORE}},
    "no original": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "not truncated": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": BEFORE,
                                       "truncate": False}},
    "both names": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
                   "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": BEFORE}},
    "original above": {"original_max_position_embeddings": BEFORE,
                       "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "no betas": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": BEFORE,
                                  "beta_fast": None, "beta_slow": None}},
    "nothing": {"rope_scaling": {}},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "longrope": {"original_max_position_embeddings": BEFORE,
                 "rope_scaling": {"rope_type": "longrope", "short_factor": [1.0 + i / 16 for i in range(16)],
                                  "long_factor": [2.0 + i / 8 for i in range(16)]}},
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_of_rotary_embedding_gives_the_angles_of_transformers(name):
    config = COMMON | GQA | {"model_type": "qwen3", "max_position_embeddings": 640, "rope_theta": 1e6} | SPELLINGS[name]
    theirs_ = transformers.models.qwen3.modeling_qwen3.Qwen3RotaryEmbedding(transformers.Qwen3Config.from_dict(config))
    count = 600 if name == "longrope" else 300  # beyond the original context, its longer list counts
    cos, sin = theirs_(torch.zeros(1, count, 1), torch.arange(count)[None])
    ours = rope_table(parse_config(config).rope, count)
    assert_close(ours, torch.stack([cos[0, :, :16], sin[0, :, :16]], dim=1), "float32")


def test_a_context_that_yarn_stretches_is_as_long_as_it_makes_it():
    config = COMMON | GQA | {"model_type": "qwen3", "max_position_embeddings": 640} | SPELLINGS["type"]
    assert parse_config(config).max_position_embeddings == 4 * BEFORE


QWEN_SLIDES = {"model_type": "qwen3", "sliding_window": 256, "use_sliding_window": True}


@pytest.mark.parametrize(
    ("change", "windows"),
    [
        ({"sliding_window": 256}, [256] * 3),
        ({"sliding_window": None}, [None] * 3),
        ({}, [None] * 3),  # the family's own 4,096, which no row of this context outgrows
        ({"model_type": "qwen3", "sliding_window": 256}, [None] * 3),
        (QWEN_SLIDES | {"max_window_layers": 3}, [None] * 3),
        (QWEN_SLIDES | {"max_window_layers": 2}, [None, None, 256]),
        (QWEN_SLIDES | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}, [256, None, 256]),
        (QWEN_SLIDES | {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2}, [256] * 3),
        (QWEN_SLIDES | {"model_type": "smollm3", "no_rope_layers": [1, 0, 1]}, [None, 256, None]),
        (QWEN_SLIDES | {"model_type": "llama"}, [None] * 3),
    ],
)
def test_layers_slide_where_transformers_lets_them(change, windows):
    config = parse_config(COMMON | GQA | {"model_type": "mistral"} | change)
    assert config.max_position_embeddings == 1024
    assert [config.window_of(layer) for layer in range(3)] == windows


@pytest.mark.parametrize(
    ("named", "module", "left"),
    [
        ("o_proj", "model.layers.1.self_attn.o_proj", True),
        ("model.layers.1", "model.layers.1.self_attn.o_proj", True),
        ("model.layers.1", "model.layers.10.self_attn.o_proj", False),
        ("model.layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj", True),
        ("mlp.up", "model.layers.1.mlp.up_proj", False),
        ("model.layers.[0-2].mlp", "model.layers.2.mlp.up_proj", True),
        (r"model\.layers\.\d+\.self_attn.*", "model.layers.12.self_attn.q_proj", True),
        ("re:.*self_attn.*", "model.layers.12.self_attn.q_proj", True),
        (".*mlp.gate", "model.layers.1.mlp.gate_proj", False),
    ],
)
def test_modules_are_left_unquantised_by_name_end_and_pattern_as_in_transformers(named, module, left):
    assert (module in Unconverted.of([named])) == left
    if not named.startswith("re:"):  # which is compressed-tensors' way
        assert should_convert_module(module, [named]) != left


def saved(folder, name: str, **changes) -> dict[str, torch.Tensor]:
    """A checkpoint's folder, in one file whose tensors may be changed; returns them."""
    theirs(name).save_pretrained(folder)
    tensors = dict(Checkpoint(folder).tensors())
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    for key, change in changes.items():
        change(tensors[key])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("tensor", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_weight_that_is_no_number_is_refused_by_its_tensors_name(tensor, value, tmp_path):
    saved(tmp_path, "mistral", **{tensor: lambda t: t.view(-1)[7:8].fill_(value)})
    with pytest.raises(CheckpointError, match=f"tensor {tensor} holds a NaN or an infinity"):
        load_model(tmp_path, CPU)


def test_an_fp8_byte_that_is_no_number_is_refused_and_a_zero_scale_only_where_a_tile_is_not_zero(tmp_path):
    write_fp8(theirs("qwen3"), tmp_path)
    tensors, name = dict(Checkpoint(tmp_path).tensors()), "model.layers.1.mlp.down_proj.weight"
    file = tmp_path / "model.safetensors"
    tensors[name + "_scale_inv"][0, 1] = 0
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="a scale of 0 for a tile that is not"):
        load_model(tmp_path, CPU)
    tensors[name].view(torch.uint8)[:, 128:] = 0
    save_file(tensors, file)
    model, _ = load_model(tmp_path, CPU)
    assert prefill(model, tokens(5)).isfinite().all()
    tensors[name].view(torch.uint8)[5, 7] = 0xFF
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=f"tensor {name} holds a NaN"):
        load_model(tmp_path, CPU)


def test_a_head_in_the_file_counts_whatever_the_config_says_of_tying(tmp_path):
    saved(tmp_path, "mistral")
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8")) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    ours, _ = load_model(tmp_path, CPU, form="bf16")
    with torch.inference_mode():
        expected = theirs("mistral")(tokens(20)[None]).logits[0]
    assert relative(prefill(ours, tokens(20)), expected) < 1e-4


def test_empty_tensors_and_scales_of_a_cache_are_left_in_the_file_and_told(tmp_path):
    tensors = saved(tmp_path, "mistral")
    extra = {"model.layers.0.self_attn.k_scale": torch.ones(1), "model.layers.1.self_attn.v_proj.output_scale":
             torch.ones(1), "model.layers.1.mlp.shared_experts.up_proj.weight": torch.zeros(0, 128)}  # fmt: skip
    save_file(tensors | extra, tmp_path / "model.safetensors")
    ours, _ = load_model(tmp_path, CPU)
    assert ours.config.num_hidden_layers == 3 and ours.unused_scales == 2


@pytest.mark.parametrize(
    ("generation", "sampler", "temperature"),
    [
        ({"do_sample": False}, "greedy", 0.8),
        ({"do_sample": False, "temperature": 0.6}, "greedy", 0.6),
        ({"temperature": 0.0}, "greedy", 0.8),
        ({"do_sample": True, "temperature": 0.6}, "gumbel", 0.6),
        ({"temperature": 0.6}, "gumbel", 0.6),
    ],
)
def test_a_checkpoint_that_asks_for_no_sampling_gets_none(generation, sampler, temperature):
    defaults, suggested = suggested_by(generation)
    assert suggested and (str(defaults["sampler"]), defaults["temperature"]) == (sampler, temperature)


def compressed(strategy: str) -> dict:
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "dynamic": False, "symmetric": True}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": {"num_bits": 8}}}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head", "re:.*o_proj"],
            "config_groups": groups}  # fmt: skip


OTHERS = {  # quantization_config, whether each row has a scale of its own, and the scale's shape
    "per-tensor": ({"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}, False, ()),
    "compressed-tensor": (compressed("tensor"), False, (1,)),
    "compressed-channel": (compressed("channel"), True, (-1, 1)),
    "fbgemm": ({"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["o_proj"]}, True, (-1, 1)),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head", "*.o_proj"]}, False, ()),
    "modelopt-aside": (None, False, ()),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_fp8_formats_are_restored_as_their_scales_say_and_quantised_again(name, tmp_path):
    quantization, by_row, shape = OTHERS[name]
    tensors, out, model = saved(tmp_path, "qwen2"), {}, theirs("qwen2")
    left = quantization is not None and name != "per-tensor"  # o_proj stays as it is
    for key, tensor in tensors.items():
        out[key] = tensor
        if not key.endswith("_proj.weight") or (left and "o_proj" in key):
            continue
        scale = tensor.abs().amax(dim=1 if by_row else (0, 1), keepdim=True) / 448
        out[key] = (tensor / scale).to(torch.float8_e4m3fn)
        model.state_dict()[key].copy_(out[key].float() * scale)
        out[key + "_scale"] = scale.reshape(shape).clone()
        out[key.replace("weight", "input_scale")] = torch.ones(1)
    save_file(out, tmp_path / "model.safetensors")
    if quantization is None:
        about = {"quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"], "kv_cache_quant_algo": None}}
        (tmp_path / "hf_quant_config.json").write_text(json.dumps(about), encoding="utf-8")
    else:
        config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8")) | {
            "quantization_config": quantization
        }
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    plain, _ = load_model(tmp_path, CPU, form="bf16")
    with torch.inference_mode():
        expected = model(tokens(60)[None]).logits[0]
    assert relative(prefill(plain, tokens(60)), expected) < 1e-4
    fp8, _ = load_model(tmp_path, CPU)
    attention, mlp = fp8.model.layers[0].self_attn, fp8.model.layers[1].mlp
    assert mlp.down_proj.twice and 0 < mlp.down_proj.tile_errors.max() < 2**-4
    assert attention.o_proj.is_fp8 != left and attention.o_proj.twice != left
    restored(model, fp8)
    with torch.inference_mode():
        assert 0 < relative(prefill(fp8, tokens(60)), model(tokens(60)[None]).logits[0]) < of_the_format(fp8)
