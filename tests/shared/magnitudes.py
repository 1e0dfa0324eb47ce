"""Layers whose gradients keep their relative error whatever the size of what comes in; for CPU and GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jax_deepgemm import dequantize, fp8_gemm_nt, fp8_linear, grouped_linear, quantize
from jax_deepgemm.moe import expert_mlp, moe_mlp, route
from tests.shared.gpu_programs import program
from tests.shared.moe_oracle import moe_plain, normal, relative

F32 = jnp.float32
SIZES = (1e-30, 1e-20, 1e-12, 1e-9, 1e-4, 1.0, 1e10, 1e30)
POWERS = (-64, -30, 30, 64)
TOKENS, HIDDEN, INTERMEDIATE, EXPERTS = 40, 256, 128, 4


class Layer(NamedTuple):
    """A function of arrays, its arguments, and the same in float32 for the error."""

    function: Callable[..., jax.Array]
    arguments: tuple[jax.Array, ...]
    plain: Callable[..., jax.Array]
    limit: float


@functools.cache
def layers() -> dict[str, Layer]:
    x = normal(0, TOKENS, HIDDEN)
    w = normal(1, 136, HIDDEN, dtype=F32, scale=HIDDEN**-0.5)
    grouped = normal(2, EXPERTS, 136, HIDDEN, dtype=F32, scale=HIDDEN**-0.5)
    w13 = normal(3, EXPERTS, 2 * INTERMEDIATE, HIDDEN, dtype=F32, scale=HIDDEN**-0.5)
    w2 = normal(4, EXPERTS, HIDDEN, INTERMEDIATE, dtype=F32, scale=INTERMEDIATE**-0.5)
    ids, weights = jax.jit(route, static_argnums=1)(normal(5, TOKENS, EXPERTS, dtype=F32), 2)
    sizes = jnp.array([10, 0, 25, 5], jnp.int32)
    expert = jnp.repeat(jnp.arange(EXPERTS), sizes, total_repeat_length=TOKENS)[:, None]
    dot = functools.partial(jnp.einsum, precision="highest")

    def plain_linear(x: jax.Array, w: jax.Array) -> jax.Array:
        return dot("mk,nk->mn", x.astype(F32), w)

    def plain_grouped(x: jax.Array, w: jax.Array) -> jax.Array:
        return dot("mk,mnk->mn", x.astype(F32), w[expert[:, 0]])

    def e5m2(x: jax.Array, w: jax.Array) -> jax.Array:
        return fp8_linear(x, w, grad_dtype=jnp.float8_e5m2)

    def ue8m0(x: jax.Array, w: jax.Array) -> jax.Array:
        return fp8_linear(x, w, scale_format="ue8m0")

    def through_experts(x: jax.Array, weights: jax.Array, w13: jax.Array, w2: jax.Array) -> jax.Array:
        return moe_mlp(x, ids, weights, w13, w2)

    def plain_moe(x: jax.Array, weights: jax.Array, w13: jax.Array, w2: jax.Array) -> jax.Array:
        return moe_plain(x, ids, weights, w13, w2)

    ones = jnp.ones((TOKENS, 1), F32)
    return {
        "fp8_linear": Layer(fp8_linear, (x, w), plain_linear, 0.05),
        "fp8_linear_e5m2": Layer(e5m2, (x, w), plain_linear, 0.09),
        "fp8_linear_ue8m0": Layer(ue8m0, (x, w), plain_linear, 0.06),
        "grouped_linear": Layer(lambda x, w: grouped_linear(x, w, sizes), (x, grouped), plain_grouped, 0.05),
        "expert_mlp": Layer(
            lambda x, w13, w2: expert_mlp(x, w13, w2, sizes),
            (x, w13, w2),
            lambda x, w13, w2: moe_plain(x, expert, ones, w13, w2),
            0.09,
        ),
        "moe_mlp": Layer(through_experts, (x, weights, w13, w2), plain_moe, 0.09),
    }


def gradients(function: Callable[..., jax.Array], arguments: tuple[jax.Array, ...]) -> Callable[..., Any]:
    """A compiled function of the incoming gradient, float32."""

    def run(dy: jax.Array) -> tuple[Any, ...]:
        y, vjp = jax.vjp(function, *arguments)
        return vjp(dy.astype(y.dtype))

    return program(run)


@functools.cache
def compiled(name: str) -> tuple[Layer, Callable[..., Any], jax.Array]:
    """A layer, its gradients, and an incoming gradient that is a bfloat16 number."""
    layer = layers()[name]
    shape = jax.eval_shape(layer.function, *layer.arguments).shape
    return layer, gradients(layer.function, layer.arguments), normal(7, *shape).astype(F32)


def check_relative_errors(name: str) -> None:
    """Gradients of a layer against float32, for incoming gradients of every size."""
    layer, pull, dy = compiled(name)
    exact = gradients(layer.plain, layer.arguments)(dy)
    for size in SIZES:
        for i, (got, want) in enumerate(zip(pull(dy * size), exact, strict=True)):
            error = relative(np.asarray(got, np.float64) / size, want)
            assert error < layer.limit, (name, size, i, error)


def check_loss_scaling(name: str) -> None:
    """An incoming gradient times a power of two gives the same bits, times that power."""
    _, pull, dy = compiled(name)
    plain = pull(dy)
    for power in POWERS:
        for got, want in zip(pull(dy * 2.0**power), plain, strict=True):
            assert got.dtype == want.dtype
            np.testing.assert_array_equal(
                np.asarray(got, np.float64), np.asarray(want, np.float64) * 2.0**power
            )


def check_quantize(block: tuple[int, int], dtype: str, scale_format: str) -> None:
    """Values keep their relative error, and products theirs."""
    limit = 2.0**-4 if dtype == "float8_e4m3fn" else 2.0**-3
    x = np.asarray(normal(8, 130, 260, dtype=F32))
    step = jax.jit(lambda x: dequantize(quantize(x, block, getattr(jnp, dtype), scale_format)))
    for size in SIZES:
        assert relative(np.asarray(step(x * np.float32(size)), np.float64) / size, x) < limit, size


def check_products() -> None:
    x, w = normal(0, 40, 260, dtype=F32), normal(1, 136, 260, dtype=F32)
    step = jax.jit(lambda x, w: fp8_gemm_nt(quantize(x), quantize(w, (128, 128)), out_dtype=F32))
    plain = np.asarray(step(x, w), np.float64)
    for power in POWERS:
        for left, right in ((power, 0), (0, power), (power, -power)):
            got = np.asarray(step(x * 2.0**left, w * 2.0**right), np.float64)
            np.testing.assert_array_equal(got, plain * 2.0 ** (left + right))


# Neighbours ------------------------------------------------------------------------------------------------

LARGER = 1e6
"""How much larger the tokens of the first group are than the others'."""
NEIGHBOURING = ("grouped_linear", "expert_mlp", "moe_mlp")
NEIGHBOURS = np.array([5, 0, 25, 10], np.int32)
"""Rows of each group, all within 128."""


