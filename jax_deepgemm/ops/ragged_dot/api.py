"""Drop-in replacements of jax.lax.ragged_dot and jax.lax.ragged_dot_general, on grouped GEMMs.

Every ragged product is brought to one of the forms that ops compute, under vmap for its other dimensions:

    nn   lhs [m, k], rhs [g, k, n]  -> [m, n]       rows are grouped
    nt   lhs [m, k], rhs [g, n, k]  -> [m, n]
    tn   lhs [k, m], rhs [k, n]     -> [g, m, n]    the contraction is grouped

An operand that is stored in another order is transposed in front, and a note is logged once per shape.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from jax_deepgemm.core.arrays import unwrapped
from jax_deepgemm.core.dtypes import wider
from jax_deepgemm.core.options import Sharding
from jax_deepgemm.core.sharding import Axes, as_spec, entries
from jax_deepgemm.log import note_once
from jax_deepgemm.ops.gemm.checks import BFLOAT16, FLOAT32, check_options
from jax_deepgemm.ops.gemm.config import GemmConfig
from jax_deepgemm.ops.grouped import op as ops
from jax_deepgemm.ops.grouped.checks import check_offset
from jax_deepgemm.ops.quantize.array import QuantizedLike
from jax_deepgemm.ops.quantize.per_channel import is_per_channel
from jax_deepgemm.ops.quantize.prepared_fp4 import PreparedFp4
from jax_deepgemm.ops.ragged_dot import op as ragged_ops
from jax_deepgemm.ops.ragged_dot.canonical import CanonicalForm, mode_of, plan_contraction, plan_rows
from jax_deepgemm.ops.ragged_dot.quantized import (
    as_array,
    is_quantized,
    per_channel_dot,
    quantized_dot,
    sizes_of_rows,
)

RHS_LAYOUTS = {
    "gkn": lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), (0,), (0,)),
    "gnk": lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), (0,), (0,)),
}


def ragged_dot(
    lhs: ArrayLike | QuantizedLike,
    rhs: ArrayLike | QuantizedLike | PreparedFp4,
    group_sizes: ArrayLike,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    group_offset: ArrayLike | None = None,
    out_sharding: Sharding = None,
    *,
    rhs_layout: str = "gkn",
    allow_transpose: bool = False,
    expected_m: int | None = None,
    config: GemmConfig | None = None,
    num_sms: int | None = None,
    reduce_dtype: DTypeLike | None = None,
) -> jax.Array:
    """Each group of rows times its own matrix: jax.lax.ragged_dot, on tensor cores without the expansion.

    d[i] = lhs[i] @ rhs[group of row i]; the first group_sizes[0] rows belong to group 0, and so on.

    >>> import jax, jax.numpy as jnp
    >>> from jax_deepgemm import ragged_dot
    >>> x = jnp.ones((5, 16), jnp.bfloat16)
    >>> w = jnp.stack([jnp.full((16, 2), g + 1, jnp.bfloat16) for g in range(3)])
    >>> ragged_dot(x, w, jnp.array([2, 0, 2]))[:, 0]
    Array([16, 16, 48, 48, 0], dtype=bfloat16)

    A device that holds the experts from the second on, `jax.vmap` over any operand, and gradients:

    >>> ragged_dot(x, w[1:], jnp.array([2, 0, 2]), group_offset=1)[:, 0]
    Array([0, 0, 48, 48, 0], dtype=bfloat16)
    >>> sizes = jnp.array([[5, 0, 0], [0, 1, 4]])
    >>> jax.vmap(ragged_dot, in_axes=(None, None, 0))(x, w, sizes)[:, :, 0]
    Array([[16, 16, 16, 16, 16],
           [32, 48, 48, 48, 48]], dtype=bfloat16)
    >>> jax.grad(lambda w: ragged_dot(x, w, sizes[1]).sum())(w)[:, 0, 0]
    Array([0, 1, 4], dtype=bfloat16)

    Args:
      lhs: [m, k], or a QuantizedArray of block (1, 128).
      rhs: [g, k, n] (see `rhs_layout`), or a QuantizedArray; or an FP4 weight, a `PreparedFp4` [g, n, k],
        with which an lhs that is not quantised is quantised here, one scale for 128 of a row; with NVFP4 lhs
        is bfloat16 and stays that.
      group_sizes: [g] integers. Rows after the last group give zeros, and what they hold is not read.
        Negative sizes count as zero; groups end with lhs.
      precision: as in jax.lax.ragged_dot; the kernels' products of bfloat16 are exact and summed in float32,
        whatever Precision is asked for. BF16_BF16_F32 is that too, and rounds float32 operands to bfloat16.
        Another DotAlgorithm is XLA's to run.
      preferred_element_type: the result's dtype; default that of jax.lax.ragged_dot, bfloat16 for quantised
        operands.
      group_offset: int32 scalar or [1]: rhs holds the groups [group_offset, group_offset + g) of a longer
        group_sizes, and rows of the others give zeros. (jax.lax.ragged_dot names it and refuses it.)
      out_sharding: the result's sharding on a mesh with Explicit axes; needed there if k or g is cut.
      rhs_layout: "gkn", or "gnk" for rhs stored [g, n, k]. Neither copies bfloat16.
      allow_transpose: for a quantised rhs stored "gkn": FP8 tensor cores read along k, so its bytes have to
        be transposed at each call.
      expected_m: about how many rows a group has, a hint for choosing tiles.
      config: a GemmConfig to use instead of the cost model's choice.
      num_sms: at most so many SMs of the GPU.
      reduce_dtype: what partial results are summed in across devices that cut k or g; default float32.

    Returns:
      [m, n] in preferred_element_type.

    Raises:
      TypeError, ValueError: as jax.lax.ragged_dot, and for options that do not fit.

    Source: jax.lax.ragged_dot.

    What runs: bfloat16 with a bfloat16 or float32 result, and quantised operands, run on the grouped kernels.
    Everything else (float16, float32, float64, integers, mixed dtypes, other results) is computed by
    jax.lax.ragged_dot_general on one device's operands: nothing is converted. That is slow on a GPU, so the
    log (level info) says why once, and `explain` shows it. Gradients are ragged products,
    so nothing is expanded for them either; the cotangent of a float32 result is rounded to bfloat16 for
    bfloat16 operands. Quantised operands have no derivative; `grouped_linear` has.
    """
    if rhs_layout not in RHS_LAYOUTS:
        raise ValueError(
            f"ragged_dot: rhs_layout is {rhs_layout!r}, need 'gkn' (rhs is [g, k, n]) or 'gnk' ([g, n, k])."
        )
    options: dict[str, Any] = {"expected_m": expected_m, "config": config, "num_sms": num_sms}
    lhs, rhs = unwrapped(lhs), unwrapped(rhs)
    if is_per_channel(rhs):
        default = jnp.bfloat16 if preferred_element_type is None else preferred_element_type
        types = default, jnp.float32 if reduce_dtype is None else reduce_dtype
        checked = check_options("ragged_dot", *types, out_sharding, config, num_sms, b=rhs)
        return per_channel_dot(lhs, rhs, group_sizes, rhs_layout, group_offset, expected_m, checked)
    if is_quantized(lhs) or is_quantized(rhs):
        return quantized_dot(
            lhs,
            rhs,
            group_sizes,
            rhs_layout,
            allow_transpose,
            out_dtype=jnp.bfloat16 if preferred_element_type is None else preferred_element_type,
            group_offset=group_offset,
            out_sharding=out_sharding,
            reduce_dtype=jnp.float32 if reduce_dtype is None else reduce_dtype,
            **options,
        )
    if allow_transpose:
        raise ValueError(
            "ragged_dot: allow_transpose is for a quantised rhs stored [g, k, n]; leave it out, other "
            "operands are never transposed here."
        )
    call = _Call("ragged_dot", precision, preferred_element_type, out_sharding, reduce_dtype, **options)
    return _ragged_dot(lhs, rhs, group_sizes, RHS_LAYOUTS[rhs_layout], group_offset, None, call)


def ragged_dot_general(
    lhs: ArrayLike,
    rhs: ArrayLike,
    group_sizes: ArrayLike,
    ragged_dot_dimension_numbers: lax.RaggedDotDimensionNumbers,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    group_offset: ArrayLike | None = None,
    out_sharding: Sharding = None,
    *,
    num_groups: int | None = None,
    expected_m: int | None = None,
    config: GemmConfig | None = None,
    num_sms: int | None = None,
    reduce_dtype: DTypeLike | None = None,
) -> jax.Array:
    """jax.lax.ragged_dot_general: any batch, row and contraction dimensions, one of them ragged.

    Which dimension of lhs is ragged tells what is computed:

        rows          [b.., m.., k..], [g, b.., k.., n..], [b.., x.., g] -> [b.., m.., n..]
        contraction   [b.., m.., k..], [b.., k.., n..],    [b.., x.., g] -> [g, b.., m.., n..]
        batch         [b.., m.., k..], [b.., k.., n..],    [x.., g]      -> [b.., m.., n..]

    x are the dimensions of that kind in front of the ragged one. group_sizes [g] hold for all of them. As in
    JAX, a ragged batch is a plain product: nothing is left out.

    >>> import jax, jax.numpy as jnp
    >>> from jax_deepgemm import ragged_dot_general
    >>> weight_gradient = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())
    >>> dy, x = jnp.ones((5, 2), jnp.bfloat16), jnp.ones((5, 3), jnp.bfloat16)
    >>> dw = ragged_dot_general(dy, x, jnp.array([1, 4]), weight_gradient, None, jnp.float32)
    >>> dw.shape, dw[:, 0, 0]
    ((2, 2, 3), Array([1., 4.], dtype=float32))

    Without a copy run, of bfloat16:

        ragged rows          lhs [b.., x.., r, y.., k..], rhs [b.., g, k.., n..] or [b.., g, n.., k..]
        ragged contraction   lhs [b.., x.., r, y.., m..], rhs [b.., x.., r, y.., n..]

    r is the ragged dimension. Other orders (a rhs [g, b, k, n] is one) are transposed in front, which a note
    in the log says once per shape. A ragged batch runs on XLA's dot_general.

    Args:
      lhs: array, with the dimensions of lhs as in the table above.
      rhs: array, with those of rhs as in the table above.
      group_sizes: integers [g], or with the leading dimensions above.
      ragged_dot_dimension_numbers: a jax.lax.RaggedDotDimensionNumbers.
      group_offset: int32 scalar or [1], of the first of the groups that rhs (ragged rows) or the result
        (ragged contraction) holds.
      num_groups: for a ragged contraction, groups of the result, from group_offset on; default all of
        group_sizes, needed with group_offset.
      precision, preferred_element_type, out_sharding, expected_m, config, num_sms, reduce_dtype: as in
        `ragged_dot`.

    Returns:
      Array of dimensions as in the table above, of the dtype that `ragged_dot` gives.

    Raises:
      TypeError, ValueError: as jax.lax.ragged_dot_general, and for options that do not fit.

    What runs, and its derivatives: as `ragged_dot`. All modes are differentiable. Source:
    jax.lax.ragged_dot_general.
    """
    call = _Call(
        "ragged_dot_general",
        precision,
        preferred_element_type,
        out_sharding,
        reduce_dtype,
        expected_m,
        config,
        num_sms,
    )
    return _ragged_dot(lhs, rhs, group_sizes, ragged_dot_dimension_numbers, group_offset, num_groups, call)


@dataclass(frozen=True)
class _Call:
    """The keyword arguments of one call, as given."""

    name: str
    precision: Any
    preferred_element_type: Any
    out_sharding: Any
    reduce_dtype: Any
    expected_m: int | None
    config: Any
    num_sms: int | None


# Checks


def _held_groups(
    name: str, mode: str, of_rhs: int, of_sizes: int, offset: Any, num_groups: int | None
) -> int:
    """How many groups rhs (ragged rows) or the result (ragged contraction) holds."""
    if mode == "batch" and offset is not None:
        raise ValueError(
            f"{name}: group_offset with a ragged batch dimension: no operand has a group dimension, and all "
            "of the batch counts. Leave it out."
        )
    if num_groups is not None and mode != "contraction":
        raise ValueError(
            f"{name}: num_groups={num_groups} is for a ragged contracting dimension, where the result has "
            f"the groups; here the ragged dimension is one of lhs's {mode}. Leave it out."
        )
    if mode == "contraction":
        return _groups_of_result(name, of_sizes, offset, num_groups)
    if mode == "rows" and of_rhs > of_sizes:
        raise ValueError(
            f"{name}: rhs holds {of_rhs} groups from group_offset on, but group_sizes has only {of_sizes}; "
            "need the sizes of all groups there are, also of those that rhs does not hold."
        )
    return of_rhs


def _groups_of_result(name: str, of_sizes: int, offset: Any, num_groups: int | None) -> int:
    if num_groups is None:
        if offset is not None:
            raise ValueError(
                f"{name}: group_offset without num_groups, and the ragged dimension is a contracting one: "
                "say how many groups from there on the result has, num_groups=..."
            )
        return of_sizes
    integer = isinstance(num_groups, int) and not isinstance(num_groups, bool)
    if not integer or not 0 <= num_groups <= of_sizes or (offset is None and num_groups != of_sizes):
        raise ValueError(
            f"{name}: num_groups is {num_groups!r} and group_sizes has {of_sizes} groups, need an int up to "
            "that (for some of the groups give group_offset too)."
        )
    return num_groups


def _result_type(
    call: _Call, lhs: Any, rhs: Any, sizes: Any, numbers: lax.RaggedDotDimensionNumbers, offset: Any
) -> jax.ShapeDtypeStruct:
    """Shape and dtype by JAX's own rules, or its error."""
    shape = tuple(sizes.shape)
    group = numbers.rhs_group_dimensions
    if offset is not None and shape and len(group) == 1 and 0 <= group[0] < rhs.ndim:
        shape = (*shape[:-1], rhs.shape[group[0]])
    product = functools.partial(
        lax.ragged_dot_general,
        ragged_dot_dimension_numbers=numbers,
        precision=call.precision,
        preferred_element_type=call.preferred_element_type,
    )
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
        return jax.eval_shape(
            product,
            jax.ShapeDtypeStruct(lhs.shape, lhs.dtype),
            jax.ShapeDtypeStruct(rhs.shape, rhs.dtype),
            jax.ShapeDtypeStruct(shape, sizes.dtype),
        )


