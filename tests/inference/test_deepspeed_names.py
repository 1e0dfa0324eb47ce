"""Every name that DeepSpeed's inference binding registers: the list is frozen, table and page follow it.

Each has a call against its formula in float64, in every type, and a call that is refused.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_deepgemm.inference import deepspeed, deepspeed_names
from tests.shared import inference_oracle as oracle
from tests.shared.inference_oracle import close, drawn, visible, wide

PIN = """
    softmax_fp32 softmax_fp16 softmax_context_fp32 softmax_context_fp16 softmax_context_int8
    bias_gelu_fp32 bias_gelu_fp16 bias_geglu bias_add_fp32 bias_add_fp16 bias_relu_fp32 bias_relu_fp16
    bias_residual_fp32 bias_residual_fp16 layer_norm _layer_norm_residual layer_norm_residual_store
    qkv_gemm_fp32 qkv_gemm_fp16 qkv_gemm_int8 mlp_gemm_fp32 mlp_gemm_fp16 mlp_gemm_int8 vector_matmul_fp32
    vector_matmul_fp16 vector_matmul_int8 linear_layer_fp32 linear_layer_fp16 linear_layer_int8
    fused_gemm_gelu_fp32 fused_gemm_gelu_fp16 residual_add_bias_fp32 residual_add_bias_fp16
    apply_rotary_pos_emb einsum_sec_sm_ecm_fp32 einsum_sec_sm_ecm_fp16 moe_res_matmul add_padding_fp32
    add_padding_fp16 pad_transform_fp32 pad_transform_fp16 allocate_workspace_fp32 allocate_workspace_fp16
"""
"""DeepSpeed 0.7.7."""
HEAD = """
    softmax_context_int8 gated_activation layer_norm _layer_norm_residual
    layer_norm_residual_store_pre_ln_res rms_norm pre_rms_norm _vector_add apply_rotary_pos_emb
    moe_res_matmul reset_cache release_workspace retake_workspace softmax_fp32 softmax_fp16 softmax_bf16
    softmax_context_fp32 softmax_context_fp16 softmax_context_bf16 bias_gelu_fp32 bias_gelu_fp16
    bias_gelu_bf16 bias_add_fp32 bias_add_fp16 bias_add_bf16 bias_relu_fp32 bias_relu_fp16 bias_relu_bf16
    bias_residual_fp32 bias_residual_fp16 bias_residual_bf16 qkv_gemm_fp32 qkv_gemm_fp16 qkv_gemm_bf16
    rms_qkv_gemm_fp32 rms_qkv_gemm_fp16 rms_qkv_gemm_bf16 mlp_gemm_fp32 mlp_gemm_fp16 mlp_gemm_bf16
    rms_mlp_gemm_fp32 rms_mlp_gemm_fp16 rms_mlp_gemm_bf16 vector_matmul_fp32 vector_matmul_fp16
    vector_matmul_bf16 linear_layer_fp32 linear_layer_fp16 linear_layer_bf16 fused_gemm_gelu_fp32
    fused_gemm_gelu_fp16 fused_gemm_gelu_bf16 residual_add_bias_fp32 residual_add_bias_fp16
    residual_add_bias_bf16 einsum_sec_sm_ecm_fp32 einsum_sec_sm_ecm_fp16 einsum_sec_sm_ecm_bf16
    add_padding_fp32 add_padding_fp16 add_padding_bf16 pad_transform_fp32 pad_transform_fp16
    pad_transform_bf16 allocate_workspace_fp32 allocate_workspace_fp16 allocate_workspace_bf16
    dequantize_fp32 dequantize_fp16 dequantize_bf16
