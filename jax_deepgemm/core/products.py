"""Matrix products in plain XLA, as the references take them.

They bind JAX's primitive. Libraries that change a model's products (qwix) replace the code of
`jax.lax.dot_general` itself while the model runs; a reference that called it would be changed too, and JAX
would keep the program for all later calls.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
import numpy as np
from jax import lax
from jax.extend.core.primitives import dot_general_p

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
    """jax.lax.dot_general of arrays on one device."""
    return dot_general_p.bind(
        a,
        b,
        dimension_numbers=(contracts, batch),
        precision=_canonical(precision),
        preferred_element_type=np.dtype(out_dtype),
        out_sharding=None,
    )


def _canonical(precision: Any) -> Any:
    """Of all that JAX takes, what its primitive takes."""
    if isinstance(precision, str) and precision in lax.DotAlgorithmPreset.__members__:
        return lax.DotAlgorithmPreset[precision]
    if isinstance(precision, str | lax.Precision):
        return (lax.Precision(precision),) * 2
    return tuple(map(lax.Precision, precision)) if isinstance(precision, tuple) else precision