def _one_precision(precision: Any) -> Any:
    """A pair of equal precisions as one: JAX has no pairs of algorithms."""
    pair = isinstance(precision, (tuple, list)) and len(precision) == 2
    return precision[0] if pair and precision[0] == precision[1] else precision


def _default_precision() -> Any:
    settings: Any = jax.config  # whose types do not name every setting before jax 0.11
    return settings.jax_default_matmul_precision


def _asks_for_bfloat16(precision: Any, lhs: jax.Array, rhs: jax.Array) -> bool:
    """Whether float32 operands are to be multiplied in bfloat16, as the kernels do, by the caller's word."""
    asked = ragged_ops.algorithm(_default_precision() if precision is None else precision)
    types = {lhs.dtype, rhs.dtype}
    if FLOAT32 not in types or not types <= {FLOAT32, BFLOAT16}:
        return False
    return asked not in (None, lax.DotAlgorithmPreset.DEFAULT) and ragged_ops.is_kernels(asked)


def _options(call: _Call, dtype: np.dtype[Any], on_kernels: bool) -> dict[str, Any]:
    """Static parameters of the op."""
    name = call.name
    reduce_dtype = jnp.float32 if call.reduce_dtype is None else call.reduce_dtype
    known = check_options(
        name,
        dtype if on_kernels else jnp.float32,
        reduce_dtype if on_kernels else jnp.float32,
        call.out_sharding,
        call.config,
        call.num_sms,
    )
    if on_kernels:
        return {**vars(known), "expected_m": call.expected_m}
    if call.config is not None:
        raise ValueError(
            f"{name}: config is given, but no kernel of this package runs these operands: the kernels take "
            "bfloat16 (not mixed), give bfloat16 or float32, and sum in float32. Leave config out, or "
            "convert the operands."
        )
    if not jnp.issubdtype(dtype, jnp.inexact):
        reduce_dtype = dtype
    precision = _default_precision() if call.precision is None else call.precision
    return {
        "out_dtype": dtype,
        "reduce_dtype": reduce_dtype,
        "out_sharding": known.out_sharding,
        "precision": tuple(precision) if isinstance(precision, list) else precision,
    }


