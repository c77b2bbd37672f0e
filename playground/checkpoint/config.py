"""What a model is, as frozen dataclasses. `families.py` makes them from a checkpoint's `config.json` and checks every
field; everything behind that boundary may trust them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from playground.checkpoint.patterns import may_never_end

BLOCK_SIZE = 128
"""Width of an activation block and side of a weight tile: the only block size of the DeepSeek-V3 FP8 format."""


MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 10.0
"""Of sampling; below the first, 0 says the same better."""


_EXPRESSION = re.compile(r"[*+?\[\](){}|\\^$]|^re:")
_REPEATED = re.compile(r"[*+{]")  # each multiplies the time that a match can take by a name's length


class CheckpointError(ValueError):
    """A model folder that can't be used: the message names the file, field or tensor and says what would do. It stays
    a sentence, however much of a file it quotes."""

    def __init__(self, message: str):
        super().__init__(message if len(message) <= 600 else f"{message[:300]} ... {message[-200:]}")


def whole_blocks(size: int) -> int:
    """The size rounded up to whole 128-wide blocks."""
    return -(-size // BLOCK_SIZE) * BLOCK_SIZE


@dataclass(frozen=True)
class YarnScaling:
    """YaRN context extension (Peng et al., 2023, arXiv:2309.00071), with DeepSeek's two `mscale` fields."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None  # of cosines and sines, where the checkpoint states it
    truncate: bool = True  # the range between fast and slow is rounded outwards to whole pairs

    def attention_scale(self, mscale: float) -> float:
        """YaRN's magnitude correction `0.1 * mscale * ln(factor) + 1`; 1 where nothing is extended."""
        return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    @property
    def magnitude(self) -> float:
        """What cosines and sines are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self.attention_scale(self.mscale) / self.attention_scale(self.mscale_all_dim)
        return self.attention_scale(1.0)


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's context extension: slow frequencies divided by `factor`, a smooth passage to the fast ones."""

    factor: float
    original_max_position_embeddings: int
    low_freq_factor: float
    high_freq_factor: float


@dataclass(frozen=True)
class LinearScaling:
    """All frequencies divided by `factor`."""

    factor: float


@dataclass(frozen=True)
class LongScaling:
    """LongRoPE (Ding et al., 2024, arXiv:2402.13753): each frequency divided by a number of its own, of one of two
    lists: contexts longer than the original one take `long`."""

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_max_position_embeddings: int
    factor: float
    attention_factor: float | None = None

    @property
    def magnitude(self) -> float:
        """What cosines and sines are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.factor <= 1:
            return 1.0
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_max_position_embeddings))


Scaling = YarnScaling | Llama3Scaling | LinearScaling | LongScaling


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of `dim` values. `interleaved`: pairs are `(x[2i], x[2i+1])`, otherwise `(x[i], x[i+dim/2])`."""

    theta: float
    dim: int
    interleaved: bool
    scaling: Scaling | None = None


@dataclass(frozen=True)
class MlaConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1)."""

    heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    softmax_scale: float
    interleaved: bool = True  # the pairs of the files' rotary parts lie beside each other, else half a part apart

    @property
    def latent(self) -> int:
        """Width of the KV latent here: whole blocks, zeros behind it."""
        return whole_blocks(self.kv_lora_rank)

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def rotary_width(self) -> int:
        """Of what is rotated of a head."""
        return self.qk_rope_head_dim

    @property
    def value_dim(self) -> int:
        """Of a head's values."""
        return self.v_head_dim

    @property
    def absorbed_weights(self) -> int:
        """Of a layer: what decode holds a second time, `kv_b_proj` in the form that it absorbs."""
        return self.latent * self.heads * (self.qk_nope_head_dim + self.v_head_dim)

    @property
    def prefill_width(self) -> int:
        """Numbers of a token while a prefill chunk's heads are made: queries, keys and values at most."""
        return self.heads * self.qk_head_dim * 3

    @property
    def expanded_width(self) -> int:
        """Numbers of every token that a prefill chunk attends to: each head's keys and values, as they are expanded."""
        return self.heads * (self.qk_head_dim + self.v_head_dim + self.qk_nope_head_dim)

    def weight_count(self, hidden: int) -> int:
        """Of a layer's projections, as the files hold them."""
        queries, rank, rank_kv = self.heads * self.qk_head_dim, self.q_lora_rank, self.kv_lora_rank
        query = hidden * queries if rank is None else rank * (hidden + queries)
        expand = rank_kv * self.heads * (self.qk_nope_head_dim + self.v_head_dim)
        return query + hidden * (rank_kv + self.qk_rope_head_dim) + expand + self.heads * self.v_head_dim * hidden

    @property
    def cache_widths(self) -> tuple[int, ...]:
        """Of the vectors that the cache holds per token and layer: the compressed KV latent, the shared rotary key."""
        return (self.latent, self.qk_rope_head_dim)

    @property
    def cache_across(self) -> int:
        """None: a latent is key and value."""
        return 0


