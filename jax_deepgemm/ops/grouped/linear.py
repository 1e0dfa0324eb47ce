"""A linear layer with one weight per group of rows, forward and backward in FP8 (or BF16).

In FP8, kept for the backward pass: x quantised along its rows and transposed, as the weight gradient wants it
(1 byte per element), and the transposed FP8 weight, as the input gradient wants it. x itself is not kept.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from jax_deepgemm.core.arrays import unwrapped
from jax_deepgemm.core.derivatives import same_varying_axes
from jax_deepgemm.core.first_order import ReverseOnly
from jax_deepgemm.ops.gemm.checks import (
    BLOCKED,
    OUT_DTYPES,
    PER_ROW,
    Side,
    check_options,
    check_weight_gradient,
    layer_weight,
)
from jax_deepgemm.ops.gemm.reference import SCALE_BLOCK
from jax_deepgemm.ops.grouped import recipe as fp8
from jax_deepgemm.ops.grouped.api import (
    m_grouped_bf16_gemm_nn_contiguous,
    m_grouped_bf16_gemm_nt_contiguous,
)
from jax_deepgemm.ops.grouped.checks import Rows
from jax_deepgemm.ops.grouped.recipe import Frozen
from jax_deepgemm.ops.quantize import Fp4Array, PreparedFp4, PreparedWeight, QuantizedArray, quantize
from jax_deepgemm.ops.quantize.api import SCALE_FORMATS
from jax_deepgemm.ops.quantize.per_channel import PerChannelArray, is_per_channel, products
from jax_deepgemm.ops.quantize.prepared import Bits, Copies, as_it_came, check_trained, master_and_copies
from jax_deepgemm.ops.quantize.prepared_fp4 import NO_FP8

GROUPED_OUT = "jdg_grouped_out"
"""checkpoint_name of the layer's result."""
GROUPED_ACT_FP8 = "jdg_grouped_act_fp8"
"""checkpoint_name of the FP8 activations kept for the weight gradient."""
GROUPED_WEIGHT_FP8 = "jdg_grouped_weight_fp8"
"""checkpoint_name of the FP8 weights kept for the input gradient."""


def in_bf16(w: Any) -> Any:
    """A weight for products in bfloat16, which take FP4 as it is."""
    return w if isinstance(w, PreparedFp4) else w.astype(jnp.bfloat16)


BF16_GEMMS = {"nk": m_grouped_bf16_gemm_nt_contiguous, "kn": m_grouped_bf16_gemm_nn_contiguous}
"""The product of rows with weights of each layout; its derivatives read and write the same layout."""

_WEIGHT = Side("w", "n", False, (BLOCKED, PER_ROW), ("g",))
_Like: TypeAlias = tuple[np.dtype[Any], PartitionSpec | None]
_Pair: TypeAlias = tuple[jax.Array, jax.Array]


@dataclass(frozen=True)
class _Layer:
    """What of one call is static."""

    out_dtype: np.dtype[Any]
    out_sharding: PartitionSpec | None
    gemms: fp8.LayerOptions
    num_groups: int
    k: int
    """Features of x."""
    x: _Like
    """dtype and, on Explicit axes, spec of x, for its gradient; likewise w."""
    w: _Like
    with_weight: bool


@overload
def grouped_linear(
    x: jax.Array,
    w: jax.Array | PreparedWeight | Frozen | PerChannelArray | tuple[jax.Array, jax.Array],
    group_sizes: jax.Array,
    *,
    recipe: str = ...,
    weight_layout: str = ...,
    scale_format: str = ...,
    weight_gradient: str = ...,
    group_offset: ArrayLike | None = ...,
    out_dtype: DTypeLike = ...,
    expected_m: int | None = ...,
    out_sharding: PartitionSpec | NamedSharding | None = ...,
    reduce_dtype: DTypeLike = ...,
    num_sms: int | None = ...,
    with_weight: Literal[False] = ...,
) -> jax.Array: ...


