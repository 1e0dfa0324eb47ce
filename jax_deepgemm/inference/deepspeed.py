"""The names that DeepSpeed's inference binding registers, as functions of its positional arguments.

Values are returned and nothing is written: caches go in as `cache=` and come out. What differs from DeepSpeed
besides stands in docs/from_deepspeed.md, name by name.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.inference import checks
from jax_deepgemm.inference.context import allocate_workspace, reset_cache, softmax_context
from jax_deepgemm.inference.contiguous import attention
from jax_deepgemm.inference.elementwise import bias_act, residual_add
from jax_deepgemm.inference.layers import linear, mlp, norm_linear
from jax_deepgemm.inference.masks import bias_of, view_of
from jax_deepgemm.inference.names import KINDS, Given, adapter, there
from jax_deepgemm.inference.norms import norm
from jax_deepgemm.inference.products import product
from jax_deepgemm.inference.rotary import rotary
from jax_deepgemm.inference.scores import masked_softmax
from jax_deepgemm.inference.weights import QuantizedWeight

FLASH_KEYS = 128
"""Keys that padded arrays have."""


# Softmax and attention --------------------------------------------------------------------------------------


def _softmax(given: Given) -> jax.Array:
    scores = checks.floats(given.name, "attn_scores", given.attn_scores)
    if scores.ndim not in (3, 4):
        raise ValueError(
            f"{given.name}: attn_scores are {list(scores.shape)}, need [batch, heads, queries, keys] or "
            "[batch, queries, keys]."
        )
    whole = scores if scores.ndim == 4 else scores[:, None]
    parts = int(given.head_offset), int(given.mp_size)
    bias = bias_of(given.name, given.attn_mask, given.alibi, whole.shape, *parts)
    view = view_of(given, whole.shape[2], whole.shape[3], bool(given.triangular))
    out = masked_softmax(whole, scale=float(given.layer_scale), bias=bias, **view)
    return out.reshape(scores.shape)


def _softmax_context_int8(given: Given) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q [b, h, s, d], keys [b, h, d, l], values [b, h, l, d]."""
    q = checks.floats(given.name, "query", given.query)
    k, v = (checks.floats(given.name, one, given[one], like=q) for one in ("prev_key", "prev_value"))
    fits = q.ndim == k.ndim == v.ndim == 4 and q.shape[1] == int(given.heads)
    if not fits or k.shape != (*q.shape[:2], q.shape[3], v.shape[2]) or v.shape[:2] != q.shape[:2]:
        raise ValueError(
            f"{given.name}: query is {list(q.shape)}, prev_key {list(k.shape)} and prev_value "
            f"{list(v.shape)}, need [batch, heads, queries, d], [batch, heads, d, keys] and [batch, heads, "
            "keys, d]."
        )
    new = there(given.new_value) and given.new_value.shape[1] > 0
    view = view_of(given, q.shape[2], v.shape[2], bool(given.triangular) and not new)
    bias = bias_of(given.name, given.attn_mask, None, (*q.shape[:3], v.shape[2]))
    parts = (q.swapaxes(1, 2), k.transpose(0, 3, 1, 2), v.swapaxes(1, 2))
    out = attention(*parts, bias=bias, scale=float(given.norm_factor) ** 2, **view)
    return out.swapaxes(1, 2), k, v


