"""Tensor-core kernels of modern language models as JAX functions.

Names are imported on first use, so that `import jax_deepgemm` costs little and touches no GPU. What it does
do is register the custom call, so that programs from a file or a cache find it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jax_deepgemm import config
from jax_deepgemm import log as _log
from jax_deepgemm._version import __version__
from jax_deepgemm.core import launch as _launch  # noqa: F401 - registers the custom call

if TYPE_CHECKING:
    from jax_deepgemm.core.export import export_checks
    from jax_deepgemm.core.launch import embed_kernels
    from jax_deepgemm.ops.einsum.api import bf16_einsum, fp8_einsum
    from jax_deepgemm.ops.gemm.api import (
        bf16_gemm_nn,
        bf16_gemm_nt,
        bf16_gemm_tn,
        bf16_gemm_tt,
        fp8_gemm_nn,
        fp8_gemm_nt,
        fp8_gemm_tn,
        fp8_gemm_tt,
    )
    from jax_deepgemm.ops.gemm.epilogue import Epilogue
    from jax_deepgemm.ops.gemm.family import GemmConfig, GemmProblem
    from jax_deepgemm.ops.gemm.heads import fp8_gemm_nt_skip_head_mid
    from jax_deepgemm.ops.gemm.linear import fp8_linear
    from jax_deepgemm.ops.grouped.api import (
        k_grouped_bf16_gemm_tn_contiguous,
        k_grouped_fp8_gemm_nt_contiguous,
        k_grouped_fp8_gemm_tn_contiguous,
        m_grouped_bf16_gemm_nn_contiguous,
        m_grouped_bf16_gemm_nt_contiguous,
        m_grouped_bf16_gemm_nt_masked,
        m_grouped_fp8_gemm_nn_contiguous,
        m_grouped_fp8_gemm_nt_contiguous,
        m_grouped_fp8_gemm_nt_masked,
    )
    from jax_deepgemm.ops.grouped.gathered import (
        k_grouped_bf16_gemm_tn_gathered,
        k_grouped_fp8_gemm_tn_gathered,
        m_grouped_bf16_gemm_nn_gathered,
        m_grouped_bf16_gemm_nt_gathered,
        m_grouped_fp8_gemm_nt_gathered,
    )
    from jax_deepgemm.ops.grouped.linear import grouped_linear
    from jax_deepgemm.ops.hc_prenorm import hc_prenorm_gemm
    from jax_deepgemm.ops.quantize import (
        Fp4Array,
        PerChannelArray,
        PreparedFp4,
        PreparedWeight,
        QuantizedArray,
        accumulate_gradients,
        dequantize,
        dequantize_per_channel,
        prepare_fp4,
        prepare_weight,
        quantize,
        quantize_per_channel,
    )
    from jax_deepgemm.ops.ragged_dot.api import ragged_dot, ragged_dot_general
    from jax_deepgemm.ops.topk import topk
    from jax_deepgemm.tools.explain import explain
    from jax_deepgemm.tools.precompile import precompile

_HOME = {
    "bf16_einsum": "ops.einsum.api",
    "fp8_einsum": "ops.einsum.api",
    "bf16_gemm_nn": "ops.gemm.api",
    "bf16_gemm_nt": "ops.gemm.api",
    "bf16_gemm_tn": "ops.gemm.api",
    "bf16_gemm_tt": "ops.gemm.api",
    "fp8_gemm_nn": "ops.gemm.api",
    "fp8_gemm_nt": "ops.gemm.api",
    "fp8_gemm_nt_skip_head_mid": "ops.gemm.heads",
    "fp8_gemm_tn": "ops.gemm.api",
    "fp8_gemm_tt": "ops.gemm.api",
    "fp8_linear": "ops.gemm.linear",
    "Epilogue": "ops.gemm.epilogue",
    "GemmConfig": "ops.gemm.family",
    "GemmProblem": "ops.gemm.family",
    "Fp4Array": "ops.quantize",
    "PerChannelArray": "ops.quantize",
    "dequantize_per_channel": "ops.quantize",
    "quantize_per_channel": "ops.quantize",
    "PreparedFp4": "ops.quantize",
    "PreparedWeight": "ops.quantize",
    "accumulate_gradients": "ops.quantize",
    "QuantizedArray": "ops.quantize",
    "prepare_fp4": "ops.quantize",
    "prepare_weight": "ops.quantize",
    "quantize": "ops.quantize",
    "dequantize": "ops.quantize",
    "k_grouped_bf16_gemm_tn_contiguous": "ops.grouped.api",
    "k_grouped_bf16_gemm_tn_gathered": "ops.grouped.gathered",
    "k_grouped_fp8_gemm_nt_contiguous": "ops.grouped.api",
    "k_grouped_fp8_gemm_tn_contiguous": "ops.grouped.api",
    "k_grouped_fp8_gemm_tn_gathered": "ops.grouped.gathered",
    "m_grouped_bf16_gemm_nn_contiguous": "ops.grouped.api",
    "m_grouped_bf16_gemm_nn_gathered": "ops.grouped.gathered",
    "m_grouped_bf16_gemm_nt_contiguous": "ops.grouped.api",
    "m_grouped_bf16_gemm_nt_gathered": "ops.grouped.gathered",
    "m_grouped_bf16_gemm_nt_masked": "ops.grouped.api",
    "m_grouped_fp8_gemm_nn_contiguous": "ops.grouped.api",
    "m_grouped_fp8_gemm_nt_contiguous": "ops.grouped.api",
    "m_grouped_fp8_gemm_nt_gathered": "ops.grouped.gathered",
    "m_grouped_fp8_gemm_nt_masked": "ops.grouped.api",
    "grouped_linear": "ops.grouped.linear",
    "hc_prenorm_gemm": "ops.hc_prenorm",
    "ragged_dot": "ops.ragged_dot.api",
    "ragged_dot_general": "ops.ragged_dot.api",
    "topk": "ops.topk",
    "explain": "tools.explain",
    "precompile": "tools.precompile",
    "embed_kernels": "core.launch",
    "export_checks": "core.export",
}

_log.start()

__all__ = [
    "Epilogue",
    "Fp4Array",
    "GemmConfig",
    "GemmProblem",
    "PerChannelArray",
    "PreparedFp4",
    "PreparedWeight",
    "QuantizedArray",
    "__version__",
    "accumulate_gradients",
    "bf16_einsum",
    "bf16_gemm_nn",
    "bf16_gemm_nt",
    "bf16_gemm_tn",
    "bf16_gemm_tt",
    "config",
    "dequantize",
    "dequantize_per_channel",
    "embed_kernels",
    "explain",
    "export_checks",
    "fp8_einsum",
    "fp8_gemm_nn",
    "fp8_gemm_nt",
    "fp8_gemm_nt_skip_head_mid",
    "fp8_gemm_tn",
    "fp8_gemm_tt",
    "fp8_linear",
    "grouped_linear",
    "hc_prenorm_gemm",
    "k_grouped_bf16_gemm_tn_contiguous",
    "k_grouped_bf16_gemm_tn_gathered",
    "k_grouped_fp8_gemm_nt_contiguous",
    "k_grouped_fp8_gemm_tn_contiguous",
    "k_grouped_fp8_gemm_tn_gathered",
    "m_grouped_bf16_gemm_nn_contiguous",
    "m_grouped_bf16_gemm_nn_gathered",
    "m_grouped_bf16_gemm_nt_contiguous",
    "m_grouped_bf16_gemm_nt_gathered",
    "m_grouped_bf16_gemm_nt_masked",
    "m_grouped_fp8_gemm_nn_contiguous",
    "m_grouped_fp8_gemm_nt_contiguous",
    "m_grouped_fp8_gemm_nt_gathered",
    "m_grouped_fp8_gemm_nt_masked",
    "precompile",
    "prepare_fp4",
    "prepare_weight",
    "quantize",
    "quantize_per_channel",
    "ragged_dot",
    "ragged_dot_general",
    "topk",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'jax_deepgemm' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"jax_deepgemm.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOME))
