"""Calls by DeepGEMM's names give what this package's own functions give, and what a formula says."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_deepgemm as jdg
from jax_deepgemm import config, deep_gemm, grouped, indexer, moe
from jax_deepgemm.quantization import (
    QuantizedArray,
    get_mn_major_tma_aligned_tensor,
    pack_ue8m0_to_int,
    quantize,
    to_tuple,
)
from tests.deep_gemm.test_names import NAMES
from tests.shared.arrays import normal
from tests.shared.public_operands import operands

F32, E4 = jnp.float32, jnp.float8_e4m3fn
given = functools.cache(lambda name: operands()[name])


near = functools.partial(pytest.approx, rel=1e-3, abs=1e-2)


def pair(name: str) -> tuple[jax.Array, jax.Array]:
    """A quantised operand as DeepGEMM's users have it."""
    return to_tuple(given(name))


def dense(layout: str) -> list[tuple[Any, Any]]:
    a = "q_x" if layout[0] == "n" else "q_x_t"
    b = "q_w" if layout[1] == "t" else "q_w_t"
    own, theirs = getattr(jdg, f"fp8_gemm_{layout}"), getattr(deep_gemm, f"fp8_fp4_gemm_{layout}")
    with_c = own(given(a), given(b), given("c").astype(F32), out_dtype=F32)
    return [
        (theirs(pair(a), pair(b)), own(given(a), given(b))),
        (theirs(pair(a), pair(b), None, given("c").astype(F32), (1, 128, 128)), with_c),
    ]


def plain(layout: str) -> list[tuple[Any, Any]]:
    a, b = "x" if layout[0] == "n" else "x_t", "w" if layout[1] == "t" else "w_t"
    own, theirs = getattr(jdg, f"bf16_gemm_{layout}"), getattr(deep_gemm, f"bf16_gemm_{layout}")
    return [
        (theirs(given(a), given(b), c=given("c")), own(given(a), given(b), given("c"))),
        (theirs(given(a), given(b), out_dtype=F32), own(given(a), given(b), out_dtype=F32)),
    ]


def by_xla(layout: str) -> list[tuple[Any, Any]]:
    a, b = given("x" if layout[0] == "n" else "x_t"), given("w" if layout[1] == "t" else "w_t")
    wide = (np.asarray(a, np.float32), np.asarray(b, np.float32))
    want = (wide[0] if layout[0] == "n" else wide[0].T) @ (wide[1].T if layout[1] == "t" else wide[1])
    theirs = getattr(deep_gemm, f"cublaslt_gemm_{layout}")
    got = theirs(a, b, c=given("c").astype(F32))
    return [(np.asarray(got), near(want + np.asarray(given("c"), np.float32)))]


def rows(kind: str, layout: str, suffix: str = "") -> list[tuple[Any, Any]]:
    name = f"m_grouped_{kind}_gemm_{layout}_contiguous"
    a, b = ("q_x", "q_ws") if kind == "fp8" else ("x", "ws")
    b = b if layout == "nt" else f"{b}_t"
    operand = pair if kind == "fp8" else given
    own = functools.partial(getattr(jdg, name), given(a), given(b))
    theirs = functools.partial(getattr(deep_gemm, name), operand(a), operand(b), None)
    by_ends = theirs(given("ends"), use_psum_layout=True, mk_alignment=2)
    return [
        (theirs(given("indices")), own(m_indices=given("indices"))),
        (by_ends, own(ends=given("ends"), alignment=2)),
    ]


def masked(name: str, a: str, b: str) -> list[tuple[Any, Any]]:
    counts = {"masked_m": given("counts"), "expected_m": 2, "zero_rows": True}
    operand = pair if a.startswith("q_") else given
    own = jdg.m_grouped_fp8_gemm_nt_masked if a.startswith("q_") else jdg.m_grouped_bf16_gemm_nt_masked
    return [(getattr(deep_gemm, name)(operand(a), operand(b), **counts), own(given(a), given(b), **counts))]