def _apply_rotary(given: Given) -> tuple[jax.Array, jax.Array]:
    """q and k [b, s, heads * d]; the last argument was rotate_every_two before it was rope_theta."""
    last = given.rope_theta
    old = isinstance(last, bool)
    theta, every_two = (10000.0, last) if old else (float(last), not given.rotate_half)
    if old and not (every_two or given.rotate_half):
        raise ValueError(f"{given.name}: rotate_half and rotate_every_two are False, need one of both True.")
    arrays = [checks.floats(given.name, one, given[one]) for one in ("mixed_query", "key_layer")]
    heads = checks.whole(given.name, "num_heads", given.num_heads, 1)
    if any(x.ndim != 3 or x.shape[:2] != arrays[0].shape[:2] for x in arrays) or arrays[0].shape[2] % heads:
        raise ValueError(
            f"{given.name}: mixed_query is {list(arrays[0].shape)} and key_layer {list(arrays[1].shape)}, "
            f"need [batch, tokens, heads * d] for {heads} heads."
        )
    d = arrays[0].shape[2] // heads
    places = int(given.offset) + jnp.arange(arrays[0].shape[1], dtype=jnp.int32)
    style = "interleaved" if every_two else "half"
    turned = (
        rotary(x.reshape(*x.shape[:2], -1, d), places, dim=int(given.rotary_dim), theta=theta, style=style)
        for x in arrays
    )
    q, k = (y.reshape(x.shape) for x, y in zip(arrays, turned, strict=True))
    return q, k


# Norms and elementwise functions ----------------------------------------------------------------------------


def _gated(given: Given) -> jax.Array:
    act = {3: "gelu_erf", 4: "silu"}[checks.choice(given.name, "actFun", int(given.actFun), (3, 4))]
    return bias_act(given.activation, given.bias, act, gated="split")


def _residual_add(given: Given) -> jax.Array:
    arrays = given.hidden_state, given.residual
    if given.mlp_after_attn and not given.preln:
        return residual_add(*arrays, final_bias=given.final_bias, mode="post")
    mode = "pre" if given.mlp_after_attn else "parallel"
    attn_bias = given.attention_bias if given.mlp_after_attn or given.add_bias else None
    return residual_add(
        *arrays, given.attention_output, attn_bias, given.final_bias, mode=mode, mp_size=int(given.mp_size)
    )


def _moe_res_matmul(given: Given) -> jax.Array:
    res = checks.floats(given.name, "moe_res", given.moe_res)
    out = checks.floats(given.name, "output", given.output)
    checks.shaped(given.name, "output", out, res.shape, "as moe_res")
    coef = checks.floats(given.name, "coef", given.coef)
    if coef.size != 2 * res.shape[-1]:
        raise ValueError(
            f"{given.name}: coef is {list(coef.shape)}, need two rows of {res.shape[-1]} numbers."
        )
    of_res, of_out = (
        jnp.expand_dims(row, tuple(range(res.ndim - 1))) for row in coef.reshape(2, -1).astype(jnp.float32)
    )
    return (out.astype(jnp.float32) * of_out + res.astype(jnp.float32) * of_res).astype(out.dtype)


def _vector_add(given: Given) -> jax.Array:
    a = checks.floats(given.name, "a", given.a)
    b = checks.shaped(given.name, "b", checks.floats(given.name, "b", given.b, like=a), a.shape, "as a")
    return (float(given.gamma) * a.astype(jnp.float32) + b.astype(jnp.float32)).astype(a.dtype)


# Products ---------------------------------------------------------------------------------------------------


