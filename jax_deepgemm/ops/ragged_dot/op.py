"""Ragged products of dtypes that have no kernel here: what jax.lax.ragged_dot_general computes, as ops.

    nn   lhs [m, k], rhs [g, k, n]  -> [m, n]       rows are grouped
    nt   lhs [m, k], rhs [g, n, k]  -> [m, n]
    tn   lhs [k, m], rhs [k, n]     -> [g, m, n]    the contraction is grouped

JAX's own primitive maps only operands that all have the batch in front (and only one level of it), has no
gradient where the contraction is ragged, and no group offset. As ops they have all of it, and shardings of
the groups.

Operands after lhs and rhs: group_sizes int32 [s] of all groups, >= 0, and the indices of the groups that rhs
(or the result) holds, int32 [g], consecutive.
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

from jax_deepgemm.core import products
from jax_deepgemm.core.dtypes import wider
from jax_deepgemm.core.op import Op
from jax_deepgemm.core.sharding import Batch, ShardingPlan
from jax_deepgemm.ops.gemm.checks import BFLOAT16, OUT_DTYPES
from jax_deepgemm.ops.grouped import segments

Params = dict[str, Any]

FORMS = {
    "nn": lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), (0,), (0,)),
    "nt": lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), (0,), (0,)),
    "tn": lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ()),
}
BATCHED = {
    "nn": lax.RaggedDotDimensionNumbers((((2,), (2,)), ((0,), (0,))), (1,), (1,)),
    "nt": lax.RaggedDotDimensionNumbers((((2,), (3,)), ((0,), (0,))), (1,), (1,)),
    "tn": lax.RaggedDotDimensionNumbers((((1,), (1,)), ((0,), (0,))), (1,), ()),
}
"""The same with a batch in front of every operand; of the result of "tn", behind the groups."""

DENSE: dict[str, tuple[tuple[products.Dims, products.Dims], tuple[products.Dims, products.Dims]]] = {
    "nn": (((2, 0), (1, 0)), ((), ())),
    "nt": (((2, 0), (2, 0)), ((), ())),
    "tn": (((1,), (1,)), ((0,), (0,))),
}
"""(contracting, batch dimensions) where lhs, and for "tn" rhs, has the groups in front."""


_KERNEL_ALGORITHMS = (lax.DotAlgorithmPreset.BF16_BF16_F32, lax.DotAlgorithmPreset.DEFAULT)


def algorithm(precision: Any) -> lax.DotAlgorithm | lax.DotAlgorithmPreset | None:
    """The dot algorithm that a precision names; None of a Precision."""
    if isinstance(precision, str):
        return lax.DotAlgorithmPreset.__members__.get(precision)
    return precision if isinstance(precision, (lax.DotAlgorithm, lax.DotAlgorithmPreset)) else None


def is_kernels(asked: lax.DotAlgorithm | lax.DotAlgorithmPreset) -> bool:
    """Whether the kernels compute by this algorithm: products of bfloat16, summed in float32."""
    if isinstance(asked, lax.DotAlgorithmPreset):
        return asked in _KERNEL_ALGORITHMS
    types = (asked.lhs_precision_type, asked.rhs_precision_type, asked.accumulation_type)
    counts = (asked.lhs_component_count, asked.rhs_component_count, asked.num_primitive_operations)
    multiplied = tuple(np.dtype(one) for one in types)
    return multiplied == (BFLOAT16, BFLOAT16, np.dtype(np.float32)) and counts == (1, 1, 1)


def why_no_kernel(lhs: Any, rhs: Any, out: Any, precision: Any) -> str:
    """Why the grouped kernels cannot multiply these dtypes, and the way out; "" if they can."""
    lhs, rhs, out = map(np.dtype, (lhs, rhs, out))
    asked = algorithm(precision)
    if asked is not None and not is_kernels(asked):
        return (
            f"the kernels multiply bfloat16 and sum in float32, and precision asks for {asked}. Leave it "
            "out, or say precision='BF16_BF16_F32'."
        )
    if not lhs == rhs == BFLOAT16:
        return (
            f"the kernels take bfloat16 operands, not {lhs.name} and {rhs.name}. Convert both, "
            ".astype(jnp.bfloat16); of float32, precision='BF16_BF16_F32' does it."
        )
    if out not in OUT_DTYPES:
        return (
            f"the kernels write bfloat16 or float32, not {out.name}. Ask for "
            "preferred_element_type=jnp.float32, and convert the result."
        )
    return ""


def _on_xla(avals: Any, *, layout: str, out_dtype: Any, precision: Any, **_: Any) -> str:
    """What is said where XLA runs the product on a GPU."""
    lhs, rhs = avals[:2]
    operands = " x ".join(f"{x.dtype.name}{list(x.shape)}" for x in (lhs, rhs))
    return (
        f"ragged_dot ({layout}) of {operands} runs on XLA, which is slow on a GPU: "
        f"{why_no_kernel(lhs.dtype, rhs.dtype, out_dtype, precision)}"
    )


class _RaggedOp(Op):
    """An op whose vmap levels become a batch dimension of JAX's primitive, which itself maps little."""

    def run_reference(self, *arrays: jax.Array, batch: Batch, **params: Any) -> list[jax.Array]:
        if not batch:
            return super().run_reference(*arrays, batch=batch, **params)
        levels, whole = _one_level(arrays, batch)
        return [x.reshape((*levels, *x.shape[1:])) for x in _reference(*whole, **params)]