# What runs


def _ragged_dot(
    lhs: Any,
    rhs: Any,
    group_sizes: Any,
    numbers: lax.RaggedDotDimensionNumbers,
    group_offset: Any,
    num_groups: int | None,
    call: _Call,
) -> jax.Array:
    if not isinstance(numbers, lax.RaggedDotDimensionNumbers):
        raise TypeError(
            f"{call.name}: ragged_dot_dimension_numbers is a {type(numbers).__name__}, need a "
            "jax.lax.RaggedDotDimensionNumbers."
        )
    operands = {"lhs": lhs, "rhs": rhs, "group_sizes": group_sizes}
    lhs, rhs, sizes = (as_array(call.name, what, x) for what, x in operands.items())
    call = dataclasses.replace(call, precision=_one_precision(call.precision))
    offset = None if group_offset is None else check_offset(call.name, group_offset)
    result = _result_type(call, lhs, rhs, sizes, numbers, offset)
    mode, all_groups = mode_of(numbers), sizes.shape[-1]
    held = rhs.shape[numbers.rhs_group_dimensions[0]] if mode == "rows" else all_groups
    count = _held_groups(call.name, mode, held, all_groups, offset, num_groups)
    if _asks_for_bfloat16(call.precision, lhs, rhs):
        lhs, rhs = lhs.astype(jnp.bfloat16), rhs.astype(jnp.bfloat16)
    on_kernels = not ragged_ops.why_no_kernel(lhs.dtype, rhs.dtype, result.dtype, call.precision)
    params = _options(call, result.dtype, on_kernels)
    if mode == "batch":
        return lax.dot_general(
            lhs,
            rhs,
            numbers.dot_dimension_numbers,
            precision=call.precision,
            preferred_element_type=call.preferred_element_type,
            out_sharding=call.out_sharding,
        )
    shape = result.shape if mode == "rows" else (count, *result.shape[1:])
    if 0 in (*lhs.shape, *rhs.shape, *shape):
        return _zeros(lhs, rhs, shape, result.dtype, params["out_sharding"])
    if mode == "rows":
        plan = plan_rows(numbers, lhs.ndim, rhs.ndim)
    else:
        plan = plan_contraction(numbers, lhs.ndim, rhs.ndim, sizes.ndim)
    product = _on_kernels if on_kernels else _on_xla
    return _run(call.name, plan, product, lhs, rhs, sizes, offset, count, shape, params)


