"""Calls for compute-sanitizer: plans of one block, of a cluster and of a grid."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.core.sanitize import Case
from jax_deepgemm.ops.dispatch.api import plan_copies


def cases() -> Iterator[Case]:
    """Yields all meetings, each with few and with many experts, without and with a capacity."""
    rng = np.random.default_rng(0)
    for tokens, experts, capacity in (
        (3, 7, None),
        (250, 300, 2),
        (1001, 33, None),
        (1001, 33, 50),
        (5003, 2048, None),
        (5003, 300, 20),
    ):
        ids = jnp.asarray(rng.integers(-1, experts + 1, (tokens, 7)), jnp.int32)

        def joined(ids: jax.Array, experts: int = experts, capacity: int | None = capacity) -> jax.Array:
            return jnp.concatenate([x.reshape(-1) for x in plan_copies(ids, experts, capacity)])

        yield Case(f"dispatch {tokens * 7} of {experts} capacity {capacity}", joined, (ids,))
