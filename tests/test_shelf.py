"""Switching models: the old one is released, and a failure at any point leaves one that works."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from conftest import SMALL, random_tensors

from playground import CheckpointError, RequestError
from playground.checkpoint.families import parse_config
from playground.checkpoint.files import Checkpoint, save_checkpoint
from playground.checkpoint.hub import EMBEDDED
from playground.shelf import Shelf


@pytest.fixture
def folders(tmp_path):
    """Two good models and one whose damage shows only when its weights are read."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(EMBEDDED / "tokenizer.json"))
    changes = SMALL | {"vocab_size": 4096}
    state = {n: t.bfloat16() for n, t in random_tensors(parse_config(changes))}
    for name in ("one", "two", "bad"):
        save_checkpoint(tmp_path / name, changes, state, tokenizer, fp8=True)
    tensors = dict(Checkpoint(tmp_path / "bad").tensors())
    tensors["model.layers.0.self_attn.o_proj.weight_scale_inv"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "bad" / "model-00001-of-00001.safetensors")
    return [str(tmp_path / name) for name in ("one", "two", "bad")]


def writes(shelf: Shelf) -> bool:
    return len(list(shelf.current.stream("Once", max_new_tokens=3, ignore_eos=True))) == 4


def test_a_switch_releases_the_old_model_and_ends_what_it_was_writing(folders):
    with Shelf(folders, device="cpu") as shelf:
        old = weakref.ref(shelf.current.model)
        stream = shelf.current.stream("Once", max_new_tokens=200, ignore_eos=True)
        told = []
        shelf.switch(folders[1], lambda done, total: told.append(done / total))
        assert list(stream)[-1].stats.finish_reason == "cancelled"
        del stream
        gc.collect()
        assert old() is None and writes(shelf) and shelf.name == folders[1]
        assert told == sorted(told) and told[-1] == 1


def test_a_failure_before_or_while_loading_leaves_a_model_that_writes(folders):
    with Shelf(folders, device="cpu") as shelf:
        first = shelf.current
        with pytest.raises(CheckpointError, match="not one of the models of this page"):
            shelf.switch("/etc")
        assert shelf.current is first
        with pytest.raises(CheckpointError, match=r"one is back: .*o_proj.weight_scale_inv holds a scale"):
            shelf.switch(folders[2])
        assert shelf.name == folders[0] and writes(shelf)
        shelf.switch(folders[1])
        assert writes(shelf)


def test_while_a_model_is_loading_requests_and_other_switches_are_told_so(folders):
    with Shelf(folders, device="cpu") as shelf:
        seen = []

        def during(done: int, total: int) -> None:
            for action in (lambda: shelf.current, lambda: shelf.switch(folders[0])):
                try:
                    action()
                except (RequestError, CheckpointError) as error:
                    seen.append(str(error))

        shelf.switch(folders[1], during)
        assert {text.split(";")[0] for text in seen} == {"A model is being loaded", "Another model is being loaded"}
        assert writes(shelf)


def test_a_shelf_without_models_has_the_embedded_one():
    with Shelf([], device="cpu", context=128) as shelf:
        assert shelf.current.folder == EMBEDDED and shelf.names == ["storyteller"]
        shelf.switch("storyteller")
        assert torch.get_default_dtype() == torch.float32 and writes(shelf)
