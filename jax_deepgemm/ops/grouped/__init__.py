"""Grouped GEMMs: many GEMMs with different numbers of rows in one call, as mixtures of experts need them."""

from __future__ import annotations

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
from jax_deepgemm.ops.grouped.layouts import (
    check_group_sizes,
    check_m_indices,
    ends_to_group_sizes,
    ends_to_indices,
    get_k_alignment_for_contiguous_layout,
    get_m_alignment_for_contiguous_layout,
    get_mk_alignment_for_contiguous_layout,
    get_theoretical_mk_alignment_for_contiguous_layout,
    group_sizes_to_ends,
    group_sizes_to_indices,
    indices_to_ends,
    indices_to_group_sizes,
    set_mk_alignment_for_contiguous_layout,
)

__all__ = [
    "check_group_sizes",
    "check_m_indices",
    "ends_to_group_sizes",
    "ends_to_indices",
    "get_k_alignment_for_contiguous_layout",
    "get_m_alignment_for_contiguous_layout",
    "get_mk_alignment_for_contiguous_layout",
    "get_theoretical_mk_alignment_for_contiguous_layout",
    "group_sizes_to_ends",
    "group_sizes_to_indices",
    "indices_to_ends",
    "indices_to_group_sizes",
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
    "set_mk_alignment_for_contiguous_layout",
]
