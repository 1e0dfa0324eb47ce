"""swiglu, swiglu_quantize, swiglu_grad_quantize: for SwiGLU and the other activations of experts."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jax_deepgemm.core.derivatives import same_varying_axes
from jax_deepgemm.ops.quantize.activation import SILU, Activation, as_activation
from jax_deepgemm.ops.quantize.api import checked_input
from jax_deepgemm.ops.quantize.array import Block
from jax_deepgemm.ops.quantize.blocks import check_blocks
from jax_deepgemm.ops.quantize.fused import PER_COLUMN, is_square, row_limit
from jax_deepgemm.ops.swiglu import reference
from jax_deepgemm.ops.swiglu.op import (
    swiglu_grad_groups_op,
    swiglu_grad_op,
    swiglu_groups_op,
    swiglu_op,
)
from jax_deepgemm.ops.swiglu.plain import activate
from jax_deepgemm.ops.swiglu.problem import COMPUTED


def swiglu(
    h: jax.Array, weight: jax.Array | None = None, *, activation: str | Activation = SILU
) -> jax.Array:
    """silu(gate) * up * weight of h = gate | up, computed in float32 and rounded once.

    For FP8 use `swiglu_quantize`. This one has derivatives of any order; for them h and weight are kept, and
    nothing else. One kernel computes it, and one its gradients, rounded once, where sizes are known and the
    type is one of those below. Of the exact numbers results in float32 differ by some 1e-6, relative to the
    largest term; so bfloat16 and float16 ones are next to, or are, the nearest.

    Args:
      h: [.., 2 i] bfloat16, float16 or float32; [.., i] for an activation without a gate.
      weight: [..] a factor per row, or None.
      activation: "silu", "gelu", "relu2", or an `Activation`, which says what they are.

    Returns:
      [.., i] in h's dtype.

    Raises:
      ValueError: h whose last dimension is odd, a weight of another shape than h's rows, another activation.

    Source: Shazeer, "GLU Variants Improve Transformer" (2020), SwiGLU with beta = 1.

    >>> h = jnp.array([[1.0, 2.0, 10.0, 20.0]])
    >>> [f"{act:.3f}" for act in swiglu(h, jnp.array([2.0]))[0].tolist()]
    ['14.621', '70.464']
    """
    activation = as_activation("swiglu", activation)
    if h.ndim < 1 or h.shape[-1] % activation.halves:
        raise ValueError(f"swiglu: h has shape {list(h.shape)}, need [.., 2 i], gate and up side by side.")
    if weight is not None and weight.shape != h.shape[:-1]:
        raise ValueError(
            f"swiglu: weight has shape {list(weight.shape)} and h {list(h.shape)}, need a factor per row, "
            f"{list(h.shape[:-1])}."
        )

    if not all(isinstance(size, int) for size in h.shape) or np.dtype(h.dtype).name not in COMPUTED:
        return jax.checkpoint(functools.partial(_plain, activation))(h, weight)
    weights = [] if weight is None else [weight.astype(jnp.float32)]
    if h.ndim == 1:
        return swiglu(h[None], weights[0][None] if weights else None, activation=activation)[0]
    function = functools.partial(activate, activation=activation)
    if not weights:
        function = functools.partial(activate, weight=None, activation=activation)
    stacked: Any = functools.reduce(lambda one, _: jax.vmap(one), range(h.ndim - 2), function)
    act: jax.Array = stacked(*same_varying_axes([h, *weights]))
    return act


def _plain(activation: Activation, h: jax.Array, weight: jax.Array | None) -> jax.Array:
    return reference.act(h, weight, None, activation).astype(h.dtype)


def swiglu_quantize(
    h: ArrayLike,
    weight: ArrayLike | None = None,
    rows: ArrayLike | None = None,
    *,
    activation: str | Activation = SILU,
    blocks: ArrayLike | None = None,
    transposed: bool = True,
    block_t: Block = PER_COLUMN,
    dtype: DTypeLike = jnp.float8_e4m3fn,
    scale_format: str = "f32",
) -> tuple[jax.Array, ...]:
    """act = silu(gate) * up * weight in float32, quantised as `quantize_both` does, without storing act.

    Args:
      h: [m, 2 i] bfloat16, float16 or float32: gate | up; [m, i] for an activation without a gate. More
        dimensions: jax.vmap.
      weight: [m] float32, a factor per row, or None.
      rows: int32 scalar or [1]; rows from here on count as zeros, whatever they hold. None: all count.
      activation: as in `swiglu`, in the place of silu(gate) * up.
      blocks: int32 [b, 4], `row_blocks(group_sizes, m)`, instead of rows: the transposed copy's blocks begin
        with each group, as `quantize_groups` has them.
      transposed: also give the transposed copy, which the weight gradient of the next GEMM reads.
      block_t: with blocks, elements that share a scale in the transposed copy: (128, 1), or (128, 128).
      dtype: float8_e4m3fn or float8_e5m2.
      scale_format: "f32", or "ue8m0" for powers of two.

    Returns:
      values [m, i], scales [m, ceil(i / 128)], and with `transposed` values_t [i, m], scales_t [ceil(m /
      128), i]: see `quantize_both`; of blocks values_t [i, 128 b], scales_t [b, i], or with block_t (128,
      128) [b, ceil(i / 128)]: see `quantize_groups`.

    Raises:
      TypeError, ValueError: types, shapes or formats outside the above.

    exp is not correctly rounded, so values may differ in the last bit between devices; on one device kind
    equal inputs give equal bits.

    Has no derivative: `swiglu_grad_quantize` is what a backward pass calls; grouped_linear and moe_mlp do.

    >>> h = jnp.concatenate([jnp.full((2, 128), 4.0), jnp.full((2, 128), 0.5)], axis=1)
    >>> values, scales, values_t, scales_t = swiglu_quantize(h)
    >>> values.shape, values_t.shape, f"{values[0, 0].astype(jnp.float32) * scales[0, 0]:.3f}"
    ((2, 128), (128, 2), '1.964')
    """
    activation = as_activation("swiglu_quantize", activation)
    h, dtype = _checked_h("swiglu_quantize", h, dtype, scale_format, activation)
    weights = _checked_weight("swiglu_quantize", h, weight)
    limit = row_limit("swiglu_quantize", rows)
    square = _is_square("swiglu_quantize", block_t, blocks)
    if blocks is not None:
        table = _blocks("swiglu_quantize", blocks, rows, transposed)
        grouped = swiglu_groups_op(dtype, scale_format, bool(weights), activation, square)
        return tuple(grouped(*same_varying_axes([h, *weights, *table])))
    op = swiglu_op(dtype, scale_format, bool(transposed), bool(weights), bool(limit), activation)
    return tuple(op(*same_varying_axes([h, *weights, *limit])))


def swiglu_grad_quantize(
    h: ArrayLike,
    weight: ArrayLike | None,
    dact: ArrayLike,
    rows: ArrayLike | None = None,
    *,
    activation: str | Activation = SILU,
    blocks: ArrayLike | None = None,
    transposed: bool = True,
    block_t: Block = PER_COLUMN,
    dtype: DTypeLike = jnp.float8_e4m3fn,
    scale_format: str = "f32",
) -> tuple[jax.Array | None, ...]:
    """The gradients of SwiGLU's h, quantised as `quantize_both` does without storing it, and of its weight.

        dh      = dact * weight * (up * silu'(gate) | silu(gate))
        dweight = sum over the features of dact * silu(gate) * up

    Args:
      h, weight, rows, activation, blocks, transposed, block_t, dtype, scale_format: as in `swiglu_quantize`.
        Of another activation dh is likewise dact * weight * its derivatives, in the columns that h has them
        in.
      dact: [m, i] in h's dtype, the gradient of act.

    Returns:
      dh's values [m, 2 i], scales [m, ceil(2 i / 128)], with `transposed` values_t [2 i, m], scales_t [ceil(m
      / 128), 2 i] (of blocks [2 i, 128 b] and [b, 2 i], or [b, ceil(2 i / 128)]), then dweight [m] float32
      (None if weight is).
      dweight's sum has a fixed order: equal bits every time.

    Raises:
      TypeError, ValueError: types, shapes or formats outside the above.

    Has no derivative: it is one; higher ones go through `swiglu` and the BF16 GEMMs.

    >>> h, dact = jnp.ones((2, 256)), jnp.full((2, 128), 3.0)
    >>> values, scales, values_t, scales_t, dweight = swiglu_grad_quantize(h, jnp.ones(2), dact)
    >>> values.shape, scales.shape, f"{dweight[1]:.2f}"
    ((2, 256), (2, 2), '280.73')
    """
    where = "swiglu_grad_quantize"
    activation = as_activation(where, activation)
    h, dtype = _checked_h(where, h, dtype, scale_format, activation)
    weights = _checked_weight(where, h, weight)
    dact = jnp.asarray(dact)
    wanted = (h.shape[0], h.shape[1] // activation.halves)
    if dact.shape != wanted or dact.dtype != h.dtype:
        raise ValueError(
            f"{where}: dact is {dact.dtype.name}{list(dact.shape)}, need {h.dtype.name}{list(wanted)}, the "
            f"type of h ({list(h.shape)}) with a column per feature. Convert it: dact.astype(h.dtype)."
        )
    limit = row_limit(where, rows)
    square = _is_square(where, block_t, blocks)
    if blocks is None:
        op = swiglu_grad_op(dtype, scale_format, bool(transposed), bool(weights), bool(limit), activation)
    else:
        limit = _blocks(where, blocks, rows, transposed)
        op = swiglu_grad_groups_op(dtype, scale_format, bool(weights), activation, square)
    results = tuple(op(*same_varying_axes([h, *weights, dact, *limit])))
    return results if weights else (*results, None)


def _is_square(where: str, block_t: Any, blocks: Any) -> bool:
    square = is_square(where, block_t)
    if square and blocks is None:
        raise ValueError(
            f"{where}: block_t is (128, 128) without blocks, need row_blocks(group_sizes, m) with it. Of one "
            "group: row_blocks(jnp.array([m]), m)."
        )
    return square


def _blocks(where: str, blocks: Any, rows: Any, transposed: bool) -> list[jax.Array]:
    if rows is not None or not transposed:
        raise ValueError(
            f"{where}: blocks are given with {'rows' if rows is not None else 'transposed=False'}, need them "
            "alone: they say which rows count, and matter to the transposed copy only."
        )
    return check_blocks(where, blocks)


def _checked_h(
    where: str, h: Any, dtype: Any, scale_format: str, activation: Activation
) -> tuple[jax.Array, np.dtype]:
    h, _, dtype = checked_input(h, (1, 128), dtype, scale_format, where)
    if h.ndim != 2 or h.shape[1] % activation.halves:
        raise ValueError(
            f"{where}: h has shape {list(h.shape)}, need [m, 2 i], gate and up side by side. For stacked "
            "matrices use jax.vmap."
        )
    return h, dtype


def _checked_weight(where: str, h: jax.Array, weight: Any) -> list[jax.Array]:
    if weight is None:
        return []
    weight = jnp.asarray(weight)
    if weight.shape != h.shape[:1] or weight.dtype != jnp.float32:
        raise ValueError(
            f"{where}: weight is {weight.dtype.name}{list(weight.shape)}, need float32[{h.shape[0]}], one "
            f"factor per row of h ({list(h.shape)})."
        )
    return [weight]
