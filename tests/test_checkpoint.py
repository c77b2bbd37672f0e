"""Damaged, hostile or oversized checkpoints: one error type, quickly, with a sentence that says what is wrong."""

from __future__ import annotations

import json
import random
import struct
import time
from contextlib import contextmanager

import pytest
import torch
from conftest import SMALL, random_tensors
from safetensors import SafetensorError
from tokenizers import Tokenizer, models

from playground.api import load
from playground.checkpoint import files as checkpoint
from playground.checkpoint.config import CheckpointError
from playground.checkpoint.families import parse_config
from playground.checkpoint.files import INDEX, Checkpoint, save_checkpoint
from playground.checkpoint.memory import plan
from playground.engine.loading import load_model
from playground.model.transformer import Transformer

CPU = torch.device("cpu")
SHARD = "model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    state = {n: t.bfloat16() for n, t in random_tensors(parse_config(SMALL))}
    save_checkpoint(folder, SMALL, state, Tokenizer(models.BPE()), fp8=True)
    return folder


@pytest.fixture
def copy(good, tmp_path):
    """A copy of the good folder in which single files may be replaced."""

    def make(**files: bytes):
        for file in good.iterdir():
            target = tmp_path / file.name
            target.unlink(missing_ok=True)
            target.symlink_to(file)
        for name, content in files.items():
            target = tmp_path / {"shard": SHARD, "index": INDEX, "config": "config.json"}[name]
            target.unlink()
            target.write_bytes(content)
        return tmp_path

    return make


def refused(folder, seconds: float = 10.0) -> str:
    """The message of the `CheckpointError` that loading must raise, in time."""
    began = time.perf_counter()
    with pytest.raises(CheckpointError) as caught:
        load_model(folder, CPU)
    assert time.perf_counter() - began < seconds
    return str(caught.value)


def test_the_good_folder_loads(good):
    assert load_model(good, CPU)[0].config.vocab_size == 256


INTEGERS = [name for name, value in SMALL.items() if type(value) is int and "token_id" not in name]


@pytest.mark.parametrize("name", INTEGERS)
def test_every_integer_field_at_its_worst_is_refused_or_changes_nothing(name, good, copy):
    config = json.loads((good / "config.json").read_text())
    for value in (0, -1, 2**31, "7", 1.5, True, [], None):
        folder = copy(config=json.dumps(config | {name: value}).encode())
        try:
            model, _ = load_model(folder, CPU)
        except CheckpointError:
            continue
        # None falls back to a default, and some zeros are a meaning: then every tensor must still have found its place
        assert value in (0, None, 2**31) and type(value) is not bool, f"{name}={value!r} was taken"
        assert {n for n, _ in model.named_parameters()} >= {"lm_head.weight"}


@pytest.mark.parametrize("seed", range(100))
def test_flipped_bytes_in_a_header_end_in_the_one_error_or_in_the_same_tensors(seed, good, copy):
    data, chance = bytearray((good / SHARD).read_bytes()), random.Random(seed)
    (size,) = struct.unpack("<Q", data[:8])
    for _ in range(chance.choice((1, 1, 4))):
        data[chance.randrange(8 + size)] ^= 1 << chance.randrange(8)
    began = time.perf_counter()
    try:
        model, _ = load_model(copy(shard=bytes(data)), CPU)
    except CheckpointError as error:
        assert str(error)
    else:  # only metadata or white space was hit, or two tensors of one shape changed places
        assert model.config.vocab_size == 256
    assert time.perf_counter() - began < 10


@pytest.mark.parametrize("seed", range(60))
def test_a_file_cut_anywhere_is_refused_by_its_name(seed, good, copy):
    data = (good / SHARD).read_bytes()
    cut = random.Random(seed).choice((random.Random(seed).randrange(200), random.Random(-seed).randrange(len(data))))
    assert SHARD in refused(copy(shard=data[:cut]))


