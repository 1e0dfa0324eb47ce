"""The way out that each message of test_gemm_errors.py and test_grouped_errors.py names is one.

Every refused call has an entry here: the call after its advice was followed, traced.
"""

from __future__ import annotations

import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

import jax_deepgemm as jdg
from jax_deepgemm.core import kernel_rule
from jax_deepgemm.quantization import pack_ue8m0_to_int, unpack_ue8m0_from_int
from tests.gemm import test_gemm_errors as dense
from tests.gemm.test_gemm_errors import A, B, W, X
from tests.grouped import test_grouped_errors as grouped
from tests.grouped.test_grouped_errors import AK, AM, XK, XM, YK
from tests.shared import op_checks

BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32
E4 = jnp.float8_e4m3fn
q, quantize = jdg.quantize, jdg.quantize
nt, bf16_nt, linear = jdg.fp8_gemm_nt, jdg.bf16_gemm_nt, jdg.fp8_linear
QA, QB = lambda: q(X, (1, 128)), lambda: q(W, (128, 128))
W_T = jnp.swapaxes(W, 0, 1)


def second_candidate(function: Any, *args: Any) -> Any:
    return jdg.explain(function, *args, show=False)[0].candidates[1][0]


DENSE: dict[str, Any] = {
    "fp8-unquantised": (lambda: nt(QA(), B), lambda: bf16_nt(X, W)),
    "fp8-triple": lambda: nt(A, QB()),
    "fp8-scales-not-array": lambda: nt((A[0], np.ones((4, 2), np.float32)), B),
    "fp8-values-dtype": lambda: nt(QA(), B),
    "fp8-values-fnuz": lambda: nt(A, QB()),
    "fp8-rank": lambda: jax.vmap(nt, (0, None))((jnp.ones((2, 4, 256), E4), jnp.ones((2, 4, 2))), B),
    "fp8-scale-dtype": lambda: nt(A, (B[0], B[1].astype(BF16).astype(F32))),
    "fp8-scale-e8m0": lambda: nt(A, (B[0], B[1].astype(jnp.float8_e8m0fnu).astype(F32))),
    "fp8-scale-packed": lambda: nt((A[0], unpack_ue8m0_from_int(jnp.ones((4, 1), jnp.int32))[..., :2]), B),
    "fp8-scale-shape": lambda: nt(QA(), B),
    "fp8-scale-shape-b": lambda: nt(A, QB()),
    "fp8-scale-transposed": lambda: nt(A, QB()),
    "fp8-block-64": lambda: nt(QA(), B),
    "fp8-block-32-by-128": (lambda: nt(QA(), B), lambda: nt(q(X, (1, 32)), q(W, (32, 32)))),
    "fp8-block-a-128": lambda: nt(QA(), B),
    "fp8-block-b": (lambda: nt(A, QB()), lambda: nt(A, q(W, (1, 128)))),
    "fp8-block-stored": lambda: jdg.fp8_gemm_tn(q(X.T, (128, 1)), q(W_T, (128, 128))),
    "fp8-block-lies": lambda: nt(A, q(W, (1, 128))),
    "fp8-k": lambda: jdg.fp8_gemm_nn(A, q(W_T, (128, 128))),
    "fp8-k-hopeless": lambda: nt(q(X[:, :128]), q(W[:, :128], (128, 128))),
    "fp8-c-shape": lambda: nt(A, B, jnp.broadcast_to(jnp.ones(300, BF16), (4, 300))),
    "fp8-c-dtype": (
        lambda: nt(A, B, jnp.ones((4, 300), F32).astype(jnp.bfloat16)),
        lambda: nt(A, B, jnp.ones((4, 300), F32), out_dtype=jnp.float32),
    ),
    "fp8-c-type": (lambda: nt(A, B, None), lambda: nt(A, B, jnp.full((4, 300), 1.0, BF16))),
    "fp8-out-dtype": lambda: nt(A, B, out_dtype=F32).astype(jnp.float16),
    "fp8-out-dtype-junk": (lambda: nt(A, B, out_dtype=jnp.bfloat16), lambda: nt(A, B, out_dtype=jnp.float32)),
    "fp8-out-dtype-none": lambda: nt(A, B),
    "fp8-reduce-dtype-none": lambda: nt(A, B),
    "fp8-reduce-dtype": (
        lambda: nt(A, B, out_dtype=F32),
        lambda: nt(A, B, out_dtype=jnp.bfloat16, reduce_dtype=BF16),
    ),
    "fp8-config": (lambda: nt(A, B, config=None), lambda: nt(A, B, config=second_candidate(nt, A, B))),
    "fp8-config-problem": lambda: nt(A, B, config=None),
    "fp8-num-sms": (lambda: nt(A, B, num_sms=1), lambda: nt(A, B, num_sms=None)),
    "fp8-out-sharding": lambda: nt(A, B, out_sharding=jax.P("x", None)),
    "bf16-dtype": lambda: bf16_nt(X.astype(F32).astype(jnp.bfloat16), W),
    "bf16-fp8": lambda: nt(QA(), QB()),
    "bf16-quantised": lambda: nt(QA(), B),
    "bf16-tuple": lambda: nt(A, B),
    "bf16-rank": lambda: bf16_nt(jnp.expand_dims(X[0], 0), W),
    "bf16-k": lambda: jdg.bf16_gemm_nn(X, W_T),
    "bf16-k-tn": lambda: bf16_nt(X, W),
    "bf16-c-shape": lambda: bf16_nt(X, W, jnp.broadcast_to(jnp.ones((4, 1), BF16), (4, 300))),
    "bf16-c-dtype": (
        lambda: bf16_nt(X, W, jnp.ones((4, 300), BF16), out_dtype=jnp.bfloat16),
        lambda: bf16_nt(X, W, jnp.ones((4, 300), BF16).astype(jnp.float32), out_dtype=F32),
    ),
    "bf16-out-dtype": lambda: bf16_nt(X, W, out_dtype=F32).astype(jnp.int32),
    "linear-k": lambda: linear(X, W_T.T),
    "linear-rank": lambda: jax.vmap(linear, (None, 0))(X, jnp.stack([W, W])),
    "linear-x-dtype": lambda: linear(X.astype(BF16), W),
    "linear-x-quantised": lambda: nt(QA(), QB()),
    "linear-w-triple": (lambda: linear(X, B), lambda: linear(X, QB())),
    "linear-w-tuple": lambda: linear(X, QB()),
    "linear-w-block": lambda: linear(X, QB()),
    "linear-grad-dtype": lambda: linear(X, W, grad_dtype=jnp.float8_e5m2),
    "linear-grad-dtype-junk": lambda: linear(X, W, grad_dtype=jnp.float8_e4m3fn),
    "linear-grad-dtype-none": lambda: linear(X, W),
    "linear-out-dtype": lambda: linear(X, W, out_dtype=F32).astype(jnp.float16),
    "linear-out-dtype-none": lambda: linear(X, W),
    "linear-frozen-rows": lambda: jax.grad(lambda x: linear(x, QB()).astype(F32).sum())(X),
}

