"""Types that ops share: the form of activations, the rule of a gate, the KV cache, what a survey holds."""

from __future__ import annotations

from typing import NamedTuple

import torch

FP8_MAX = 448.0
LOG2_E = 1.4426950408889634  # cards raise 2 to a power faster than e: a softmax's scale takes this in
AMAX_FLOOR = 1e-4  # keeps the scale of an all-zero block away from zero
UNIT = 2.0**62  # a probability times this is a whole number for `cumulative`
INVARIANT_ROWS = 32  # up to this many rows, a product's row depends on that row alone (see `plain_gemm`)


class Form(NamedTuple):
    """In which form an op leaves what products will read: in the model's dtype, block-quantised, or both."""

    plain: bool
    fp8: bool
    ue8m0: bool = False  # scales are powers of two


class Routing(NamedTuple):
    """How a gate chooses experts (DeepSeek-V3, arXiv:2412.19437, section 2.1.2)."""

    top_k: int
    groups: int  # of equal size; 1: no groups
    kept_groups: int
    sigmoid: bool  # scores; otherwise softmax
    normalised: bool  # weights of the chosen sum to 1 before scaling
    scaling: float
    shared: int = 0  # experts that every row goes to, with weight 1: numbered after the others


class Formed(NamedTuple):
    """Activations `[T, K]` in the form requested; None for what was not."""

    plain: torch.Tensor | None
    q: torch.Tensor | None  # float8_e4m3fn
    s: torch.Tensor | None  # [T, K/128] float32


class KV(NamedTuple):
    """What attention keeps of each token, in pages: a layer's cache, or all layers' with a dimension before the pages.

    Plain, or E4M3 with a scale for each vector of a token: a key head, a value head, or with MLA the latent and the
    rotary key. E4M3 keeps three bits of mantissa over a range of 2^15, so that a scale has only to bring a vector into
    it; and with one scale for a whole vector, attention restores scores and weights instead of keys and values.

    Values of heads lie `across` in an E4M3 page: tokens side by side, one column after another, behind all tokens'
    keys. So a tensor core, which multiplies FP8 only along what is contiguous, can take them as they are."""

    values: torch.Tensor  # [pages, page_size, width] in the model's dtype, or float8_e4m3fn
    scales: torch.Tensor | None = None  # [pages, vectors, page_size] float32, restored by value * scale
    widths: tuple[int, ...] = ()  # of a token's vectors, in order: their sum is the width; needed with scales only
    across: int = 0  # of the last columns; with scales only

    @classmethod
    def zeros(
        cls, *shape: int, widths: tuple[int, ...], dtype: torch.dtype, device: torch.device | str, across: int = 0
    ) -> KV:
        """`shape` ends with pages and page size. `dtype` float8_e4m3fn brings scales with it, others no `across`."""
        values = torch.zeros(*shape, sum(widths), dtype=dtype, device=device)
        if dtype != torch.float8_e4m3fn:
            return cls(values, None, widths)
        *pages, page_size = shape
        return cls(values, torch.zeros(*pages, len(widths), page_size, device=device), widths, across)

    def by_token(self) -> tuple[torch.Tensor, torch.Tensor]:
        """An E4M3 layer's codes (uint8: torch can't index FP8), token by token: views `[pages, page_size, columns]` of
        the columns that lie along and of those that lie across."""
        pages = self.values.view(torch.uint8).flatten(1)
        along, across = pages.split([self.page_size * (self.width - self.across), self.page_size * self.across], dim=1)
        return along.unflatten(1, (self.page_size, -1)), across.unflatten(1, (self.across, self.page_size)).mT

    def check_values_across(self) -> None:
        """Raises ValueError unless this can be a cache of heads: in E4M3 their values lie across."""
        if self.across != (0 if self.scales is None else self.width // 2):
            raise ValueError(f"an E4M3 cache of heads keeps its values across, not {self.across} columns")

    @property
    def page_size(self) -> int:
        return self.values.shape[-2]

    @property
    def width(self) -> int:
        return self.values.shape[-1]

    def layer(self, index: int) -> KV:
        scales = None if self.scales is None else self.scales[index]
        return self._replace(values=self.values[index], scales=scales)


class Keep(NamedTuple):
    """What MLA's cache keeps of each token: KV latent and rotary key, from column `at` of partial sums."""

    at: int
    norm: torch.Tensor  # [latent]
    eps: float
    slots: torch.Tensor  # [T] int64: page * page_size and the token's number in the page
    kv: KV