@overload
def grouped_linear(
    x: jax.Array,
    w: jax.Array | PreparedWeight | Frozen | PerChannelArray | tuple[jax.Array, jax.Array],
    group_sizes: jax.Array,
    *,
    recipe: str = ...,
    weight_layout: str = ...,
    scale_format: str = ...,
    weight_gradient: str = ...,
    group_offset: ArrayLike | None = ...,
    out_dtype: DTypeLike = ...,
    expected_m: int | None = ...,
    out_sharding: PartitionSpec | NamedSharding | None = ...,
    reduce_dtype: DTypeLike = ...,
    num_sms: int | None = ...,
    with_weight: Literal[True],
) -> tuple[jax.Array, Any]: ...


def grouped_linear(
    x: jax.Array,
    w: jax.Array | PreparedWeight | Frozen | PerChannelArray | tuple[jax.Array, jax.Array],
    group_sizes: jax.Array,
    *,
    recipe: str = "fp8",
    weight_layout: str = "nk",
    scale_format: str = "f32",
    weight_gradient: str = "1x128",
    group_offset: ArrayLike | None = None,
    out_dtype: DTypeLike = jnp.bfloat16,
    expected_m: int | None = None,
    out_sharding: PartitionSpec | NamedSharding | None = None,
    reduce_dtype: DTypeLike = jnp.float32,
    num_sms: int | None = None,
    with_weight: bool = False,
) -> Any:
    """y = x @ w[g].T for the rows of each group g, with gradients.

    >>> import jax, jax.numpy as jnp
    >>> from jax_deepgemm import grouped_linear
    >>> x = jax.random.normal(jax.random.key(0), (10, 256), jnp.bfloat16)
    >>> w = jax.random.normal(jax.random.key(1), (3, 512, 256), jnp.float32) / 16
    >>> sizes = jnp.array([4, 0, 5], jnp.int32)
    >>> y = grouped_linear(x, w, sizes)
    >>> y.shape, y.dtype.name, bool(jnp.any(y[9]))
    ((10, 512), 'bfloat16', False)
    >>> loss = lambda x, w: grouped_linear(x, w, sizes).astype(jnp.float32).sum()
    >>> dx, dw = jax.grad(loss, (0, 1))(x, w)
    >>> dx.dtype.name, dw.dtype.name, bool(jnp.any(dw[1]))
    ('bfloat16', 'float32', False)

    With "fp8" the forward and both backward GEMMs run in FP8, by the recipe of the DeepSeek-V3 report,
    section 3.3: x and dy with one scale per row and 128 features, w with one per 128x128 block; for dw, x and
    dy with one scale per feature and 128 rows (they begin with each group, see docs/limits.md), accumulated
    in float32. With "bf16" x and w are rounded to bfloat16, and derivatives of any order exist.

    Weights that several calls use, for microbatches or under `jax.checkpoint`, are quantised once by
    `prepare_weight`: a PreparedWeight as w gives the same bits, and the gradient goes to its master.

    A QuantizedArray as w is a frozen weight: only x has a gradient, for which its bytes are transposed. Keep
    it out of the differentiated arguments: FP8 leaves count as floating point in `jax.grad`. So is an FP4
    weight, a `PreparedFp4`, which the gradient of x expands at each call, to FP8 (`expand_fp4`) or bfloat16.

    Args:
      x: [m, k] bfloat16 or float32; the rows of group 0, then those of group 1, and so on.
      w: [g, n, k] bfloat16 or float32 master weights, or for "fp8" a PreparedWeight of them, or a
        QuantizedArray or (values, scales) tuple [g, n, k] of block (128, 128). Block (1, 128) works in the
        forward pass only. Or an FP4 weight, a PreparedFp4, of NVFP4 for "bf16". For that and weight_layout
        "kn" a PerChannelArray [g, k, n], which has no derivative.
      group_sizes: integer [g_all], g_all >= g. Any sizes; negative ones count as 0.
      recipe: "fp8" or "bf16".
      weight_layout: "nk", or "kn" for masters and prepared weights [g, k, n], with gradients [g, k, n]. No
        weight is transposed: BF16 products read either layout, and the pass that quantises for FP8 writes
        both. Frozen weights are [g, n, k].
      scale_format: with "fp8", of the scales of x, dy and masters: "f32", or "ue8m0" for powers of two.
      weight_gradient: with "fp8", elements that share a scale in x where dw is computed: "1x128", the recipe
        above, or "128x128", 128 rows of 128 features, which is faster (docs/fp8.md says what it costs). With
        weight_layout "kn" that is said of dy.
      group_offset: the group of w[0], for a part of the weights; int or int32 array, default 0. Rows of
        groups without a weight here are zero in y and in dx.
      out_dtype: dtype of y, bfloat16 or float32. dx and dw have the dtypes of x and w.
      expected_m: rows of a group to expect, for the choice of the kernel.
      out_sharding: y's sharding on a mesh with Explicit axes; needed there if k or g is cut.
      reduce_dtype: what devices exchange partial results in: float32, or out_dtype.
      num_sms: as in `fp8_gemm_nt`.
      with_weight: also return w, as it came. Where that is used in place of w from there on, the product of
        the weight gradient adds to the gradient of the later uses, in its buffer (with "bf16" XLA adds): see
        `accumulate_gradients`.

    Returns:
      [m, n] in out_dtype; or (that, w). Rows behind the last group are zero, and have a zero gradient.

    Raises:
      ValueError, TypeError: operands that do not fit; the message names both sides.
      TypeError: with "fp8", on forward-mode and on second derivatives.

    For `jax.checkpoint` policies y is named "jdg_grouped_out", the kept FP8 activations "jdg_grouped_act_fp8"
    and the kept FP8 weights "jdg_grouped_weight_fp8".
    """
    check_recipe("grouped_linear", recipe)
    x, group_sizes = unwrapped(x), unwrapped(group_sizes)
    if is_per_channel(w):
        options = check_options("grouped_linear", out_dtype, reduce_dtype, out_sharding, None, num_sms)
        _check_per_channel(w, recipe, weight_layout, with_weight)
        rows = Rows(group_sizes, None, None, None, group_offset)
        arguments = ("x", x.astype(jnp.bfloat16), "w", w, rows, expected_m, options)
        return checkpoint_name(products().contiguous("grouped_linear", *arguments), GROUPED_OUT)
    weight = layer_weight("grouped_linear", _WEIGHT, w)
    check_rows("grouped_linear", "x", x)
    check_weight("grouped_linear", "w", weight, recipe)
    check_form("grouped_linear", weight_layout, scale_format, weight_gradient, w=weight)
    if not covers(weight, weight_layout, x.shape[1]):
        stored = ", ".join(weight_layout)
        other = "kn" if weight_layout == "nk" else "nk"
        raise ValueError(
            f"grouped_linear: x is {list(x.shape)} and w is {list(weight.shape)}, need x [m, k] and "
            f"w [g, {stored}] with the same k. For weights stored [g, {', '.join(other)}] pass "
            f"weight_layout={other!r}."
        )
    check_sizes("grouped_linear", group_sizes, weight.shape[0])
    if with_weight:
        check_trained("grouped_linear", w=weight)
    options = check_options("grouped_linear", out_dtype, reduce_dtype, out_sharding, None, num_sms)
    if recipe == "bf16":
        y = BF16_GEMMS[weight_layout](
            x.astype(jnp.bfloat16),
            in_bf16(weight),
            group_sizes,
            group_offset=0 if group_offset is None else group_offset,
            expected_m=expected_m,
            out_dtype=options.out_dtype,
            out_sharding=options.out_sharding,
            reduce_dtype=options.reduce_dtype,
            num_sms=options.num_sms,
        )
        y = checkpoint_name(y, GROUPED_OUT)
        return (y, weight) if with_weight else y
    groups = fp8.Groups.of(group_sizes, group_offset)
    leaves, tree = jax.tree.flatten((x, weight, groups))
    x, weight, groups = jax.tree.unflatten(tree, same_varying_axes(leaves))
    layer = _Layer(
        out_dtype=options.out_dtype,
        out_sharding=options.out_sharding,
        gemms=fp8.LayerOptions(
            expected_m,
            options.num_sms,
            options.reduce_dtype,
            fp8.rows_are_whole(x),
            weight_layout,
            scale_format,
            weight_gradient,
        ),
        num_groups=weight.shape[0],
        k=x.shape[1],
        x=like(x),
        w=like(jax.tree.leaves(weight)[0]),
        with_weight=with_weight,
    )
    if isinstance(weight, Frozen):
        y = _frozen(layer, x, weight, groups)
    else:
        y = _trained(layer, x, *master_and_copies(weight), groups)
    if not with_weight:
        return checkpoint_name(y, GROUPED_OUT)
    y, master = y
    return checkpoint_name(y, GROUPED_OUT), as_it_came(weight, master)


