"""FP4 weights in the order in which kernels read them: half the bytes of FP8, and the same numbers."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike, DTypeLike

from jax_deepgemm.ops.quantize import nvfp4_slabs
from jax_deepgemm.ops.quantize import slabs as layout
from jax_deepgemm.ops.quantize.array import QuantizedArray, as_dtype, check_block, scales_spec
from jax_deepgemm.ops.quantize.fp4 import (
    BLOCK,
    E2M1,
    E4M3,
    NVFP4_BLOCK,
    Fp4Array,
    checked_nvfp4,
    nvfp4_parts,
    packed,
    parts_of,
    shown,
)

BFLOAT16 = np.dtype(jnp.bfloat16)
NO_FP8 = (
    "A number of e2m1 times its scale of e4m3 has five bits behind its first one and float8_e4m3fn three, "
    "so no product in FP8 takes NVFP4 as it is."
)
"""Why NVFP4 has no products with FP8, for errors."""
_ROW_OF_SLABS, _SQUARE, _PER_ROW = (layout.ROWS, layout.COLUMNS), (128, 128), (1, 128)
_CODES = (np.dtype(jnp.float8_e8m0fnu), np.dtype(np.uint8), np.dtype(np.int8))
_MOST_APART = layout.LARGEST - layout.SMALLEST


def products() -> Any:
    """The products of these weights. Imported by a relative name: they stand on products that call them here,
    and whose programs do not depend on them (core/version.py)."""
    return importlib.import_module("..mixed.api", __package__)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PreparedFp4:
    """A frozen FP4 weight [.., n, k] in the order in which products read it, made by `prepare_fp4`.

    >>> from jax_deepgemm.quantization import prepare_fp4, quantize_fp4
    >>> w = prepare_fp4(quantize_fp4(jnp.ones((3, 128, 320))))
    >>> w, w.slabs.shape
    (PreparedFp4(float4_e2m1fn[3,128,384] for float8_e4m3fn), (3, 2, 3, 4368))
    >>> w[1].shape
    (128, 384)

    `fp8_gemm_nt`, `m_grouped_fp8_gemm_nt_contiguous` and `.._masked`, the same in BF16, `grouped_linear`,
    `ragged_dot` and the functions of `jax_deepgemm.moe` take it as a frozen weight. It is a pytree with one
    leaf of bytes, so it goes through `jax.jit`, `jax.lax.scan`, `jax.vmap` and `jax.shard_map`, and has no
    gradient. Dimensions in front, rows of slabs (64 of n) and columns of slabs (128 of k) may be cut over
    devices. In NVFP4 it is for products in BF16 only.

    Attributes:
      slabs: uint8 [.., n / 64, ceil(k / 128), 4368], 64 rows by 128 of k in each (ops/quantize/slabs.py); of
        NVFP4 [.., 4624] (ops/quantize/nvfp4_slabs.py).
      activations: what it is multiplied with, static: float8_e4m3fn, which is bfloat16 too; of NVFP4
        bfloat16.

    An index is one of leading dimensions. Raises nothing; functions that take it call `check`.
    """

    slabs: jax.Array
    activations: np.dtype[Any] = dataclasses.field(default=E4M3, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """[.., n, k], k rounded up to a multiple of 128."""
        *lead, rows, columns, _ = self.slabs.shape
        return (*lead, rows * layout.ROWS, columns * layout.COLUMNS)

    @property
    def ndim(self) -> int:
        """Rank of the weight."""
        return len(self.slabs.shape) - 1

    @property
    def dtype(self) -> np.dtype[Any]:
        """float4_e2m1fn."""
        return E2M1

    @property
    def is_nvfp4(self) -> bool:
        """Whether it is NVFP4, and else MXFP4."""
        return bool(self.slabs.shape[-1] == nvfp4_slabs.BYTES)

    def __getitem__(self, index: Any) -> PreparedFp4:
        """The same of some of the leading dimensions.

        Raises:
          IndexError: an index of rows or columns, which slabs have many of.
        """
        parts = index if isinstance(index, tuple) else (index,)
        used = sum(part is not None for part in parts)
        if any(part is Ellipsis or getattr(part, "dtype", None) == np.bool_ for part in parts):
            used = self.ndim
        if used > self.ndim - 2:
            raise IndexError(
                f"PreparedFp4: index {index!r} of a weight {list(self.shape)}: only the "
                f"{max(self.ndim - 2, 0)} leading dimensions can be indexed (no Ellipsis, no masks). For "
                "rows or columns index before prepare_fp4."
            )
        return PreparedFp4(self.slabs[index], self.activations)

    def fp4(self, k: int | None = None) -> Fp4Array:
        """The weight as it was before `prepare_fp4`.

        >>> from jax_deepgemm.quantization import dequantize_fp4, prepare_fp4, quantize_fp4
        >>> w = quantize_fp4(jnp.linspace(-3, 3, 64 * 96).reshape(64, 96))
        >>> again = prepare_fp4(w).fp4(96)
        >>> bool(jnp.all(dequantize_fp4(again) == dequantize_fp4(w)))
        True

        Args:
          k: columns of it, a multiple of 32, or 16 in NVFP4; None: all, with the zeros that prepare_fp4 put
            behind them.

        Returns:
          An Fp4Array of the same numbers, signs of zeros too, and the same scales but those of blocks of
          zeros. Of a slab that could not be held (see `prepare_fp4`) all scales are NaN. In NVFP4 scales of
          zero are 2**-9, and those below zero positive.

        Raises:
          ValueError: a k that the weight does not have; an NVFP4 weight joined of parts whose global scales
            differ, which traced ones are not asked for.
        """
        k = self._columns("fp4", k)
        if self.is_nvfp4:
            values, scales, whole = nvfp4_slabs.unfold(self.slabs)
            return Fp4Array(values[..., : k // 2], scales[..., : k // NVFP4_BLOCK], _one_scale(whole))
        values, codes = layout.unfold(self.slabs)
        codes = lax.bitcast_convert_type(codes[..., : k // BLOCK], jnp.float8_e8m0fnu)
        return Fp4Array(values[..., : k // 2], codes)

    def _columns(self, where: str, k: int | None) -> int:
        most, block = self.shape[-1], NVFP4_BLOCK if self.is_nvfp4 else BLOCK
        if k is None:
            return most
        if k % block or not most - layout.COLUMNS < k <= most:
            raise ValueError(
                f"{where}: k is {k} of a weight {list(self.shape)}, need a multiple of {block} above "
                f"{most - layout.COLUMNS} and at most {most}: what k was before prepare_fp4."
            )
        return k

    def shardings(self, weight: NamedSharding) -> PreparedFp4:
        """Shardings of the leaves, a pytree of this structure for ``in_shardings`` or ``device_put``.

        Cut as a weight [.., n, k] is where every cut is at the edge of a slab, else replicated.

        >>> from jax_deepgemm.quantization import prepare_fp4, quantize_fp4
        >>> mesh = jax.sharding.Mesh(jax.devices()[:1], ("x",))
        >>> w = prepare_fp4(quantize_fp4(jnp.ones((128, 256))))
        >>> w.shardings(NamedSharding(mesh, P("x"))).slabs.spec
        P('x', None, None)
        """
        spec = (*weight.spec, *(None,) * (self.ndim - len(weight.spec)))
        cut = scales_spec(P(*spec), self.shape, _ROW_OF_SLABS, weight.mesh)
        placed: Any = NamedSharding(weight.mesh, P(*cut, None))
        return PreparedFp4(placed, self.activations)

    def check(self, where: str = "PreparedFp4", name: str = "w") -> PreparedFp4:
        """Returns itself if it is what `prepare_fp4` makes, else raises.

        Args:
          where: the function to name in the message.
          name: the argument to name in the message.

        Raises:
          TypeError, ValueError: slabs of another dtype or shape.
        """
        dtype, shape = getattr(self.slabs, "dtype", None), tuple(getattr(self.slabs, "shape", ()))
        if dtype != np.uint8 or len(shape) < 3 or shape[-1] not in (layout.BYTES, nvfp4_slabs.BYTES):
            raise (TypeError if dtype != np.uint8 else ValueError)(
                f"{where}: slabs of {name} are {shown(self.slabs)}, need uint8 [.., n / 64, k / 128, "
                f"{layout.BYTES}], or {nvfp4_slabs.BYTES} of NVFP4. Make them: prepare_fp4({name})."
            )
        return self

    def __repr__(self) -> str:
        if not hasattr(self.slabs, "shape"):
            return f"PreparedFp4({self.slabs!r})"
        return f"PreparedFp4({E2M1.name}[{','.join(map(str, self.shape))}] for {self.activations.name})"


def prepare_fp4(w: Fp4Array | tuple[ArrayLike, ...], *, activations: DTypeLike | None = None) -> PreparedFp4:
    """An FP4 weight in the order in which products with FP8 or BF16 activations read it.

    >>> import jax, jax.numpy as jnp
    >>> from jax_deepgemm import fp8_gemm_nt, quantize
    >>> from jax_deepgemm.quantization import expand_fp4, prepare_fp4
    >>> w = quantize(jax.random.normal(jax.random.key(0), (192, 256)), (1, 32), jnp.float4_e2m1fn)
    >>> x = quantize(jax.random.normal(jax.random.key(1), (4, 256), jnp.bfloat16))
    >>> prepared = prepare_fp4(w)                        # once, when the weights are loaded
    >>> y = fp8_gemm_nt(x, prepared)
    >>> bool((y == fp8_gemm_nt(x, expand_fp4(w))).all())
    True

    Hopper's tensor cores have no FP4: the kernels make e4m3 or bfloat16 of it, exactly. Of MXFP4
    64 rows by 128 of k share a scale, the base, which is that of an FP8 weight; what the scales of FP4 differ
    from it goes into the exponents of e4m3. So results are those of the expanded weight, bit for bit, and
    half the bytes are read. A number of NVFP4 times its scale is one of bfloat16; the product of these is
    multiplied by the global scale in float32, before it is rounded.

    Args:
      w: [.., n, k], k a multiple of 32 (NVFP4: 16), n a multiple of 64: an `Fp4Array`, or its parts as
        checkpoints have them. Values: uint8 or int8 [.., n, k / 2] with the first number in the lower four
        bits (DeepSeek V4, ModelOpt), or [.., n, k / 32, 16] (MXFP4 of gpt-oss), or float4_e2m1fn [.., n, k].
        Scales: [.., n, k / 32] as float8_e8m0fnu, or their codes, uint8; or of NVFP4 float8_e4m3fn [.., n, k
        / 16] and a third part, float32 [..]. Groups of experts, and other leading dimensions, are prepared as
        they are.
      activations: None: float8_e4m3fn, or of NVFP4 bfloat16. Products in bfloat16 take both.

    Returns:
      A `PreparedFp4`: 4368 bytes for 64 x 128 numbers, 4.27 bits for each, against 4.25 of w; of NVFP4 4624
      bytes, 4.52 bits against 4.5.

    Raises:
      TypeError: a w that is no FP4, an activations that there is not.
      ValueError: shapes that do not fit. Scales of MXFP4 of numbers other than zero which are more than 2**11
        apart in one slab of 64 rows by 128 of k, which the message names; where values are traced, as under
        `jax.jit`, that cannot raise, and the results that such a slab takes part in are NaN.

    Pure; goes through `jax.jit`, `jax.vmap` and `jax.shard_map`. NaN scales make their slab NaN, and of NVFP4
    the results of their row.
    """
    nvfp4 = nvfp4_parts(w)
    kind = BFLOAT16 if nvfp4 else E4M3
    if activations is not None:
        kind = as_dtype("prepare_fp4", "activations", activations, "float8_e4m3fn, or of NVFP4 bfloat16")
    if kind != (BFLOAT16 if nvfp4 else E4M3):
        raise TypeError(
            f"prepare_fp4: activations is {kind.name} and w is {'NVFP4' if nvfp4 else 'MXFP4'}, need "
            f"{'bfloat16' if nvfp4 else 'float8_e4m3fn'}, or leave it out. "
            + (NO_FP8 if nvfp4 else "Products in bfloat16 take the same bytes.")
        )
    if nvfp4:
        values, scales, whole = checked_nvfp4("prepare_fp4", "w", nvfp4)
        _check_rows("prepare_fp4", values, layout.ROWS)
        return PreparedFp4(_fold_nvfp4(values, scales, whole), kind)
    values, codes = _checked("prepare_fp4", w)
    slabs, apart = _fold(values, codes)
    if not isinstance(apart, jax.core.Tracer) and apart.is_fully_addressable:
        _check_apart(np.asarray(apart))
    return PreparedFp4(slabs, kind)


_fold_nvfp4 = jax.jit(nvfp4_slabs.fold)
_fold = jax.jit(layout.fold)


def _check_apart(apart: np.ndarray[Any, Any]) -> None:
    wrong = np.argwhere(apart > _MOST_APART)
    if not len(wrong):
        return
    *lead, row, column = map(int, wrong[0])
    where = [f"expert {'.'.join(map(str, lead))}"] * bool(lead)
    where += [f"row block {row} (rows from {row * layout.ROWS})"]
    where += [f"k block {column} (k from {column * layout.COLUMNS})"]
    raise ValueError(
        f"prepare_fp4: scales in {', '.join(where)} are 2**{apart[tuple(wrong[0])]} apart, need at most "
        f"2**{_MOST_APART} in 64 rows by 128 of k; {len(wrong)} of {apart.size} such blocks are wider. For "
        "this weight use FP8 with a scale for each row: expand_fp4(w, (1, 128))."
    )


def _one_scale(of_slabs: jax.Array) -> jax.Array:
    """The global scales [..] of those of slabs [.., n / 64, k / 128]."""
    *lead, down, across = of_slabs.shape
    if not down * across:
        return jnp.ones(lead, jnp.float32)
    whole = of_slabs[..., 0, 0]
    if not isinstance(of_slabs, jax.core.Tracer) and of_slabs.is_fully_addressable:
        each, first = np.asarray(of_slabs), np.asarray(whole)[..., None, None]
        if not np.array_equal(each, np.broadcast_to(first, each.shape), equal_nan=True):
            raise ValueError(
                "fp4: the weight was joined of parts with global scales of their own; an Fp4Array has one "
                "for a matrix. Take its rows apart first, `half` of them in slabs of 64: "
                "dataclasses.replace(w, slabs=w.slabs[..., :half, :, :])."
            )
    return whole


def expand_fp4(
    w: Fp4Array | PreparedFp4 | tuple[ArrayLike, ArrayLike],
    block: tuple[int, int] = (128, 128),
    *,
    k: int | None = None,
) -> QuantizedArray:
    """An FP4 weight as an FP8 one: the same numbers in twice the bytes.

    >>> from jax_deepgemm.quantization import dequantize, dequantize_fp4, expand_fp4, quantize_fp4
    >>> w = quantize_fp4(jnp.linspace(-3, 3, 64 * 128).reshape(64, 128))
    >>> expand_fp4(w)
    QuantizedArray(float8_e4m3fn[64,128], scales float32[1,1], block=(128, 128))
    >>> bool(jnp.all(dequantize(expand_fp4(w)) == dequantize_fp4(w)))
    True

    Args:
      w: [.., n, k], an `Fp4Array` or values and scales as `prepare_fp4` takes them, n any number; or a
        `PreparedFp4`.
      block: (128, 128), or (1, 128) for a scale for each row.
      k: columns of a PreparedFp4, as in `PreparedFp4.fp4`.

    Returns:
      A QuantizedArray of float8_e4m3fn. Exact where scales of numbers other than zero are at most 2**14 apart
      within each block; numbers of smaller ones are rounded to multiples of 2**-15 times the largest scale.
      Of a PreparedFp4 a row is always exact, and a block of 128 rows where its two slabs allow it.

    Raises:
      TypeError, ValueError: as `prepare_fp4`; another block; a weight in NVFP4, whose numbers FP8 does not
        hold.
    """
    block = check_block(block, "expand_fp4")
    if nvfp4_parts(w) or (isinstance(w, PreparedFp4) and w.is_nvfp4):
        raise TypeError(
            f"expand_fp4: w is NVFP4, need MXFP4. {NO_FP8} Use bfloat16, dequantize_fp4(w, jnp.bfloat16), or "
            "quantise that anew: jax_deepgemm.quantize(.., (128, 128))."
        )
    if block not in (_SQUARE, _PER_ROW):
        raise ValueError(f"expand_fp4: block is {block}, need (128, 128), or (1, 128).")
    if isinstance(w, PreparedFp4):
        k = w.check("expand_fp4")._columns("expand_fp4", k)
        values, codes = layout.unfold(w.slabs)
        values, codes = values[..., : k // 2], codes[..., : k // BLOCK]
    else:
        values, codes = _checked("expand_fp4", w, rows=1)
    numbers, scales = _expand(values, codes, rows=block[0])
    return QuantizedArray(numbers, scales, block)


_expand = functools.partial(jax.jit, static_argnames="rows")(layout.expand)


def _checked(where: str, w: Any, rows: int = layout.ROWS) -> tuple[jax.Array, jax.Array]:
    """Bytes [.., n, k / 2] and codes [.., n, k / 32] of an unprepared weight."""
    if isinstance(w, PreparedFp4):
        raise TypeError(f"{where}: w is prepared already: {w!r}. Use it as it is; its values: w.fp4().")
    parts = parts_of(w)
    if parts is None:
        raise TypeError(
            f"{where}: w is {shown(w)}, need an Fp4Array, or (values, scales) of bytes. Quantise it: "
            "jax_deepgemm.quantize(w, (1, 32), jnp.float4_e2m1fn)."
        )
    values, scales = parts
    if getattr(scales, "dtype", None) not in _CODES:
        raise TypeError(
            f"{where}: scales of w are {shown(scales)}, need float8_e8m0fnu, or their codes in uint8: one "
            "for 32 numbers of a row. Packed words of int32 become codes with .view(np.uint8)."
        )
    if values.shape == (*scales.shape, BLOCK // 2) and values.dtype != E2M1:
        values = values.reshape(*scales.shape[:-1], -1)
    values = packed(where, "w", values)
    need = [*values.shape[:-1], 2 * values.shape[-1] // BLOCK]
    if values.ndim < 2 or 2 * values.shape[-1] % BLOCK or list(scales.shape) != need:
        raise ValueError(
            f"{where}: values of w are {shown(parts[0])} and scales {shown(scales)}, need bytes [.., n, "
            "k / 2] (or [.., n, k / 32, 16]) and [.., n, k / 32], k a multiple of 32: one scale for 32 "
            "numbers of a row. Pad k with zeros."
        )
    _check_rows(where, values, rows)
    return values, lax.bitcast_convert_type(jnp.asarray(scales), jnp.uint8)


def _check_rows(where: str, values: jax.Array, rows: int) -> None:
    if values.shape[-2] % rows:
        raise ValueError(
            f"{where}: w is {[*values.shape[:-1], 2 * values.shape[-1]]}: n is {values.shape[-2]}, need a "
            "multiple of 64. Pad it with rows of zeros: jnp.pad of values and scales, and leave out the "
            "columns of the result."
        )
