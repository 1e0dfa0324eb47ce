"""Logits of an attention's indexer: checks, calls of the ops, and gradients."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jax_deepgemm.core.arrays import unwrapped
from jax_deepgemm.core.derivatives import same_varying_axes
from jax_deepgemm.core.first_order import ReverseOnly
from jax_deepgemm.core.options import Sharding
from jax_deepgemm.ops.indexer import checks, fp4
from jax_deepgemm.ops.indexer.checks import BFLOAT16, Form
from jax_deepgemm.ops.indexer.family import IndexerConfig
from jax_deepgemm.ops.indexer.op import gradients_op, logits_op
from jax_deepgemm.ops.quantize import QuantizedArray, dequantize, quantize
from jax_deepgemm.ops.quantize.array import QuantizedLike
from jax_deepgemm.ops.quantize.fp4 import Fp4Array


def mqa_logits(
    q: QuantizedLike | Fp4Array | ArrayLike,
    kv: QuantizedLike | Fp4Array | ArrayLike,
    weights: ArrayLike,
    k_start: ArrayLike,
    k_end: ArrayLike,
    *,
    compressed: bool = False,
    max_len: int | None = None,
    out_dtype: DTypeLike = jnp.float32,
    config: IndexerConfig | None = None,
    out_sharding: Sharding = None,
    num_sms: int | None = None,
) -> jax.Array:
    """Scores of keys for tokens, by which sparse attention chooses: FP8 products of heads with one key.

        logits[i, j] = s[j] * sum_h weights[i, h] * relu(sum_d q[i, h, d] * kv[j, d])

    for k_start[i] <= j < k_end[i], and minus infinity elsewhere. s are the scales of kv. Windows are data:
    causal ones, several sequences in one row, or a device's part of a sequence.

    >>> import jax, jax.numpy as jnp
    >>> from jax_deepgemm import quantize
    >>> from jax_deepgemm.indexer import mqa_logits
    >>> q = jax.random.normal(jax.random.key(0), (4, 8, 128), jnp.bfloat16)
    >>> kv = jax.random.normal(jax.random.key(1), (6, 128), jnp.bfloat16)
    >>> weights, start, end = jnp.ones((4, 8)), jnp.zeros(4, jnp.int32), jnp.arange(3, 7)
    >>> logits = mqa_logits(quantize(q), quantize(kv), weights, start, end)
    >>> logits.shape, jnp.sum(logits > -jnp.inf, axis=1).tolist()
    ((4, 6), [3, 4, 5, 6])
    >>> mqa_logits(quantize(q), quantize(kv), weights, start + 2, end, compressed=True, max_len=4).shape
    (4, 4)

    Args:
      q: [s, h, d]: float8_e4m3fn, whose scales the caller has multiplied into the weights; a QuantizedArray
        of block (1, 128), or (values, scales [s, h]), whose scales are multiplied into them here; an
        `Fp4Array`, or its values and scales; or bfloat16, quantised here. h is 1 to 128, d is 32, 64 or 128.
      kv: a QuantizedArray of block (1, 128), or (values [n, d] float8_e4m3fn, scales [n] float32), scales
        positive; an `Fp4Array`, or its values and scales; or bfloat16 [n, d], if q is.
      weights: float32 [s, h].
      k_start, k_end: integers [s], 0 <= k_start <= k_end <= n. Bounds outside are clipped on the device, and
        a window that ends before it begins is empty; of NumPy arrays they are an error.
      compressed: whether column j of row i is key k_start[i] + j, instead of key j.
      max_len: the columns of the compressed form; keys of longer windows have none. None: n.
      out_dtype: float32, or bfloat16, rounded once.
      config: an IndexerConfig to use instead of the cost model's choice.
      out_sharding: on a mesh with Explicit axes the result's, needed where heads are cut.
      num_sms: SMs that the kernel may use.

    Returns:
      [s, n] or [s, max_len] in out_dtype.

    Raises:
      TypeError, ValueError: types, shapes or options outside the above; the message says what to do.

    Differentiable with respect to the weights, and to q and kv where they are bfloat16: straight through the
    quantisation, at the quantised values. First order, in reverse mode; plain XLA, head by head, which takes
    a few arrays of [s, n] in memory.

    FP4 operands, of which each may be one by itself, become rows of e4m3 before: without any rounding unless
    scales of a row are more than 2**14 times apart. Then numbers of its smaller blocks become multiples of
    2**-15 times the largest scale.

    Deterministic. NaN in a token's q reaches its row only, and what keys outside of all windows hold reaches
    nothing. Source: DeepSeek-V3.2, "lightning indexer"; DeepGEMM's fp8_mqa_logits.
    """
    weights = checks.weights_of("mqa_logits", weights)
    keys: tuple[jax.Array, ...]
    if _is_bfloat16(q) and _is_bfloat16(kv):
        keys = (checks.plain_operand("mqa_logits", "kv", kv, "[n, d]"),)
        queries, function = checks.plain_operand("mqa_logits", "q", q, "[s, h, d]"), _quantised_here
    else:
        queries, weights = checks.scaled_queries("mqa_logits", q, weights)
        keys, function = checks.keys_as_given("mqa_logits", kv), _quantised
    return _call(
        "mqa_logits",
        function,
        (queries, *keys, weights),
        (k_start, k_end),
        compressed=compressed,
        max_len=max_len,
        out_dtype=out_dtype,
        config=config,
        out_sharding=out_sharding,
        num_sms=num_sms,
    )


def bf16_mqa_logits(
    q: ArrayLike,
    kv: ArrayLike,
    weights: ArrayLike,
    k_start: ArrayLike,
    k_end: ArrayLike,
    *,
    compressed: bool = False,
    max_len: int | None = None,
    out_dtype: DTypeLike = jnp.float32,
    config: IndexerConfig | None = None,
    out_sharding: Sharding = None,
    num_sms: int | None = None,
) -> jax.Array:
    """`mqa_logits` of bfloat16 numbers, for those who do not quantise.

    >>> import jax, jax.numpy as jnp
    >>> from jax_deepgemm.indexer import bf16_mqa_logits
    >>> q, kv = jnp.ones((1, 2, 32), jnp.bfloat16), jnp.ones((3, 32), jnp.bfloat16)
    >>> bf16_mqa_logits(q, kv, jnp.array([[1.0, 0.5]]), jnp.array([0]), jnp.array([2])).tolist()
    [[48.0, 48.0, -inf]]

    Args:
      q: [s, h, d] bfloat16; h is 1 to 128, d is 32, 64 or 128.
      kv: [n, d] bfloat16.
      weights: float32 [s, h].
      k_start, k_end, compressed, max_len, out_dtype, config, out_sharding, num_sms: as the parameters of
        `mqa_logits`; k_start and k_end are integers [s].

    Returns:
      [s, n] or [s, max_len] in out_dtype.

    Raises:
      TypeError, ValueError: types, shapes or options outside the above; the message says what to do.

    Differentiable with respect to q, kv and weights: first order, in reverse mode; the products of the
    gradients are those of bfloat16 numbers, summed in float32. Deterministic.
    """
    op = "bf16_mqa_logits"
    operands = (
        checks.plain_operand(op, "q", q, "[s, h, d]"),
        checks.plain_operand(op, "kv", kv, "[n, d]"),
        checks.weights_of(op, weights),
    )
    return _call(
        op,
        _plain,
        operands,
        (k_start, k_end),
        compressed=compressed,
        max_len=max_len,
        out_dtype=out_dtype,
        config=config,
        out_sharding=out_sharding,
        num_sms=num_sms,
    )


def _is_bfloat16(x: Any) -> bool:
    return getattr(unwrapped(x), "dtype", None) == BFLOAT16


def _call(op: str, function: Any, operands: tuple[jax.Array, ...], window: Any, **options: Any) -> jax.Array:
    q, kv, weights = operands[0], operands[1], operands[-1]
    checks.check_shapes(op, q, kv, weights)
    bounds = checks.check_window(op, window, q.shape[0], kv.shape[0])
    form = checks.form(op, kv.shape[0], **options)
    logits: jax.Array = function(form, *same_varying_axes([*operands, *bounds]))
    return logits


# Gradients -------------------------------------------------------------------------------------------------


def _op(scaled: bool, form: Form, packed: bool = False) -> Any:
    return functools.partial(logits_op(scaled, form.columns is not None, packed), **form.options)


def _gradients(
    form: Form, q: jax.Array, kv: jax.Array, weights: jax.Array, window: Sequence[jax.Array], by: jax.Array
) -> list[jax.Array]:
    """Those of q, kv and weights, each in its type and cut as it is."""
    columns = {} if form.columns is None else {"columns": form.columns}
    found = gradients_op(form.columns is not None)(q, kv, weights, *window, by, **columns)
    return [_as(x, like) for x, like in zip(found, (q, kv, weights), strict=True)]


def _as(x: jax.Array, like: jax.Array) -> jax.Array:
    sharding = jax.typeof(like).sharding
    x = x.astype(like.dtype)
    return jax.sharding.reshard(x, sharding) if sharding.mesh.explicit_axes else x


_IN_JNP = (
    "jnp: jnp.einsum('shn,sh->sn', jax.nn.relu(jnp.einsum('shd,nd->shn', q, kv)), weights) inside the windows"
)
_first_order = functools.partial(ReverseOnly, gradients="gradients of logits")


@functools.partial(_first_order, "bf16_mqa_logits", _IN_JNP)
def _plain(form: Form, q: Any, kv: Any, weights: Any, start: Any, end: Any) -> jax.Array:
    return _op(False, form)(q, kv, weights, start, end)[0]


def _plain_forward(form: Form, *operands: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _plain(form, *operands), operands


def _plain_backward(form: Form, kept: tuple[jax.Array, ...], by: jax.Array) -> tuple[Any, ...]:
    q, kv, weights, *window = kept
    return (*_gradients(form, q, kv, weights, window, by), None, None)


_plain.defvjp(_plain_forward, _plain_backward)


@functools.partial(_first_order, "mqa_logits", _IN_JNP)
def _quantised(form: Form, q: Any, kv: Any, scales: Any, weights: Any, start: Any, end: Any) -> jax.Array:
    return _op(True, form, fp4.is_packed(kv))(q, kv, scales, weights, start, end)[0]


def _quantised_forward(form: Form, *operands: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _quantised(form, *operands), operands


def _quantised_backward(form: Form, kept: tuple[jax.Array, ...], by: jax.Array) -> tuple[Any, ...]:
    q, kv, scales, weights, *window = kept
    if fp4.is_packed(kv):
        kv, scales = fp4.expand(kv, scales)
    meant = kv.astype(jnp.float32) * scales[:, None]
    of_weights = _gradients(form, q.astype(jnp.float32), meant, weights, window, by)[2]
    return None, None, None, of_weights, None, None


_quantised.defvjp(_quantised_forward, _quantised_backward)


@functools.partial(_first_order, "mqa_logits", _IN_JNP)
def _quantised_here(form: Form, q: Any, kv: Any, weights: Any, start: Any, end: Any) -> jax.Array:
    return _quantised_here_forward(form, q, kv, weights, start, end)[0]


def _quantised_here_forward(
    form: Form, q: jax.Array, kv: jax.Array, weights: jax.Array, *window: jax.Array
) -> tuple[jax.Array, tuple[Any, ...]]:
    queries, keys = quantize(q), quantize(kv)
    scaled = weights * queries.scales[..., 0]
    logits = _op(True, form)(queries.values, keys.values, keys.scales[:, 0], scaled, *window)[0]
    return logits, (queries, keys, weights, *window)


def _quantised_here_backward(
    form: Form, kept: tuple[QuantizedArray, QuantizedArray, jax.Array, jax.Array, jax.Array], by: jax.Array
) -> tuple[Any, ...]:
    queries, keys, weights, *window = kept
    meant = dequantize(queries, jnp.bfloat16), dequantize(keys, jnp.bfloat16)
    return (*_gradients(form, *meant, weights, window, by), None, None)


_quantised_here.defvjp(_quantised_here_forward, _quantised_here_backward)