def _one_level(arrays: tuple[jax.Array, ...], batch: Batch) -> tuple[list[int], list[jax.Array]]:
    """Sizes of the levels, and all arrays with the levels as one dimension."""
    counts = [sum(on[i] for on in batch) for i in range(len(arrays))]
    levels = [
        next(x.shape[sum(on[i] for on in batch[:level])] for i, x in enumerate(arrays) if carried[i])
        for level, carried in enumerate(batch)
    ]
    whole = []
    for i, x in enumerate(arrays):
        missing = [level for level, on in enumerate(batch) if not on[i]]
        x = jnp.broadcast_to(jnp.expand_dims(x, missing), (*levels, *x.shape[counts[i] :]))
        whole.append(x.reshape((math.prod(levels), *x.shape[len(levels) :])))
    return levels, whole


def _reference(
    lhs: jax.Array,
    rhs: jax.Array,
    sizes: jax.Array,
    groups: jax.Array,
    *,
    layout: str,
    out_dtype: Any,
    precision: Any,
    **_: Any,
) -> list[jax.Array]:
    """The product, with at most one batch dimension in front of all operands."""
    batched = sizes.ndim > 1
    map_each = jax.vmap if batched else lambda function: function

    def product(*arrays: jax.Array) -> jax.Array:
        options = {"layout": layout, "out_dtype": out_dtype, "precision": precision}
        native = functools.partial(_native, batched=batched, **options)
        dense = map_each(functools.partial(_dense, **options))
        return lax.platform_dependent(*arrays, default=dense, cuda=native, rocm=native, tpu=native)

    if sizes.shape == groups.shape:
        return [product(lhs, rhs, sizes)]
    # The groups' rows are brought to the front; what was in front of them comes last, in no group.
    first, own = map_each(functools.partial(_window, lhs.shape[-2]))(sizes, groups)
    roll = map_each(functools.partial(jnp.roll, axis=0))
    lhs = roll(lhs, -first)
    if layout == "tn":
        return [product(lhs, roll(rhs, -first), own)]
    return [roll(product(lhs, rhs, own), first)]


def _native(
    lhs: jax.Array,
    rhs: jax.Array,
    sizes: jax.Array,
    *,
    batched: bool,
    layout: str,
    out_dtype: Any,
    precision: Any,
) -> jax.Array:
    """By JAX's own primitive, for which some platforms have code."""
    numbers = (BATCHED if batched else FORMS)[layout]
    out = lax.ragged_dot_general(
        lhs, rhs, sizes, numbers, precision=precision, preferred_element_type=out_dtype
    )
    return jnp.moveaxis(out, 0, 1) if batched and layout == "tn" else out


