"""Every public name of DeepGEMM 2.6 to 2.8, by release: the list is frozen, module and page follow it."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from jax_deepgemm import deep_gemm

pytestmark = pytest.mark.any_version

PAGE = Path(__file__).parents[2] / "docs" / "from_deepgemm.md"
BEGIN, END = "<!-- begin names -->", "<!-- end names -->"

RELEASES = {
    "2.6 to 2.8": """
        set_num_sms get_num_sms set_tc_util get_tc_util set_pdl get_pdl set_ignore_compile_dims
        set_block_size_multiple_of
        set_mk_alignment_for_contiguous_layout get_mk_alignment_for_contiguous_layout
        get_theoretical_mk_alignment_for_contiguous_layout get_m_alignment_for_contiguous_layout
        get_k_alignment_for_contiguous_layout
        fp8_fp4_gemm_nt fp8_fp4_gemm_nn fp8_fp4_gemm_tn fp8_fp4_gemm_tt
        fp8_gemm_nt fp8_gemm_nn fp8_gemm_tn fp8_gemm_tt
        m_grouped_fp8_fp4_gemm_nt_contiguous m_grouped_fp8_fp4_gemm_nn_contiguous
        m_grouped_fp8_fp4_gemm_nt_masked m_grouped_fp8_gemm_nt_contiguous m_grouped_fp8_gemm_nn_contiguous
        m_grouped_fp8_gemm_nt_masked fp8_m_grouped_gemm_nt_masked bf16_m_grouped_gemm_nt_masked
        k_grouped_fp8_gemm_nt_contiguous k_grouped_fp8_gemm_tn_contiguous k_grouped_bf16_gemm_tn_contiguous
        bf16_gemm_nt bf16_gemm_nn bf16_gemm_tn bf16_gemm_tt
        m_grouped_bf16_gemm_nt_contiguous m_grouped_bf16_gemm_nn_contiguous m_grouped_bf16_gemm_nt_masked
        cublaslt_gemm_nt cublaslt_gemm_nn cublaslt_gemm_tn cublaslt_gemm_tt
        einsum fp8_einsum tf32_hc_prenorm_gemm
        fp8_fp4_mqa_logits get_paged_mqa_logits_metadata fp8_fp4_paged_mqa_logits
        fp8_mqa_logits fp8_paged_mqa_logits
        transform_sf_into_required_layout get_tma_aligned_size get_mn_major_tma_aligned_tensor
        get_mn_major_tma_aligned_packed_ue8m0_tensor get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor
        SymmBuffer get_symm_buffer_for_mega_moe transform_weights_for_mega_moe fp8_fp4_mega_moe bf16_mega_moe
        utils.ceil_div utils.align utils.ceil_to_ue8m0 utils.pack_ue8m0_to_int utils.unpack_ue8m0_from_int
        utils.per_token_cast_to_fp8 utils.per_channel_cast_to_fp8 utils.per_block_cast_to_fp8
        utils.per_custom_dims_cast_to_fp8 utils.per_token_cast_to_fp4 utils.transpose_packed_fp4
        utils.cast_back_from_fp4 utils.init_dist utils.uneven_all_gather utils.dist_print
        testing.bench testing.bench_kineto testing.calc_diff testing.count_bytes testing.assert_bitwise_equal
        testing.get_arch_major testing.test_filter testing.ignore_env
        legacy.m_grouped_bf16_gemm_nt_contiguous_tl legacy.m_grouped_bf16_gemm_nn_contiguous_tl
        legacy.a_fused_m_grouped_bf16_gemm_nt_contiguous_tl
        legacy.a_fused_m_grouped_bf16_gemm_nn_contiguous_tl
        legacy.a_fused_k_grouped_bf16_gemm_tn_contiguous_tl
        legacy.b_fused_k_grouped_bf16_gemm_tn_contiguous_tl
    """,
    "2.6 and 2.7": """
        fp8_gemm_nt_skip_head_mid
    """,
    "2.8": """
        get_mqa_logits_metadata get_sparse_mqa_logits_metadata get_paged_sparse_mqa_logits_metadata
        fp8_fp4_sparse_mqa_logits fp8_fp4_paged_sparse_mqa_logits bf16_mega_gate mega_mhc
        fp4_gemm_nt m_grouped_fp4_gemm_nt_contiguous m_grouped_fp4_gemm_nt_masked
        k_grouped_fp4_gemm_nt_contiguous cublaslt_nvfp4_gemm_nt batched_syrk batched_symm fp4_fp4_mega_moe
        get_symm_buffer_for_sm90_mega_moe transform_weights_for_mega_moe_sm90 fp8_mega_moe
        use_deterministic_algorithms jit_hooks shutdown locality_domain
    """,
}

NAMES = {name: release for release, names in RELEASES.items() for name in names.split()}


def find(name: str) -> object:
    found: object = deep_gemm
    for part in name.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_name_is_there(name: str) -> None:
    assert callable(find(name))


def test_there_are_no_others() -> None:
    top = {name for name in deep_gemm.__all__ if name not in ("utils", "testing", "legacy")}
    rooms = {f"{room}.{name}" for room in ("testing", "legacy") for name in getattr(deep_gemm, room).__all__}
    assert top | rooms == {name.removeprefix("utils.") for name in NAMES}
    assert set(deep_gemm.utils.__all__) <= top


def test_page_lists_every_name_with_its_release() -> None:
    text = PAGE.read_text().split(BEGIN)[1].split(END)[0]
    rows = re.findall(r"^\| `([\w.]+)` \| ([^|]*) \| [^|]+ \|$", text, re.MULTILINE)
    assert dict(rows) == NAMES
    assert len(rows) == len(NAMES)


@pytest.mark.parametrize("name", deep_gemm.absent.ABSENT)
def test_what_cannot_exist_says_what_to_use(name: str) -> None:
    with pytest.raises(NotImplementedError, match=rf"^{name} is not there on Hopper in JAX: .*\. Use .*\.$"):
        find(name)(1, two=2)  # type: ignore[operator]


def test_advice_names_what_exists() -> None:
    import jax_deepgemm
    import jax_deepgemm.hyperconnection
    import jax_deepgemm.indexer
    import jax_deepgemm.jit
    import jax_deepgemm.moe

    for _, use in deep_gemm.absent.ABSENT.values():
        for path in re.findall(r"jax_deepgemm((?:\.\w+)+)", use):
            found: object = jax_deepgemm
            for part in path.strip(".").split("."):
                found = getattr(found, part)


D_LESS = re.compile(r"gemm|batched_|einsum|^legacy")


@pytest.mark.parametrize("name", [name for name in NAMES if D_LESS.search(name)])
def test_d_is_returned_and_not_written(name: str) -> None:
    short = name.rpartition(".")[2]
    if short in deep_gemm.absent.ABSENT or short == "fp8_gemm_nt_skip_head_mid":  # d has the holes
        return
    function = find(name)
    taken = inspect.signature(function).parameters  # type: ignore[arg-type]
    before = list(taken)[: list(taken).index("d")]
    assert before in (["a", "b"], ["expr", "a", "b"]) or short == "batched_syrk"
    with pytest.raises(
        TypeError, match=r"d is a float, need None: JAX arrays are not written to, and the value is"
    ):
        function(*before, 1.0)  # type: ignore[operator]
