"""A linear layer whose forward and backward GEMMs run in FP8: the training recipe of DeepSeek-V3.

    y  = x @ w.T      x 1x128 along k,        w 128x128
    dx = dy @ w       dy 1x128 along n,       w 128x128, transposed bytes of the same copy
    dw = dy.T @ x     dy, x 1x128 along tokens, accumulated in float32; weight_gradient "128x128": x in blocks

Kept for the backward pass: x in FP8, quantised along tokens and transposed, as dw wants it (1 byte per
element instead of bfloat16's 2), and w in FP8, transposed as dx wants it. x itself is not kept. x, dy and w
are read once each for their two copies.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jax_deepgemm.core.arrays import unwrapped
from jax_deepgemm.core.derivatives import same_varying_axes
from jax_deepgemm.core.first_order import ReverseOnly
from jax_deepgemm.core.sharding import entries
from jax_deepgemm.ops.gemm.api import fp8_gemm_nt
from jax_deepgemm.ops.gemm.checks import (
    BLOCKED,
    FLOAT32,
    FP8_DTYPES,
    OUT_DTYPES,
    PER_ROW,
    Side,
    check_options,
    check_weight_gradient,
    dtype_option,
    layer_weight,
)
from jax_deepgemm.ops.gemm.config import GemmConfig
from jax_deepgemm.ops.gemm.reference import SCALE_BLOCK
from jax_deepgemm.ops.gemm.tokens import Tokens
from jax_deepgemm.ops.quantize import Fp4Array, PreparedFp4, QuantizedArray, expand_fp4, quantize
from jax_deepgemm.ops.quantize.fused import quantize_both
from jax_deepgemm.ops.quantize.prepared import (
    Bits,
    Copies,
    PreparedWeight,
    as_it_came,
    check_trained,
    master_and_copies,
)
from jax_deepgemm.ops.quantize.prepared_fp4 import NO_FP8

LINEAR_OUT = "jdg_linear_out"
"""checkpoint_name of the layer's result."""
ACT_FP8 = "jdg_act_fp8"
"""checkpoint_name of the FP8 activations kept for the weight gradient."""
WEIGHT_FP8 = "jdg_weight_fp8"
"""checkpoint_name of the FP8 weight kept for the input gradient."""

_WEIGHT = Side("w", "n", False, (BLOCKED, PER_ROW))
_Bytes: TypeAlias = tuple[jax.Array, jax.Array]
E4M3 = np.dtype(jnp.float8_e4m3fn)


@dataclass(frozen=True)
class _Recipe:
    """What of one call is static."""

    out_dtype: np.dtype[Any]
    grad_dtype: np.dtype[Any]
    scale_format: str
    weight_gradient: str
    reduce_dtype: np.dtype[Any]
    num_sms: int | None
    config: Any
    out_sharding: PartitionSpec | None
    x: tuple[np.dtype[Any], PartitionSpec | None]
    """dtype and, on Explicit axes, spec of x, for its gradient; likewise w."""
    w: tuple[np.dtype[Any], PartitionSpec | None]
    with_weight: bool
    features: int
    """k."""

    def quantize(self, x: jax.Array, block: tuple[int, int], dtype: Any = E4M3) -> QuantizedArray:
        return quantize(x, block, dtype, self.scale_format)

    @property
    def block_of_x(self) -> tuple[int, int]:
        """What shares a scale in x.T, of which dw is made."""
        return BLOCKED if self.weight_gradient == "128x128" else PER_ROW

    def quantize_both(
        self, x: jax.Array, block_t: tuple[int, int] = PER_ROW, dtype: Any = E4M3
    ) -> tuple[QuantizedArray, QuantizedArray]:
        """x, and x.T quantised along tokens in blocks of block_t, in one pass."""
        values, scales, values_t, scales_t = quantize_both(
            x, block_t=block_t[::-1], dtype=dtype, scale_format=self.scale_format
        )
        return QuantizedArray(values, scales, PER_ROW), QuantizedArray(values_t, scales_t.T, block_t)

    def gradient(
        self,
        a: QuantizedArray,
        b: QuantizedArray,
        like: tuple[np.dtype[Any], PartitionSpec | None],
        c: jax.Array | None = None,
    ) -> jax.Array:
        """C + A @ B.T as the gradient of an argument of this dtype and spec."""
        dtype, spec = like
        reduce = self.reduce_dtype if self.reduce_dtype == dtype else FLOAT32
        return fp8_gemm_nt(
            a, b, c, out_dtype=dtype, out_sharding=spec, reduce_dtype=reduce, num_sms=self.num_sms
        )


