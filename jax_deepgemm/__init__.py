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
    from jax_deepgemm.ops.grouped.linear import grouped_linear
    from jax_deepgemm.ops.quantize import (
        PreparedWeight,
        QuantizedArray,
        accumulate_gradients,
        dequantize,
        prepare_weight,
        quantize,
    )
    from jax_deepgemm.ops.ragged_dot.api import ragged_dot, ragged_dot_general
    from jax_deepgemm.ops.topk import topk
    from jax_deepgemm.tools.explain import explain
    from jax_deepgemm.tools.precompile import precompile

_HOME = {
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
    "PreparedWeight": "ops.quantize",
    "accumulate_gradients": "ops.quantize",
    "QuantizedArray": "ops.quantize",
    "prepare_weight": "ops.quantize",
    "quantize": "ops.quantize",
    "dequantize": "ops.quantize",
    "k_grouped_bf16_gemm_tn_contiguous": "ops.grouped.api",
    "k_grouped_fp8_gemm_nt_contiguous": "ops.grouped.api",
    "k_grouped_fp8_gemm_tn_contiguous": "ops.grouped.api",
    "m_grouped_bf16_gemm_nn_contiguous": "ops.grouped.api",
    "m_grouped_bf16_gemm_nt_contiguous": "ops.grouped.api",
    "m_grouped_bf16_gemm_nt_masked": "ops.grouped.api",
    "m_grouped_fp8_gemm_nn_contiguous": "ops.grouped.api",
    "m_grouped_fp8_gemm_nt_contiguous": "ops.grouped.api",
    "m_grouped_fp8_gemm_nt_masked": "ops.grouped.api",
    "grouped_linear": "ops.grouped.linear",
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
    "GemmConfig",
    "GemmProblem",
    "PreparedWeight",
    "QuantizedArray",
    "__version__",
    "accumulate_gradients",
    "bf16_gemm_nn",
    "bf16_gemm_nt",
    "bf16_gemm_tn",
    "bf16_gemm_tt",
    "config",
    "dequantize",
    "embed_kernels",
    "explain",
    "export_checks",
    "fp8_gemm_nn",
    "fp8_gemm_nt",
    "fp8_gemm_nt_skip_head_mid",
    "fp8_gemm_tn",
    "fp8_gemm_tt",
    "fp8_linear",
    "grouped_linear",
    "k_grouped_bf16_gemm_tn_contiguous",
    "k_grouped_fp8_gemm_nt_contiguous",
    "k_grouped_fp8_gemm_tn_contiguous",
    "m_grouped_bf16_gemm_nn_contiguous",
    "m_grouped_bf16_gemm_nt_contiguous",
    "m_grouped_bf16_gemm_nt_masked",
    "m_grouped_fp8_gemm_nn_contiguous",
    "m_grouped_fp8_gemm_nt_contiguous",
    "m_grouped_fp8_gemm_nt_masked",
    "precompile",
    "prepare_weight",
    "quantize",
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