def int8_weight(name: str, weight: Any, scales: Any, groups: int, merge_count: int = 0) -> QuantizedWeight:
    """int8 [n, k] with a scale for each of `groups` runs of rows and of 2^merge_count parts of k."""
    values = jnp.asarray(checks.unwrapped(weight))
    parts = 2 ** int(merge_count)
    if values.dtype != jnp.int8 or values.ndim != 2 or values.shape[0] % groups or values.shape[1] % parts:
        raise ValueError(
            f"{name}: weight is {checks.described(values)}, need int8 [n, k] with n a multiple of {groups} "
            f"groups and k of {parts}."
        )
    flat = checks.floats(name, "q_scale", scales).reshape(-1).astype(jnp.float32)
    if flat.size < groups * parts:
        raise ValueError(
            f"{name}: q_scale has {flat.size} numbers, need {groups * parts}: {parts} for each group."
        )
    of_rows = jnp.repeat(flat[: groups * parts].reshape(groups, parts), values.shape[0] // groups, axis=0)
    return QuantizedWeight(values.T, of_rows.T, "int8")


def _weight(given: Given, weight: str = "weight", scale: str = "q_scale") -> tuple[Any, str]:
    """A weight and its layout, of the arguments that say so."""
    if not given.get("q_int8", False):
        return given[weight], "nk" if given.get("transposed_mode", False) else "kn"
    scales = checks.floats(given.name, scale, given[scale])
    if scales.ndim < 1:
        raise ValueError(f"{given.name}: {scale} is a number, need float32 [groups]: {scale}[None].")
    return int8_weight(given.name, given[weight], scales, max(scales.shape[0], 1)), "kn"


def _qkv_gemm(given: Given) -> tuple[jax.Array, jax.Array]:
    weight, layout = _weight(given)
    form = {"gamma": given.gamma, "beta": given.beta, "eps": float(given.epsilon), "w_layout": layout}
    return norm_linear(given.input, weight, given.bias if given.add_bias else None, **form)


def _rms_qkv_gemm(given: Given) -> tuple[jax.Array, jax.Array]:
    weight, layout = _weight(given)
    form = {"gamma": given.gamma, "kind": "rms", "eps": float(given.epsilon), "w_layout": layout}
    return norm_linear(given.input, weight, **form)


def _qkv_gemm_int8(given: Given) -> jax.Array:
    weight = int8_weight(given.name, given.weight, given.q_scale, int(given.groups))
    form = {"gamma": given.gamma, "beta": given.beta, "eps": float(given.epsilon)}
    return norm_linear(given.input, weight, given.bias if given.add_bias else None, **form)[0]


def _activation(given: Given, known: dict[int, tuple[str, str | None]]) -> dict[str, Any]:
    act, gated = known[checks.choice(given.name, "activation_type", int(given.activation_type), tuple(known))]
    return {"act": act, "gated": gated}


PLAIN: dict[int, tuple[str, str | None]] = {1: ("gelu_tanh", None), 2: ("relu", None)}
GATED: dict[int, tuple[str, str | None]] = {**PLAIN, 3: ("gelu_erf", "split"), 4: ("silu", "split")}


def _mlp_gemm(given: Given) -> tuple[jax.Array, jax.Array]:
    w1, layout = _weight(given, "weight_interm")
    w2, _ = _weight(given, "weight_out", "q_scale1")
    form: dict[str, Any] = {"norm": "layer", "gamma": given.gamma, "beta": given.beta}
    form |= {"eps": float(given.epsilon), "w_layout": layout, **_activation(given, PLAIN)}
    if not given.mlp_after_attn:
        return mlp(given.residual, w1, w2, given.bias, **form)
    added = {"residual": given.residual, "residual_bias": given.input_bias}
    return mlp(given.input, w1, w2, given.bias, **added, **form)


def _rms_mlp_gemm(given: Given) -> tuple[jax.Array, jax.Array]:
    w1, layout = _weight(given, "weight_interm")
    w2, _ = _weight(given, "weight_out", "q_scale1")
    form: dict[str, Any] = {"norm": "rms", "gamma": given.gamma, "eps": float(given.epsilon)}
    form |= {"returns": "sum", "w_layout": layout, **_activation(given, GATED)}
    return mlp(given.input, w1, w2, residual=given.residual, **form)


def _mlp_gemm_int8(given: Given) -> tuple[jax.Array, jax.Array]:
    y, total = norm(
        given.input,
        given.gamma,
        given.beta,
        eps=float(given.epsilon),
        residual=given.residual,
        bias=given.input_bias,
        return_sum=True,
    )
    weight = int8_weight(given.name, given.weight, given.q_scale, int(given.groups))
    return linear(y, weight, given.bias, "gelu_tanh"), total if given.preLayerNorm else y


def _vector_matmul(given: Given) -> jax.Array:
    weight, layout = _weight(given)
    return linear(given.input, weight, w_layout=layout)


def _vector_matmul_int8(given: Given) -> jax.Array:
    weight = int8_weight(given.name, given.weight, given.q_scale, int(given.groups), int(given.merge_count))
    return linear(given.input, weight)


def _linear_layer_int8(given: Given) -> jax.Array:
    return linear(
        given.input, int8_weight(given.name, given.weight, given.q_scale, int(given.groups)), given.bias
    )


def _linear_layer(given: Given) -> jax.Array:
    weight, layout = _weight(given)
    y = linear(given.input, weight, given.bias if given.add_bias else None, w_layout=layout)
    if not given.do_flash_attn:
        return y
    heads = checks.whole(given.name, "num_heads", given.num_heads, 1)
    if y.ndim != 3 or y.shape[2] % (3 * heads):
        raise ValueError(
            f"{given.name}: the result is {list(y.shape)} and do_flash_attn is True, need [batch, tokens, 3 "
            f"* {heads} * d]."
        )
    split = y.reshape(*y.shape[:2], 3, heads, -1).transpose(2, 0, 3, 1, 4)
    d = split.shape[-1]
    return _padded(split, _flash_width(d) if d % 64 else d)


def _fused_gemm_gelu(given: Given) -> jax.Array:
    w1, layout = _weight(given, scale="weight_scale")
    w2, _ = _weight(given, "weight_out", "weight_out_scale")
    return mlp(given.input, w1, w2, given.bias, w_layout=layout)[0]


def _einsum(given: Given) -> jax.Array:
    q = checks.floats(given.name, "Q", given.Q)
    w = checks.floats(given.name, "W", given.W, like=q)
    if q.ndim != 3 or w.ndim != 2 or q.shape[0] != w.shape[0]:
        raise ValueError(
            f"{given.name}: Q is {list(q.shape)} and W is {list(w.shape)}, need [s, e, c] and [s, m]."
        )
    return product(q, w, ((0,), (0,))).astype(q.dtype)


def _dequantize(given: Given) -> jax.Array:
    groups = checks.whole(given.name, "groups", given.groups, 1)
    weight = int8_weight(given.name, given.weight, given.qscale, groups)
    return (weight.values.T.astype(jnp.float32) * weight.scales.T).astype(given.kind)


# Padding ----------------------------------------------------------------------------------------------------


def _flash_width(d: int) -> int:
    return 32 if d < 32 else 64 if d < 64 else max(128, -(-d // 64) * 64)


def _padded(x: jax.Array, d: int, tokens: int | None = None) -> jax.Array:
    rows = 0 if tokens is None else tokens - x.shape[-2]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, rows), (0, d - x.shape[-1])])


