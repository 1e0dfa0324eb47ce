"""Shared experts on a GPU: both forms against the routed experts and the shared one in calls of their own.

Run: pytest -m gpu tests/gpu/test_moe_shared_gpu.py        (about 15 s)
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_deepgemm import quantize
from jax_deepgemm.moe import SharedExperts, moe_mlp, moe_mlp_decode
from tests.shared.moe_oracle import normal, pull, random_ids, relative

F32 = jnp.float32
H, I, E, K = 512, 256, 8, 2  # and one expert more, the shared one
CASES = [
    ("fp8", 300),
    pytest.param("fp8", 7, marks=pytest.mark.smoke),
    ("bf16", 129),
    ("fp8", 1),
]


def operands(tokens: int) -> tuple[jax.Array, list[jax.Array]]:
    """ids; x, weights, w13 and w2 with the shared expert."""
    return random_ids(0, tokens, K, E, dropped=0.1), [
        normal(0, tokens, H),
        jax.nn.softmax(normal(1, tokens, K, dtype=F32)),
        normal(2, E + 1, 2 * I, H, dtype=F32, scale=H**-0.5),
        normal(3, E + 1, H, I, dtype=F32, scale=I**-0.5),
    ]


@pytest.mark.parametrize(("recipe", "tokens"), CASES)
def test_both_forms(recipe, tokens):
    ids, args = operands(tokens)
    every = jnp.zeros((tokens, 1), jnp.int32)
    wide = args[0].dtype

    def apart(x: Any, weights: Any, w13: Any, w2: Any) -> jax.Array:
        routed = moe_mlp(x, ids, weights, w13[:-1], w2[:-1], recipe=recipe)
        shared = moe_mlp(x, every, jnp.ones((tokens, 1)), w13[-1:], w2[-1:], recipe=recipe)
        return (routed.astype(F32) + shared.astype(F32)).astype(wide)

    def last(x: Any, weights: Any, w13: Any, w2: Any) -> jax.Array:
        return moe_mlp(x, ids, weights, w13, w2, shared=1, recipe=recipe)

    def own(x: Any, weights: Any, w13: Any, w2: Any) -> jax.Array:
        shared = SharedExperts(w13[-1], w2[-1])
        return moe_mlp(x, ids, weights, w13[:-1], w2[:-1], shared=shared, recipe=recipe)

    dy = normal(4, tokens, H)
    want = pull(apart, *args, by=dy)
    for run in (last, own):
        got = pull(run, *args, by=dy)
        for one, other in zip(got, want, strict=True):
            assert relative(one, other) < 0.01, run.__name__
    for _ in range(20):
        for one, other in zip(pull(own, *args, by=dy), got, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("tokens", [1, 24])
def test_decoding_with_frozen_weights(tokens):
    ids, (x, weights, w13, w2) = operands(tokens)
    frozen = [quantize(w, (128, 128)) for w in (w13, w2)]
    first, alone = ([quantize(w[part], (128, 128)) for w in (w13, w2)] for part in (slice(E), E))
    want = jax.jit(lambda *w: moe_mlp(x, ids, weights, *w, shared=1))(*frozen)
    for layer in (moe_mlp, moe_mlp_decode):
        own = jax.jit(lambda w, s, layer=layer: layer(x, ids, weights, *w, shared=SharedExperts(*s)))(
            first, alone
        )
        last = jax.jit(lambda *w, layer=layer: layer(x, ids, weights, *w, shared=1))(*frozen)
        assert relative(own, want) < 0.01
        assert relative(last, want) < 0.01