def _dense(
    lhs: jax.Array, rhs: jax.Array, sizes: jax.Array, *, layout: str, out_dtype: Any, precision: Any
) -> jax.Array:
    """One product over copies of the rows for each group, as JAX expands its primitive elsewhere."""
    ends = jnp.cumsum(sizes, dtype=sizes.dtype)[:, None]
    row = lax.broadcasted_iota(sizes.dtype, (sizes.shape[0], lhs.shape[0]), 1)
    mine = ((ends - sizes[:, None] <= row) & (row < ends))[..., None]
    left, right = _masked(mine, lhs), _masked(mine, rhs) if layout == "tn" else rhs
    contracts, batch = DENSE[layout]
    return products.dot_general(left, right, contracts, batch, precision=precision, out_dtype=out_dtype)


def _masked(mine: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.where(mine, x[None], jnp.zeros((), x.dtype))


def _window(rows: int, sizes: jax.Array, groups: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First row of the given groups, and their sizes."""
    everywhere = segments.read(sizes, "sizes", rows)
    starts, ends, _ = segments.take_groups(everywhere, groups[:1], groups.shape[0])
    return starts[0], ends - starts


def _my_rows(plan: ShardingPlan, rows: str, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    lhs, rhs, sizes, groups = arrays
    if plan.cut(rows):
        sizes = segments.window(sizes, "sizes", plan.size[rows], plan.offset(rows), plan.local_size(rows))
    return lhs, rhs, sizes, groups


def _jvp(primals: list[Any], tangents: list[Any], *, layout: str, **params: Any) -> list[jax.Array]:
    lhs, rhs, *groups = primals
    dlhs, drhs, *_ = tangents
    run = functools.partial(RAGGED_DOT[layout], layout=layout, **params)
    terms = [] if dlhs is None else run(dlhs, rhs, *groups)
    terms += [] if drhs is None else run(lhs, drhs, *groups)
    return [functools.reduce(jnp.add, terms)]


COTANGENTS: dict[tuple[str, int], tuple[str, bool]] = {
    ("nn", 0): ("nt", True),  # [m, n] x [g, k, n]
    ("nt", 0): ("nn", True),  # [m, n] x [g, n, k]
    ("nn", 1): ("tn", False),  # [m, k] x [m, n] -> [g, k, n]
    ("nt", 1): ("tn", True),  # [m, n] x [m, k] -> [g, n, k]
    ("tn", 0): ("nt", False),  # [k, n] x [g, m, n] -> [k, m]
    ("tn", 1): ("nn", False),  # [k, m] x [g, m, n] -> [k, n]
}
"""(layout, operand) -> layout of its cotangent, and whether the result's cotangent is its first operand."""


def _transpose(
    index: int, cotangents: list[jax.Array], values: list[Any], *, layout: str, **params: Any
) -> jax.Array:
    (dd,) = cotangents
    wanted, other = values[index], values[1 - index]
    how, dd_first = COTANGENTS[layout, index]
    params |= {"out_dtype": wider(dd.dtype, other.dtype), "out_sharding": wanted.out_sharding}
    params.pop("reduce_dtype", None)
    pair = (dd, other) if dd_first else (other, dd)
    return RAGGED_DOT[how](*pair, *values[2:], layout=how, **params)[0].astype(wanted.dtype)


def _rows_result(layout: str) -> Callable[..., list[Any]]:
    n = 2 if layout == "nn" else 1
    return lambda lhs, rhs, sizes, groups, *, out_dtype, **_: [((lhs[0], rhs[n]), out_dtype)]


def _op(layout: str, rule: str, rows: str, reduces: tuple[str, ...], result: Callable[..., list[Any]]) -> Op:
    return _RaggedOp(
        f"ragged_dot_{layout}",
        rule,
        result,
        _reference,
        reduces=reduces,
        recut=lambda plan, *arrays, **_: (_my_rows(plan, rows, *arrays), {}),
        without_kernel=_on_xla,
        jvp=_jvp,
        transpose=_transpose,
    )


RAGGED_DOT = {
    "nn": _op("nn", "m k, g k n, s, g -> m n", "m", ("k", "g"), _rows_result("nn")),
    "nt": _op("nt", "m k, g n k, s, g -> m n", "m", ("k", "g"), _rows_result("nt")),
    "tn": _op(
        "tn",
        "k m, k n, s, g -> g m n",
        "k",
        ("k",),
        lambda lhs, rhs, sizes, groups, *, out_dtype, **_: [((groups[0], lhs[1], rhs[1]), out_dtype)],
    ),
}