"""
"""DeepSpeed of August 2026."""
NAMES = sorted({*PIN.split(), *HEAD.split()})
TYPES = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}
PAGE = Path(__file__).parents[2] / "docs" / "from_deepspeed.md"
BEGIN, END = "<!-- begin deepspeed names -->", "<!-- end deepspeed names -->"


def test_the_list_is_that_of_the_releases() -> None:
    old, new = PIN.split(), HEAD.split()
    assert (len(old), len(new), len(NAMES)) == (43, 70, 76)
    assert len({*old} & {*new}) == 37


@pytest.mark.parametrize("name", NAMES)
def test_name_is_there(name: str) -> None:
    assert deepspeed_names[name].__name__ == name


def test_there_are_no_others() -> None:
    assert sorted(deepspeed_names) == NAMES


@pytest.mark.any_version
def test_page_lists_every_name() -> None:
    text = PAGE.read_text().split(BEGIN)[1].split(END)[0]
    rows = re.findall(r"^\| (`[^|]*) \| ([^|]+) \| ([^|]*) \|$", text, re.MULTILINE)
    listed = []
    for names, ours, _ in rows:
        for name in re.findall(r"`([\w{},]+)`", names):
            family, _, ends = name.partition("{")
            listed += [family + end for end in ends.rstrip("}").split(",")] if ends else [name]
        assert ours.strip()
    assert sorted(listed) == NAMES


# Values: (arguments, what they should give, units of the last place)


Case = tuple[list[Any], Callable[..., Any], float]
B, S, K, N, H = 2, 3, 16, 24, 2


def _quantised(seed: int, n: int, k: int, groups: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """int8 [n, k], scales [groups] in a tensor that is longer, and the numbers [n, k]."""
    values = np.random.default_rng(seed).integers(-128, 128, (n, k)).astype(np.int8)
    scales = (0.01 + np.abs(drawn(seed + 1, groups, 3)) / 100).astype(np.float32)
    return values, scales, values * np.repeat(wide(scales).reshape(-1)[:groups], n // groups)[:, None]


def families(t: Any) -> dict[str, Case]:
    """Of the names with an end, for one type."""
    x, residual = drawn(0, B, S, K, dtype=t), drawn(1, B, S, K, dtype=t)
    gamma, beta, in_bias = (drawn(seed, K, dtype=t) for seed in (2, 3, 4))
    w, bias = (drawn(5, K, N) / 4).astype(t), drawn(6, N, dtype=t)
    w2 = (drawn(7, N, K) / 4).astype(t)
    q8, s8, numbers8 = _quantised(8, N, K, 6)
    one = np.ones(1, t)
    scores, mask, alibi = (
        drawn(9, B, H, 4, 6, dtype=t),
        drawn(10, B, 6, dtype=t),
        drawn(11, B * H * 2, 1, 6, dtype=t),
    )
    mask[0, 2] = mask[1] = -10000  # the second sequence sees nothing
    triangle = visible(4, 6, causal=True) & (np.arange(6) > np.arange(4)[:, None] - 3)

    def softmax(scores: Any, mask: Any, alibi: Any, *_: Any) -> Any:
        own = alibi.reshape(B, 2 * H, 1, 6)[:, 1 : 1 + H]
        seen = triangle & (mask > -9000)[:, None, None]
        return oracle.softmax(scores * 0.5 + own + mask[:, None, None], seen)

    def qkv(x: Any, w: Any, s: Any, b: Any, gamma: Any, beta: Any, *_: Any) -> Any:
        z = oracle.layer_norm(x, gamma, beta, 1e-3)
        return z @ w + b, z

    def mlp(x: Any, r: Any, ib: Any, w: Any, w2: Any, b: Any, gamma: Any, beta: Any, *_: Any) -> Any:
        z = oracle.layer_norm(x + r + ib, gamma, beta, 1e-3)
        return oracle.gelu_tanh(z @ w + b) @ w2, z

    def rms_mlp(x: Any, r: Any, w: Any, w2: Any, gamma: Any, *_: Any) -> Any:
        value, gate = np.split(oracle.rms_norm(x + r, gamma, 1e-3) @ w, 2, -1)
        return (value * oracle.silu(gate)) @ w2, x + r

    def flash(x: Any, w: Any, b: Any, *_: Any) -> Any:
        y = (x @ w + b).reshape(B, S, 3, H, 4).transpose(2, 0, 3, 1, 4)
        return np.pad(y, [(0, 0)] * 4 + [(0, 28)])

    def padded(q: Any, k: Any, v: Any, *_: Any) -> Any:
        return tuple(
            np.pad(a, [(0, 0), (0, 0), (0, rows), (0, 24)]) for a, rows in ((q, 0), (k, 125), (v, 125))
        )

    def heads(*arrays: Any) -> Any:
        return padded(*(a.reshape(B, S, H, 8).transpose(0, 2, 1, 3) for a in arrays[:3]))

    split = [drawn(seed, B, H, S, 8, dtype=t) for seed in (12, 13, 14)]
    return {
        "softmax": ([scores, mask, alibi, True, False, True, 3, False, 0.5, 1, 2], softmax, 2),
        "bias_gelu": ([x, gamma], lambda x, b: oracle.gelu_tanh(x + b), 2),
        "bias_add": ([x, gamma], lambda x, b: x + b, 1),
        "bias_relu": ([x, gamma], lambda x, b: np.maximum(x + b, 0), 1),
        "bias_residual": ([x, residual, gamma], lambda x, r, b: x, 0),
        "qkv_gemm": ([x, w, one, bias, gamma, beta, 1e-3, True, False, False], qkv, 8),
        "rms_qkv_gemm": (
            [x, q8, s8, gamma, 1e-3, True, False],
            lambda x, w, s, gamma, *_: (
                oracle.rms_norm(x, gamma, 1e-3) @ numbers8.T,
                oracle.rms_norm(x, gamma, 1e-3),
            ),
            8,
        ),
        "mlp_gemm": (
            [x, residual, in_bias, w, w2, bias, gamma, beta, 1e-3, True, True, one, one, False, 1, False],
            mlp,
            8,
        ),
        "rms_mlp_gemm": (
            [x, residual, w, w2[: N // 2], gamma, 1e-3, one, one, False, 4, False],
            rms_mlp,
            8,
        ),
        "vector_matmul": ([x, w.T.copy(), False, one, False, True], lambda x, w, *_: x @ w.T, 8),
        "linear_layer": ([x, w, bias, True, True, H, False, 10000.0], flash, 8),
        "fused_gemm_gelu": (
            [x, w, one, bias, w2, one, False, False],
            lambda x, w, s, b, w2, *_: oracle.gelu_tanh(x @ w + b) @ w2,
            8,
        ),
        "residual_add_bias": (
            [x, residual, residual * 2, gamma, beta, 4, True, False, True],
            lambda m, r, a, ba, bf, *_: m + (r + a + ba + bf) / 4,
            1,
        ),
        "einsum_sec_sm_ecm": (
            [drawn(15, 5, 2, 3, dtype=t), drawn(16, 5, 4, dtype=t)],
            lambda q, w: np.einsum("sec,sm->ecm", q, w),
            8,
        ),
        "add_padding": (split, padded, 0),
        "pad_transform": ([x, residual, x * 2, H, True], heads, 0),
        "dequantize": ([q8, s8, 6], lambda *_: numbers8, 1),
    }


def singles() -> dict[str, Case]:
    """Of names without an end, and of what has another form in DeepSpeed 0.7.7."""
    t = np.float16
    x, residual = drawn(20, B, S, K, dtype=t), drawn(21, B, S, K, dtype=t)
    gamma, beta, bias = (drawn(seed, K, dtype=t) for seed in (22, 23, 24))
    wide_x, wide_b = drawn(25, B, S, 2 * K), drawn(26, 2 * K)
    q8, s8, numbers8 = _quantised(27, N, K, 6)
    shards = s8[:, :2].copy()
    out_bias = drawn(28, N, dtype=t)
    by_shard = q8 * np.repeat(np.repeat(wide(shards), 4, 0), 8, 1)
    q, k, v = (drawn(seed, B, H, n, 8, dtype=t) for seed, n in ((30, 3), (31, 5), (32, 5)))
    keys = k.transpose(0, 1, 3, 2).copy()
    mask = np.where(np.arange(5) == 3, -10000, 0).astype(t)[None].repeat(B, 0)
    none = np.zeros(1, t)

    def gated(act: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, b, *_: (x + b)[..., :K] * act((x + b)[..., K:])

    def normed(x: Any, b: Any, r: Any, gamma: Any, beta: Any, _: Any) -> Any:
        return oracle.layer_norm((x + b + r).astype(t).astype(np.float64), gamma, beta, 1e-3)

    def attended(q: Any, *_: Any) -> Any:
        parts = (wide(one).transpose(0, 2, 1, 3) for one in (q, k, v))
        out = oracle.attention(*parts, mask[:, None, None] == 0, scale=0.25)
        return out.transpose(0, 2, 1, 3), wide(keys), wide(v)

    def turned(x: Any, dim: int, interleaved: bool, theta: float) -> Any:
        places = np.broadcast_to(np.arange(7, 7 + S), (B, S))
        return oracle.rotary(x.reshape(B, S, H, 8), places, oracle.rates(dim, theta), interleaved).reshape(
            B, S, K
        )

    def mlp_int8(x: Any, r: Any, ib: Any, w: Any, b: Any, gamma: Any, beta: Any, *_: Any) -> Any:
        z = oracle.layer_norm(x + r + ib, gamma, beta, 1e-3)
        return oracle.gelu_tanh(z @ numbers8.T + b), x + r + ib

    w, w2 = drawn(40, K, N) / 4, drawn(41, N, K) / 4
    full = [drawn(seed, B, S, K) for seed in (42, 43)]
    row, b1, one = drawn(44, K), drawn(45, N), np.ones(1, np.float32)
    plain: dict[str, Case] = {
        "softmax_context_int8": (
            [q, keys, none, mask, v, none, H, 0.5, False, False, False, 0, False],
            attended,
            4,
        ),
        "bias_geglu": ([wide_x, wide_b], gated(oracle.gelu_erf), 8),
        "gated_activation": ([wide_x, wide_b, 4], gated(oracle.silu), 8),
        "gated_activation 3": ([wide_x, wide_b, 3], gated(oracle.gelu_erf), 8),
        "layer_norm": ([x, gamma, beta, 1e-3], lambda x, g, b, _: oracle.layer_norm(x, g, b, 1e-3), 2),
        "_layer_norm_residual": ([x, bias, residual, gamma, beta, 1e-3], normed, 2),
        "rms_norm": ([x, gamma, 1e-3], lambda x, g, _: oracle.rms_norm(x, g, 1e-3), 2),
        "pre_rms_norm": (
            [x, residual, gamma, 1e-3],
            lambda x, r, g, _: (oracle.rms_norm((x + r).astype(t).astype(np.float64), g, 1e-3), x + r),
            2,
        ),
        "_vector_add": ([x, residual, 0.3], lambda a, b, g: 0.3 * a + b, 1),
        "apply_rotary_pos_emb": (
            [x, residual, 6, 7, H, True, 500.0],
            lambda x, k, *_: (turned(x, 6, False, 500.0), turned(k, 6, False, 500.0)),
            8,
        ),
        "apply_rotary_pos_emb 0.7": (
            [x, residual, 8, 7, H, False, True],
            lambda x, k, *_: (turned(x, 8, True, 10000.0), turned(k, 8, True, 10000.0)),
            8,
        ),
        "moe_res_matmul": (
            [x, np.stack([gamma, beta]), residual],
            lambda r, c, out: out * c[1] + r * c[0],
            1,
        ),
        "qkv_gemm_int8": (
            [x, q8, out_bias, gamma, beta, 1e-3, s8, 6, True],
            lambda x, w, b, g, be, *_: oracle.layer_norm(x, g, be, 1e-3) @ numbers8.T + b,
            8,
        ),
        "mlp_gemm_int8": ([x, residual, bias, q8, out_bias, gamma, beta, 1e-3, s8, 6, True], mlp_int8, 8),
        "vector_matmul_int8": ([x, q8, shards, 6, 1], lambda x, *_: x @ by_shard.T, 8),
        "linear_layer_int8": ([x, q8, out_bias, s8, 6], lambda x, w, b, *_: x @ numbers8.T + b, 8),
        "qkv_gemm_fp32 0.7": (
            [full[0], w, one, b1, row, row, 1e-3, False, 1, False, 1, 0, False],
            lambda x, w, s, b, g, be, *_: (
                oracle.layer_norm(x, g, be, 1e-3) @ w,
                oracle.layer_norm(x, g, be, 1e-3),
            ),
            16,
        ),
        "mlp_gemm_fp32 0.7": (
            [*full, row, w, w2, b1, row, row, 1e-3, True, False, one, one, False, 2],
            lambda x, r, ib, w, w2, b, g, be, *_: (
                np.maximum(oracle.layer_norm(r, g, be, 1e-3) @ w + b, 0) @ w2,
                oracle.layer_norm(r, g, be, 1e-3),
            ),
            32,
        ),
        "vector_matmul_fp32 0.7": ([full[0], w, False, one, False], lambda x, w, *_: x @ w, 16),
        "linear_layer_fp32 0.7": ([full[0], w, b1, False, False, H], lambda x, w, *_: x @ w, 16),
        "fused_gemm_gelu_fp32 0.7": (
            [full[0], w, one, b1, w2, one, 1e-3, True, False, False],
            lambda x, w, s, b, w2, *_: oracle.gelu_tanh(x @ w + b) @ w2,
            32,
        ),
        "residual_add_bias_fp32 post": (
            [*full, full[0], row, row, 1, True, True, False],
            lambda m, r, a, ba, bf, *_: m + r + bf,
            4,
        ),
        "residual_add_bias_fp32 parallel": (
            [*full, full[0], row, row, 2, False, True, True],
            lambda m, r, a, ba, bf, *_: m + a + (r + ba + bf) / 2,
            4,
        ),
        "softmax_fp32 3-D": (
            [full[0], none, none, False, False, True, 2, False, 1.0, 0, 1],
            lambda s, *_: oracle.softmax(s, visible(S, K, causal=True, offset=K - S, window=2)),
            4,
        ),
    }
    for name in ("layer_norm_residual_store", "layer_norm_residual_store_pre_ln_res"):
        arguments = [x, bias, residual, gamma, beta, 1e-3]
        plain[name] = (arguments, lambda x, b, r, *rest: (normed(x, b, r, *rest), x + b + r), 2)
    return plain


CASES: dict[str, Case] = {
    f"{family}_{end}": case for end, t in TYPES.items() for family, case in families(t).items()
} | singles()


@functools.cache
def results() -> dict[str, Any]:
    """Of all calls, as one program."""
    arrays = {name: [a for a in case[0] if isinstance(a, np.ndarray)] for name, case in CASES.items()}

    def run(arrays: dict[str, list[Any]]) -> dict[str, Any]:
        found = {}
        for name, (arguments, _, _) in CASES.items():
            traced = iter(arrays[name])
            filled = [next(traced) if isinstance(a, np.ndarray) else a for a in arguments]
            found[name] = deepspeed_names[name.split()[0]](*filled)
        return found

    return jax.jit(run)(arrays)


@pytest.mark.parametrize("name", CASES)
def test_values(name: str) -> None:
    arguments, want, units = CASES[name]
    expected = want(*(wide(a) if isinstance(a, np.ndarray) else a for a in arguments))
    got = results()[name]
    both = (got, expected) if isinstance(expected, tuple) else ((got,), (expected,))
    for one, right in zip(*both, strict=True):
        assert one.dtype == (TYPES[name[-4:]] if "dequantize" in name else arguments[0].dtype)
        close(one, right, units)


CONTEXT = [f"softmax_context_{end}" for end in TYPES]
WORKSPACE = [f"allocate_workspace_{end}" for end in TYPES]
NOTHING = ["release_workspace", "retake_workspace"]


@pytest.mark.any_version
def test_every_name_has_a_call() -> None:
    called = {name.split()[0] for name in CASES}
    assert called | {*CONTEXT, *WORKSPACE, *NOTHING, "reset_cache"} == {*NAMES}


# Refused calls


def _first_of_another_type(name: str) -> tuple[list[Any], str]:
    arguments, end = list(CASES[name][0]), name[-4:]
    other = "fp16" if end == "fp32" else "fp32"
    arguments[0] = arguments[0].astype(TYPES[other])
    family = name.removesuffix(f"_{end}")
    kind, was = (np.dtype(TYPES[one]).name for one in (end, other))
    return arguments, f"is {was}.*need {kind}, as the name says.*or call {family}_{other}"


X = np.ones((2, 3, 4), np.float16)
BAD: dict[str, tuple[list[Any], str]] = {
    "softmax_context_int8": (
        [X] * 6 + [2, 1.0, False, False, False, 0, False],
        r"need \[batch, heads, queries, d\]",
    ),
    "bias_geglu": ([X[..., :3], X[0, 0, :3]], "3 features, an odd number"),
    "gated_activation": ([X, X[0, 0], 1], "actFun is 1, need one of 3, 4"),
    "layer_norm": ([X, X[0, 0, :3], X[0, 0], 1e-5], r"gamma is \[3\], need \[4\]"),
    "_layer_norm_residual": (
        [X, X[0, 0], X[:1], X[0, 0], X[0, 0], 1e-5],
        r"residual is \[1, 3, 4\], need \[2, 3, 4\]",
    ),
    "rms_norm": ([X, X[0, 0, :3], 1e-5], r"gamma is \[3\], need \[4\]"),
    "pre_rms_norm": ([X, X[:1], X[0, 0], 1e-5], r"residual is \[1, 3, 4\]"),
    "_vector_add": ([X, X[:1], 1.0], r"b is \[1, 3, 4\], need \[2, 3, 4\]"),
    "apply_rotary_pos_emb": ([X, X, 2, 0, 3, True, 1e4], "need .*heads .* d.* for 3 heads"),
    "moe_res_matmul": ([X, X[0, 0], X], r"coef is \[4\], need two rows of 4"),
    "qkv_gemm_int8": (
        [X, X[0], *[X[0, 0]] * 3, 1e-5, X[0, 0], 1, False],
        r"weight is float16.*need int8 \[n, k\]",
    ),
    "mlp_gemm_int8": (
        [X, X, X[0, 0], X[0], *[X[0, 0]] * 3, 1e-5, X[0, 0], 1, True],
        "weight is float16.*need int8",
    ),
    "vector_matmul_int8": ([X, X[0].astype(np.int8), X[0, 0], 2, 0], "n a multiple of 2 groups"),
    "linear_layer_int8": (
        [X, X[0].astype(np.int8), X[0, 0], X[0, 0, :1], 3],
        "q_scale has 1 numbers, need 3",
    ),
    "reset_cache": ([], "cache is None, need cache= what allocate_workspace"),
    "release_workspace": ([1], r"1 positional arguments, need 0"),
    "retake_workspace": ([1], r"1 positional arguments, need 0"),
}
for _name in ("layer_norm_residual_store", "layer_norm_residual_store_pre_ln_res"):
    BAD[_name] = BAD["_layer_norm_residual"]
for _name in CONTEXT:
    _t = TYPES[_name[-4:]]
    BAD[_name] = ([X.astype(_t), *[None] * 13], "cache is None, need cache= what allocate_workspace")
for _end in TYPES:
    BAD[f"dequantize_{_end}"] = ([X[0].astype(np.int8), X[0, 0], 2], "n a multiple of 2 groups")
    BAD[f"allocate_workspace_{_end}"] = (
        [10, 3, 4, 1, 1, 1, False, 0, 8],
        "need hidden_dim a multiple of num_heads",
    )


@pytest.mark.any_version
@pytest.mark.parametrize("name", NAMES)
def test_errors_say_what_to_do(name: str) -> None:
    arguments, message = BAD[name] if name in BAD else _first_of_another_type(name)
    with pytest.raises((TypeError, ValueError), match=f": .*{message}"):
        deepspeed_names[name](*arguments)


@pytest.mark.any_version
@pytest.mark.parametrize("name", NAMES)
def test_wrong_number_of_arguments(name: str) -> None:
    with pytest.raises(TypeError, match=rf"^{name}: 30 positional arguments, need \d+ \("):
        deepspeed_names[name](*range(30))


@pytest.mark.any_version
def test_workspaces_are_not_taken_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed, "_warned", False)
    with pytest.warns(UserWarning, match="there is no workspace to release or take.*Leave the call out"):
        assert deepspeed_names["release_workspace"]() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert deepspeed_names["retake_workspace"]() is None


# Attention with what is kept


def _steps(end: str, d: int, alibi: bool) -> tuple[list[Any], Any]:
    """A prompt of 4 tokens and a single one, of one or two layers, and what one pass gives for the last."""
    name, t = f"softmax_context_{end}", TYPES[end]
    heads, kv, tokens, layers = 4, 4 if alibi else 2, 5, 2 if alibi else 1
    qkv = drawn(50, B, tokens, (heads + 2 * kv) * d, dtype=t)
    slopes = np.array([0.5, 0.25, 1, 2])
    ramp = (
        (slopes[None, :, None, None] * np.arange(tokens)).repeat(B, 0).reshape(B * heads, 1, tokens).astype(t)
    )
    mask = np.zeros((B, 1, 1, tokens), t)
    mask[0, ..., 1] = -10000
    workspace = deepspeed_names[f"allocate_workspace_{end}"](
        heads * d, heads, 4, B, layers, 1, False, 0, 10, 1
    )

    def run(workspace: Any, qkv: Any, ramp: Any, mask: Any) -> Any:
        parts = []
        for first, size in ((0, 4), (4, 1)):
            upto = first + size
            for layer in range(layers):
                given = qkv[:, first:upto] * (layer + 1)
                extra = (mask[..., :upto], ramp[..., :upto]) if alibi else (jnp.zeros(1, t), jnp.zeros(1, t))
                form = [8, True, False, heads, kv, 0.5, True, True, 3, False, layer, layers, extra[1], 500.0]
                out, workspace = deepspeed_names[name](
                    given, extra[0], *form, True, None, None, cache=workspace
                )
            parts.append(out)
        return jnp.concatenate(parts, 1), workspace.lengths

    got, lengths = jax.jit(run)(workspace, qkv, ramp, mask)
    np.testing.assert_array_equal(lengths, [tokens] * B)
    split = layers * wide(qkv).reshape(B, tokens, -1, d)
    places = np.broadcast_to(np.arange(tokens), (B, tokens))
    q, k = (
        oracle.rotary(x, places, oracle.rates(8, 500.0))
        for x in (split[:, :, :heads], split[:, :, heads : heads + kv])
    )
    seen = visible(tokens, tokens, causal=True, window=3) & ((mask > -9000) | (not alibi))
    added = wide(ramp).reshape(B, heads, 1, tokens) if alibi else 0.0
    want = oracle.attention(q, k, split[:, :, heads + kv :], seen, added, 0.25)
    return got, want.reshape(B, tokens, heads * d)


@pytest.mark.parametrize(("end", "d", "alibi"), [("fp32", 8, True), ("bf16", 16, False)])
def test_a_prompt_and_steps_are_one_pass(end: str, d: int, alibi: bool) -> None:
    """Rotary positions, a window of 3 keys in every step, fewer heads of keys, masked keys, per layer."""
    close(*_steps(end, d, alibi), 8)


def test_reset_keeps_nothing() -> None:
    workspace = deepspeed_names["allocate_workspace_bf16"](32, 2, 4, B, 1, 1, False, 0, 10)
    kept = workspace._replace(lengths=jnp.full(B, 3, jnp.int32))
    assert deepspeed_names["reset_cache"](cache=kept).lengths.tolist() == [0] * B