def _check_per_channel(w: Any, recipe: str, weight_layout: str, with_weight: bool) -> None:
    """A frozen weight with a scale a channel, [g, k, n], for rows of bfloat16."""
    if recipe != "bf16" or weight_layout != "kn" or with_weight:
        raise ValueError(
            f"grouped_linear: w has a scale a channel, and recipe is {recipe!r}, weight_layout "
            f"{weight_layout!r}, with_weight {with_weight}; need recipe='bf16', weight_layout='kn' (it is "
            "stored [g, k, n]) and with_weight=False (it is frozen)."
        )


def like(x: jax.Array) -> _Like:
    """dtype of an argument, and its spec on Explicit axes: what its gradient has too."""
    sharding = jax.typeof(x).sharding
    return np.dtype(x.dtype), sharding.spec if sharding.mesh.explicit_axes else None


def check_recipe(where: str, recipe: Any) -> None:
    if recipe not in fp8.RECIPES:
        raise ValueError(f"{where}: recipe is {recipe!r}, need 'fp8' or 'bf16'.")


def check_rows(where: str, name: str, x: Any) -> None:
    """x is [rows, features] in bfloat16 or float32."""
    if (
        not hasattr(x, "dtype")
        or isinstance(x, PreparedWeight | QuantizedArray)
        or np.dtype(x.dtype) not in OUT_DTYPES
    ):
        given = np.dtype(x.dtype).name if hasattr(x, "dtype") else type(x).__name__
        raise TypeError(
            f"{where}: {name} is {given}, need a bfloat16 or float32 array: the layer quantises it. "
            "For operands that are quantised already use m_grouped_fp8_gemm_nt_contiguous."
        )
    if x.ndim != 2:
        raise ValueError(
            f"{where}: {name} is {list(x.shape)}, need 2 dimensions. Merge leading dimensions: "
            f"{name}.reshape(-1, {name}.shape[-1]), or use jax.vmap."
        )


