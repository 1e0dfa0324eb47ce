"""Layers of experts on a GPU: values and gradients against float32, and decoding without compiling again.

Run: pytest -m gpu tests/gpu/test_moe_gpu.py        (about 30 s)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_deepgemm as jdg
from jax_deepgemm import moe
from tests.shared import grouped_products as oracle
from tests.shared import moe_oracle
from tests.shared.gpu_programs import difference, program
from tests.shared.moe_oracle import normal, random_ids

BF16, F32 = jnp.bfloat16, jnp.float32
moe_plain = program(moe_oracle.moe_plain)
LINEAR_LIMIT = {"fp8": 1e-3, "bf16": 2e-5}
MLP_LIMIT = {"fp8": 3e-3, "bf16": 1e-4}  # two GEMMs, and a rounding between them


def value_and_gradients(function: Callable[..., jax.Array], arrays: tuple[Any, ...], dy: jax.Array) -> Any:
    def run(*arrays: Any) -> tuple[jax.Array, ...]:
        y, vjp = jax.vjp(function, *arrays)
        return y, *vjp(dy.astype(y.dtype))

    return program(run)(*arrays)


def check(got: tuple[Any, ...], want: tuple[Any, ...], limit: float) -> None:
    found = [float(difference(one, other)) for one, other in zip(got, want, strict=True)]
    assert all(value < limit for value in found), found


@pytest.mark.parametrize("recipe", ["fp8", "bf16"])
@pytest.mark.parametrize(
    ("sizes", "n", "k"),
    [([100, 0, 333, 79, 1], 1024, 768), ([60, 5, 3], 200, 264), ([0, 0], 136, 128)],
    ids=("many", "odd", "empty"),
)
def test_grouped_linear(recipe, sizes, n, k):
    """The rows behind the last group count nowhere."""
    rows = sum(sizes) + 33
    x, w = normal(0, rows, k), normal(1, len(sizes), n, k, dtype=F32, scale=k**-0.5)
    dy = normal(2, rows, n)
    at = oracle.place(sizes, rows)

    member = jnp.asarray(at.index == np.arange(len(sizes))[:, None], F32)

    def plain(x: jax.Array, w: jax.Array) -> jax.Array:
        every = jnp.einsum("mk,gnk->gmn", x.astype(F32), w, precision="highest")
        return jnp.einsum("gm,gmn->mn", member, every, precision="highest")

    group_sizes = jnp.asarray(sizes, jnp.int32)
    layer = lambda x, w: jdg.grouped_linear(x, w, group_sizes, recipe=recipe, out_dtype=F32)  # noqa: E731
    got = value_and_gradients(layer, (x, w), dy)
    assert [z.dtype for z in got] == [F32, BF16, F32]
    check(got, value_and_gradients(plain, (x, w), dy), LINEAR_LIMIT[recipe])


TOKENS, TOP_K, EXPERTS, HIDDEN, INNER = 300, 3, 8, 512, 384


def operands(tokens: int = TOKENS, seed: int = 0) -> tuple[jax.Array, ...]:
    ids = random_ids(seed, tokens, TOP_K, EXPERTS, dropped=0.1)
    weights = jax.nn.softmax(normal(seed + 1, tokens, TOP_K, dtype=F32))
    w13 = normal(seed + 2, EXPERTS, 2 * INNER, HIDDEN, dtype=F32, scale=HIDDEN**-0.5)
    w2 = normal(seed + 3, EXPERTS, HIDDEN, INNER, dtype=F32, scale=INNER**-0.5)
    return normal(seed + 4, tokens, HIDDEN), ids, weights, w13, w2


@pytest.mark.parametrize("recipe", ["fp8", "bf16"])
@pytest.mark.parametrize("tokens", [TOKENS, 5])
def test_moe_mlp(recipe, tokens):
    x, ids, weights, w13, w2 = operands(tokens)
    layer = lambda x, weights, w13, w2: moe.moe_mlp(x, ids, weights, w13, w2, recipe=recipe)  # noqa: E731
    plain = lambda x, weights, w13, w2: moe_oracle.moe_plain(x, ids, weights, w13, w2)  # noqa: E731
    dy = normal(9, tokens, HIDDEN)
    got = value_and_gradients(layer, (x, weights, w13, w2), dy)
    check(got, value_and_gradients(plain, (x, weights, w13, w2), dy), MLP_LIMIT[recipe])


def test_frozen_weights_and_repeatability():
    x, ids, weights, w13, w2 = operands()
    frozen = jdg.quantize(w13, (128, 128)), jdg.quantize(w2, (128, 128))
    layer = jax.jit(moe.moe_mlp)
    first = layer(x, ids, weights, *frozen)
    assert all(np.array_equal(first, layer(x, ids, weights, *frozen)) for _ in range(5))
    want = moe_plain(x, ids, weights, w13, w2)
    assert float(difference(first, want)) < MLP_LIMIT["fp8"]


@pytest.mark.smoke
@pytest.mark.parametrize("recipe", ["fp8", "bf16"])
def test_decoding_compiles_once(recipe):
    """Another routing is other data, also when all tokens go to the same experts."""
    x, _, weights, w13, w2 = operands(16)
    prepared = (jdg.quantize(w13, (128, 128)), jdg.quantize(w2, (128, 128))) if recipe == "fp8" else (w13, w2)
    step = jax.jit(lambda *args: moe.moe_mlp_decode(*args, recipe=recipe))
    for seed in range(4):
        ids = random_ids(seed, 16, TOP_K, EXPERTS) if seed else jnp.tile(jnp.arange(TOP_K), (16, 1))
        got = step(x, ids, weights, *prepared)
        want = moe_plain(x, ids, weights, w13, w2)
        assert float(difference(got, want)) < MLP_LIMIT[recipe]
    assert step._cache_size() == 1
