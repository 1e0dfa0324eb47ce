"""Activations with quantisation as ops. Rows are cut freely; features of the result follow what is asked of
it, while h = gate | up stays whole along them. With row blocks everything is whole on each device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_deepgemm.core.declaration import Dims
from jax_deepgemm.core.family import LazyKernel
from jax_deepgemm.core.sharding import ShardingPlan, pieces_of_whole
from jax_deepgemm.ops.quantize import reference as quantization
from jax_deepgemm.ops.quantize.activation import SILU, Activation
from jax_deepgemm.ops.quantize.fused import (
    both_blocks,
    both_rule,
    both_shapes,
    both_shared,
    own_limit,
    shares_blocks,
    with_every_level,
)
from jax_deepgemm.ops.quantize.groups import groups_rule, groups_shapes, quantized_groups
from jax_deepgemm.ops.quantize.op import HINT, BlockOp
from jax_deepgemm.ops.swiglu import reference


@functools.cache
def swiglu_op(
    dtype: np.dtype,
    scale_format: str,
    transposed: bool,
    weighted: bool,
    limited: bool,
    activation: Activation = SILU,
) -> BlockOp:
    """(h[, weight][, rows]) -> [values, scales][values_t, scales_t]."""

    def spread(h: jax.Array, *rest: jax.Array) -> tuple[jax.Array, Any, Any]:
        given = iter(rest)
        return h, next(given) if weighted else None, next(given) if limited else None

    def plain(*arrays: jax.Array) -> list[jax.Array]:
        act = reference.act(*spread(*arrays), activation)
        return _quantized(act, dtype, scale_format, transposed)

    def on_shard(plan: ShardingPlan, local: Callable[..., Any], *arrays: jax.Array) -> Any:
        h, *rest = arrays
        if plan.cut("c"):
            mine = [_columns(half, plan, "c") for half in reference.halves(h, activation)]
            h = reference.joined(mine, activation)
        arrays = (h, *rest[: len(rest) - limited], *own_limit(plan, rest[len(rest) - limited :]))
        if not shares_blocks(plan, "rc", transposed):
            return arrays, None
        act = reference.act(*spread(*with_every_level(plan, arrays)), activation)
        return None, both_shared(plan, "rc", act, dtype, scale_format, transposed)

    operands = ["r f", *(["r"] if weighted else []), *(["one"] if limited else [])]
    return BlockOp(
        _name("swiglu_quantize", activation, dtype, scale_format, t=transposed, w=weighted, rows=limited),
        f"{', '.join(operands)} -> {both_rule('c', transposed)}",
        lambda h, *_: both_shapes(h[0], h[1] // activation.halves, dtype, transposed),
        plain,
        blocks=both_blocks("c", transposed),
        spmd=on_shard,
        kernel=_kernel("swiglu", weighted, scale_format, transposed, activation),
        grad_hint=HINT,
    )


@functools.cache
def swiglu_grad_op(
    dtype: np.dtype,
    scale_format: str,
    transposed: bool,
    weighted: bool,
    limited: bool,
    activation: Activation = SILU,
) -> BlockOp:
    """(h[, weight], dact[, rows]) -> [values, scales][values_t, scales_t][dweight], the first ones of dh."""

    def spread(h: jax.Array, *rest: jax.Array) -> tuple[jax.Array, Any, jax.Array, Any]:
        given = iter(rest)
        weight = next(given) if weighted else None
        return h, weight, next(given), next(given) if limited else None

    def plain(*arrays: jax.Array) -> list[jax.Array]:
        dh, dweight = reference.grad(*spread(*arrays), activation)
        return [*_quantized(dh, dtype, scale_format, transposed), *([dweight] if weighted else [])]

    def on_shard(plan: ShardingPlan, local: Callable[..., Any], *arrays: jax.Array) -> Any:
        count = len(arrays) - limited
        arrays = (*arrays[:count], *own_limit(plan, arrays[count:]))
        if not shares_blocks(plan, "rg", transposed) and not plan.cut("g"):
            return arrays, None
        dh, dweight = reference.grad(*spread(*with_every_level(plan, arrays)), activation)
        if plan.cut("g"):
            dh = _columns(dh, plan, "g")
        quantized = both_shared(plan, "rg", dh, dtype, scale_format, transposed)
        return None, [*quantized, *([dweight] if weighted else [])]

    def result(h: Dims, *_: Dims) -> list[Any]:
        dweight = [((h[0],), np.dtype(np.float32))] if weighted else []
        return [*both_shapes(h[0], h[1], dtype, transposed), *dweight]

    operands = ["r f", *(["r"] if weighted else []), "r c", *(["one"] if limited else [])]
    return BlockOp(
        _name(
            "swiglu_grad_quantize", activation, dtype, scale_format, t=transposed, w=weighted, rows=limited
        ),
        f"{', '.join(operands)} -> {both_rule('g', transposed)}{', r' if weighted else ''}",
        result,
        plain,
        blocks=both_blocks("g", transposed),
        spmd=on_shard,
        kernel=_kernel("swiglu_grad", weighted, scale_format, transposed, activation),
        grad_hint=HINT,
    )


@functools.cache
def swiglu_groups_op(
    dtype: np.dtype, scale_format: str, weighted: bool, activation: Activation = SILU, square: bool = False
) -> BlockOp:
    """(h[, weight], blocks) -> [values, scales, values_t, scales_t], by row blocks."""

    def plain(h: jax.Array, *rest: jax.Array) -> list[jax.Array]:
        *weight, blocks = rest
        act = reference.act(h, weight[0] if weighted else None, None, activation)
        return quantized_groups(act, blocks, dtype, scale_format, square)

    return BlockOp(
        _name("swiglu_quantize_groups", activation, dtype, scale_format, w=weighted, square=square),
        f"t f{', t' if weighted else ''}, n four -> {groups_rule(square)}",
        lambda h, *rest: groups_shapes(h[0], h[1] // activation.halves, rest[-1][0], dtype, square),
        plain,
        spmd=pieces_of_whole(*_GROUPS_DIMENSIONS),
        kernel=_kernel("swiglu", weighted, scale_format, True, activation, blocked=True, square_t=square),
        grad_hint=HINT,
    )


@functools.cache
def swiglu_grad_groups_op(
    dtype: np.dtype, scale_format: str, weighted: bool, activation: Activation = SILU, square: bool = False
) -> BlockOp:
    """(h[, weight], dact, blocks) -> [values, scales, values_t, scales_t][dweight], the first ones of dh."""

    def plain(h: jax.Array, *rest: jax.Array) -> list[jax.Array]:
        *weight, dact, blocks = rest
        counted = jnp.sum(blocks[:, 2], dtype=jnp.int32)[None]
        dh, dweight = reference.grad(h, weight[0] if weighted else None, dact, counted, activation)
        quantized = quantized_groups(dh, blocks, dtype, scale_format, square)
        return [*quantized, *([dweight] if weighted else [])]

    def result(h: Dims, *rest: Dims) -> list[Any]:
        dweight = [((h[0],), np.dtype(np.float32))] if weighted else []
        return [*groups_shapes(h[0], h[1], rest[-1][0], dtype, square), *dweight]

    return BlockOp(
        _name("swiglu_grad_quantize_groups", activation, dtype, scale_format, w=weighted, square=square),
        f"t f{', t' if weighted else ''}, t i, n four -> {groups_rule(square)}{', r' if weighted else ''}",
        result,
        plain,
        spmd=pieces_of_whole(*_GROUPS_DIMENSIONS),
        kernel=_kernel(
            "swiglu_grad", weighted, scale_format, True, activation, blocked=True, square_t=square
        ),
        grad_hint=HINT,
    )


_GROUPS_DIMENSIONS = ("r", "c", "c_blocks", "p", "b")


def _kernel(
    name: str,
    weighted: bool,
    scale_format: str,
    transposed: bool,
    activation: Activation,
    blocked: bool = False,
    square_t: bool = False,
) -> LazyKernel:
    form: dict[str, Any] = {
        "scale_format": scale_format,
        "transposed": transposed,
        "activation": activation,
        "square_t": square_t,
    }
    name += "_weighted" * weighted + "_blocked" * blocked
    return LazyKernel("jax_deepgemm.ops.swiglu.kernel", name, batched=not blocked, **form)


def _name(stem: str, activation: Activation, dtype: np.dtype, scale_format: str, **flags: bool) -> str:
    parts = [stem, *([activation.tag] if activation.tag else []), dtype.name, scale_format]
    return "_".join([*parts, *(name for name, on in flags.items() if on)])


def _quantized(x: jax.Array, dtype: np.dtype, scale_format: str, transposed: bool) -> list[jax.Array]:
    if transposed:
        return quantization.quantize_both(x, dtype=dtype, scale_format=scale_format)
    return quantization.quantize_float32(x, block=(1, 128), dtype=dtype, scale_format=scale_format)


def _columns(x: jax.Array, plan: ShardingPlan, name: str) -> jax.Array:
    """This device's columns of a whole x."""
    return lax.dynamic_slice_in_dim(x, plan.offset(name), plan.local_size(name), axis=-1)
