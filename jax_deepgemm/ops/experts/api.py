"""A layer of experts in FP8 for few tokens, as one op."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jax_deepgemm.ops.experts.family import ExpertsProblem
from jax_deepgemm.ops.experts.limits import refusal
from jax_deepgemm.ops.experts.op import LAYER
from jax_deepgemm.ops.gemm.checks import BLOCKED
from jax_deepgemm.ops.grouped import gated
from jax_deepgemm.ops.quantize import QuantizedArray


def fits(x: Any, ids: Any, w13: Any, w2: Any) -> bool:
    """Whether the chain takes these: quantised weights with 128x128 scales, and sizes within its limits.

    >>> import jax, jax.numpy as jnp
    >>> from jax_deepgemm import quantize
    >>> w13 = quantize(jnp.ones((4, 256, 512)), (128, 128))
    >>> w2 = quantize(jnp.ones((4, 512, 128)), (128, 128))
    >>> ids = jnp.zeros((3, 2), jnp.int32)
    >>> fits(jnp.ones((3, 512)), ids, w13, w2), fits(jnp.ones((3, 512), jnp.float16), ids, w13, w2)
    (True, False)
    """
    known = all(isinstance(size, int) for array in (x, ids, w13, w2) for size in array.shape)
    if not known or 0 in (*x.shape, *ids.shape) or not gated.fits(w13):
        return False
    if not isinstance(w2, QuantizedArray) or w2.block != BLOCKED:
        return False
    (tokens, slots), (experts, hidden, inner) = ids.shape, w2.shape
    expected, dtype = -(-tokens * slots // experts), np.dtype(x.dtype).name
    return refusal(ExpertsProblem(tokens, slots, hidden, inner, experts, expected, x=dtype)) == ""


def experts_swiglu(
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    w13: QuantizedArray,
    w2: QuantizedArray,
    *,
    expected_m: int | None = None,
    num_sms: int | None = None,
) -> jax.Array:
    """y[t] = sum over s of weights[t, s] * SwiGLU of expert ids[t, s] of x[t], as `moe.moe_mlp` gives it, bit
    for bit, of operands that `fits` takes.

    >>> import jax, jax.numpy as jnp
    >>> from jax_deepgemm import quantize
    >>> x = jax.random.normal(jax.random.key(0), (3, 512), jnp.bfloat16)
    >>> w13 = quantize(jax.random.normal(jax.random.key(1), (4, 256, 512)), (128, 128))
    >>> w2 = quantize(jax.random.normal(jax.random.key(2), (4, 512, 128)), (128, 128))
    >>> ids = jnp.array([[0, 3], [1, 2], [3, -1]], jnp.int32)
    >>> experts_swiglu(x, ids, jnp.full((3, 2), 0.5), w13, w2).shape
    (3, 512)

    Args:
      x: [t, h] bfloat16 or float32.
      ids: int32 [t, top_k]; a copy with an id outside [0, e) counts zero.
      weights: float32 [t, top_k].
      w13, w2: values [e, 2 i, h] and [e, h, i] with 128x128 scales.
      expected_m, num_sms: as in `moe.moe_mlp`.

    Returns:
      [t, h] in the dtype of x.

    Raises:
      NotImplementedError: on differentiation; the others are its callers' to raise.
    """
    arrays = (x, ids, weights, w13.values, w13.scales, w2.values, w2.scales)
    options = {"expected_m": expected_m, "num_sms": num_sms, "out_dtype": np.dtype(x.dtype)}
    return LAYER(*arrays, **options)[0]
