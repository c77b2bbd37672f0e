import json

import pytest
import torch
from compare import assert_bits_equal, assert_close
from conftest import empty_cache, random_tensors
from running import engine_of

import kernels
from kernels import reference as twins
from playground.checkpoint.config import CheckpointError
from playground.checkpoint.families import parse_config
from playground.engine.pages import PAGE_SIZE
from playground.model.reference import ReferenceModel
from playground.model.step import Step
from playground.model.transformer import Transformer

VARIANTS = {
    "q-lora": {},
    "no-q-lora": {"q_lora_rank": None},
    "softmax-gate": {"scoring_func": "softmax", "topk_method": "group_limited_greedy", "norm_topk_prob": False},
    "tied-head": {"tie_word_embeddings": True},
    "two-shared": {"n_shared_experts": 2, "routed_scaling_factor": 2.5},
    "no-yarn": {"rope_scaling": None},
}


def prefill(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model.logits(model(tokens, Step(torch.arange(len(tokens)), slots=None)))


def decode_all(model: Transformer, tokens: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Feeds one token at a time through the latent cache: absorbed attention all the way."""
    c, pages = model.config, torch.arange(-(-len(tokens) // PAGE_SIZE), dtype=torch.int32)[None]
    cache = empty_cache(c, pages.shape[1], dtype)
    out = []
    with torch.inference_mode():
        for at, token in enumerate(tokens):
            where = torch.tensor([at])
            step = Step(where, where, pages=pages, lengths=(where + 1).int())
            out.append(model.logits(model(token[None], step, cache)))
    return torch.cat(out)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_inference_equals_the_reference_model_in_prefill_and_absorbed_decode(small, small_config, changes):
    model = small(fp8=False, **changes)
    config = parse_config(small_config | changes)
    reference = ReferenceModel(config)
    state = dict(random_tensors(config))
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    reference.load_state_dict(state)
    tokens = torch.randint(1, 256, (150,), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        expected = reference(tokens[None], model.rope[: len(tokens)])[0][0]
    for logits in (prefill(model, tokens), decode_all(model, tokens)):
        assert_close(logits, expected, "float32")


def test_fp8_prefill_and_decode_are_no_further_apart_than_fp8_is_from_exact(small, small_config):
    dense = {"first_k_dense_replace": 2}  # no near-tie of a gate that would amplify the difference
    model = small(**dense)
    config = parse_config(small_config | dense)
    exact = ReferenceModel(config)
    plain = {n: m.dequantised(torch.float32) for n, m in model.named_modules() if hasattr(m, "dequantised")}
    state = {n: p for n, p in model.named_parameters() if not n.endswith("_scale_inv")}
    exact.load_state_dict(state | {f"{n}.weight": w for n, w in plain.items()})
    tokens = torch.randint(1, 256, (90,), generator=torch.Generator().manual_seed(7))
    a, b = prefill(model, tokens), decode_all(model, tokens)
    with torch.inference_mode():
        truth = exact(tokens[None], model.rope[: len(tokens)])[0][0]
    # prefill quantises the latent for kv_b_proj, absorbed decode does not: two independent roundings, hence sqrt(2)
    assert 0 < (a - b).norm() <= 2**0.5 * (a - truth).norm()
    assert (a - truth).norm() / truth.norm() < 0.15


def test_the_gate_of_a_row_has_the_same_bits_alone_and_in_company():
    logits = torch.randn(200, 5, 8, generator=torch.Generator().manual_seed(2))
    for batch in logits:
        together = twins.row_sigmoid(batch)
        assert_close(together, batch.double().sigmoid(), "float32")
        for row in range(5):
            assert_bits_equal(twins.row_sigmoid(batch[row : row + 1])[0], together[row])


@pytest.mark.parametrize("seed", range(8))
def test_a_row_of_a_decode_step_has_the_same_bits_alone_and_in_company(small, seed):
    torch.manual_seed(seed)
    model, rows = small(), 5
    c = model.config
    cache = torch.randn(c.num_hidden_layers, rows, PAGE_SIZE, sum(c.attention.cache_widths))
    lengths = torch.tensor([1, 7, 20, 33, 64])
    tokens, pages = torch.tensor([3, 5, 3, 8, 9]), torch.arange(rows, dtype=torch.int32)[:, None]

    def step(index: list[int]) -> torch.Tensor:
        at, page = lengths[index] - 1, pages[index]
        s = Step(at, page[:, 0].long() * PAGE_SIZE + at, pages=page, lengths=lengths[index].int())
        with torch.inference_mode():
            return model.logits(model(tokens[index], s, kernels.KV(cache.clone())))

    together = step([0, 1, 2, 3, 4])
    for row in range(rows):
        assert_bits_equal(step([row])[0], together[row])
    assert_bits_equal(step([4, 2])[1], together[2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing"),
        (lambda t: t.update(extra=torch.zeros(2)), "extra is not part"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(3)}), r"model.norm.weight has shape \[3\]"),
        (lambda t: t.update({"lm_head.weight": t["lm_head.weight"].int()}), "lm_head.weight is torch.int32"),
    ],
)
def test_a_tensor_that_does_not_fit_is_an_error_that_names_it(small_config, damage, message):
    config = parse_config(small_config)
    tensors = dict(random_tensors(config))
    damage(tensors)
    with pytest.raises(CheckpointError, match=message):
        Transformer(config).load(tensors.items(), torch.device("cpu"), torch.float32)


def copy_model(source, target, skip=()):
    target.mkdir()
    for file in source.iterdir():
        if file.name not in skip:
            (target / file.name).symlink_to(file)
    return target


@pytest.mark.parametrize(
    "missing", ["config.json", "tokenizer.json", "model.safetensors.index.json", "model-00002-of-00004.safetensors"]
)
def test_a_model_folder_that_lacks_a_file_is_told_in_a_sentence(storyteller, tmp_path, missing):
    from playground import load

    folder = copy_model(storyteller.folder, tmp_path / "model", skip=(missing,))
    with pytest.raises(CheckpointError, match=missing.split("-of")[0].replace(".index.json", "")):
        load(folder, device="cpu")


def test_a_truncated_shard_and_a_foreign_config_are_told_in_a_sentence(storyteller, tmp_path):
    from playground import load

    shard = "model-00001-of-00004.safetensors"
    folder = copy_model(storyteller.folder, tmp_path / "cut", skip=(shard,))
    (folder / shard).write_bytes((storyteller.folder / shard).read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=shard):
        load(folder, device="cpu")
    folder = copy_model(storyteller.folder, tmp_path / "other", skip=("config.json",))
    config = json.loads((storyteller.folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(CheckpointError, match="deepseek_v3"):
        load(folder, device="cpu")


def test_the_embedded_checkpoint_uses_every_part_of_the_architecture(storyteller):
    model = engine_of(storyteller).model
    c = model.config
    assert c.attention.q_lora_rank and c.rope.scaling.factor > 1 and not c.is_moe(0)
    assert c.moe.n_shared_experts and c.moe.n_routed_experts >= 8 and 1 < c.moe.topk_group < c.moe.n_group
    assert c.moe.corrected and c.max_position_embeddings >= 1024
    parameters = sum(p.numel() for n, p in model.named_parameters() if not n.endswith("_scale_inv"))
    assert 10e6 <= parameters <= 30e6
    assert all(f.stat().st_size < 9_500_000 for f in storyteller.folder.iterdir())