def inner(name: str, a: str, b: str, sizes: str) -> list[tuple[Any, Any]]:
    operand = pair if a.startswith("q_") else given
    theirs, own = getattr(deep_gemm, name), getattr(jdg, name)
    c = normal(5, 3, given(a).shape["_tn_" in name], given(b).shape["_tn_" in name], dtype=F32)
    ks = given(sizes).tolist()
    return [
        (theirs(operand(a), operand(b), None, ks, given(sizes), c), own(given(a), given(b), given(sizes), c)),
    ]


def logits(name: str) -> list[tuple[Any, Any]]:
    q, keys = given("queries").astype(E4), (given("q_keys").values, given("q_keys").scales[:, 0])
    window = given("k_start"), given("k_end") - 2
    first = (q, None) if "fp4" in name else q
    own = functools.partial(indexer.mqa_logits, q, keys, given("head_weights"), *window)
    theirs = functools.partial(getattr(deep_gemm, name), first, keys, given("head_weights"), *window)
    return [(theirs(), own()), (theirs(False, 4), own(compressed=True, max_len=4))]


def paged(name: str) -> list[tuple[Any, Any]]:
    q, lens = given("queries").astype(E4)[:, None], given("k_end")[:, None]
    parts = given("pages").reshape(2, -1), given("page_scales")
    cache = np.concatenate([np.asarray(x).view(np.uint8).reshape(2, -1) for x in parts], 1).reshape(
        2, 16, 1, 36
    )
    tables = jnp.asarray([[1, 0]] * q.shape[0], jnp.int32)
    own = indexer.paged_mqa_logits(q, cache, given("head_weights")[:, None], lens, tables, max_context_len=20)
    first = (q, None) if "fp4" in name else q
    rest = (given("head_weights"), lens, tables, None, 20)
    return [(getattr(deep_gemm, name)(first, jnp.asarray(cache), *rest), own[:, 0])]


def legacy(layout: str) -> list[tuple[Any, Any]]:
    b = given("ws" if layout == "nt" else "ws_t")
    theirs = getattr(deep_gemm.legacy, f"m_grouped_bf16_gemm_{layout}_contiguous_tl")
    own = getattr(jdg, f"m_grouped_bf16_gemm_{layout}_contiguous")
    return [(theirs(given("x"), b, None, given("indices")), own(given("x"), b, m_indices=given("indices")))]


def muon() -> list[tuple[Any, Any]]:
    x = given("xs")
    square = deep_gemm.batched_syrk(x, out_dtype=F32)
    wide = np.asarray(x, np.float32)
    symmetric = square.astype(jnp.bfloat16)
    product = deep_gemm.batched_symm(symmetric, x, out_dtype=F32)
    exact = np.asarray(symmetric, np.float32) @ wide
    return [
        (np.asarray(square), near(wide @ np.swapaxes(wide, 1, 2))),
        (np.asarray(product), near(exact)),
    ]


def by_letters() -> list[tuple[Any, Any]]:
    x, w = given("xs"), given("ws")
    c = normal(6, 6, 128, dtype=F32)
    expr = "bmk,bnk->mn"
    exact = np.einsum(expr, np.asarray(x, np.float32), np.asarray(w, np.float32)) + np.asarray(c)
    heads = jnp.swapaxes(x, 0, 1)
    return [
        (deep_gemm.einsum(expr, x, w, c=c), jdg.bf16_einsum(expr, x, w, c, out_dtype=F32)),
        (deep_gemm.einsum("bhr,hdr->bhd", heads, w), jdg.bf16_einsum("bhr,hdr->bhd", heads, w)),
        (np.asarray(deep_gemm.einsum(expr, x, w, None, c, use_cublaslt=True)), near(exact)),
    ]


