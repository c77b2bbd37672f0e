"""What a dry run leaves out."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from playground.checkpoint.files import Checkpoint
from playground.checkpoint.hub import EMBEDDED
from playground.engine.prepare import kind_of, shallow
from playground.model.transformer import Transformer


@pytest.mark.parametrize("sliding", [(), (1, 2, 3, 4, 6, 7, 8, 9), (0, 2, 4, 6, 8)])
def test_a_shallow_model_has_each_kind_of_layer_behind_each_that_it_follows_and_the_last(sliding):
    config = replace(Checkpoint(EMBEDDED).config, num_hidden_layers=11, sliding=frozenset(sliding), window=64)
    model = Transformer(config)
    layers = list(model.model.layers)
    kinds = {id(layer): kind_of(model, index) for index, layer in enumerate(layers)}
    with shallow(model):
        kept = list(model.model.layers)
    assert list(model.model.layers) == layers
    pairs = {pair for pair in pairwise(kinds[id(layer)] for layer in kept)}
    assert pairs >= {pair for pair in pairwise(kinds[id(layer)] for layer in layers)}
    assert kept[0] is layers[0] and kept[-2:] == layers[-2:] and len(kept) < len(layers)


def test_the_layers_of_a_model_come_back_whatever_a_dry_run_raises():
    model = Transformer(Checkpoint(EMBEDDED).config)
    before = model.model.layers
    with pytest.raises(ZeroDivisionError), shallow(model):
        raise ZeroDivisionError
    assert model.model.layers is before