G, S = grouped.W, grouped.S
GA, GB = grouped.A, grouped.B
G_T = jnp.swapaxes(G, 1, 2)
m_bf16, m_fp8 = jdg.m_grouped_bf16_gemm_nt_contiguous, jdg.m_grouped_fp8_gemm_nt_contiguous
m_bf16_nn, m_fp8_nn = jdg.m_grouped_bf16_gemm_nn_contiguous, jdg.m_grouped_fp8_gemm_nn_contiguous
masked, masked_fp8 = jdg.m_grouped_bf16_gemm_nt_masked, jdg.m_grouped_fp8_gemm_nt_masked
k_bf16 = jdg.k_grouped_bf16_gemm_tn_contiguous
k_fp8, k_fp8_tn = jdg.k_grouped_fp8_gemm_nt_contiguous, jdg.k_grouped_fp8_gemm_tn_contiguous
QG = lambda: q(G, (128, 128))  # noqa: E731
INDEX, ENDS = jnp.zeros(4, jnp.int32), jnp.array([1, 1, 3])

M_BF16: dict[str, Any] = {
    "nothing": (
        lambda: m_bf16(X, G, S),
        lambda: m_bf16(X, G, m_indices=INDEX),
        lambda: m_bf16(X, G, ends=ENDS, alignment=1),
    ),
    "two": lambda: m_bf16(X, G, m_indices=INDEX),
    "ends too": lambda: m_bf16(X, G, ends=ENDS),
    "float sizes": lambda: m_bf16(X, G, jnp.ones(3).astype(jnp.int32)),
    "bool sizes": lambda: m_bf16(X, G, jnp.ones(3, bool).astype(jnp.int32)),
    "list": lambda: m_bf16(X, G, jnp.array([1, 0, 2], jnp.int32)),
    "length": lambda: m_bf16(X, G, S),
    "longer without offset": lambda: m_bf16(X, G, jnp.tile(S, 2), group_offset=0),
    "shorter with offset": lambda: m_bf16(X, G, jnp.tile(S, 2), group_offset=1),
    "rank": lambda: m_bf16(X, G, S),
    "index length": lambda: m_bf16(X, G, m_indices=INDEX),
    "ends length": lambda: m_bf16(X, G, ends=ENDS),
    "alignment": lambda: m_bf16(X, G, ends=ENDS, alignment=1),
    "offset rank": (lambda: m_bf16(X, G, S, group_offset=S[0]), lambda: m_bf16(X, G, S, group_offset=S[:1])),
    "offset dtype": lambda: m_bf16(X, G, S, group_offset=jnp.float32(1).astype(jnp.int32)),
    "expected_m": lambda: m_bf16(X, G, S, expected_m=1),
    "expected_m dtype": lambda: m_bf16(X, G, S, expected_m=2),
    "no groups": lambda: m_bf16(X, G[:1], S[:1]),
    "b rank": lambda: m_bf16(X, jnp.expand_dims(G[0], 0), S[:1]),
    "a rank": lambda: jax.vmap(m_bf16, (0, None, None))(XM, G, S),
    "k": lambda: m_bf16_nn(X, G_T, S),
    "k elsewhere": lambda: m_bf16(X[:, :255], G[..., :255], S),
    "dtype": lambda: m_bf16(X.astype(F32).astype(jnp.bfloat16), G, S),
    "quantised": lambda: m_fp8(GA, GB, S),
    "fp8 values": lambda: m_fp8(QA(), QG(), S),
    "out_dtype": lambda: m_bf16(X, G, S, out_dtype=F32).astype(jnp.float16),
    "config": (
        lambda: m_bf16(X, G, S, config=None),
        lambda: m_bf16(X, G, S, config=second_candidate(m_bf16, X, G, S)),
    ),
    "num_sms": lambda: m_bf16(X, G, S, num_sms=None),
}
M_FP8: dict[str, Any] = {
    "unquantised": (lambda: m_fp8(QA(), GB, S), lambda: m_bf16(X, G, S)),
    "scales of b": lambda: m_fp8(GA, QG(), S),
    "scales of another group": lambda: m_fp8(GA, QG(), S),
    "block of a": lambda: m_fp8(QA(), GB, S),
    "k": lambda: m_fp8_nn(GA, q(G_T, (128, 128)), S),
    "values": lambda: m_fp8(QA(), GB, S),
}
MASKED: dict[str, Any] = {
    "length": lambda: masked(XM, G, S),
    "dtype": lambda: masked(XM, G, jnp.ones(3).astype(jnp.int32)),
    "zero_rows": lambda: masked(XM, G, S, zero_rows=True),
    "expected_m": lambda: masked(XM, G, S, 1),
    "groups": lambda: masked(XM[:2], G[:2], S[:2]),
    "rank": lambda: masked(jnp.expand_dims(X, 0), G[:1], S[:1]),
    "k": lambda: masked(XM, jnp.swapaxes(G_T, -1, -2), S),
}
MASKED_FP8: dict[str, Any] = {
    "groups": lambda: masked_fp8(AM, QG(), S),
    "scales of a": lambda: masked_fp8(q(XM, (1, 128)), GB, S),
}
C = jnp.ones((3, 4, 8), BF16)
K_BF16: dict[str, Any] = {
    "empty sizes": lambda: k_bf16(XK, YK, S[:1]),
    "dtype": lambda: k_bf16(XK, YK, jnp.ones(3).astype(jnp.int32)),
    "num_groups": lambda: k_bf16(XK, YK, S, num_groups=2, group_offset=0),
    "too many": lambda: k_bf16(XK, YK, jnp.tile(S, 2), num_groups=4, group_offset=0),
    "num_groups alone": lambda: k_bf16(XK, YK, S, num_groups=2, group_offset=1),
    "num_groups dtype": lambda: k_bf16(XK, YK, S, num_groups=3),
    "k": lambda: k_bf16(XK[:255], YK[:255], S),
    "c shape": lambda: k_bf16(XK, YK, S, C.astype(F32)),
    "c dtype": (
        lambda: k_bf16(XK, YK, S, C.astype(jnp.float32)),
        lambda: k_bf16(XK, YK, S, C, out_dtype=jnp.bfloat16),
    ),
    "c list": (lambda: k_bf16(XK, YK, S, None), lambda: k_bf16(XK, YK, S, jnp.full((3, 4, 8), 1.0))),
}
FOLLOWED: dict[str, Any] = {
    **DENSE,
    **{f"m_grouped_bf16_gemm_nt_contiguous-{name}": call for name, call in M_BF16.items()},
    "m_grouped_bf16_gemm_nn_contiguous-k of nn": lambda: m_bf16(X, G, S),
    **{f"m_grouped_fp8_gemm_nt_contiguous-{name}": call for name, call in M_FP8.items()},
    "m_grouped_fp8_gemm_nn_contiguous-scales of nn": lambda: m_fp8_nn(GA, q(G_T, (128, 128)), S),
    **{f"m_grouped_bf16_gemm_nt_masked-{name}": call for name, call in MASKED.items()},
    **{f"m_grouped_fp8_gemm_nt_masked-{name}": call for name, call in MASKED_FP8.items()},
    **{f"k_grouped_bf16_gemm_tn_contiguous-{name}": call for name, call in K_BF16.items()},
    "k_grouped_fp8_gemm_nt_contiguous-block": lambda: k_fp8(QA(), AK, S),
    "k_grouped_fp8_gemm_tn_contiguous-blocks of tn": lambda: k_fp8_tn(q(XK, (128, 1)), q(YK, (128, 1)), S),
}


