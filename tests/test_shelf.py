"""Switching models: the old one is released, and a failure at any point leaves one that works."""

from __future__ import annotations

import gc
import weakref
from contextlib import contextmanager

import pytest
import torch
from conftest import SMALL, random_tensors
from running import engine_of

from playground import CheckpointError, RequestError
from playground.checkpoint.families import parse_config
from playground.checkpoint.files import Checkpoint, save_checkpoint
from playground.checkpoint.hub import EMBEDDED
from playground.engine.client import ThreadClient
from playground.engine.events import Progress
from playground.engine.host import Host
from playground.engine.requests import Options
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


@contextmanager
def shelved(folders, **options):
    """A shelf whose engine is a thread of this process."""
    client = ThreadClient(Host(Options(tuple(folders), device="cpu", **options)))
    try:
        client.until_ready()
        yield Shelf(client, folders)
    finally:
        client.close()


def writes(shelf: Shelf) -> bool:
    return len(list(shelf.current.stream("Once", max_new_tokens=3, ignore_eos=True))) == 4


def test_a_switch_releases_the_old_model_and_ends_what_it_was_writing(folders):
    with shelved(folders) as shelf:
        old = weakref.ref(engine_of(shelf.current).model)
        stream = shelf.current.stream("Once", max_new_tokens=200, ignore_eos=True)
        next(iter(stream))
        told = [p.done / p.total for p in shelf.switch(folders[1]) if isinstance(p, Progress)]
        assert list(stream)[-1].stats.finish_reason == "cancelled"
        gc.collect()
        assert old() is None and writes(shelf) and shelf.name == folders[1]
        assert told == sorted(told) and told[-1] == 1


def test_a_failure_before_or_while_loading_leaves_a_model_that_writes(folders):
    with shelved(folders) as shelf:
        first = shelf.current
        with pytest.raises(CheckpointError, match="not one of the models of this page"):
            shelf.switch("/etc").last()
        assert shelf.current is first
        with pytest.raises(CheckpointError, match=r"one is back: .*o_proj.weight_scale_inv holds a scale"):
            shelf.switch(folders[2]).last()
        assert shelf.name == folders[0] and writes(shelf)
        shelf.switch(folders[1]).last()
        assert writes(shelf)


def test_a_request_for_a_model_that_is_no_longer_loaded_is_told_so_and_others_wait_for_the_new_one(folders):
    with shelved(folders) as shelf:
        old = shelf.current
        switching = shelf.switch(folders[1])
        next(iter(switching))
        early = shelf.current.stream("Once", max_new_tokens=3, ignore_eos=True)
        late = old.stream("Once", max_new_tokens=3)
        switching.last()
        with pytest.raises(RequestError, match="no longer loaded"):
            list(late)
        assert len(list(early)) == 4 and shelf.current is not old


def test_of_two_switches_at_once_the_second_comes_after_the_first(folders):
    with shelved(folders) as shelf:
        first, second = shelf.switch(folders[1]), shelf.switch(folders[0])
        assert first.last().name == "two" and second.last().name == "one" and writes(shelf)


def test_a_shelf_without_models_has_the_embedded_one():
    with shelved([], context=128) as shelf:
        assert shelf.current.folder == EMBEDDED and shelf.names == ("storyteller",)
        shelf.switch("storyteller").last()
        assert torch.get_default_dtype() == torch.float32 and writes(shelf)
