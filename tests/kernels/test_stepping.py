"""What begins and ends a step, against its twins."""

import torch

from kernels import reference
from kernels.stepping import step as stepping

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def on_device(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.to(DEVICE, copy=True) for t in tensors]


def test_tokens_and_positions_are_looked_up_as_by_the_twin():
    weight, table = torch.randn(50, 1288).bfloat16(), torch.randn(9, 2, 24)
    tokens, positions = torch.tensor([0, 49, 7]), torch.tensor([8, 0, 3])
    found = stepping.look_up(*on_device(tokens, positions, weight, table))
    for got, expected in zip(found, reference.look_up(tokens, positions, weight, table), strict=True):
        assert torch.equal(got.cpu(), expected)


def test_results_reach_the_half_of_the_host_whose_turn_it_is():
    tensors = [torch.arange(3), torch.randn(3), torch.randn(3, 46).double(), torch.randn(5000)]
    starts = [0, 8, 16, 300]
    for turn in (0, 1):
        got, expected = (torch.full((2, 6000), -1, dtype=torch.int32) for _ in range(2))
        if DEVICE == "cuda":
            got = got.pin_memory()
        stepping.deliver(on_device(*tensors), starts, got, *on_device(torch.tensor([turn], dtype=torch.int32)))
        reference.deliver(tensors, starts, expected, torch.tensor([turn]))
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        assert torch.equal(got, expected) and (expected[1 - turn] == -1).all()


def test_rows_move_on_as_by_the_twin():
    ids, moves, pages = torch.tensor([5, 6, 7]), torch.tensor([1, 1, 0]), torch.tensor([[4, 2], [3, 9], [8, 8]]).int()
    state = [
        torch.zeros(3, dtype=torch.int64),
        torch.tensor([15, 3, 0]),
        torch.zeros(3).int(),
        torch.tensor([0, 0, 128]),
        torch.tensor([1]).int(),
    ]
    got = on_device(*state)
    names = ("tokens", "positions", "lengths", "slots", "turn")
    reference.advance(ids, moves, pages, **dict(zip(names, state, strict=True)), page_size=16)
    stepping.advance(*on_device(ids, moves, pages), **dict(zip(names, got, strict=True)), page_size=16)
    assert [t.tolist() for t in got] == [t.tolist() for t in state]
    assert [t.tolist() for t in state] == [[5, 6, 7], [16, 4, 0], [17, 5, 1], [32, 52, 128], [0]]