def header_of(data: bytes) -> tuple[dict, bytes]:
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def joined(header: dict, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def overlap(header: dict) -> None:
    a, b = [n for n in header if n != "__metadata__"][:2]
    header[b]["data_offsets"] = header[a]["data_offsets"]


def huge(header: dict) -> None:
    header["model.norm.weight"]["shape"] = [2**62]


def unknown_type(header: dict) -> None:
    header["model.norm.weight"]["dtype"] = "F4"


@pytest.mark.parametrize("damage", [overlap, huge, unknown_type, dict.clear])
def test_a_header_that_lies_is_refused_by_its_file(damage, good, copy):
    header, body = header_of((good / SHARD).read_bytes())
    damage(header)
    assert SHARD in refused(copy(shard=joined(header, body)))


def test_reading_may_end_at_any_tensor(good):
    """Threads copy ahead of who takes: a file is closed only when they are done with it."""
    for taken in range(40):
        tensors = Checkpoint(good).tensors()
        for _ in range(taken % 20 + 1):
            next(tensors)
        tensors.close()


def test_a_tensor_that_cannot_be_read_names_its_file_whatever_else_is_being_read(good, monkeypatch):
    class Torn:
        def __init__(self, shard):
            self.shard = shard

        def __getattr__(self, name):
            return getattr(self.shard, name)

        def get_tensor(self, name):
            if name.endswith("down_proj.weight"):
                raise SafetensorError("torn")
            return self.shard.get_tensor(name)

    def torn(*args, opened=checkpoint.safe_open, **kwargs):
        @contextmanager
        def shard():
            with opened(*args, **kwargs) as whole:
                yield Torn(whole)

        return shard()

    found = Checkpoint(good)
    monkeypatch.setattr(checkpoint, "safe_open", torn)
    for _ in range(20):
        with pytest.raises(CheckpointError, match=SHARD):
            list(found.tensors())


@pytest.mark.parametrize("size", [0, 2**63 - 1, 2**40])
def test_a_header_of_absurd_length_is_refused(size, good, copy):
    assert SHARD in refused(copy(shard=struct.pack("<Q", size) + b"{}"))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_no_positive_number_is_refused_by_name(scale, good, copy):
    from safetensors.torch import save

    tensors = dict(Checkpoint(good).tensors())
    name = "model.layers.1.self_attn.o_proj.weight_scale_inv"
    tensors[name][0, 0] = scale
    assert name in refused(copy(shard=save(tensors)))


@pytest.mark.parametrize("place", ["../good/" + SHARD, "/etc/passwd", "absent.safetensors", "", "a\0b", "."])
def test_an_index_may_only_name_files_in_its_folder(place, good, copy):
    index = json.loads((good / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = place
    assert "which is not a file in" in refused(copy(index=json.dumps(index).encode()))


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b"\xff\xfe", b"{" * 100_000, b'{"weight_map": 3}', b'{"weight_map": {}}', b"1e999"]
)
@pytest.mark.parametrize("file", ["config", "index"])
def test_json_of_any_other_kind_is_refused(file, content, copy):
    assert refused(copy(**{file: content}))


def test_nothing_is_loaded_that_does_not_fit_and_the_refusal_says_what_would(small_config):
    model = Transformer(parse_config(small_config))
    whole = plan(model, CPU, torch.float32, 16, None, free=10**12)
    assert whole.context == 256 and whole.cache_tokens == 16 * 256
    half = plan(model, CPU, torch.float32, 16, None, free=whole.weights + whole.workspace + 512 * whole.per_token)
    assert half.cache_tokens == 512
    small = plan(model, CPU, torch.float32, 16, 64, free=10**12)
    tight = small.weights + small.workspace + 64 * small.per_token
    with pytest.raises(CheckpointError, match=r"--context 64 would fit"):
        plan(model, CPU, torch.float32, 16, None, free=tight)
    assert plan(model, CPU, torch.float32, 16, 64, free=tight).cache_tokens == 64
    with pytest.raises(CheckpointError, match="not even a short context would fit"):
        plan(model, CPU, torch.float32, 16, None, free=whole.weights // 2)
    with pytest.raises(CheckpointError, match="from 1 to 256"):
        plan(model, CPU, torch.float32, 16, 300, free=10**12)


def test_the_plan_counts_the_weights_as_they_then_stand_in_memory(good):
    model, room = load_model(good, CPU)
    held = {t.data_ptr(): t.nbytes for t in model.parameters()}
    for part in model.modules():
        kept = [getattr(part, n, None) for n in ("decoded", "absorb_keys", "absorb_values", "rope")]
        held |= {t.data_ptr(): t.nbytes for t in kept if t is not None}
    assert sum(held.values()) == pytest.approx(room.weights, rel=0.05)


def test_a_context_limit_holds_for_prompts_and_continuations(storyteller):
    with load(storyteller.folder, "cpu", context=64) as playground:
        *_, end = playground.stream("Once upon a time", ignore_eos=True)
        assert end.stats.prompt_tokens + end.stats.new_tokens == 64
