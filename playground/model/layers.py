"""The parts that every layer is made of: projections and the products that multiply them, norms, SwiGLU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

import kernels
from playground.checkpoint.config import CheckpointError, ModelConfig, whole_blocks
from playground.model.layout import Layout, as_stored
from playground.model.step import Step


@dataclass
class Activation:
    """Input of products, quantised once and read by each of them."""

    formed: kernels.Formed
    restored: torch.Tensor | None = None  # [T, K] `q * s`, on a CPU only


class Feed(nn.Module):
    """What stands before products: the form that they want their input in. The one place where the scales of
    activations are seen; `readers` names the projections that read every row, `experts` those that read a row only
    where it chose their expert."""

    def __init__(self, config: ModelConfig, *readers: str, experts: Sequence[tuple[str, ...]] = ()):
        super().__init__()
        every = [*readers, *(name for names in experts for name in names)]
        quantised = [name for name in every if config.quantises(f"model.{name}")]
        self.readers = tuple(name for name in readers if name in quantised)
        self.experts = tuple(experts) if len(quantised) > len(self.readers) else ()
        ue8m0 = bool(quantised) and config.quantization.scale_fmt == "ue8m0"
        self.form = kernels.Form(len(quantised) < len(every), bool(quantised), ue8m0)

    def forward(self, x: kernels.Formed, step: Step, chosen: torch.Tensor | None = None) -> Activation:
        """`x` in this feed's form: rows, or the choices `chosen [T, k]` of experts, one row each."""
        if x.q is None:
            return Activation(x)
        if step.trace is not None:
            if self.readers:
                step.trace.record(self.readers, x.s, None)
            if self.experts:
                each = chosen.numel() // len(x.s)  # all choices of a row may read the same
                step.trace.record(self.experts, x.s[:, None].expand(-1, each, -1).flatten(0, 1), chosen)
        # a CPU has no FP8 units: products run in float32 on exactly the numbers that FP8 holds
        return Activation(x, None if x.q.is_cuda else kernels.act_dequant(x.q, x.s))


class Linear(nn.Module):
    """A projection's place: its weight, FP8 with `weight_scale_inv` as checkpoints store it, or plain. A `Product`
    multiplies it.

    `name` is its place in the model, such as `layers.0.mlp.up_proj`. Inputs are padded to whole blocks with zeros, and
    outputs as well where they are the input of what comes next: `whole`.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        config: ModelConfig,
        name: str,
        whole: bool = False,
        bias: bool = False,
        rows: Layout | None = None,
        columns: Layout | None = None,
    ):
        """`inputs` and `outputs` as in the files; `rows` and `columns`: how they lie here, where that differs by more
        than padding behind them."""
        super().__init__()
        self.stored = (outputs, inputs)  # the shape in the files
        self.rows, self.columns = rows, columns
        inputs, outputs = len(columns or range(inputs)), len(rows or range(outputs))
        self.bias = _parameter(outputs) if bias else None
        inputs, outputs = whole_blocks(inputs), whole_blocks(outputs) if whole else outputs
        self.tile_errors: torch.Tensor | None = None  # of each tile, where the weight was quantised here at load
        self.twice = False  # it had been quantised before, in another format
        self.is_fp8 = config.quantises(f"model.{name}")
        self.scale_fmt = config.quantization.scale_fmt if self.is_fp8 else None
        self.weight = _parameter(outputs, inputs, dtype=torch.float8_e4m3fn if self.is_fp8 else None)
        if self.is_fp8:
            self.weight_scale_inv = _parameter(-(-outputs // 128), -(-inputs // 128), dtype=torch.float32)

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        if not self.is_fp8:
            return self.weight.to(dtype)
        return kernels.weight_dequant(self.weight, self.weight_scale_inv, dtype=dtype)

    def as_stored(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight as the files hold it, restored."""
        whole = as_stored(as_stored(self.dequantised(dtype), self.rows, 0), self.columns, 1)
        return whole[: self.stored[0], : self.stored[1]]