@dataclass(frozen=True)
class GqaConfig:
    """Grouped-query attention (Ainslie et al., 2023, arXiv:2305.13245)."""

    heads: int
    kv_heads: int
    head_dim: int
    qk_norm: bool  # RMSNorm on each Q and K head
    bias: bool = False  # of queries, keys and values
    output_bias: bool = False

    @property
    def width(self) -> int:
        """Of a head here: its size in whole sixteens, zeros behind each half."""
        return -(-self.head_dim // 16) * 16

    @property
    def softmax_scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def qk_head_dim(self) -> int:
        return self.width

    @property
    def rotary_width(self) -> int:
        return self.width

    @property
    def value_dim(self) -> int:
        """Of a head's values."""
        return self.width

    @property
    def absorbed_weights(self) -> int:
        """None: decode reads the projections themselves."""
        return 0

    @property
    def prefill_width(self) -> int:
        """Numbers of a token while a prefill chunk's heads are made: queries, and as many for the result."""
        return self.heads * self.width * 2

    @property
    def expanded_width(self) -> int:
        """Numbers of every token that a prefill chunk attends to: keys and values, one for each head at most."""
        return self.heads * 2 * self.width

    def weight_count(self, hidden: int) -> int:
        """Of a layer's projections, as the files hold them."""
        return 2 * hidden * self.head_dim * (self.heads + self.kv_heads)

    @property
    def cache_widths(self) -> tuple[int, ...]:
        """All key heads of a token, then all value heads."""
        return (self.width,) * (2 * self.kv_heads)

    @property
    def cache_across(self) -> int:
        """Columns of the values, which an E4M3 cache keeps across (see `kernels.KV`)."""
        return self.width * self.kv_heads


@dataclass(frozen=True)
class MoeConfig:
    """Routed experts with the field names of DeepSeek-V3 (arXiv:2412.19437, section 2.1.2)."""

    layers: tuple[int, ...]  # which layers have experts; the others are dense
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    n_group: int
    topk_group: int
    routed_scaling_factor: float
    scoring_func: str  # "sigmoid" or "softmax"
    norm_topk_prob: bool
    corrected: bool  # a correction bias chooses (topk_method "noaux_tc"), and groups count their two best experts


@dataclass(frozen=True)
class Unconverted:
    """Modules that a checkpoint leaves unquantised, by the three ways of naming them that transformers knows: from the
    start of a name to the end of a part, a name's end, or a regular expression for its start."""

    starts: frozenset[str] = frozenset()
    ends: tuple[str, ...] = ()
    patterns: tuple[re.Pattern, ...] = ()

    @classmethod
    def of(cls, names: Sequence[str]) -> Unconverted:
        """Raises `CheckpointError` for what is no expression, or one that might take forever."""
        plain = [name for name in names if not _EXPRESSION.search(name)]
        patterns = []
        for name in set(names) - set(plain):
            text = name.removeprefix("re:")
            if len(text) > 200 or may_never_end(text) or len(_REPEATED.findall(text)) > 3:
                raise CheckpointError(
                    f"config.json: modules_to_not_convert has {name[:80]!r}, too intricate a pattern."
                )
            try:
                patterns.append(re.compile(rf"(?:{text})(?:(?<=\.)|(?=\.|$))"))
            except re.error as error:
                raise CheckpointError(f"config.json: modules_to_not_convert has {name[:80]!r}: {error}.") from None
        return cls(frozenset(plain), tuple(plain), tuple(patterns))

    def __contains__(self, module: str) -> bool:
        parts = module.split(".")
        if not self.starts.isdisjoint(".".join(parts[:n]) for n in range(1, len(parts) + 1)):
            return True
        return module.endswith(self.ends) or any(pattern.match(module) for pattern in self.patterns)


@dataclass(frozen=True)
class QuantizationConfig:
    """Block-scaled FP8: E4M3 weights in 128x128 tiles, activations quantised on the fly in 1x128 blocks."""

    scale_fmt: str | None = None  # None: float32 scales (V3). "ue8m0": powers of two (V3.1)
    not_converted: Unconverted = Unconverted()


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer with RMSNorm and SwiGLU."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    attention: MlaConfig | GqaConfig
    moe: MoeConfig | None
    rope: RopeConfig
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    skipped_layers: int  # multi-token prediction layers that stand in the files after the model's own
    quantization: QuantizationConfig | None
    mlp_bias: bool = False
    unrotated: frozenset[int] = frozenset()  # layers without rotary embedding
    window: int | None = None  # tokens that a sliding layer sees
    sliding: frozenset[int] = frozenset()  # layers that see a window

    @property
    def width(self) -> int:
        """Of the residual stream: the hidden size in whole blocks, zeros behind it."""
        return whole_blocks(self.hidden_size)

    def window_of(self, layer: int) -> int | None:
        """How many tokens this layer sees, itself the last; None: all that a row can have."""
        return self.window if layer in self.sliding and self.window < self.max_position_embeddings else None

    def is_moe(self, layer: int) -> bool:
        return self.moe is not None and layer in self.moe.layers

    def quantises(self, module: str) -> bool:
        """Whether the projection of this name is stored and multiplied in FP8."""
        return self.quantization is not None and module not in self.quantization.not_converted