def _run(
    name: str,
    plan: CanonicalForm,
    product: Callable[..., jax.Array],
    lhs: jax.Array,
    rhs: jax.Array,
    sizes: jax.Array,
    offset: jax.Array | None,
    count: int,
    shape: tuple[int, ...],
    params: dict[str, Any],
) -> jax.Array:
    dtype, asked = params["out_dtype"], params["out_sharding"]
    summed = plan.layout == "tn" and plan.shared > 0
    params = {**params, "out_sharding": plan.matrix_spec(asked, len(shape))}
    if summed and jnp.issubdtype(dtype, jnp.inexact):
        params |= {"out_dtype": wider(dtype), "reduce_dtype": None}
    lhs, rhs = _ordered(name, "lhs", lhs, plan.lhs), _ordered(name, "rhs", rhs, plan.rhs)
    lead, rhs_lead = plan.batch + plan.shared, plan.rhs_lead
    rows = lhs.shape[lead : lead + 1 + plan.inner]
    sizes = sizes_of_rows(sizes, rows)
    lhs, rhs, sizes = _cut_alike(plan, lhs, rhs, sizes)
    function = functools.partial(product, plan.layout, offset=offset, count=count, params=params)
    each = 0 if sizes.ndim > 1 else None
    for level in reversed(range(lead)):
        of_rhs = 0 if plan.layout == "tn" or level < plan.batch else None
        function = jax.vmap(function, (0, of_rhs, each))
    out = function(_matrices(lhs, lead, len(rows)), _matrices(rhs, rhs_lead, plan.rhs_rows), sizes)
    if summed:
        out = jnp.sum(out, axis=tuple(range(plan.batch, lead)), dtype=out.dtype).astype(dtype)
    if plan.layout == "tn":
        out = jnp.moveaxis(out, plan.batch, 0)
    return _placed(out.reshape(shape), asked)


