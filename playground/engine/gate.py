"""What the bench asks before it prints a figure: whether what it is about to time is right."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import torch

import kernels
from kernels import reference
from playground.engine.engine import Engine
from playground.engine.requests import Request
from playground.engine.settings import SamplingParams
from playground.model.layers import MLP, Activation, Product
from playground.model.transformer import Transformer

GATE = 4e-3  # rounding of a result to bfloat16, as the tests of the kernels allow it


def random_input(product: Product, rows: int) -> tuple[Activation, torch.Tensor]:
    """Random rows in the form that a product reads, and the numbers that it reads there, `[rows, K]`."""
    x = torch.randn(rows, product.inputs, device=product.weight.device).to(product.dtype)
    formed = kernels.formed(x, kernels.Form(not product.fp8, product.fp8))
    a = kernels.act_dequant(formed.q, formed.s) if product.fp8 else formed.plain
    return Activation(formed, a if product.decoded is not None else None), a


def exact_product(product: Product, a: torch.Tensor, stack: int = 0) -> torch.Tensor:
    """Of numbers `a [rows, K]` by one of a product's weights, dequantised, in float64."""
    b = product.weight[stack]
    if product.fp8:
        b = kernels.weight_dequant(b, product.scale[stack], dtype=torch.float32)
    return a.double() @ b.double().T


def difference(out: torch.Tensor, right: torch.Tensor) -> float:
    return ((out.double() - right.double()).norm() / right.double().norm()).item()


@torch.inference_mode()
def product_error(product: Product, rows: int) -> float:
    """Relative error of a product of random rows against its dequantised operands."""
    x, a = random_input(product, rows)
    return difference(kernels.add_up(product(x), dtype=torch.float32), exact_product(product, a))


@torch.inference_mode()
def experts_error(product: Product, rows: int) -> float:
    """Relative error of the products of random rows with two experts of each row's own choice and the shared ones."""
    (x, a), count = random_input(product, rows), len(product.weight)
    routed, device = count - product.spare, product.weight.device
    shared = torch.arange(routed, count, dtype=torch.int32, device=device).expand(rows, -1)
    experts = torch.cat([torch.rand(rows, routed, device=device).argsort(dim=1)[:, :2].int(), shared], dim=1)
    out = product.of_experts(x, experts)
    right = torch.empty_like(out, dtype=torch.float64)
    for expert in experts.unique().tolist():
        right[experts == expert] = exact_product(product, a, expert)[(experts == expert).nonzero()[:, 0]]
    return difference(out, right)


@torch.inference_mode()
def gated_error(product: Product, rows: int) -> float:
    """Relative difference of SwiGLU at the end of a product to SwiGLU behind it, both quantised."""
    (x, _), form = random_input(product, rows), kernels.Form(False, True)
    out = product.swiglu(x, form, product.dtype)
    behind = kernels.swiglu(product(x), form, dtype=product.dtype)
    return difference(*(kernels.act_dequant(y.q, y.s) for y in (out, behind)))


@torch.inference_mode()
def attention_error(model: Transformer, queries: int, before: int) -> float:
    """Relative error of a prompt's attention, of heads as wide as the model's, against float64."""
    a, options = model.config.attention, {"device": model.device, "dtype": model.dtype}
    q, k = (torch.randn(t, 2, a.qk_head_dim, **options) for t in (queries, queries + before))
    v, plain = torch.randn(queries + before, 2, a.value_dim, **options), kernels.Form(True, False)
    about = {"scale": 0.1, "window": model.config.window}
    exact = reference.causal_attention(q.double(), k.double(), v.double(), plain, **about).plain
    return difference(kernels.causal_attention(q, k, v, plain, **about).plain, exact)


def written(engine: Engine, rows: int) -> Generator[None, None, list[int]]:
    """Rows with prompts of their own, run to their end, step by step; returns the first one's ids."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, engine.model.config.vocab_size, (rows, 64), generator=generator).tolist()
    requests = [
        Request(tuple(p), SamplingParams("gumbel", 1.0, seed=n), 32, ignore_eos=True) for n, p in enumerate(prompts)
    ]
    running = [engine.add([request])[0] for request in requests]
    try:
        while not all(row.finished for row in running):
            yield
    finally:
        for row in running:
            engine.cancel(row, keep=False)
    return running[0].new_ids


def faults(model: Transformer, engine: Engine) -> Iterator[str | None]:
    """What is wrong, in words; nothing where figures may be printed. As many rows as each kernel there is wants. None
    between slices: the engine's steps are whoever drives it."""
    seen, gated = set(), False
    many = (600, 2048) if model.device.type == "cuda" else ()  # a CPU has one way for all sizes
    for name, part in model.named_modules():
        if isinstance(part, MLP) and hasattr(part, "gate_up") and not part.gate_up.pieces and not gated:
            gated = True
            errors = [gated_error(part.gate_up, rows) for rows in (1, 200, *many)]
            if not max(errors) < GATE:
                yield f"{name}: SwiGLU at the end of its product differs by {max(errors):.1e}"
        if not isinstance(part, Product) or not part.multiplied or part.pieces:
            continue
        if (shape := (part.outputs, part.inputs, part.fp8)) not in seen:
            seen.add(shape)
            error, errors = experts_error if len(part.weight) > 1 else product_error, []
            for rows in (1, kernels.INVARIANT_ROWS, 200, *many):
                errors.append(error(part, rows))
                yield None
            if not max(errors) < GATE:  # NaN is wrong, too
                yield f"{name}: relative error {max(errors):.1e}"
    errors = [attention_error(model, queries, 77) for queries in (1, 100, *many)]
    if not max(errors) < GATE:
        yield f"a prompt's attention: relative error {max(errors):.1e}"
    alone = yield from written(engine, 1)
    together = yield from written(engine, 5)
    if alone != together:
        yield "a row writes other tokens alone than in company"