def _all_padded(name: str, arrays: list[jax.Array]) -> tuple[jax.Array, ...]:
    """Heads [batch, heads, tokens, d] in widths and, of keys and values, lengths of kernels."""
    if arrays[1].shape[2] > FLASH_KEYS or arrays[2].shape[2] > FLASH_KEYS:
        raise ValueError(f"{name}: there are {arrays[1].shape[2]} keys, need at most {FLASH_KEYS}.")
    d = _flash_width(arrays[0].shape[-1])
    query, *others = arrays
    return (_padded(query, d), *(_padded(x, d, FLASH_KEYS) for x in others))


def _three(given: Given, dims: str) -> list[jax.Array]:
    arrays = [checks.floats(given.name, one, given[one]) for one in ("query", "key", "value")]
    rank = dims.count(",") + 1
    if any(x.ndim != rank or x.shape[-1] != arrays[0].shape[-1] for x in arrays):
        shapes = ", ".join(str(list(x.shape)) for x in arrays)
        raise ValueError(f"{given.name}: query, key and value are {shapes}, need [{dims}] of one width.")
    return arrays


def _add_padding(given: Given) -> tuple[jax.Array, ...]:
    return _all_padded(given.name, _three(given, "batch, heads, tokens, d"))


def _pad_transform(given: Given) -> tuple[jax.Array, ...]:
    heads = checks.whole(given.name, "heads", given.heads, 1)
    arrays = _three(given, "batch, tokens, heads * d")
    if arrays[0].shape[-1] % heads:
        raise ValueError(
            f"{given.name}: query is {list(arrays[0].shape)}, need a last dimension of {heads} heads."
        )
    split = [x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2) for x in arrays]
    return _all_padded(given.name, split) if given.add_padding else tuple(split)


