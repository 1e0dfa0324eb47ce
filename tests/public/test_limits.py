"""What no kernel can take: symbolic sizes, other platforms, too many groups. Refused with a way out; symbolic
sizes are right on a CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

import jax_deepgemm as jdg
from tests.shared.arrays import normal

BF16, F32 = jnp.bfloat16, jnp.float32
ROWS = 21
SIZES = np.array([5, 0, 13], np.int32)
TN = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())


W, EXPERTS = normal(1, 16, 160), normal(2, 3, 16, 160)
Q, FP8_EXPERTS = jdg.quantize(W, (128, 128)), jdg.quantize(EXPERTS, (128, 128))


def gradients(layer: Callable[..., jax.Array], w: jax.Array) -> Callable[[jax.Array], Any]:
    return lambda x: jax.grad(lambda x, w: layer(x, w).astype(F32).sum(), (0, 1))(x, w)


def groups_of_rows(x: jax.Array) -> jax.Array:
    index = jnp.arange(x.shape[0], dtype=jnp.int32) // 8
    return jdg.m_grouped_bf16_gemm_nt_contiguous(x, EXPERTS, m_indices=index)


CASES: dict[str, tuple[Callable[..., Any], list[tuple[Any, ...]]]] = {
    "bf16_gemm_nt": (gradients(jdg.bf16_gemm_nt, W), [("b", 160)]),
    "fp8_gemm_nt": (lambda x: jdg.fp8_gemm_nt(jdg.quantize(x), Q), [("b", 160)]),
    "fp8_gemm_nt of k": (
        lambda x, y: jdg.fp8_gemm_nt(jdg.quantize(x), jdg.quantize(y)),
        [(16, "b"), (24, "b")],
    ),
    "fp8_linear": (lambda x: jdg.fp8_linear(x, W), [("b", 2, 160)]),
    "quantize": (lambda x: jax.tree.leaves(jdg.quantize(x, (128, 128))), [("b", 160)]),
    "ragged_dot": (gradients(lambda x, w: jdg.ragged_dot(x, w, SIZES), EXPERTS.mT), [("b", 160)]),
    "ragged_dot float32": (
        lambda x: jdg.ragged_dot(x.astype(F32), EXPERTS[1:].mT.astype(F32), SIZES, group_offset=1),
        [("b", 160)],
    ),
    "ragged_dot_general": (
        lambda x, y: jdg.ragged_dot_general(x, y, SIZES, TN, None, F32),
        [("b", 16), ("b", 24)],
    ),
    "grouped_linear": (gradients(lambda x, w: jdg.grouped_linear(x, w, SIZES), EXPERTS), [("b", 160)]),
    "m_indices": (groups_of_rows, [("b", 160)]),
    "ends": (
        lambda x: jdg.m_grouped_bf16_gemm_nt_contiguous(x, EXPERTS, ends=SIZES.cumsum(), alignment=1),
        [("b", 160)],
    ),
    "masked": (
        lambda x: jdg.m_grouped_fp8_gemm_nt_masked(jdg.quantize(x), FP8_EXPERTS, SIZES, zero_rows=True),
        [(3, "b", 160)],
    ),
    "k_grouped": (
        lambda x, y: jdg.k_grouped_fp8_gemm_nt_contiguous(jdg.quantize(x), jdg.quantize(y), SIZES),
        [(16, "b"), (24, "b")],
    ),
}


def sized(shapes: list[tuple[Any, ...]], b: Any) -> list[tuple[Any, ...]]:
    return [tuple(b if size == "b" else size for size in shape) for shape in shapes]


def exported(
    function: Callable[..., Any], shapes: list[tuple[Any, ...]], platforms: list[str], *rules: str
) -> Any:
    (b,) = export.symbolic_shape("b", constraints=rules)
    structs = [jax.ShapeDtypeStruct(shape, BF16) for shape in sized(shapes, b)]
    make = export.export(jax.jit(function), platforms=platforms, disabled_checks=jdg.export_checks)
    return make(*structs)


@pytest.mark.parametrize("name", CASES)
def test_rows_of_any_number(name: str) -> None:
    """The numbers of a call at this size."""
    function, shapes = CASES[name]
    arrays = [normal(3 + i, *shape) for i, shape in enumerate(sized(shapes, ROWS))]
    got, want = exported(function, shapes, ["cpu"]).call(*arrays), jax.jit(function)(*arrays)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        x, y = (np.asarray(value).astype(np.float64) for value in (one, other))
        np.testing.assert_allclose(x, y, rtol=1e-2, atol=1e-5 * np.abs(y).max())


@pytest.mark.parametrize("name", ["ragged_dot", "grouped_linear", "k_grouped"])
def test_rows_within_bounds(name: str) -> None:
    """Bounds let JAX decide comparisons that it refuses without."""
    function, shapes = CASES[name]
    exported(function, shapes, ["cpu"], "b >= 8", "b <= 4096")


@pytest.mark.parametrize("name", [name for name in CASES if name != "ragged_dot float32"])
def test_kernels_need_static_shapes(name: str) -> None:
    function, shapes = CASES[name]
    with pytest.raises(ValueError, match=r"\bb\b.*symbolic sizes; .* static shapes.*platforms=\['cpu'\]"):
        exported(function, shapes, ["cuda"])


def test_ways_out_for_a_gpu() -> None:
    function, shapes = CASES["fp8_linear"]
    pytest.importorskip("cuda.core")
    sized_program = jax.jit(function).trace(*(jax.ShapeDtypeStruct(s, BF16) for s in sized(shapes, 64)))
    assert "jax_deepgemm_launch" in sized_program.lower(lowering_platforms=("cuda",)).as_text()
    with jdg.config.use(fallback="reference"):
        assert exported(function, shapes, ["cuda", "cpu"]).platforms == ("cuda", "cpu")


def test_explain_says_so() -> None:
    (b,) = export.symbolic_shape("b")
    with pytest.raises(ValueError, match=r"bf16_gemm_nt: operands .*static shapes"):
        jdg.explain(lambda x: jdg.bf16_gemm_nt(x, W), jax.ShapeDtypeStruct((b, 160), BF16))
    (call,) = jdg.explain(CASES["ragged_dot float32"][0], jax.ShapeDtypeStruct((b, 160), BF16), show=False)
    assert "float32[b, 160]" in call.problem


@pytest.mark.parametrize("platform", ["rocm", "tpu"])
def test_other_platforms_are_refused(platform: str) -> None:
    """Nothing but jnp would run there, so it is not done silently."""
    x = jax.ShapeDtypeStruct((8, 160), BF16)
    make = lambda *platforms: export.export(  # noqa: E731
        jax.jit(lambda x: jdg.bf16_gemm_nt(x, W)), platforms=platforms, disabled_checks=jdg.export_checks
    )(x)
    for platforms in ((platform,), ("cpu", platform)):
        with pytest.raises(
            ValueError, match=f"bf16_gemm_nt: lowered for {platform}; the kernels are for cuda"
        ):
            make(*platforms)
    with jdg.config.use(fallback="reference"):
        assert make("cpu", platform).platforms == ("cpu", platform)
    pytest.importorskip("cuda.core")
    assert make("cuda", "cpu").platforms == ("cuda", "cpu")


def rows_in_parts(x: Any, b: Any, sizes: Any) -> Any:
    whole = jdg.m_grouped_bf16_gemm_nt_contiguous
    return whole(x, b[:2000], sizes, group_offset=0) + whole(x, b[2000:], sizes, group_offset=2000)


def inner_in_parts(x: Any, y: Any, sizes: Any) -> Any:
    part = functools.partial(jdg.k_grouped_bf16_gemm_tn_contiguous, x, y, sizes)
    return jnp.concatenate(
        [part(num_groups=2000, group_offset=0), part(num_groups=49, group_offset=2000)], axis=0
    )


def masked_in_parts(x: Any, b: Any, sizes: Any) -> Any:
    whole = jdg.m_grouped_bf16_gemm_nt_masked
    return jnp.concatenate([whole(*(z[cut] for z in (x, b, sizes))) for cut in (np.s_[:2000], np.s_[2000:])])


def one_after_the_other(x: Any, b: Any, sizes: Any) -> Any:
    return jax.lax.map(lambda z: jdg.m_grouped_bf16_gemm_nt_contiguous(*z), (x, b, sizes))


TOO_MANY: dict[str, tuple[Any, Any, list[tuple[int, ...]], str]] = {
    "rows": (
        jdg.m_grouped_bf16_gemm_nt_contiguous,
        rows_in_parts,
        [(64, 16), (2049, 8, 16), (2049,)],
        r"2049 groups .*room for 2048\. .*a slice of b with group_offset=.*sum",
    ),
    "inner": (
        jdg.k_grouped_bf16_gemm_tn_contiguous,
        inner_in_parts,
        [(64, 16), (64, 8), (2049,)],
        r"2049 groups .*num_groups= with group_offset=",
    ),
    "masked": (
        jdg.m_grouped_bf16_gemm_nt_masked,
        masked_in_parts,
        [(2049, 8, 16), (2049, 8, 16), (2049,)],
        r"2049 groups .*slices of the operands",
    ),
    "vmap": (
        jax.vmap(jdg.m_grouped_bf16_gemm_nt_contiguous),
        one_after_the_other,
        [(3, 64, 16), (3, 1000, 8, 16), (3, 1000)],
        r"3000 groups .*jax\.lax\.map",
    ),
}


@pytest.mark.parametrize("name", TOO_MANY)
def test_too_many_groups_for_one_kernel(name: str) -> None:
    pytest.importorskip("cuda.core")
    whole, in_parts, shapes, says = TOO_MANY[name]
    types = [jax.ShapeDtypeStruct(shape, BF16) for shape in shapes[:2]]
    types += [jax.ShapeDtypeStruct(shapes[2], jnp.int32)]

    def lower(function: Callable[..., Any]) -> str:
        return jax.jit(function).trace(*types).lower(lowering_platforms=("cuda",)).as_text()

    with pytest.raises(ValueError, match=says) as caught:
        lower(whole)
    assert "slabs" not in str(caught.value)
    assert lower(in_parts).count("@jax_deepgemm_launch") == (1 if name == "vmap" else 2)