def neighbours() -> dict[str, Layer]:
    """Layers each of whose tokens goes to one expert; those of the first expert are `LARGER`."""
    x = normal(0, TOKENS, HIDDEN)
    expert = np.repeat(np.arange(EXPERTS), NEIGHBOURS)
    x = jnp.where(expert[:, None] == 0, x.astype(F32) * LARGER, x.astype(F32)).astype(x.dtype)
    grouped, (w13, w2) = layers()["grouped_linear"].arguments[1], layers()["expert_mlp"].arguments[1:]
    order = np.random.default_rng(0).permutation(TOKENS)
    ids, ones = jnp.asarray(expert[order])[:, None], jnp.ones((TOKENS, 1), F32)
    exact = functools.partial(jnp.einsum, "mk,mnk->mn", precision="highest")
    return {
        "grouped_linear": Layer(
            lambda w: grouped_linear(x, w, jnp.asarray(NEIGHBOURS)),
            (grouped,),
            lambda w: exact(x.astype(F32), w[expert]),
            0.05,
        ),
        "expert_mlp": Layer(
            lambda w13, w2: expert_mlp(x, w13, w2, jnp.asarray(NEIGHBOURS)),
            (w13, w2),
            lambda w13, w2: moe_plain(x, jnp.asarray(expert)[:, None], ones, w13, w2),
            0.09,
        ),
        "moe_mlp": Layer(
            lambda w13, w2: moe_mlp(x[order], ids, ones, w13, w2),
            (w13, w2),
            lambda w13, w2: moe_plain(x[order], ids, ones, w13, w2),
            0.09,
        ),
    }


def check_neighbours(name: str) -> None:
    """Gradients of the other experts' weights are right, however large the tokens of the first are."""
    layer = neighbours()[name]
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("one",))  # all rows are surely on one device
    whole = jax.shard_map(layer.function, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    dy = normal(7, *jax.eval_shape(layer.plain, *layer.arguments).shape).astype(F32)
    got, want = (gradients(f, layer.arguments)(dy) for f in (whole, layer.plain))
    for one, other in zip(got, want, strict=True):
        for expert in np.flatnonzero(NEIGHBOURS)[1:]:
            error = relative(one[expert], other[expert])
            assert error < layer.limit, (name, expert, error)
