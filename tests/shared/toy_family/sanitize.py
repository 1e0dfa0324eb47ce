"""A call for compute-sanitizer."""

from __future__ import annotations

from collections.abc import Iterator

import jax.numpy as jnp

from jax_deepgemm.core.sanitize import Case
from tests.shared.toy_family.op import scale


def cases() -> Iterator[Case]:
    """Rows and columns that fill no block."""
    yield Case("toy scale", scale, (jnp.ones((33, 65)), jnp.arange(65.0)))