@overload
def fp8_linear(
    x: jax.Array,
    w: jax.Array | PreparedWeight | QuantizedArray | PreparedFp4 | tuple[jax.Array, jax.Array],
    *,
    out_dtype: DTypeLike = ...,
    grad_dtype: DTypeLike = ...,
    scale_format: str = ...,
    weight_gradient: str = ...,
    config: GemmConfig | None = ...,
    out_sharding: PartitionSpec | NamedSharding | None = ...,
    reduce_dtype: DTypeLike = ...,
    num_sms: int | None = ...,
    with_weight: Literal[False] = ...,
) -> jax.Array: ...


@overload
def fp8_linear(
    x: jax.Array,
    w: jax.Array | PreparedWeight | QuantizedArray | PreparedFp4 | tuple[jax.Array, jax.Array],
    *,
    out_dtype: DTypeLike = ...,
    grad_dtype: DTypeLike = ...,
    scale_format: str = ...,
    weight_gradient: str = ...,
    config: GemmConfig | None = ...,
    out_sharding: PartitionSpec | NamedSharding | None = ...,
    reduce_dtype: DTypeLike = ...,
    num_sms: int | None = ...,
    with_weight: Literal[True],
) -> tuple[jax.Array, Any]: ...


def fp8_linear(
    x: jax.Array,
    w: jax.Array | PreparedWeight | QuantizedArray | PreparedFp4 | tuple[jax.Array, jax.Array],
    *,
    out_dtype: DTypeLike = jnp.bfloat16,
    grad_dtype: DTypeLike = jnp.float8_e4m3fn,
    scale_format: str = "f32",
    weight_gradient: str = "1x128",
    config: GemmConfig | None = None,
    out_sharding: PartitionSpec | NamedSharding | None = None,
    reduce_dtype: DTypeLike = jnp.float32,
    num_sms: int | None = None,
    with_weight: bool = False,
) -> Any:
    """y = x @ w.T with FP8 GEMMs in the forward and the backward pass.

    >>> import jax, jax.numpy as jnp
    >>> from jax_deepgemm import fp8_linear
    >>> x = jax.random.normal(jax.random.key(0), (2, 8, 256), jnp.bfloat16)
    >>> w = jax.random.normal(jax.random.key(1), (512, 256), jnp.float32) / 16
    >>> y = fp8_linear(x, w)
    >>> y.shape, y.dtype.name
    ((2, 8, 512), 'bfloat16')
    >>> dx, dw = jax.grad(lambda x, w: fp8_linear(x, w).astype(jnp.float32).sum(), (0, 1))(x, w)
    >>> dx.dtype.name, dw.dtype.name
    ('bfloat16', 'float32')

    x is quantised with one scale per token and 128 features, w with one per 128x128 block; both from the
    master values at each call. The gradients follow the recipe of the DeepSeek-V3 report, section 3.3: dx
    takes dy per token, dw takes dy and x with one scale per 128 tokens, all sums in float32.

    A weight that several calls use, for microbatches or under `jax.checkpoint`, is quantised once by
    `prepare_weight`: a PreparedWeight as w gives the same bits, and the gradient goes to its master.

    A QuantizedArray as w is a frozen weight: it is used as it is, and only x has a gradient (its own is
    zero). Keep it out of the differentiated arguments: FP8 leaves count as floating point in `jax.grad`. So
    is an FP4 weight, a `PreparedFp4`, which the gradient of x expands to FP8 at each call (`expand_fp4`).

    Args:
      x: [.., k] bfloat16 or float32. The leading dimensions are tokens; any of them may be 0.
      w: [n, k] bfloat16 or float32 master weight, or a PreparedWeight of one, or a QuantizedArray or (values,
        scales) tuple [n, k] of block (128, 128). Block (1, 128) works in the forward pass only. Or an FP4
        weight, a PreparedFp4 of MXFP4.
      out_dtype: dtype of y, bfloat16 or float32. dx and dw have the dtypes of x and w.
      grad_dtype: dtype of the quantised dy, float8_e4m3fn or float8_e5m2.
      scale_format: "f32", or "ue8m0" for scales that are powers of two; those of a PreparedWeight are as
        they were made.
      weight_gradient: elements that share a scale in x where dw is computed: "1x128", the recipe above, or
        "128x128", 128 tokens of 128 features, which is faster (docs/fp8.md says what it costs).
      config: a GemmConfig for the forward GEMM.
      out_sharding: y's sharding on a mesh with Explicit axes; needed there if k is cut.
      reduce_dtype: what devices exchange partial results in: float32, or out_dtype.
      num_sms: as in `fp8_gemm_nt`.
      with_weight: also return w, as it came. Where that is used in place of w from there on, the product of
        the weight gradient adds to the gradient of the later uses, in its buffer: see `accumulate_gradients`.

    Returns:
      [.., n] in out_dtype; or (that, w).

    Raises:
      ValueError, TypeError: operands that do not fit; the message names both sides.
      TypeError: on forward-mode differentiation, and on a second one (Hessian products): reverse mode of
        first order only. `bf16_gemm_nt` has both.

    For `jax.checkpoint` policies y is named "jdg_linear_out", the kept FP8 activations "jdg_act_fp8" and the
    kept FP8 weight "jdg_weight_fp8"; with the first two in `save_only_these_names` no GEMM runs twice.

    On a mesh with Auto axes, cut the first of x's leading dimensions or use `jax.shard_map`: the leading
    dimensions are merged, and XLA moves data if an inner one of them is cut. Explicit axes have no such
    limit.
    """
    x, w = unwrapped(x), layer_weight("fp8_linear", _WEIGHT, w)
    _check_shapes(x, w)
    if with_weight:
        check_trained("fp8_linear", w=w)
    options = check_options("fp8_linear", out_dtype, reduce_dtype, out_sharding, config, num_sms)
    grad_dtype = dtype_option("fp8_linear", "grad_dtype", grad_dtype, "float8_e4m3fn or float8_e5m2")
    if grad_dtype not in FP8_DTYPES:
        raise ValueError(
            f"fp8_linear: grad_dtype is {grad_dtype.name}, need float8_e4m3fn or float8_e5m2. "
            "float8_e4m3fn is the recipe's choice."
        )
    check_weight_gradient("fp8_linear", weight_gradient)
    leaves, tree = jax.tree.flatten((x, w))
    x, w = jax.tree.unflatten(tree, same_varying_axes(leaves))
    tokens = Tokens.of(x if x.ndim > 1 else x[None])
    flat = tokens.flatten(x if x.ndim > 1 else x[None])
    recipe = _Recipe(
        out_dtype=options.out_dtype,
        grad_dtype=grad_dtype,
        scale_format=scale_format,
        weight_gradient=weight_gradient,
        reduce_dtype=options.reduce_dtype,
        num_sms=options.num_sms,
        config=config,
        out_sharding=_flat_out_sharding(tokens, options.out_sharding, x.ndim),
        x=_like(flat),
        w=_like(jax.tree.leaves(w)[0]),
        with_weight=with_weight,
        features=x.shape[-1],
    )
    if isinstance(w, QuantizedArray | PreparedFp4):
        y = _frozen_linear(recipe, flat, w)
    else:
        y = _linear(recipe, flat, *master_and_copies(w))
    if with_weight:
        y, master = y
        w = as_it_came(w, master)
    y = tokens.unflatten(y)
    if options.out_sharding is not None and x.ndim > 1 and jax.typeof(y).sharding.mesh.explicit_axes:
        y = jax.sharding.reshard(y, options.out_sharding)
    y = checkpoint_name(y if x.ndim > 1 else y[0], LINEAR_OUT)
    return (y, w) if with_weight else y