def covers(w: Any, layout: str, k: int) -> bool:
    """Whether a weight has k; that of an FP4 weight is only known up to 127 zeros."""
    if isinstance(w, PreparedFp4):
        return bool(-(-k // SCALE_BLOCK) == w.slabs.shape[-2])
    return bool(w.shape[1 + layout.index("k")] == k)


def check_weight(where: str, name: str, w: Any, recipe: str) -> None:
    """w is [groups, n, k], a master weight, an FP4 one or, for "fp8", a prepared or frozen one."""
    if isinstance(w, PreparedWeight):
        w.check(where, name)
        if recipe == "bf16":
            raise ValueError(
                f"{where}: {name} is prepared for FP8 and recipe is 'bf16'. Use recipe='fp8', or pass the "
                f"master: {name}.master."
            )
    elif isinstance(w, PreparedFp4):
        w.check(where, name)
        if recipe == "fp8" and w.is_nvfp4:
            raise ValueError(
                f"{where}: {name} is NVFP4, {w!r}, and recipe is 'fp8'. {NO_FP8} Use recipe='bf16'."
            )
    elif isinstance(w, Fp4Array):
        raise TypeError(
            f"{where}: {name} is an Fp4Array {list(w.shape)}, need it prepared for the kernels, once: "
            f"jax_deepgemm.prepare_fp4({name})."
        )
    elif isinstance(w, QuantizedArray):
        w.check(where, name)
        if recipe == "bf16":
            raise ValueError(
                f"{where}: {name} is quantised and recipe is 'bf16'. Use recipe='fp8', or "
                f"dequantize({name}, jnp.bfloat16)."
            )
        if tuple(w.block) not in (BLOCKED, PER_ROW):
            raise ValueError(
                f"{where}: {name} has one scale per block {w.block}, need (128, 128), or (1, 128) without "
                f"gradients. Quantise it so: jax_deepgemm.quantize({name}, (128, 128))."
            )
    elif not hasattr(w, "dtype") or np.dtype(w.dtype) not in OUT_DTYPES:
        given = np.dtype(w.dtype).name if hasattr(w, "dtype") else type(w).__name__
        raise TypeError(
            f"{where}: {name} is {given}, need bfloat16 or float32 master weights, a PreparedWeight of them, "
            "or a QuantizedArray for frozen ones."
        )
    if w.ndim != 3:
        raise ValueError(f"{where}: {name} is {list(w.shape)}, need [groups, n, k].")


def check_form(
    where: str, weight_layout: Any, scale_format: Any, weight_gradient: Any, **weights: Any
) -> None:
    """Options that there are, and frozen weights as tensor cores read them."""
    if weight_layout not in fp8.WEIGHT_LAYOUTS:
        raise ValueError(
            f"{where}: weight_layout is {weight_layout!r}, need 'nk' for weights [g, n, k], or 'kn' for "
            "[g, k, n]."
        )
    if scale_format not in SCALE_FORMATS:
        raise ValueError(
            f"{where}: scale_format is {scale_format!r}, need 'f32', or 'ue8m0' for powers of two."
        )
    check_weight_gradient(where, weight_gradient)
    for name, w in weights.items():
        if weight_layout != "nk" and isinstance(w, PreparedFp4):
            raise ValueError(
                f"{where}: {name} is {w!r}, and weight_layout is 'kn'. FP4 weights are stored [g, n, k], "
                "their scales along k: need weight_layout='nk'."
            )
        if weight_layout != "nk" and isinstance(w, QuantizedArray):
            raise ValueError(
                f"{where}: {name} is quantised, and weight_layout is 'kn'. FP8 products read weights along "
                "k, so that frozen ones are stored [g, n, k]. Quantise the transposed weight once: "
                f"jax_deepgemm.quantize({name}.mT, (128, 128)), with weight_layout='nk'."
            )


def check_sizes(where: str, sizes: Any, groups: int) -> None:
    if not hasattr(sizes, "dtype") or not jnp.issubdtype(sizes.dtype, jnp.integer) or sizes.ndim != 1:
        given = f"{sizes.dtype} {list(sizes.shape)}" if hasattr(sizes, "dtype") else type(sizes).__name__
        raise ValueError(f"{where}: group_sizes are {given}, need an integer array [groups].")
    if sizes.shape[0] < groups:
        raise ValueError(
            f"{where}: group_sizes are [{sizes.shape[0]}] for {groups} weights, need at least one size per "
            "weight: the sizes of all groups, with group_offset for a part of the weights."
        )


def _forward(layer: _Layer, x: QuantizedArray, w: Frozen, groups: fp8.Groups) -> jax.Array:
    return fp8.m_grouped(x, w, groups, layer.gemms, layer.out_dtype, layer.out_sharding)


def _rows(layer: _Layer, x: jax.Array) -> QuantizedArray:
    return quantize(x, PER_ROW, scale_format=layer.gemms.scale_format)


def _input_gradient(layer: _Layer, dy: QuantizedArray, w_t: QuantizedArray, groups: fp8.Groups) -> jax.Array:
    dtype, spec = layer.x
    return fp8.m_grouped(dy, w_t, groups, layer.gemms, dtype, spec)


_first_order = functools.partial(ReverseOnly, "grouped_linear", fp8.HIGHER_ORDER)


@_first_order
def _trained(layer: _Layer, x: jax.Array, w: jax.Array, copies: Copies | None, groups: fp8.Groups) -> Any:
    """w: the masters, whose copies are made here if there are none."""
    weight = fp8.forward_weight(w if copies is None else PreparedWeight(w, copies), layer.gemms)
    y = _forward(layer, _rows(layer, x), weight, groups)
    return (y, w) if layer.with_weight else y


def _trained_fwd(
    layer: _Layer, x: jax.Array, w: jax.Array, copies: Copies | None, groups: fp8.Groups
) -> tuple[Any, tuple[_Pair, Bits, fp8.Groups]]:
    rows, along_rows = fp8.both(x, groups, layer.gemms, "x")
    weight, weight_t = fp8.both_weights(w, copies, layer.gemms, GROUPED_WEIGHT_FP8)
    act = fp8.keep(*along_rows, GROUPED_ACT_FP8)
    y = _forward(layer, rows, weight, groups)
    return (y, w) if layer.with_weight else y, (act, weight_t, groups)


def _trained_bwd(
    layer: _Layer, residuals: tuple[_Pair, Bits, fp8.Groups], cotangents: Any
) -> tuple[jax.Array, jax.Array, None, None]:
    dy, later = cotangents if layer.with_weight else (cotangents, None)
    act, weight_t, groups = residuals
    rows, along_rows = fp8.both(dy, groups, layer.gemms, "dy")
    dx = _input_gradient(layer, rows, weight_t.meant, groups)
    dtype, spec = layer.w
    x = fp8.AlongRows(*fp8.kept(act))
    dw = fp8.k_grouped(along_rows, x, groups, dy.shape[0], layer.num_groups, layer.gemms, dtype, spec, later)
    return dx, dw, None, None


_trained.defvjp(_trained_fwd, _trained_bwd)


@_first_order
def _frozen(layer: _Layer, x: jax.Array, w: Frozen, groups: fp8.Groups) -> jax.Array:
    return _forward(layer, _rows(layer, x), w, groups)


def _frozen_fwd(layer: _Layer, x: jax.Array, w: Frozen, groups: fp8.Groups) -> tuple[jax.Array, Any]:
    require_blocked("grouped_linear", w)
    y = _forward(layer, _rows(layer, x), w, groups)
    return y, (fp8.keep_frozen(w, GROUPED_WEIGHT_FP8), groups)


def _frozen_bwd(layer: _Layer, residuals: tuple[fp8.Kept, fp8.Groups], dy: jax.Array) -> tuple[Any, ...]:
    w, groups = residuals
    weight_t = fp8.frozen_transposed(w, layer.w[0], layer.k)
    return _input_gradient(layer, _rows(layer, dy), weight_t, groups), None, None


_frozen.defvjp(_frozen_fwd, _frozen_bwd)


def require_blocked(where: str, w: Frozen) -> None:
    """A frozen weight through which a gradient goes has square blocks."""
    if isinstance(w, QuantizedArray) and tuple(w.block) != BLOCKED:
        raise ValueError(
            f"{where}: the gradient of x needs w with one scale per block (128, 128), and this frozen weight "
            f"has block {w.block}: its scales run along k, and dx = dy @ w sums over n. Quantise it so: "
            "jax_deepgemm.quantize(w, (128, 128))."
        )