def _on_kernels(
    layout: str,
    lhs: jax.Array,
    rhs: jax.Array,
    sizes: jax.Array,
    *,
    offset: jax.Array | None,
    count: int,
    params: dict[str, Any],
) -> jax.Array:
    first = np.zeros(1, np.int32) if offset is None else offset
    if layout == "tn":
        params = {name: value for name, value in params.items() if name != "expected_m"}
        return ops.K_GROUPED_BF16(lhs, rhs, sizes, first, rows_format="sizes", num_groups=count, **params)[0]
    return ops.M_GROUPED_BF16[layout](lhs, rhs, sizes, first, rows_format="sizes", **params)[0]


def _on_xla(
    layout: str,
    lhs: jax.Array,
    rhs: jax.Array,
    sizes: jax.Array,
    *,
    offset: jax.Array | None,
    count: int,
    params: dict[str, Any],
) -> jax.Array:
    groups = np.arange(count, dtype=np.int32)
    if offset is not None:
        groups = groups + offset
        sizes = jnp.pad(sizes, (0, 1))  # tells the op that `groups` are not just all groups
    return ragged_ops.RAGGED_DOT[layout](lhs, rhs, sizes, groups, layout=layout, **params)[0]


def _cut_alike(plan: CanonicalForm, *arrays: jax.Array) -> list[jax.Array]:
    """On Explicit axes, arrays that are mapped together are first cut together."""
    lead = plan.batch + plan.shared
    counts = (lead, lead if plan.layout == "tn" else plan.batch, lead if arrays[-1].ndim > 1 else 0)
    if not lead or not jax.typeof(arrays[0]).sharding.mesh.explicit_axes:
        return list(arrays)
    specs = [entries(jax.typeof(x).sharding.spec, x.ndim) for x in arrays]
    mapped = [spec[:count] for spec, count in zip(specs, counts, strict=True)]
    cuts = [next((cuts[i] for cuts in mapped if i < len(cuts) and cuts[i]), ()) for i in range(lead)]
    return [_recut(x, spec, cuts[:count]) for x, spec, count in zip(arrays, specs, counts, strict=True)]


