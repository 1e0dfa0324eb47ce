"""The dtype of intermediate results."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def wider(dtype: Any, other: Any = jnp.float32) -> np.dtype[Any]:
    """The dtype in which sums of both are taken.

    It is chosen here, and no operand is promoted unasked, so `jax_numpy_dtype_promotion` has no say.
    """
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(dtype, other)
