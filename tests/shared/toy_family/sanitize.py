"""A call for compute-sanitizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from tests.shared.toy_family.op import scale


def cases() -> Iterator[tuple[str, Callable[..., jax.Array], tuple[Any, ...]]]:
    """Yields (name, function, operands)."""
    yield "toy scale", scale, (jnp.ones((33, 65)), jnp.arange(65.0))
