"""What the kernels get: a batch merged into groups and rows, rows of whole 16 bytes.

The kernels are stood in for by the references, which read the prepared operands as a kernel does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_deepgemm.core import kernel_rule
from jax_deepgemm.core.op import Op
from jax_deepgemm.ops.grouped import op as ops
from tests.shared import grouped_oracle as oracle
from tests.shared.gemm_oracle import assert_rounded

F32 = jnp.float32
B, M, N, K, G = 3, 13, 9, 145, 4  # nothing divides 8 or 16
SIZES = ((3, 0, 7, 1), (0, 0, 0, 13), (5, 20, 1, -3))
COUNTS = ((3, 0, 13, 1), (0, 0, 0, 0), (5, 20, 1, -3))


@dataclass(frozen=True)
class Case:
    """An op, its operands for each element of a batch, and its static parameters."""

    name: str
    op: Op
    operands: Callable[[int], list[Any]]
    params: dict[str, Any]
    batches: tuple[tuple[bool, ...], ...]

    def __str__(self) -> str:
        return self.name


def sizes(i: int, *, of: Any = SIZES) -> np.ndarray:
    return np.array(of[i], np.int32)


def offset(i: int) -> np.ndarray:
    return np.array([i - 1], np.int32)


def m_fp8(i: int) -> list[Any]:
    b = oracle.fp8(10 + i, G, N, K, block=(128, 128))
    return [*oracle.fp8(i, M, K), *b, sizes(i), offset(i)]


def m_bf16(form: str, i: int) -> list[Any]:
    b = (G, N, K) if form == "nt" else (G, K, N)
    return [oracle.random(i, M, K), oracle.random(10 + i, *b), sizes(i), offset(i)]


def segmented(i: int) -> list[Any]:
    """Groups in descending order, with a gap in front."""
    starts, ends = [1, 4, 4, 9], [4, 4, 8, 9 + i]
    s = np.array([*starts, *ends, 3, 2, 1, 0], np.int32)
    return [*m_bf16("nt", i)[:2], s, offset(i)]


def masked_fp8(i: int) -> list[Any]:
    b = oracle.fp8(10 + i, G, N, K, block=(1, 128))
    return [*oracle.fp8(i, G, M, K), *b, sizes(i, of=COUNTS)]


def masked_bf16(form: str, i: int) -> list[Any]:
    b = (G, N, K) if form == "nt" else (G, K, N)
    return [oracle.random(i, G, M, K), oracle.random(10 + i, *b), sizes(i, of=COUNTS)]


def k_masked(i: int) -> list[Any]:
    return [oracle.random(i, G, M, 10), oracle.random(10 + i, G, M, N), sizes(i, of=COUNTS)]


def k_fp8(i: int) -> list[Any]:
    return [
        *(x if j % 2 == 0 else x.T for j, x in enumerate((*oracle.fp8(i, 10, K), *oracle.fp8(10 + i, N, K)))),
        10 * sizes(i),
        offset(i),
    ]


def k_fp8_blocks(i: int) -> list[Any]:
    """Groups of whole blocks of k, and two blocks of b's rows; b's scales are of 128x128."""
    a, b = oracle.fp8(i, 10, 384), oracle.fp8(10 + i, 136, 384, block=(128, 128))
    return [a[0], a[1].T, b[0], b[1].T, np.array([130, 100], np.int32), np.zeros(1, np.int32)]


def k_bf16(i: int) -> list[Any]:
    c = oracle.random(20 + i, 2, 10, N, dtype=np.float32)
    return [oracle.random(i, M, 10), oracle.random(10 + i, M, N), sizes(i), offset(i), c]


Y, X = True, False
M_PARAMS = {"rows_format": "sizes", "expected_m": None, "out_dtype": F32}
K_PARAMS = {"rows_format": "sizes", "num_groups": 2, "out_dtype": F32}
MASKED = {"zero_rows": True, "expected_m": None, "out_dtype": F32}
CASES = [
    Case(
        "m-fp8",
        ops.M_GROUPED_FP8[128, 128],
        m_fp8,
        M_PARAMS,
        ((Y, Y, X, X, Y, X), (Y,) * 6, (X, X, Y, X, X, Y), (X, X, X, X, Y, X)),
    ),
    *(
        Case(f"m-bf16-{form}", ops.M_GROUPED_BF16[form], functools.partial(m_bf16, form), M_PARAMS, batches)
        for form, batches in (("nt", ((Y, X, Y, Y),)), ("nn", ((Y, Y, Y, X), (X, X, X, Y))))
    ),
    Case(
        "m-segments",
        ops.M_GROUPED_BF16["nt"],
        segmented,
        {**M_PARAMS, "rows_format": "segments"},
        ((Y, X, Y, Y), (X, Y, X, Y)),
    ),
    Case("masked-fp8", ops.M_MASKED_FP8[1, 128], masked_fp8, MASKED, ((Y, Y, X, X, Y), (X, X, Y, Y, X))),
    Case("masked-nt", ops.M_MASKED_BF16["nt"], functools.partial(masked_bf16, "nt"), MASKED, ((X, X, Y),)),
    Case("masked-nn", ops.M_MASKED_BF16["nn"], functools.partial(masked_bf16, "nn"), MASKED, ((Y, Y, X),)),
    Case("k-masked", ops.K_MASKED_BF16, k_masked, {"out_dtype": F32}, ((Y, X, Y),)),
    Case("k-fp8", ops.K_GROUPED_FP8, k_fp8, K_PARAMS, ((Y,) * 6, (Y, Y, X, X, Y, X), (X, X, X, X, X, Y))),
    Case(
        "k-fp8-block",
        ops.K_GROUPED_FP8_BLOCK,
        k_fp8_blocks,
        {**K_PARAMS, "rows_format": "blocks"},
        ((Y,) * 6, (Y, Y, X, X, Y, X)),
    ),
    Case("k-bf16-add", ops.K_GROUPED_BF16_ADD, k_bf16, K_PARAMS, ((Y,) * 5, (X, Y, Y, X, X))),
]
PAIRS = [(case, None) for case in CASES] + [(case, batch) for case in CASES for batch in case.batches]


@pytest.mark.parametrize(("case", "batch"), PAIRS, ids=str)
def test_prepared_operands_mean_the_same(case: Case, batch: tuple[bool, ...] | None) -> None:
    """The op on each element of the batch = the kernel's reading of all of it."""
    each = [case.operands(i) for i in range(B)]
    if batch is None:
        whole, want = each[0], case.op(*each[0], **case.params)[0]
    else:
        whole = [np.stack([one[j] for one in each]) if on else each[0][j] for j, on in enumerate(batch)]
        picked = [[x[i] if on else x for x, on in zip(whole, batch, strict=True)] for i in range(B)]
        want = np.stack([case.op(*operands, **case.params)[0] for operands in picked])

    @jax.jit
    def prepare(*arrays: jax.Array) -> Any:
        folded, _ = kernel_rule.fold(arrays, () if batch is None else (batch,))
        assert case.op.kernel_prepare is not None
        return case.op.kernel_prepare(*folded, **case.params)

    prepared = prepare(*whole)
    check_rows_of_16_bytes(case, prepared)
    got = as_a_kernel(case, prepared, want.shape, batch is not None)
    assert_rounded(got, oracle.wide(want), K)


