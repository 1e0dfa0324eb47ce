"""Inference with functions that DeepSpeed's kernels compute, of plain arrays: nothing is kept between calls,
nothing is written in place, caches go in and come out."""

from __future__ import annotations

from jax_deepgemm.attention import (
    KVCache,
    PagedKVCache,
    attend_with_cache,
    paged_append,
    ragged_paged_attention,
)
from jax_deepgemm.inference.contiguous import attention
from jax_deepgemm.inference.deepspeed import deepspeed_names
from jax_deepgemm.inference.elementwise import bias_act, residual_add
from jax_deepgemm.inference.experts import grouped_linear
from jax_deepgemm.inference.fastgen import fastgen_names
from jax_deepgemm.inference.layers import linear, mlp, norm_linear
from jax_deepgemm.inference.norms import norm, norm_fp8
from jax_deepgemm.inference.rotary import rotary
from jax_deepgemm.inference.scores import masked_softmax
from jax_deepgemm.inference.tokens import embed, last_tokens
from jax_deepgemm.inference.weights import QuantizedWeight, dequantize, quantize
from jax_deepgemm.moe import combine as moe_combine
from jax_deepgemm.moe import dispatch as moe_dispatch
from jax_deepgemm.moe import route as moe_route

__all__ = [
    "KVCache",
    "PagedKVCache",
    "QuantizedWeight",
    "attend_with_cache",
    "attention",
    "bias_act",
    "deepspeed_names",
    "dequantize",
    "embed",
    "fastgen_names",
    "grouped_linear",
    "last_tokens",
    "linear",
    "masked_softmax",
    "mlp",
    "moe_combine",
    "moe_dispatch",
    "moe_route",
    "norm",
    "norm_fp8",
    "norm_linear",
    "paged_append",
    "quantize",
    "ragged_paged_attention",
    "residual_add",
    "rotary",
]