# Workspaces -------------------------------------------------------------------------------------------------


def _no_workspace(given: Given) -> None:
    global _warned
    if not _warned:
        warnings.warn(
            f"{given.name}: there is no workspace to release or take: caches are arrays, which are freed "
            "with their last use. Leave the call out.",
            stacklevel=3,
        )
        _warned = True


_warned = False

# The table --------------------------------------------------------------------------------------------------

ATTENTION = "query_key_value attn_mask rotary_dim rotate_half rotate_every_two heads"
MASKS = "norm_factor triangular local_attention window_size no_masking layer_id num_layers alibi"
WORKSPACE = (
    "hidden_dim num_heads prompt_length batch_size num_layers mp_size external_cache rank max_out_tokens"
)
NORM = "input gamma beta epsilon"
NORM_RESIDUAL = "input bias residual gamma beta epsilon"
QKV = "input weight q_scale bias gamma beta epsilon add_bias"
MLP = (
    "input residual input_bias weight_interm weight_out bias gamma beta epsilon preLayerNorm "
    "mlp_after_attn q_scale q_scale1 q_int8 activation_type"
)
GEMM_GELU = "input weight weight_scale bias weight_out weight_out_scale"
LINEAR = "input weight bias add_bias do_flash_attn num_heads"


def _layer_norm(given: Given, **options: Any) -> Any:
    residual, bias = given.get("residual"), given.get("bias")
    form: dict[str, Any] = {"eps": float(given.epsilon), "residual": residual, "bias": bias}
    return norm(given.input, given.gamma, given.beta, **form, **options)


def _rms_norm(given: Given, **options: Any) -> Any:
    form: dict[str, Any] = {"kind": "rms", "eps": float(given.epsilon), "residual": given.get("residual")}
    return norm(given.input, given.gamma, **form, **options)


def _with_sum(compute: Callable[..., Any]) -> Callable[[Given], Any]:
    return lambda given: compute(given, return_sum=True)


_TYPED: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "softmax": (
        _softmax,
        (
            "attn_scores attn_mask alibi triangular recompute local_attention window_size async_op "
            "layer_scale head_offset mp_size",
        ),
    ),
    "softmax_context": (
        softmax_context,
        (f"{ATTENTION} num_kv {MASKS} rope_theta is_prompt token_idx position_ids", f"{ATTENTION} {MASKS}"),
    ),
    "bias_gelu": (lambda given: bias_act(given.input, given.bias, "gelu_tanh"), ("input bias",)),
    "bias_add": (lambda given: bias_act(given.input, given.bias), ("input bias",)),
    "bias_relu": (lambda given: bias_act(given.input, given.bias, "relu"), ("input bias",)),
    "bias_residual": (lambda given: given.input, ("input residual bias",)),
    "qkv_gemm": (
        _qkv_gemm,
        (f"{QKV} q_int8 transposed_mode", f"{QKV} num_layers external_cache mp_size rank q_int8"),
    ),
    "mlp_gemm": (_mlp_gemm, (f"{MLP} transposed_mode", MLP)),
    "vector_matmul": (
        _vector_matmul,
        ("input weight async_op q_scale q_int8 transposed_mode", "input weight async_op q_scale q_int8"),
    ),
    "linear_layer": (_linear_layer, (f"{LINEAR} transposed_mode rope_theta", LINEAR)),
    "fused_gemm_gelu": (
        _fused_gemm_gelu,
        (f"{GEMM_GELU} q_int8 transposed_mode", f"{GEMM_GELU} epsilon preLayerNorm q_int8 async_op"),
    ),
    "residual_add_bias": (
        _residual_add,
        (
            "hidden_state residual attention_output attention_bias final_bias mp_size mlp_after_attn "
            "add_bias preln",
        ),
    ),
    "einsum_sec_sm_ecm": (_einsum, ("Q W",)),
    "add_padding": (_add_padding, ("query key value",)),
    "pad_transform": (_pad_transform, ("query key value heads add_padding",)),
}
"""What PIN and HEAD have for several types."""