def check_rows_of_16_bytes(case: Case, prepared: Any) -> None:
    matrices = [x for x in prepared if not jnp.issubdtype(x.dtype, jnp.integer)]
    for x in matrices[: 2 if "bf16" in case.op.name else 4]:  # C is not read by TMA
        assert x.shape[-1] * x.dtype.itemsize % 16 == 0


def as_a_kernel(case: Case, prepared: Any, shape: tuple[int, ...], batched: bool) -> np.ndarray:
    """Reads the operands as prepare.py says, and cuts what exceeds the result."""
    params = dict(case.params)
    name, operands = case.op.name, list(prepared)
    m, n = shape[-2:]
    if "rows_format" in params and batched:
        params["rows_format"] = "segments"
    if "num_groups" in params:
        params["num_groups"] = int(np.prod(shape[:-2]))
        if len(operands) == 5:
            assert operands[4].shape == shape
            rows = [(0, 0), (0, operands[0].shape[1] - m), (0, operands[1].shape[1] - n)]
            operands[4] = jnp.pad(operands[4].reshape(-1, m, n), rows)
    if "masked" in name:
        groups = operands[0].shape[0]
        for j in range(1, len(operands) - 1):  # group i of a has group i modulo b's of b
            operands[j] = jnp.tile(operands[j], (groups // operands[j].shape[0], 1, 1))
    if "fp8" in name and "k_grouped" not in name:
        operands = cut_scales(operands)
    if "k_grouped_fp8" in name:
        operands[1], operands[3] = operands[1][:, :m], operands[3][:, :n]
    (d,) = jax.jit(functools.partial(case.op.reference, **params))(*operands)
    if "k_" not in name:
        return np.asarray(d.reshape(*shape[:-1], d.shape[-1])[..., :n])
    return np.asarray(d[:, :m, :n].reshape(shape))


def cut_scales(operands: list[Any]) -> list[Any]:
    """Scales padded to whole 16 bytes have more columns than the grid."""
    a, sa, b, sb, *rest = operands
    blocks = -(-a.shape[-1] // 128)
    return [a, sa[..., :blocks], b, sb[..., :blocks], *rest]


def test_what_fits_is_not_copied() -> None:
    a, b, s, o = (
        oracle.random(0, 16, 64),
        oracle.random(1, 2, 8, 64),
        np.zeros(2, np.int32),
        np.zeros(1, np.int32),
    )
    prepare = functools.partial(ops.M_GROUPED_BF16["nt"].kernel_prepare, **M_PARAMS)
    assert "pad" not in str(jax.make_jaxpr(prepare)(a, b, s, o))
    batched = str(jax.make_jaxpr(prepare)(np.stack([a, a]), b, np.stack([s, s]), o))
    assert "bf16[2,2,8,64]" not in batched  # a shared b is not repeated