def _recut(x: jax.Array, spec: list[Axes], cuts: list[Axes]) -> jax.Array:
    taken = {axis for cut in cuts for axis in cut}
    rest = [tuple(axis for axis in axes if axis not in taken) for axes in spec[len(cuts) :]]
    return jax.sharding.reshard(x, as_spec([*cuts, *rest]))


def _ordered(name: str, what: str, x: jax.Array, order: tuple[int, ...]) -> jax.Array:
    moved = [d for d in order if x.shape[d] != 1]
    if moved != sorted(moved):
        dims = ", ".join(map(str, order))
        note_once(
            f"{name}: {what} {list(x.shape)} is transposed ({dims}) at each call, which copies it. The "
            "docstring of ragged_dot_general says which orders of dimensions run as they are."
        )
    return jnp.transpose(x, order)


def _matrices(x: jax.Array, lead: int, rows: int) -> jax.Array:
    """[lead.., rows, columns]: the dimensions of rows and columns each as one."""
    shape = x.shape
    return x.reshape((*shape[:lead], math.prod(shape[lead : lead + rows]), math.prod(shape[lead + rows :])))


def _zeros(
    lhs: jax.Array, rhs: jax.Array, shape: tuple[int, ...], dtype: Any, spec: PartitionSpec | None
) -> jax.Array:
    """The result if a dimension is empty, varying over the operands' axes of a shard_map."""
    nothing = [jnp.sum(x[(slice(0, 0),) * x.ndim]).astype(dtype) for x in (lhs, rhs)]
    return _placed(jnp.broadcast_to(nothing[0] + nothing[1], shape), spec)


def _placed(x: jax.Array, spec: PartitionSpec | None) -> jax.Array:
    explicit = jax.typeof(x).sharding.mesh.explicit_axes
    return jax.sharding.reshard(x, spec) if spec is not None and explicit else x