def _check_shapes(x: Any, w: Any) -> None:
    if (
        not hasattr(x, "dtype")
        or isinstance(x, PreparedWeight | QuantizedArray)
        or np.dtype(x.dtype) not in OUT_DTYPES
    ):
        given = np.dtype(x.dtype).name if hasattr(x, "dtype") else type(x).__name__
        raise TypeError(
            f"fp8_linear: x is {given}, need a bfloat16 or float32 array: the layer quantises it. "
            "For operands that are quantised already use fp8_gemm_nt."
        )
    if isinstance(w, Fp4Array):
        raise TypeError(
            f"fp8_linear: w is an Fp4Array {list(w.shape)}, need it prepared for the kernels, once: "
            "jax_deepgemm.prepare_fp4(w)."
        )
    frozen = isinstance(w, QuantizedArray | PreparedFp4)
    if not frozen and (not hasattr(w, "dtype") or np.dtype(w.dtype) not in OUT_DTYPES):
        given = np.dtype(w.dtype).name if hasattr(w, "dtype") else type(w).__name__
        raise TypeError(
            f"fp8_linear: w is {given}, need a bfloat16 or float32 master weight or a PreparedWeight, "
            "or a QuantizedArray or (values, scales) tuple for a frozen one."
        )
    if isinstance(w, PreparedFp4) and w.check("fp8_linear", "w").is_nvfp4:
        raise TypeError(
            f"fp8_linear: w is NVFP4, {w!r}, and x is quantised to FP8. {NO_FP8} Use bf16_gemm_nt(x, w) of "
            "rows in bfloat16, which has gradients of x."
        )
    if x.ndim < 1 or w.ndim != 2 or not _same_k(x, w):
        raise ValueError(
            f"fp8_linear: x is {list(x.shape)} and w is {list(w.shape)}, "
            "need x [.., k] and w [n, k] with the same k. "
            "A weight stored [k, n] is passed as w.T; stacked weights go through jax.vmap."
        )
    if isinstance(w, PreparedWeight | QuantizedArray):
        w.check("fp8_linear", "w")
    if isinstance(w, QuantizedArray) and tuple(w.block) not in (BLOCKED, PER_ROW):
        raise ValueError(
            f"fp8_linear: w has one scale per block {w.block}, need (128, 128), "
            "or (1, 128) without gradients. Quantise it so: jax_deepgemm.quantize(w, (128, 128))."
        )


