"""Activations as ops that do not quantise, with derivatives of any order. Their h has gate and up in a
dimension of its own, so that rows and features are cut freely, and nothing is gathered.

act       h[, weight] -> act; its jvp is
tangent   h[, weight], their tangents -> that of act: jnp, as its own derivatives are. Its transpose is
grad      h[, weight], the gradient of act -> those of h[ and weight], a kernel as act is
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from jax_deepgemm.core.declaration import Dims
from jax_deepgemm.core.derivatives import same_varying_axes
from jax_deepgemm.core.family import LazyKernel
from jax_deepgemm.core.op import Op, mesh_of
from jax_deepgemm.core.sharding import ShardingPlan, as_spec, entries
from jax_deepgemm.ops.quantize.activation import Activation
from jax_deepgemm.ops.swiglu import reference

KERNELS = "jax_deepgemm.ops.swiglu.kernel"


def activate(h: jax.Array, weight: jax.Array | None, activation: Activation) -> jax.Array:
    """act [r, i] of h [r, 2 i] or [r, i], and of weight float32 [r] or None."""
    op = act_op(activation, np.dtype(h.dtype), weight is not None)
    arrays = [_apart(h, activation), *([] if weight is None else [weight])]
    return op(*same_varying_axes(arrays), fallback="reference")[0]


def _apart(h: jax.Array, activation: Activation) -> jax.Array:
    """h [r, halves, i], or interleaved [r, i, halves]; on Explicit axes cut as it was, along i."""
    rows, cols = h.shape
    parts = [activation.halves, cols // activation.halves]
    shape = (rows, *(reversed(parts) if activation.interleaved else parts))
    if not mesh_of([jax.typeof(h)]).explicit_axes:
        return h.reshape(shape)
    row, col = entries(jax.typeof(h).sharding.spec, 2)
    spec: PartitionSpec = as_spec([row, col, ()] if activation.interleaved else [row, (), col])
    return jnp.reshape(h, shape, out_sharding=spec)


def _together(h: jax.Array) -> jax.Array:
    return h.reshape(h.shape[0], math.prod(h.shape[1:]))


@functools.cache
def act_op(activation: Activation, dtype: np.dtype, weighted: bool) -> Op:
    """(h[, weight]) -> [act]"""

    def jvp(primals: list[Any], tangents: list[Any], **options: Any) -> Any:
        given = [jnp.zeros_like(x) if t is None else t for x, t in zip(primals, tangents, strict=True)]
        arrays = same_varying_axes([*primals, *given])
        return tangent_op(activation, dtype, weighted)(*arrays, **options)

    return Op(
        _name("swiglu", activation, dtype, weighted),
        f"{_operands(activation, weighted)} -> r c",
        functools.partial(_act_type, activation, dtype),
        _reference(activation, dtype),
        kernel=_kernel("plain_act", activation, weighted),
        jvp=jvp,
    )


@functools.cache
def tangent_op(activation: Activation, dtype: np.dtype, weighted: bool) -> Op:
    """(h[, weight], dh[, dweight]) -> [the tangent of act], linear in dh and dweight."""
    plain = _tangents_of(_reference(activation, dtype))

    def transposes(cotangents: list[jax.Array], operands: list[Any], **options: Any) -> list[jax.Array]:
        arrays = same_varying_axes([*operands[: len(operands) // 2], *cotangents])
        return grad_op(activation, dtype, weighted)(*arrays, **options)

    return Op(
        _name("swiglu_tangent", activation, dtype, weighted),
        ", ".join([_operands(activation, weighted)] * 2) + " -> r c",
        functools.partial(_act_type, activation, dtype),
        plain,
        jvp=_jnp_jvp(plain),
        transposes=transposes,
    )


@functools.cache
def grad_op(activation: Activation, dtype: np.dtype, weighted: bool) -> Op:
    """(h[, weight], dact) -> [dh[, dweight]]"""

    def plain(h: jax.Array, *rest: jax.Array) -> list[jax.Array]:
        *weight, dact = rest
        given = weight[0] if weighted else None
        dh, dweight = reference.grad(_together(h), given, dact, None, activation)
        return [dh.reshape(h.shape).astype(dtype), *([dweight] if weighted else [])]

    def result(h: Dims, *_: Dims) -> list[Any]:
        return [(h, dtype), *([((h[0],), np.dtype(np.float32))] if weighted else [])]

    def on_shard(plan: ShardingPlan, local: Callable[..., Any], *arrays: jax.Array) -> Any:
        if not (weighted and plan.cut("c")):
            return arrays, None
        dh, dweight = local(*arrays)
        return None, [dh, lax.psum(dweight, plan.axes["c"])]

    operands = _operands(activation, weighted)
    return Op(
        _name("swiglu_grad", activation, dtype, weighted),
        f"{operands}, r c -> {operands}",
        result,
        plain,
        spmd=on_shard,
        kernel=_kernel("plain_grad", activation, weighted),
        jvp=_jnp_jvp(plain),
    )


def _operands(activation: Activation, weighted: bool) -> str:
    """Dimensions of h and weight, which their gradients have too."""
    return f"r {'c s' if activation.interleaved else 's c'}" + (", r" if weighted else "")


def _act_type(activation: Activation, dtype: np.dtype, h: Dims, *_: Dims) -> list[tuple[Dims, np.dtype]]:
    return [((h[0], h[1 if activation.interleaved else 2]), dtype)]


def _reference(activation: Activation, dtype: np.dtype) -> Callable[..., list[jax.Array]]:
    def plain(h: jax.Array, weight: jax.Array | None = None) -> list[jax.Array]:
        return [reference.act(_together(h), weight, None, activation).astype(dtype)]

    return plain


def _tangents_of(function: Callable[..., list[jax.Array]]) -> Callable[..., list[jax.Array]]:
    """The first half of its operands are those of function, the other half their tangents."""

    def tangents(*arrays: jax.Array) -> list[jax.Array]:
        count = len(arrays) // 2
        return jax.jvp(function, arrays[:count], arrays[count:])[1]

    return tangents


def _jnp_jvp(function: Callable[..., list[jax.Array]]) -> Callable[..., Any]:
    """The jvp rule of an op that is this function of arrays."""

    def jvp(primals: list[Any], tangents: list[Any], **_: Any) -> Any:
        given = [jnp.zeros_like(x) if t is None else t for x, t in zip(primals, tangents, strict=True)]
        return _tangents_of(function)(*same_varying_axes([*primals, *given]))

    return jvp


def _kernel(name: str, activation: Activation, weighted: bool) -> LazyKernel:
    return LazyKernel(KERNELS, name + "_weighted" * weighted, batched=True, activation=activation)


def _name(stem: str, activation: Activation, dtype: np.dtype, weighted: bool) -> str:
    return "_".join([stem, *([activation.tag] if activation.tag else []), dtype.name, *["w"] * weighted])
