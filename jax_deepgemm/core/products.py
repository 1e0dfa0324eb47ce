"""Matrix products in plain XLA, as the references take them.

A primitive of its own. Libraries that change a model's products (qwix) replace the code of
`jax.lax.dot_general` itself while the model runs; JAX calls it to map a product too. A reference that came by
there would be changed, and JAX would keep its program for all later calls.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.extend.core.primitives import dot_general_p
from jax.interpreters import batching, mlir, xla

Dims: TypeAlias = tuple[int, ...]


def dot_general(
    a: jax.Array,
    b: jax.Array,
    contracts: tuple[Dims, Dims],
    batch: tuple[Dims, Dims] = ((), ()),
    *,
    precision: Any = lax.Precision.HIGHEST,
    out_dtype: Any = np.float32,
) -> jax.Array:
    """jax.lax.dot_general of arrays on one device; no derivative."""
    return _product_p.bind(
        a, b, contracts=contracts, batch=batch, precision=_canonical(precision), out_dtype=np.dtype(out_dtype)
    )


def _canonical(precision: Any) -> Any:
    """A precision in the one form that JAX's primitive takes, of all that its functions take."""
    if isinstance(precision, str) and precision in lax.DotAlgorithmPreset.__members__:
        return lax.DotAlgorithmPreset[precision]
    if isinstance(precision, str | lax.Precision):
        return (lax.Precision(precision),) * 2
    return tuple(map(lax.Precision, precision)) if isinstance(precision, tuple) else precision


_product_p = Primitive("jax_deepgemm_product")
_product_p.def_impl(functools.partial(xla.apply_primitive, _product_p))


def _params(contracts: Any, batch: Any, precision: Any, out_dtype: Any) -> dict[str, Any]:
    return {
        "dimension_numbers": (contracts, batch),
        "precision": precision,
        "preferred_element_type": out_dtype,
        "out_sharding": None,
    }


@_product_p.def_abstract_eval
def _(a: Any, b: Any, **params: Any) -> Any:
    return dot_general_p.abstract_eval(a, b, **_params(**params))[0]


def _bind(a: jax.Array, b: jax.Array, **params: Any) -> jax.Array:
    return dot_general_p.bind(a, b, **_params(**params))


mlir.register_lowering(_product_p, mlir.lower_fun(_bind, multiple_results=False))


def _map(
    args: Sequence[Any], mapped: Sequence[int | None], *, contracts: Any, batch: Any, **params: Any
) -> tuple[jax.Array, int]:
    """A dimension mapped in both operands is one more batch dimension; in one, one more of the result's."""
    contracts, batch = (tuple(map(_behind, dims, mapped)) for dims in (contracts, batch))
    if None not in mapped:
        batch = tuple((dim, *dims) for dim, dims in zip(mapped, batch, strict=True))
        return _product_p.bind(*args, contracts=contracts, batch=batch, **params), 0
    kept_a, kept_b = (
        [dim for dim in range(x.ndim) if dim not in (*summed, *shared)]
        for x, summed, shared in zip(args, contracts, batch, strict=True)
    )
    result = [*batch[0], *kept_a] if mapped[1] is None else [*batch[1], *(-1 for _ in kept_a), *kept_b]
    where = result.index(mapped[0] if mapped[1] is None else mapped[1])
    return _product_p.bind(*args, contracts=contracts, batch=batch, **params), where


def _behind(dims: Dims, mapped: int | None) -> Dims:
    """Dimensions of an operand, counted with the mapped one."""
    return dims if mapped is None else tuple(dim + (dim >= mapped) for dim in dims)


batching.primitive_batchers[_product_p] = _map