@pytest.mark.parametrize("name", [case.name for case in (*dense.BAD, *grouped.BAD)])
def test_advice_works(name: str) -> None:
    calls = FOLLOWED[name]
    for call in calls if isinstance(calls, tuple) else (calls,):
        jax.eval_shape(call)


def test_no_advice_is_left_over() -> None:
    assert set(FOLLOWED) == {case.name for case in (*dense.BAD, *grouped.BAD)}


def test_unpacked_scales_are_those_that_were_packed() -> None:
    scales = jnp.array([[1.0, 2.0, 0.0, 0.0]] * 4)
    unpacked = unpack_ue8m0_from_int(pack_ue8m0_to_int(scales))[..., :2]
    np.testing.assert_array_equal(nt((A[0], unpacked), B), nt((A[0], scales[:, :2]), B))


# Messages that have no table elsewhere: the refused call, what it says, and the calls after its advice

BATCH = jax.lax.RaggedDotDimensionNumbers((((2,), (1,)), ((0,), (0,))), (0,), ())
ROWS = jax.lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), (0,), (0,))
INNER = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())
ragged, general = jdg.ragged_dot, jdg.ragged_dot_general
layer = jdg.grouped_linear
EITHER = (ValueError, TypeError)

OTHERS: dict[str, tuple[Any, str, tuple[Any, ...]]] = {
    "ragged layout": (
        lambda: ragged(X, G, S, rhs_layout="nk"),
        r"rhs_layout is 'nk', need 'gkn' .* or 'gnk'",
        (lambda: ragged(X, G_T, S, rhs_layout="gkn"), lambda: ragged(X, G, S, rhs_layout="gnk")),
    ),
    "ragged transpose": (
        lambda: ragged(X, G_T, S, allow_transpose=True),
        "leave it out",
        (lambda: ragged(X, G_T, S),),
    ),
    "ragged half quantised": (
        lambda: ragged(X, QG(), S, rhs_layout="gnk"),
        r"rhs is quantised and lhs is not.*quantize\(lhs, \(1, 128\)\)",
        (lambda: ragged(q(X, (1, 128)), QG(), S, rhs_layout="gnk"),),
    ),
    "ragged quantised k first": (
        lambda: ragged(QA(), q(G_T, (128, 128)), S),
        r"quantize\(rhs\.mT, \(128, 128\)\).*rhs_layout='gnk'.*allow_transpose=True",
        (
            lambda: ragged(QA(), q(G_T.mT, (128, 128)), S, rhs_layout="gnk"),
            lambda: ragged(QA(), q(G_T, (128, 128)), S, allow_transpose=True),
        ),
    ),
    "ragged_dot_general quantised": (
        lambda: general(QA(), QG(), S, ROWS),
        "ragged_dot takes quantised operands",
        (lambda: ragged(QA(), QG(), S, rhs_layout="gnk"),),
    ),
    "ragged config": (
        lambda: ragged(X.astype(F32), G_T.astype(F32), S, config=jdg.GemmConfig(64, 64, 4)),
        "Leave config out, or convert",
        (
            lambda: ragged(X.astype(F32), G_T.astype(F32), S),
            lambda: ragged(X, G_T, S, config=jdg.GemmConfig(64, 64, 4)),
        ),
    ),
    "ragged groups": (
        lambda: ragged(X, G_T, S[:2], group_offset=0),
        "need the sizes of all groups",
        (lambda: ragged(X, G_T, S, group_offset=0),),
    ),
    "ragged batch offset": (
        lambda: general(XM, G_T, S, BATCH, group_offset=1),
        r"group_offset with a ragged batch dimension.*Leave it out",
        (lambda: general(XM, G_T, S, BATCH),),
    ),
    "ragged num_groups of rows": (
        lambda: general(X, G_T, S, ROWS, num_groups=2),
        "num_groups=2 is for a ragged contracting dimension.*Leave it out",
        (lambda: general(X, G_T, S, ROWS),),
    ),
    "ragged offset alone": (
        lambda: general(XK, YK, S, INNER, group_offset=1),
        r"num_groups=\.\.\.",
        (lambda: general(XK, YK, S, INNER, group_offset=1, num_groups=2),),
    ),
    "ragged num_groups": (
        lambda: general(XK, YK, S, INNER, num_groups=2),
        "give group_offset too",
        (lambda: general(XK, YK, S, INNER, num_groups=2, group_offset=0),),
    ),
    "layer k": (
        lambda: layer(X, G_T, S),
        r"For weights stored \[g, k, n\] pass weight_layout='kn'",
        (lambda: layer(X, G_T, S, weight_layout="kn"),),
    ),
    "layer frozen, turned": (
        lambda: layer(X, jdg.quantize(G_T, (128, 128)), S, weight_layout="kn"),
        r"jax_deepgemm\.quantize\(w\.mT, \(128, 128\)\), with weight_layout='nk'",
        (lambda: layer(X, jdg.quantize(G_T.mT, (128, 128)), S),),
    ),
    "layer rank": (
        lambda: layer(XM, G, S),
        r"x\.reshape\(-1, x\.shape\[-1\]\), or use jax\.vmap",
        (
            lambda: layer(XM.reshape(-1, XM.shape[-1]), G, S),
            lambda: jax.vmap(layer, (0, None, None))(XM, G, S),
        ),
    ),
    "layer quantised x": (
        lambda: layer(QA(), G, S),
        "use m_grouped_fp8_gemm_nt_contiguous",
        (lambda: m_fp8(QA(), QG(), S),),
    ),
    "layer recipe": (
        lambda: layer(X, QG(), S, recipe="bf16"),
        r"recipe='fp8', or dequantize\(w, jnp\.bfloat16\)",
        (
            lambda: layer(X, QG(), S, recipe="fp8"),
            lambda: layer(X, jdg.dequantize(QG(), jnp.bfloat16), S, recipe="bf16"),
        ),
    ),
    "layer block": (
        lambda: layer(X, q(G, (128, 1)), S),
        r"quantize\(w, \(128, 128\)\)",
        (lambda: layer(X, q(G, (128, 128)), S), lambda: layer(X, q(G, (1, 128)), S)),
    ),
    "layer sizes": (
        lambda: layer(X, G, S[:2]),
        "with group_offset for a part of the weights",
        (lambda: layer(X, G, S), lambda: layer(X, G[:1], S, group_offset=1)),
    ),
    "layer gradient": (
        lambda: jax.grad(lambda x: layer(x, q(G, (1, 128)), S).astype(F32).sum())(X),
        r"quantize\(w, \(128, 128\)\)",
        (lambda: jax.grad(lambda x: layer(x, QG(), S).astype(F32).sum())(X),),
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_advice_works(name: str) -> None:
    refused, says, calls = OTHERS[name]
    with pytest.raises(EITHER, match=f"(?s){says}"):
        jax.eval_shape(refused)
    for call in calls:
        jax.eval_shape(call)


def test_another_gpu_may_run_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    other = types.SimpleNamespace(device_kind="Other GPU", compute_capability="10.0", core_count=148)
    monkeypatch.setattr(kernel_rule, "device_of", lambda ctx: other)
    lower = lambda: jax.jit(lambda a, b: bf16_nt(a, b)).trace(X, W).lower(lowering_platforms=("cuda",))  # noqa: E731
    with pytest.raises(ValueError, match=r"config\.use\(fallback='reference'\)"):
        lower()
    with jdg.config.use(fallback="reference"):
        assert "jax_deepgemm_launch" not in lower().as_text()


# On a mesh

ROW_CUT, K_CUT = jax.P("x", None), jax.P(None, "y")


def placed(mode: str, *specs: jax.P) -> list[jax.Array]:
    mesh = op_checks.make_mesh(mode)
    arrays = (jnp.ones((8, 256), BF16), jnp.ones((16, 256), BF16))
    return [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)]


def test_a_cut_sum_takes_the_out_sharding_that_is_asked_for() -> None:
    a, b = placed("explicit", K_CUT, K_CUT)
    with pytest.raises(ValueError, match=r"say out_sharding=jax\.P\(\.\.\.\)"):
        jax.eval_shape(bf16_nt, a, b)
    for spec in (jax.P(None, None), ROW_CUT):
        assert jax.eval_shape(lambda a, b, s=spec: bf16_nt(a, b, out_sharding=s), a, b).sharding.spec == spec


def test_an_out_sharding_that_cannot_be_is_a_reshard_of_one_that_can() -> None:
    a, b = placed("explicit", jax.P(None, None), jax.P(None, None))
    wanted = jax.P(None, ("x", "y"))
    with pytest.raises(
        ValueError, match=r"the op can give .*\. Ask for that, and reshard the result"
    ) as caught:
        jax.eval_shape(lambda a, b: bf16_nt(a, b, out_sharding=jax.P("x", "x")), a, b)
    assert f"can give {ROW_CUT}:" in str(caught.value)

    def followed(a: jax.Array, b: jax.Array) -> jax.Array:
        return jax.sharding.reshard(bf16_nt(a, b, out_sharding=ROW_CUT), wanted)

    with jax.set_mesh(op_checks.make_mesh("explicit")):
        assert jax.eval_shape(followed, a, b).sharding.spec == wanted


def test_export_over_several_devices() -> None:
    def export(function: Any, operands: list[jax.Array]) -> Any:
        return jax.export.export(jax.jit(function), disabled_checks=jdg.export_checks)(*operands)

    with pytest.raises(
        NotImplementedError, match=r"Use Explicit axes, .* or jax\.shard_map over all mesh axes"
    ):
        export(lambda a, b: bf16_nt(a, b), placed("auto", ROW_CUT, jax.P()))
    assert export(bf16_nt, placed("explicit", ROW_CUT, jax.P(None, None))).nr_devices == 8
    operands = placed("auto", ROW_CUT, jax.P())
    mesh = operands[0].sharding.mesh
    mapped = jax.shard_map(bf16_nt, mesh=mesh, in_specs=(ROW_CUT, jax.P()), out_specs=ROW_CUT)
    assert export(mapped, operands).nr_devices == 8