def fp8_by_letters() -> list[tuple[Any, Any]]:
    heads, w = quantize(jnp.swapaxes(given("xs"), 0, 1)), given("q_ws")
    want = jdg.fp8_einsum("bhr,hdr->bhd", heads, w)
    tuples = to_tuple(heads), pair("q_ws")
    return [
        (deep_gemm.fp8_einsum("bhr,hdr->bhd", *tuples), want),
        (deep_gemm.fp8_einsum("bhr,hdr->bhd", *tuples, recipe=(1, 128, 128)), want),
    ]


def prenorm() -> list[tuple[Any, Any]]:
    x, w = given("x"), given("w_f32")
    whole, parts = jdg.hc_prenorm_gemm(x, w), jdg.hc_prenorm_gemm(x, w, num_splits=2)
    found = deep_gemm.tf32_hc_prenorm_gemm(x, w), deep_gemm.tf32_hc_prenorm_gemm(x, w, None, None, 2)
    return [*zip(found[0], whole), *zip(found[1], parts)]


def holes() -> list[tuple[Any, Any]]:
    splits, d = (64, 8, 0), normal(7, 6, 128 + 2 * 8)
    own = functools.partial(jdg.fp8_gemm_nt_skip_head_mid, given("q_x"), given("q_w"), head_splits=splits)
    theirs = functools.partial(deep_gemm.fp8_gemm_nt_skip_head_mid, pair("q_x"), pair("q_w"))
    return [(theirs(None, splits), own()), (theirs(d, splits, (1, 128, 128)), own(d))]


LAYOUTS = ("nt", "nn", "tn", "tt")
CALLS: dict[str, Callable[[], list[tuple[Any, Any]]]] = {
    **{f"fp8_fp4_gemm_{l}": functools.partial(dense, l) for l in LAYOUTS},
    **{f"bf16_gemm_{l}": functools.partial(plain, l) for l in LAYOUTS},
    **{f"cublaslt_gemm_{l}": functools.partial(by_xla, l) for l in LAYOUTS},
    **{f"m_grouped_fp8_fp4_gemm_{l}_contiguous": functools.partial(rows, "fp8", l) for l in ("nt", "nn")},
    **{f"m_grouped_bf16_gemm_{l}_contiguous": functools.partial(rows, "bf16", l) for l in ("nt", "nn")},
    **{f"legacy.m_grouped_bf16_gemm_{l}_contiguous_tl": functools.partial(legacy, l) for l in ("nt", "nn")},
    "m_grouped_fp8_fp4_gemm_nt_masked": lambda: masked("m_grouped_fp8_fp4_gemm_nt_masked", "q_xs", "q_ws"),
    "m_grouped_bf16_gemm_nt_masked": lambda: masked("m_grouped_bf16_gemm_nt_masked", "xs", "ws"),
    "k_grouped_fp8_gemm_nt_contiguous": lambda: inner(
        "k_grouped_fp8_gemm_nt_contiguous", "q_x", "q_w_rows", "long_sizes"
    ),
    "k_grouped_fp8_gemm_tn_contiguous": lambda: inner(
        "k_grouped_fp8_gemm_tn_contiguous", "q_x_t", "q_w_columns", "long_sizes"
    ),
    "k_grouped_bf16_gemm_tn_contiguous": lambda: inner(
        "k_grouped_bf16_gemm_tn_contiguous", "x_t", "w_t", "long_sizes"
    ),
    "fp8_fp4_mqa_logits": lambda: logits("fp8_fp4_mqa_logits"),
    "fp8_mqa_logits": lambda: logits("fp8_mqa_logits"),
    "fp8_fp4_paged_mqa_logits": lambda: paged("fp8_fp4_paged_mqa_logits"),
    "fp8_paged_mqa_logits": lambda: paged("fp8_paged_mqa_logits"),
    "batched_syrk": muon,
    "fp8_gemm_nt_skip_head_mid": holes,
    "einsum": by_letters,
    "fp8_einsum": fp8_by_letters,
    "tf32_hc_prenorm_gemm": prenorm,
}

