"""Dense GEMMs with FP8 and BF16 operands, and the FP8 linear layer made of them."""

from __future__ import annotations

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
from jax_deepgemm.ops.gemm.heads import fp8_gemm_nt_skip_head_mid
from jax_deepgemm.ops.gemm.linear import fp8_linear

__all__ = [
    "Epilogue",
    "bf16_gemm_nn",
    "bf16_gemm_nt",
    "bf16_gemm_tn",
    "bf16_gemm_tt",
    "fp8_gemm_nn",
    "fp8_gemm_nt",
    "fp8_gemm_nt_skip_head_mid",
    "fp8_gemm_tn",
    "fp8_gemm_tt",
    "fp8_linear",
]
