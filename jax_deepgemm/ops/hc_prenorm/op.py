"""Projections of wide rows with the sums of their squares as ops, and the products of their derivatives.

    hc_prenorm_gemm          a, b -> d, squares          quadratic in a: its jvp is a product and a sum
    hc_prenorm_gemm_splits   a, b -> the same of each part of k
    hc_product_nt, nn, tn    what the derivatives are made of, on XLA; each is a derivative of the others

Rows of a are cut freely; b, and so the numbers of a row and the columns of d, are whole on each device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_deepgemm.core.declaration import Dims
from jax_deepgemm.core.derivatives import Wanted
from jax_deepgemm.core.family import LazyKernel
from jax_deepgemm.core.op import Op
from jax_deepgemm.core.products import dot_general
from jax_deepgemm.ops.gemm.padding import ROW_BYTES, pad_axis
from jax_deepgemm.ops.hc_prenorm import reference
from jax_deepgemm.ops.hc_prenorm.family import beyond

ANYWHERE = {"fallback": "reference"}
"""Where no kernel runs (other platforms, symbolic sizes) jnp does; it is not slow enough to refuse."""


# Products of derivatives -----------------------------------------------------------------------------------


def _product(contracts: tuple[Dims, Dims], x: jax.Array, y: jax.Array, *, out_dtype: Any) -> list[jax.Array]:
    """In float32, or in TF32 where that is a matrix unit's way to take float32, as the forward product is."""
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return [dot_general(x, y, contracts, precision=lax.Precision.DEFAULT).astype(out_dtype)]


def _product_jvp(form: str, primals: list[Any], tangents: list[Any], **params: Any) -> list[jax.Array]:
    (x, y), (dx, dy) = primals, tangents
    run = functools.partial(PRODUCT[form], **params)
    terms = [*([] if dx is None else run(dx, y)), *([] if dy is None else run(x, dy))]
    return [functools.reduce(jnp.add, terms)]


# Of each product x, y -> z: the products of the cotangents of x and of y; "z" stands for that of the result.
_COTANGENTS = {
    "nt": (("nn", "zy"), ("tn", "zx")),
    "nn": (("nt", "zy"), ("tn", "xz")),
    "tn": (("nt", "yz"), ("nn", "xz")),
}


def _product_transpose(
    form: str, which: int, cotangents: list[jax.Array], operands: list[Any], **_: Any
) -> jax.Array:
    wanted = operands[which]
    assert isinstance(wanted, Wanted)
    other, names = _COTANGENTS[form][which]
    given = dict(zip("xyz", (*operands, cotangents[0])))
    options = {"out_dtype": wanted.dtype, "out_sharding": wanted.out_sharding, **ANYWHERE}
    return PRODUCT[other](*(given[name] for name in names), **options)[0]


def _product_op(form: str, rule: str, contracts: tuple[Dims, Dims], result: Callable[..., Dims]) -> Op:
    return Op(
        f"hc_product_{form}",
        rule,
        lambda x, y, *, out_dtype: [(result(x, y), out_dtype)],
        functools.partial(_product, contracts),
        reduces=("m",) if form == "tn" else (),
        jvp=functools.partial(_product_jvp, form),
        transpose=functools.partial(_product_transpose, form),
    )


PRODUCT: dict[str, Op] = {
    "nt": _product_op("nt", "m k, n k -> m n", ((1,), (1,)), lambda x, y: (x[0], y[0])),
    "nn": _product_op("nn", "m n, n k -> m k", ((1,), (0,)), lambda x, y: (x[0], y[1])),
    "tn": _product_op("tn", "m n, m k -> n k", ((0,), (0,)), lambda x, y: (x[1], y[1])),
}


# The op ----------------------------------------------------------------------------------------------------


def _jvp(primals: list[Any], tangents: list[Any], *, num_splits: int = 0, **_: Any) -> list[Any]:
    (a, b), (da, db) = primals, tangents
    product: Callable[..., Any] = functools.partial(PRODUCT["nt"], out_dtype=jnp.float32, **ANYWHERE)
    if num_splits:
        product = jax.vmap(product)
        a, b, da, db = (None if x is None else reference.pieces(x, num_splits) for x in (a, b, da, db))
    terms = [*([] if da is None else product(da, b)), *([] if db is None else product(a, db))]
    return [functools.reduce(jnp.add, terms), None if da is None else _squares_jvp(a, da)]


def _squares_jvp(a: jax.Array, da: jax.Array) -> jax.Array:
    return 2 * jnp.sum(a.astype(jnp.float32) * da.astype(jnp.float32), axis=-1)


def _result(a: Dims, b: Dims, *, num_splits: int = 0, **_: Any) -> list[tuple[Dims, Any]]:
    lead = (num_splits,) if num_splits else ()
    return [((*lead, a[0], b[0]), jnp.float32), ((*lead, a[0]), jnp.float32)]


def _prepare(a: jax.Array, b: jax.Array, **_: Any) -> tuple[jax.Array, jax.Array]:
    """k to a multiple of 8: rows of whole 16 bytes."""
    step = ROW_BYTES // 2
    return pad_axis("hc_prenorm_gemm: a", a, -1, step), pad_axis("hc_prenorm_gemm: b", b, -1, step)


def _on_xla(avals: Any, **_: Any) -> str:
    (m, k), n = avals[0].shape[-2:], avals[1].shape[-2]
    return f"hc_prenorm_gemm: {beyond(m, k, n)}, so XLA multiplies, and reads a twice."


@functools.cache
def prenorm_op(splits: bool, kernel: bool) -> Op:
    """(a, b) -> d, squares; with `num_splits=` where they have a dimension of splits.

    Args:
      splits: whether they have.
      kernel: whether the call is within the limits of the kernel.
    """
    runs: dict[str, Any] = {"without_kernel": _on_xla}
    if kernel:
        runs = {"kernel": LazyKernel("jax_deepgemm.ops.hc_prenorm.kernel", "hc_prenorm")}
    return Op(
        "hc_prenorm_gemm" + "_splits" * splits,
        "m k, n k -> s m n, s m" if splits else "m k, n k -> m n, m",
        _result,
        reference.hc_prenorm,
        blocks={"n": ("k", 1)},  # cut where k is, which is nowhere
        kernel_prepare=_prepare,
        jvp=_jvp,
        **runs,
    )