ALIASES = {
    **{f"fp8_gemm_{l}": f"fp8_fp4_gemm_{l}" for l in LAYOUTS},
    "m_grouped_fp8_gemm_nt_contiguous": "m_grouped_fp8_fp4_gemm_nt_contiguous",
    "m_grouped_fp8_gemm_nn_contiguous": "m_grouped_fp8_fp4_gemm_nn_contiguous",
    "m_grouped_fp8_gemm_nt_masked": "m_grouped_fp8_fp4_gemm_nt_masked",
    "fp8_m_grouped_gemm_nt_masked": "m_grouped_fp8_fp4_gemm_nt_masked",
    "bf16_m_grouped_gemm_nt_masked": "m_grouped_bf16_gemm_nt_masked",
}

ELSEWHERE = re.compile(r"^(utils|testing)\.|_fused_|^[sg]et_|^transform_|^(batched_symm|use_|shutdown)")
"""Names with tests in other files of this folder, or in tests/quantize."""


@pytest.mark.parametrize("name", CALLS)
def test_equals_the_function_of_this_package(name: str) -> None:
    for got, want in CALLS[name]():
        if isinstance(want, jax.Array | np.ndarray):
            assert got.dtype == want.dtype
            np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))
        else:
            assert got == want


def test_every_name_is_called_somewhere() -> None:
    absent = set(deep_gemm.absent.ABSENT)
    left = {name for name in NAMES if not ELSEWHERE.search(name)} - set(CALLS) - set(ALIASES) - absent
    assert left == set()
    for alias, name in ALIASES.items():
        assert getattr(deep_gemm, alias) is getattr(deep_gemm, name)


def test_alpha_is_a_factor_of_the_product() -> None:
    x, w, c = given("x"), given("w"), given("c").astype(F32)
    halved = jdg.Epilogue(alpha=0.5)
    want = jdg.bf16_gemm_nt(x, w, c, out_dtype=F32, epilogue=halved)
    np.testing.assert_array_equal(deep_gemm.bf16_gemm_nt(x, w, c=c, alpha=0.5), want)
    want = jdg.fp8_gemm_nt(given("q_x"), given("q_w"), epilogue=halved)
    np.testing.assert_array_equal(
        deep_gemm.fp8_gemm_nt(pair("q_x"), pair("q_w"), alpha=jnp.float32(0.5)), want
    )


# Operands


def test_packed_scales_are_unpacked() -> None:
    a, b = (quantize(normal(seed, 8, 512), scale_format="ue8m0") for seed in (0, 1))
    packed = [(x.values, pack_ue8m0_to_int(x.scales)) for x in (a, b)]
    np.testing.assert_array_equal(deep_gemm.fp8_gemm_nt(*packed), jdg.fp8_gemm_nt(a, b))


def test_scales_in_the_layout_of_a_kernel_are_refused() -> None:
    (values, scales), b = pair("q_x"), pair("q_w")
    moved = get_mn_major_tma_aligned_tensor(scales)
    with pytest.raises(
        ValueError, match=r"scales of a are \[2, 8\], the memory that .* need .*\[6, 2\]\. Leave"
    ):
        deep_gemm.fp8_gemm_nt((values, moved), b)


