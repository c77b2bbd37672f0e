"""The ops: tensors in, tensors out. A CUDA tensor goes to Triton, any other to the torch twin (see `dispatch.py`).

Each family's `contract.py` says what its ops take and give and raises the errors; `reference.py` says in torch what
each one computes. Importing this package imports neither torch nor Triton: a page that only shows what
a draw left does without both. Each name comes from its home when it is first asked for.

On a card an op may read some of its inputs before the ops before it have ended (see `launch.py`): weights, their scales
and norms; `seq_lens` and `block_table`; of the cache of `gqa_decode` and `mla_decode` all pages but each row's newest;
`temperature`, `seeds` and `positions`; `experts` of `expert_gemm` with weights. None of these may be what an op wrote,
unless work of torch's own began after it; `experts` also where another `expert_gemm`, without weights, lies between
`route` and the one that reads them.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "kernels.attention.contract": "causal_attention gather_kv gqa_decode mla_decode",
    "kernels.forms": "FP8_MAX INVARIANT_ROWS KV Form Formed Keep Routing",
    "kernels.sampling.layout": "PROMPTED SCORED SHOWN SURVEYED Survey",
    "kernels.gemm.contract": "add_up expert_gemm fp8_gemm gemm_partials gemm_swiglu plain_gemm",
    "kernels.moe.contract": "route",
    "kernels.norm.contract": "add_norm add_norm_gate swiglu",
    "kernels.quant.contract": "act_dequant act_quant formed weight_dequant weight_quant",
    "kernels.reference": "has_fp8_units",
    "kernels.rope.contract": "absorb_queries rope_heads rotate split_latents",
    "kernels.sampling.contract": "cumulative draw draw_and_normaliser penalise survey",
    "kernels.sampling.filters": "draw_multinomial log_softmax process_logits",
    "kernels.sampling.noise": "gumbel_noise uniform_noise",
    "kernels.stepping.contract": "advance deliver look_up",
    "kernels.launch": "one_after_another",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}
__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'kernels' has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(_HOME_OF[name]), name)
    return found