class Product(nn.Module):
    """Projections of one input, multiplied as one: their weights lie below each other in one storage, of which the
    projections' own parameters are views. `experts`: as many such stacks, behind each other.

    Where some of its projections are FP8 and others are not, it falls into `pieces`: a product for each.
    """

    def __init__(self, *stacks: tuple[Linear, ...], spare: int = 0, multiplied: bool = True):
        """`spare` stacks more have room, for their owner to fill; `multiplied=False` is only a storage."""
        super().__init__()
        self.stacks = stacks  # a tuple, so that torch does not count the projections twice
        self.spare, self.multiplied = spare, multiplied
        first = stacks[0]
        forms = {part.is_fp8 for stack in stacks for part in stack}
        self.pieces = [Product((part,)) for part in first] if len(forms) > 1 else None
        if self.pieces and len(stacks) > 1:
            raise CheckpointError("Experts of one layer of which some are quantised and others not can't be run.")
        self.fp8, self.inputs = first[0].is_fp8, first[0].weight.shape[1]
        # each projection but the last begins a tile, so that scales stay with their weights
        sizes = [whole_blocks(part.weight.shape[0]) for part in first]
        self.starts = [sum(sizes[:i]) for i in range(len(first))]
        self.outputs = self.starts[-1] + first[-1].weight.shape[0]
        self.weight = self.scale = self.decoded = self.dtype = self.bias = None

    def allocate(self, device: torch.device, dtype: torch.dtype) -> None:
        """Makes the storage, all zeros, and the projections' parameters views of it."""
        if self.pieces:
            return self._each("allocate", device, dtype)
        shape = (len(self.stacks) + self.spare, self.outputs, self.inputs)
        self.weight = torch.zeros(shape, dtype=torch.uint8 if self.fp8 else dtype, device=device)
        if self.fp8:
            self.weight = self.weight.view(torch.float8_e4m3fn)
            tiles = (shape[0], -(-self.outputs // 128), -(-self.inputs // 128))
            self.scale = torch.ones(tiles, dtype=torch.float32, device=device)
        for number, stack in enumerate(self.stacks):
            for start, part in zip(self.starts, stack, strict=True):
                rows = part.weight.shape[0]
                part.weight = _frozen(self.weight[number, start : start + rows])
                if self.fp8:
                    tile = start // 128
                    part.weight_scale_inv = _frozen(self.scale[number, tile : tile - (-rows // 128)])

    def prepare(self, dtype: torch.dtype) -> None:
        """Called once the weights are loaded. On a CPU they are restored here, once, not at every product."""
        self.dtype, first = dtype, self.stacks[0]
        if any(part.bias is not None for part in first):
            self.bias = torch.zeros(self.outputs, dtype=dtype, device=first[0].weight.device)
            for start, part in zip(self.starts, first, strict=True):
                if part.bias is not None:
                    self.bias[start : start + len(part.bias)] = part.bias
        if self.pieces:
            return self._each("prepare", dtype)
        if self.fp8 and self.multiplied and not self.weight.is_cuda:
            pairs = zip(self.weight, self.scale, strict=True)
            self.decoded = torch.stack([kernels.weight_dequant(w, s, dtype=dtype) for w, s in pairs])

    def _each(self, method: str, *args) -> None:
        for piece in self.pieces:
            getattr(piece, method)(*args)

    def _operands(self, x: Activation) -> tuple[torch.Tensor, torch.Tensor, tuple]:
        if not self.fp8:
            return x.formed.plain, self.weight, (None, None)
        if self.decoded is not None:
            return x.restored, self.decoded, (None, None)
        return x.formed.q, self.weight, (x.formed.s, self.scale)

    def forward(self, x: Activation, biased: bool = True) -> torch.Tensor:
        """Partial sums `[P, T, outputs]`; with `biased`, a bias that there is is one of them."""
        if self.pieces:
            each = [kernels.add_up(piece(x, biased), dtype=self.dtype) for piece in self.pieces]
            sizes = [b - a for a, b in pairwise([*self.starts, self.outputs])]
            return torch.cat([F.pad(p, (0, n - p.shape[1])) for p, n in zip(each, sizes, strict=True)], dim=-1)[None]
        a, b, (a_s, b_s) = self._operands(x)
        partials = kernels.gemm_partials(a, b[0], a_s, None if b_s is None else b_s[0], out_dtype=self.dtype)
        if self.bias is None or not biased:
            return partials
        return torch.cat([partials, self.bias.to(partials.dtype).expand(1, partials.shape[1], -1)])

    def swiglu(self, x: Activation, form: kernels.Form, dtype: torch.dtype) -> kernels.Formed:
        """`silu(gate) * up` of two projections, `[T, outputs / 2]` in `form`."""
        if self.pieces or self.bias is not None:
            return kernels.swiglu(self(x), form, dtype=dtype)
        a, b, (a_s, b_s) = self._operands(x)
        return kernels.gemm_swiglu(a, b[0], a_s, None if b_s is None else b_s[0], form=form, dtype=dtype)

    def of_experts(self, x: Activation, experts: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """`[T, k, outputs]` for the stacks that `experts [T, k]` names, the spare ones last in each row."""
        a, b, scales = self._operands(x)
        return kernels.expert_gemm(a, b, experts, *scales, weights, out_dtype=self.dtype, shared=self.spare)


class PlainLinear(nn.Module):
    """What the format keeps out of FP8 (head, gate): a product summed and returned in float32."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.stored = (outputs, inputs)  # the shape in the files
        self.weight = _parameter(outputs, whole_blocks(inputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[T, inputs]`, in whole blocks, to float32 `[T, outputs]`."""
        return kernels.plain_gemm(x.to(self.weight.dtype), self.weight, out_dtype=torch.float32)


class RMSNorm(nn.Module):
    """A norm's weight; the ops that use it do more at once. They take the mean over all of a row: where zeros pad it to
    `width`, or as `rows` says, what that makes too small of the mean goes into the weight, kept in float32, and into
    eps."""

    def __init__(self, dim: int, eps: float, width: int | None = None, rows: Layout | None = None):
        super().__init__()
        self.stored, self.rows = (dim,), rows
        width = len(rows) if rows else width or dim
        self.share = dim / width
        self.weight, self.eps = _parameter(width), eps * self.share

    def prepare(self, dtype: torch.dtype) -> None:
        if self.share != 1:
            self.weight = _frozen(self.weight.float() * self.share**0.5)

    def forward(self, x: torch.Tensor, partials: list[torch.Tensor], form: kernels.Form):
        """`x [T, D]` plus what the products before it left, and the norm of that sum in `form`."""
        return kernels.add_norm(x, partials, self.weight, self.eps, form)


class MLP(nn.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`. An inner size that is no multiple of 128 is padded with zero weights."""

    def __init__(self, config: ModelConfig, inner: int, name: str, products: bool = True, layout: Layout | None = None):
        """`products=False`: only the weights; the experts of a layer are multiplied together. `layout` of the inner
        size."""
        super().__init__()
        c, wide = config, (config.hidden_size, inner)
        self.gate_proj = Linear(*wide, c, f"{name}.gate_proj", whole=True, bias=c.mlp_bias, rows=layout)
        self.up_proj = Linear(*wide, c, f"{name}.up_proj", whole=True, bias=c.mlp_bias, rows=layout)
        self.down_proj = Linear(*wide[::-1], c, f"{name}.down_proj", whole=True, bias=c.mlp_bias, columns=layout)
        if products:
            self.gate_up = Product((self.gate_proj, self.up_proj))
            self.down = Product((self.down_proj,))
            self.feed_down = Feed(c, f"{name}.down_proj")

    def forward(self, x: Activation, step: Step) -> torch.Tensor:
        """Partial sums `[P, T, D]`."""
        return self.down(self.feed_down(self.gate_up.swiglu(x, self.feed_down.form, self.down.dtype), step))


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _parameter(*shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
    """Shape and dtype of a weight to come: storage arrives with the checkpoint. No dtype: the model's own."""
    return _frozen(torch.empty(shape, dtype=dtype, device="meta"))
