"""Calls for compute-sanitizer: chains of one token and of many, on few SMs and on all."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.core.sanitize import FEW_SMS, Case
from jax_deepgemm.ops.experts.api import experts_swiglu
from jax_deepgemm.ops.quantize import quantize


def cases() -> Iterator[Case]:
    """Yields k of whole quads and of others, tiles of one row and of many, copies that are dropped."""
    rng = np.random.default_rng(0)
    for tokens, top_k, hidden, inner, experts, sms in (
        (1, 8, 1024, 512, 40, None),
        (9, 3, 512, 384, 5, FEW_SMS),
        (90, 2, 512, 128, 3, None),
    ):
        keys = jax.random.split(jax.random.key(tokens), 3)
        x = jax.random.normal(keys[0], (tokens, hidden), jnp.bfloat16)
        w13 = quantize(jax.random.normal(keys[1], (experts, 2 * inner, hidden)), (128, 128))
        w2 = quantize(jax.random.normal(keys[2], (experts, hidden, inner)), (128, 128))
        ids = jnp.asarray(rng.integers(-1, experts, (tokens, top_k)), jnp.int32)
        weights = jnp.full((tokens, top_k), 1 / top_k, jnp.float32)

        def layer(*given: jax.Array, sms: int | None = sms) -> jax.Array:
            return experts_swiglu(*given, num_sms=sms)  # type: ignore[arg-type]

        yield Case(f"experts tokens={tokens} experts={experts}", layer, (x, ids, weights, w13, w2))