_HEAD_TYPED: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "rms_qkv_gemm": (_rms_qkv_gemm, ("input weight q_scale gamma epsilon q_int8 transposed_mode",)),
    "rms_mlp_gemm": (
        _rms_mlp_gemm,
        (
            "input residual weight_interm weight_out gamma epsilon q_scale q_scale1 q_int8 activation_type "
            "transposed_mode",
        ),
    ),
}
_UNTYPED: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "softmax_context_int8": (
        _softmax_context_int8,
        (
            "query prev_key new_key attn_mask prev_value new_value heads norm_factor merging triangular "
            "local_attention window_size no_masking",
        ),
    ),
    "bias_geglu": (
        lambda given: bias_act(given.activation, given.bias, "gelu_erf", gated="split"),
        ("activation bias",),
    ),
    "gated_activation": (_gated, ("activation bias actFun",)),
    "layer_norm": (_layer_norm, (NORM,)),
    "_layer_norm_residual": (_layer_norm, (NORM_RESIDUAL,)),
    "layer_norm_residual_store": (_with_sum(_layer_norm), (NORM_RESIDUAL,)),
    "layer_norm_residual_store_pre_ln_res": (_with_sum(_layer_norm), (NORM_RESIDUAL,)),
    "rms_norm": (_rms_norm, ("input gamma epsilon",)),
    "pre_rms_norm": (_with_sum(_rms_norm), ("input residual gamma epsilon",)),
    "_vector_add": (_vector_add, ("a b gamma",)),
    "apply_rotary_pos_emb": (
        _apply_rotary,
        ("mixed_query key_layer rotary_dim offset num_heads rotate_half rope_theta",),
    ),
    "moe_res_matmul": (_moe_res_matmul, ("moe_res coef output",)),
    "qkv_gemm_int8": (_qkv_gemm_int8, ("input weight bias gamma beta epsilon q_scale groups add_bias",)),
    "mlp_gemm_int8": (
        _mlp_gemm_int8,
        ("input residual input_bias weight bias gamma beta epsilon q_scale groups preLayerNorm",),
    ),
    "vector_matmul_int8": (_vector_matmul_int8, ("input weight q_scale groups merge_count",)),
    "linear_layer_int8": (_linear_layer_int8, ("input weight bias q_scale groups",)),
    "reset_cache": (reset_cache, ("",)),
    "release_workspace": (_no_workspace, ("",)),
    "retake_workspace": (_no_workspace, ("",)),
}


_OTHERWISE_TYPED: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "allocate_workspace": (allocate_workspace, (f"{WORKSPACE} min_out_tokens", WORKSPACE)),
    "dequantize": (_dequantize, ("weight qscale groups",)),
}
"""Whose first argument has not the type that the name says."""


def _table() -> dict[str, Callable[..., Any]]:
    found = {name: adapter(name, orders, compute) for name, (compute, orders) in _UNTYPED.items()}
    for end, kind in KINDS.items():
        for family, (compute, orders) in (_TYPED | _HEAD_TYPED).items():
            name = f"{family}_{end}"
            found[name] = adapter(name, orders, compute, kind)
        for family, (compute, orders) in _OTHERWISE_TYPED.items():
            name = f"{family}_{end}"
            found[name] = adapter(name, orders, _of_kind(compute, kind))
    return found


def _of_kind(compute: Callable[[Given], Any], kind: np.dtype[Any]) -> Callable[[Given], Any]:
    """Of arguments that know what the name says."""
    return lambda given: compute(Given(given.name, kind, given))


deepspeed_names: dict[str, Callable[..., Any]] = _table()
"""Every name that DeepSpeed's inference binding registers, of 0.7.7 and of August 2026."""
