"""Operands as callers hold them."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np


def unwrapped(x: Any) -> Any:
    """The array in an object that says how to become one (`__jax_array__`), a flax.nnx.Param say; else x.

    An object that refuses, as a QuantizedArray does, stays as it is.

    >>> class Weight:
    ...     def __jax_array__(self):
    ...         return np.ones(2)
    >>> unwrapped(Weight()), unwrapped("x")
    (array([1., 1.]), 'x')
    """
    if isinstance(x, (jax.Array, np.ndarray)) or not hasattr(type(x), "__jax_array__"):
        return x
    try:
        return x.__jax_array__()
    except TypeError:
        return x