def _same_k(x: Any, w: Any) -> bool:
    """That of an FP4 weight, a multiple of 32, is only known up to 127 zeros."""
    if isinstance(w, PreparedFp4):
        return bool(-(-x.shape[-1] // SCALE_BLOCK) == w.slabs.shape[-2] and x.shape[-1] % 32 == 0)
    return bool(x.shape[-1] == w.shape[-1])


def _like(x: jax.Array) -> tuple[np.dtype[Any], PartitionSpec | None]:
    sharding = jax.typeof(x).sharding
    return np.dtype(x.dtype), sharding.spec if sharding.mesh.explicit_axes else None


def _flat_out_sharding(tokens: Tokens, spec: PartitionSpec | None, rank: int) -> PartitionSpec | None:
    """The tokens stay as they are; the features as asked. The rest is a reshard of the result."""
    if spec is None:
        return None
    features = tuple(axis for axis in entries(spec, rank)[-1] if axis not in tokens.axes)
    return spec if rank == 2 else tokens.flat_spec(features)


def _keep(q: QuantizedArray, name: str) -> _Bytes:
    """What waits for the backward pass: the bytes of the values, and the scales, under a checkpoint_name.

    Bytes, because jax.checkpoint passes what it saves through reduce_precision, which knows no largest
    exponent with numbers in it: float8_e4m3fn values from 256 on would come back as infinities.
    """
    values = lax.bitcast_convert_type(q.values, jnp.uint8)
    return checkpoint_name(values, name), checkpoint_name(q.scales, name)


def _kept(kept: _Bytes, block: tuple[int, int], dtype: Any = E4M3) -> QuantizedArray:
    return QuantizedArray(lax.bitcast_convert_type(kept[0], dtype), kept[1], block)


def _swapped(q: QuantizedArray) -> QuantizedArray:
    return QuantizedArray(q.values.T, q.scales.T, (q.block[1], q.block[0]))


def _forward(recipe: _Recipe, x: QuantizedArray, w: QuantizedArray | PreparedFp4) -> jax.Array:
    return fp8_gemm_nt(
        x,
        w,
        out_dtype=recipe.out_dtype,
        config=recipe.config,
        out_sharding=recipe.out_sharding,
        reduce_dtype=recipe.reduce_dtype,
        num_sms=recipe.num_sms,
    )


_first_order = functools.partial(
    ReverseOnly, "fp8_linear", "bf16_gemm_nt(x, w) of bfloat16 operands, which has derivatives of any order"
)


@_first_order
def _linear(recipe: _Recipe, x: jax.Array, w: jax.Array, copies: Copies | None) -> Any:
    """w: the master, whose copies are made here if there are none."""
    weight = recipe.quantize(w, BLOCKED) if copies is None else copies.plain.meant
    y = _forward(recipe, recipe.quantize(x, PER_ROW), weight)
    return (y, w) if recipe.with_weight else y


def _linear_fwd(
    recipe: _Recipe, x: jax.Array, w: jax.Array, copies: Copies | None
) -> tuple[Any, tuple[_Bytes, Bits]]:
    along_features, along_tokens = recipe.quantize_both(x, recipe.block_of_x)
    copies = Copies.named(w, WEIGHT_FP8, recipe.scale_format) if copies is None else copies
    y = _forward(recipe, along_features, copies.plain.meant)
    return (y, w) if recipe.with_weight else y, (_keep(along_tokens, ACT_FP8), copies.transposed)


def _linear_bwd(
    recipe: _Recipe, kept: tuple[_Bytes, Bits], cotangents: Any
) -> tuple[jax.Array, jax.Array, None]:
    dy, later = cotangents if recipe.with_weight else (cotangents, None)
    x_along_tokens = _kept(kept[0], recipe.block_of_x)
    along_features, along_tokens = recipe.quantize_both(dy, dtype=recipe.grad_dtype)
    dx = recipe.gradient(along_features, kept[1].meant, recipe.x)
    return dx, recipe.gradient(along_tokens, x_along_tokens, recipe.w, later), None


_linear.defvjp(_linear_fwd, _linear_bwd)


@_first_order
def _frozen_linear(recipe: _Recipe, x: jax.Array, w: QuantizedArray | PreparedFp4) -> jax.Array:
    return _forward(recipe, recipe.quantize(x, PER_ROW), w)


def _frozen_fwd(
    recipe: _Recipe, x: jax.Array, w: QuantizedArray | PreparedFp4
) -> tuple[jax.Array, _Bytes | PreparedFp4]:
    if isinstance(w, PreparedFp4):
        kept = replace(w, slabs=checkpoint_name(w.slabs, WEIGHT_FP8))
        return _forward(recipe, recipe.quantize(x, PER_ROW), w), kept
    if tuple(w.block) != BLOCKED:
        raise ValueError(
            f"fp8_linear: the gradient of x needs w with one scale per block (128, 128), and this frozen "
            f"weight has block {w.block}: its scales run along k, and dx = dy @ w sums over n. "
            "Quantise it so: jax_deepgemm.quantize(w, (128, 128))."
        )
    return _forward(recipe, recipe.quantize(x, PER_ROW), w), _keep(w, WEIGHT_FP8)


def _frozen_bwd(recipe: _Recipe, w: _Bytes | PreparedFp4, dy: jax.Array) -> tuple[jax.Array, None]:
    quantized = recipe.quantize(dy, PER_ROW, recipe.grad_dtype)
    if isinstance(w, PreparedFp4):
        weight = expand_fp4(w, k=recipe.features)
    else:
        weight = _kept(w, BLOCKED, recipe.w[0])
    return recipe.gradient(quantized, _swapped(weight), recipe.x), None


_frozen_linear.defvjp(_frozen_fwd, _frozen_bwd)