@pytest.mark.parametrize(
    ("recipes", "message"),
    [
        ({"recipe": (1, 128)}, r"recipe is \(1, 128\), .*; need recipe=\(gran_m, gran_n, gran_k\)"),
        ({"recipe": (1, 128, 128), "recipe_a": (1, 128)}, "or none of them"),
        ({"recipe_a": (1, 128)}, "or none of them"),
        ({"recipe": (1, 1, 128)}, r"need .*\[128, 2\]"),
        ({"compiled_dims": "k n"}, "compiled_dims is 'k n', need letters of 'mnk'"),
    ],
)
def test_recipes_are_checked(recipes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        deep_gemm.fp8_gemm_nt(pair("q_x"), pair("q_w"), **recipes)


def test_a_recipe_says_the_block_of_a_tuple_and_must_fit_an_array() -> None:
    want = jdg.fp8_gemm_nt(given("q_x"), given("q_w_rows"))
    for recipe in ({"recipe": (1, 1, 128)}, {"recipe_a": (1, 128), "recipe_b": (1, 128)}):
        np.testing.assert_array_equal(deep_gemm.fp8_gemm_nt(pair("q_x"), pair("q_w_rows"), **recipe), want)
    assert isinstance(given("q_w"), QuantizedArray)
    with pytest.raises(
        ValueError, match=r"b has one scale per block \(128, 128\), and the recipe says \(1, 128\)"
    ):
        deep_gemm.fp8_gemm_nt(pair("q_x"), given("q_w"), recipe=(1, 1, 128))


FP4 = jax.jit(deep_gemm.per_token_cast_to_fp4, static_argnums=(1, 2, 3))


@pytest.mark.parametrize(("gran", "packed"), [(32, False), (32, True), (128, False), (128, True)])
def test_fp4_weights_are_those_that_they_stand_for(gran: int, packed: bool) -> None:
    values, scales = FP4(normal(3, 64, 512), True, gran, packed)
    a = quantize(normal(4, 5, 512))
    meant = deep_gemm.cast_back_from_fp4(values, scales, gran, packed)
    want = jdg.fp8_gemm_nt(a, jdg.prepare_fp4(quantize(meant, (1, 32), jnp.float4_e2m1fn)))
    for recipes in ({}, {"recipe_a": (1, 128), "recipe_b": (1, gran)}):
        np.testing.assert_array_equal(
            deep_gemm.fp8_fp4_gemm_nt(to_tuple(a), (values, scales), **recipes), want
        )
    with pytest.raises(
        ValueError, match=r"scales of b are .*, need float32 or int32 \[64, .*a scale for each row"
    ):
        deep_gemm.fp8_fp4_gemm_nt(to_tuple(a), (values, scales[:, :1].repeat(3, 1)))


def test_fp4_weights_of_groups() -> None:
    values, scales = FP4(normal(3, 2 * 64, 256), True, 32)
    b = values.reshape(2, 64, -1), scales.reshape(2, 64, -1)
    w = jdg.prepare_fp4((b[0], pack_ue8m0_to_int(b[1]).view(np.uint8)))
    a, index = quantize(normal(4, 6, 256)), jnp.array([0, 0, 1, 1, 1, -1])
    got = deep_gemm.m_grouped_fp8_fp4_gemm_nt_contiguous(to_tuple(a), b, None, index)
    np.testing.assert_array_equal(got, jdg.m_grouped_fp8_gemm_nt_contiguous(a, w, m_indices=index))
    rows, counts = quantize(normal(5, 2, 3, 256)), jnp.array([1, 3])
    options = {"expected_m": 2, "zero_rows": True}
    got = deep_gemm.m_grouped_fp8_fp4_gemm_nt_masked(to_tuple(rows), b, None, counts, **options)
    np.testing.assert_array_equal(got, jdg.m_grouped_fp8_gemm_nt_masked(rows, w, counts, **options))


def test_fp4_operands_say_what_to_do() -> None:
    b = np.zeros((128, 128), np.int8), np.ones((128, 2), np.float32)
    with pytest.raises(
        NotImplementedError, match=r"a is int8 \[128, 128\], which is packed FP4.*cast_back_from_fp4"
    ):
        deep_gemm.fp8_gemm_nt(b, pair("q_w"))


def test_operands_that_are_none_are_refused_by_the_product() -> None:
    with pytest.raises(TypeError, match=r"fp8_gemm_nt: a is bfloat16 \[6, 256\], need a QuantizedArray"):
        deep_gemm.fp8_gemm_nt(given("x"), pair("q_w"))
    with pytest.raises(TypeError, match="masked_m is missing"):
        deep_gemm.m_grouped_bf16_gemm_nt_masked(given("xs"), given("ws"))
    with pytest.raises(ValueError, match=r"batched_symm: a is \[3, 6, 256\] and b is \[3, 6, 256\], need"):
        deep_gemm.batched_symm(given("xs"), given("xs"))
    with pytest.raises(ValueError, match=r"batched_syrk: a is bfloat16 \[6, 256\], need bfloat16 of three"):
        deep_gemm.batched_syrk(given("x"))


def test_advice_for_the_gate_is_right() -> None:
    x, weight = given("x"), given("w")
    ids, weights = moe.route(
        deep_gemm.bf16_gemm_nt(x, weight, out_dtype=F32), 2, score="sqrt_softplus", bias=None, scale=1.5
    )
    logits = np.asarray(x, np.float32) @ np.asarray(weight, np.float32).T
    score = np.sqrt(np.logaddexp(0, logits))
    best = -np.sort(-score, axis=1)[:, :2]
    np.testing.assert_allclose(weights, 1.5 * best / best.sum(1, keepdims=True), rtol=1e-3)
    np.testing.assert_array_equal(ids, np.argsort(-score, axis=1)[:, :2])


# How DeepGEMM divides contexts


def divided(lens: np.ndarray, num_sms: int) -> np.ndarray:
    """One unit after the other, dealt out to the SMs."""
    atoms = -(-lens.shape[1] // 2)
    units = [
        (request * atoms + atom, piece)
        for request, length in enumerate(lens[:, -1])
        for atom in range(atoms)
        for piece in range(-(-length // 256))
    ]
    each, more = divmod(len(units), num_sms)
    counts = [each + (share >= num_sms - more) for share in range(num_sms)]
    ends = np.cumsum([0, *counts])
    return np.array([units[i] if i < len(units) else (lens.shape[0] * atoms, 0) for i in ends])


@pytest.mark.parametrize("next_n", [1, 2, 3])
@pytest.mark.parametrize("num_sms", [7, 40])
def test_metadata(next_n: int, num_sms: int) -> None:
    rng = np.random.default_rng(next_n)
    for lens in (
        rng.integers(0, 3000, (5, next_n)),
        np.zeros((5, next_n), np.int64),
        np.eye(5, next_n) * 700,
    ):
        lens = lens.astype(np.int32)
        got = deep_gemm.get_paged_mqa_logits_metadata(lens, 64, num_sms)
        np.testing.assert_array_equal(got, divided(lens, num_sms))


def test_metadata_errors() -> None:
    for arguments in ((np.ones(3), 64, 2), (np.ones((3, 1)), 32, 2), (np.ones((3, 1)), 64, 0)):
        with pytest.raises(ValueError, match=r"need \[b, next_n\], 64 and a positive int"):
            deep_gemm.get_paged_mqa_logits_metadata(*arguments)
    with pytest.raises(NotImplementedError, match="schedule_meta=None"):
        deep_gemm.get_paged_mqa_logits_metadata(np.ones((3, 1)), 64, 2, np.zeros(3))


def test_knobs_hold_for_one_call() -> None:
    seen = []

    def product(x: Any) -> Any:
        seen.append(config.get())
        return x

    deep_gemm.calls.run(product, 1, num_sms=5, mk_alignment=8)
    assert (seen[0].num_sms, seen[0].mk_alignment) == (5, 8)
    assert config.get().num_sms is None
    assert grouped.get_mk_alignment_for_contiguous_layout() == 128
    with pytest.raises(TypeError, match="unexpected keyword"):
        deep_gemm.bf16_gemm_nt(given("x"), given("w"), sms=3)
