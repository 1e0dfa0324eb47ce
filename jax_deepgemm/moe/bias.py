"""Biases of experts: added to the rows of each expert, with gradients that are sums in a fixed order.

In XLA, so that each addition is a pass over what it is added to, fused with its neighbours where XLA can.
The gradient of a bias is the product that gives a weight's gradient, with ones in the place of the rows: sums
over each expert's rows in float32, of dh as the weight's gradient reads it, and equal bits every time (a
scatter would add in any order).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.core import products
from jax_deepgemm.core.derivatives import same_varying_axes
from jax_deepgemm.core.prefix import prefix_ends
from jax_deepgemm.moe.form import ExpertForm
from jax_deepgemm.ops.gemm.checks import OUT_DTYPES
from jax_deepgemm.ops.grouped import recipe as fp8
from jax_deepgemm.ops.grouped.api import k_grouped_bf16_gemm_tn_contiguous

ONES = 16  # columns of ones, of which one is needed: what the kernels read are rows of whole 16 bytes


def check_biases(where: str, w13: Any, w2: Any, form: ExpertForm, b13: Any, b2: Any) -> None:
    """b13 [e, 2 * i], in the order of w13's rows, and b2 [e, h], or None."""
    first, second = form.sizes(w13, w2)
    for name, bias, shape in (("b13", b13, first[:2]), ("b2", b2, second[:2])):
        if bias is None:
            continue
        if not hasattr(bias, "dtype") or np.dtype(bias.dtype) not in OUT_DTYPES or tuple(bias.shape) != shape:
            given = f"{bias.dtype} {list(bias.shape)}" if hasattr(bias, "dtype") else type(bias).__name__
            raise ValueError(
                f"{where}: {name} is {given}, need bfloat16 or float32 {list(shape)}: a number for each "
                "feature of every expert's product."
            )


def expert_of_rows(groups: fp8.Groups, rows: int, experts: int) -> jax.Array:
    """int32 [rows]: which of the biases here is the row's; `experts` where none is."""
    ends, row = same_varying_axes([prefix_ends(groups.sizes, rows), jnp.arange(rows, dtype=jnp.int32)])
    expert = jnp.sum(row[:, None] >= ends[None, :], axis=1, dtype=jnp.int32)
    here = (expert < ends.shape[0]) & (expert >= groups.offset) & (expert < groups.offset + experts)
    return jnp.where(here, expert - groups.offset, experts)


@jax.custom_vjp
def spread_bias(bias: jax.Array, like: jax.Array, groups: fp8.Groups) -> jax.Array:
    """float32 [rows of like, n]: each row's bias; zeros in rows of no expert here."""
    index = expert_of_rows(groups, like.shape[0], bias.shape[0])
    return jnp.take(bias.astype(jnp.float32), index, axis=0, mode="fill", fill_value=0)


def _spread_fwd(bias: jax.Array, like: jax.Array, groups: fp8.Groups) -> tuple[jax.Array, Any]:
    return spread_bias(bias, like, groups), (jnp.zeros((bias.shape[0], 0), bias.dtype), like, groups)


def _spread_bwd(kept: Any, given: jax.Array) -> tuple[jax.Array, None, None]:
    bias, _, groups = kept
    sums = k_grouped_bf16_gemm_tn_contiguous(
        jnp.ones((given.shape[0], ONES), jnp.bfloat16),
        given.astype(jnp.bfloat16),
        groups.sizes,
        num_groups=bias.shape[0],
        group_offset=groups.offset,
    )
    return sums[:, 0].astype(bias.dtype), None, None


spread_bias.defvjp(_spread_fwd, _spread_bwd)


def with_bias(
    x: jax.Array, bias: jax.Array | None, groups: fp8.Groups, row_weights: jax.Array | None = None
) -> jax.Array:
    """x plus the bias of each row, times the row's weight, rounded once."""
    if bias is None:
        return x
    rows = spread_bias(bias, x[:, :0], groups)
    if row_weights is not None:
        rows = rows * row_weights[:, None]
    return (x.astype(jnp.float32) + rows).astype(x.dtype)


def bias_gradient(
    dh: fp8.AlongRows, groups: fp8.Groups, rows: int, experts: int, gemms: fp8.LayerOptions, dtype: Any
) -> jax.Array:
    """[experts, n]: the sums over each expert's rows of dh, quantised along rows."""
    ones = fp8.AlongRows(
        jnp.ones((ONES, dh.values.shape[1]), dh.values.dtype),
        jnp.ones((dh.scales.shape[0], ONES), jnp.float32),
    )
    options = dataclasses.replace(gemms, weight_layout="kn")
    return fp8.k_grouped(dh, ones, groups, rows, experts, options, np.float32)[:, 0].astype(dtype)


def of_tokens(ids: jax.Array, weights: jax.Array | None, bias: jax.Array) -> jax.Array:
    """float32 [t, h]: the sum over each token's experts of weight * bias.

    A product of [t, e], in which each token has its weights, and the biases: small beside the experts'
    products, and without a pass over the rows of all copies.
    """
    each = jax.nn.one_hot(ids, bias.shape[0], dtype=jnp.float32)
    share = each.sum(axis=1) if weights is None else jnp.sum(each * weights[..., None], axis=1)
    return _product(share, bias.astype(jnp.float32))


@jax.custom_vjp
def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return products.dot_general(a, b, ((1,), (0,)))


def _product_fwd(a: jax.Array, b: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _product(a, b), (a, b)


def _product_bwd(kept: tuple[jax.Array, jax.Array], given: jax.Array) -> tuple[jax.Array, jax.Array]:
    a, b = kept
    return products.dot_general(given, b, ((1,), (1,))), products.dot_general(a, given, ((0,), (0,)))


_product.defvjp(_product_fwd, _product_bwd)
