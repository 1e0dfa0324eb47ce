"""Matrix products of XLA, with derivatives.

The primitive is bound as it is, because libraries that change a model's products (qwix) replace the code of
`jax.lax.dot_general` while the model runs: see core/products.py, whose product has no derivative.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
import numpy as np
from jax import lax
from jax.extend.core.primitives import dot_general_p

from jax_deepgemm.core.derivatives import same_varying_axes

Dims: TypeAlias = tuple[int, ...]


def product(
    a: jax.Array,
    b: jax.Array,
    contracts: tuple[Dims, Dims],
    batch: tuple[Dims, Dims] = ((), ()),
    out_dtype: Any = np.float32,
) -> jax.Array:
    """Sums in float32 of products of two arrays of one dtype; those of float32 are not rounded to TF32."""
    a, b = same_varying_axes((a, b))
    precision: Any = lax.Precision.HIGHEST if a.dtype == np.float32 else lax.Precision.DEFAULT
    return dot_general_p.bind(
        a,
        b,
        dimension_numbers=(contracts, batch),
        precision=(precision, precision),
        preferred_element_type=np.dtype(out_dtype),
        out_sharding=None,
    )
