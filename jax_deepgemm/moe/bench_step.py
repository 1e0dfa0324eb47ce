"""Rows of the benchmark: one training step of a block with experts, written in several ways.

The block: RMS norm, router, experts of Qwen3's shape, and the sum with its input; the step: gradients of its
input and of all parameters, and plain SGD on these. "moe_mlp" is this package's layer; the others sort and
sum rows by `dispatch` and `combine`, and have grouped products between. The weights have the layout that each
way takes: [experts, n, k], or for `ragged_dot` [experts, k, n].
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_deepgemm.core.bench import BESIDE_BASELINE, CLOCK, Beside, Row, Table
from jax_deepgemm.moe.dispatch import combine, dispatch
from jax_deepgemm.moe.layer import moe_mlp
from jax_deepgemm.moe.route import route
from jax_deepgemm.ops.gemm.bench import GEMM_PREFIX
from jax_deepgemm.ops.grouped.linear import grouped_linear
from jax_deepgemm.ops.ragged_dot.api import ragged_dot

KEYS = ("tokens", "hidden", "inner", "experts", "top_k")
QWEN, SMALL = (8192, 2048, 768, 32, 8), (16, 256, 128, 4, 2)
RATE = 1e-3  # of SGD
CALLS = 3  # of the step with jax.lax.ragged_dot, 100 ms each

Product = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(rows, weights, group sizes) -> rows."""
Experts = Callable[..., jax.Array]
"""(x, ids, routing weights, w13, w2) -> y."""


def of_products(product: Product, num_experts: int) -> Experts:
    """A layer of experts as users write it with grouped products."""

    def experts(x: jax.Array, ids: jax.Array, weights: jax.Array, w13: jax.Array, w2: jax.Array) -> jax.Array:
        rows, plan = dispatch(x, ids, num_experts)
        gate, up = jnp.split(product(rows, w13, plan.group_sizes), 2, axis=-1)
        return combine(product(jax.nn.silu(gate) * up, w2, plan.group_sizes), plan, weights)

    return experts


def _step(experts: Experts, top_k: int, x: jax.Array, dy: jax.Array, params: Any) -> tuple[Any, ...]:
    """The block's result, the gradient of x, and the parameters one step further."""

    def block(x: jax.Array, params: Any) -> jax.Array:
        scale, router, w13, w2 = params
        wide = x.astype(jnp.float32)
        inverse = lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)
        norm = (wide * inverse * scale).astype(x.dtype)
        logits = jnp.einsum("th,eh->te", norm, router, preferred_element_type=jnp.float32)
        return x + experts(norm, *route(logits, top_k), w13, w2)

    y, vjp = jax.vjp(block, x, params)
    dx, gradients = vjp(dy)
    return y, dx, jax.tree.map(lambda w, dw: w - jnp.asarray(RATE, w.dtype) * dw, params, gradients)


@functools.partial(jax.jit, static_argnums=0)
def _draw(sizes: tuple[int, ...]) -> tuple[Any, ...]:
    """x, the gradient of the result, and parameters in both layouts."""
    tokens, hidden, inner, experts, _ = sizes
    keys = jax.random.split(jax.random.key(0), 5)
    x, dy = (jax.random.normal(key, (tokens, hidden), jnp.bfloat16) for key in keys[:2])
    router = jax.random.normal(keys[2], (experts, hidden), jnp.bfloat16) * jnp.bfloat16(hidden**-0.5)
    w13 = jax.random.normal(keys[3], (experts, 2 * inner, hidden), jnp.bfloat16) * jnp.bfloat16(hidden**-0.5)
    w2 = jax.random.normal(keys[4], (experts, hidden, inner), jnp.bfloat16) * jnp.bfloat16(inner**-0.5)
    scale = jnp.ones(hidden)
    return x, dy, (scale, router, w13, w2), (scale, router, w13.mT, w2.mT)


def rows(small: bool) -> Iterator[Row]:
    """The table's rows, all on the same draw."""
    sizes = SMALL if small else QWEN
    tokens, hidden, inner, experts, top_k = sizes
    draw = functools.partial(_draw, sizes)
    given, transposed = (lambda drawn: drawn[:3]), (lambda drawn: (*drawn[:2], drawn[3]))
    step = lambda how: functools.partial(_step, how, top_k)  # noqa: E731
    theirs = Beside("jax.lax.ragged_dot", step(of_products(lax.ragged_dot, experts)), transposed, calls=CALLS)
    ways: dict[str, tuple[Experts, Any]] = {
        "moe_mlp, fp8": (functools.partial(moe_mlp, recipe="fp8"), given),
        "moe_mlp, bf16": (functools.partial(moe_mlp, recipe="bf16"), given),
        "grouped_linear, fp8": (of_products(grouped_linear, experts), given),
        "ragged_dot, bf16": (of_products(ragged_dot, experts), transposed),
    }
    for way, (how, operands) in ways.items():
        yield Row(
            name=f"moe_step {way}: tokens={tokens} hidden={hidden} inner={inner} experts={experts}",
            fields={"way": way, **dict(zip(KEYS, sizes, strict=True))},
            function=step(how),
            draw=draw,
            flops=18 * tokens * top_k * hidden * inner,
            operands=operands,
            prefix="",
            gemms=GEMM_PREFIX,
            baseline=theirs if way == "ragged_dot, bf16" else None,
        )


TABLE = Table(
    "A training step of a block with experts: norm, router, experts, gradients, SGD; bfloat16 weights",
    ("way", *KEYS),
    rows,
    columns=("us", "span us", "GEMMs us", "launches", "temp GB", *BESIDE_BASELINE, CLOCK),
    baseline="jax.lax.ragged_dot",
    part=lambda fields: "",
    order=2,
    in_bf16=lambda fields: {"way": "moe_mlp, bf16"} if fields["way"] == "moe_mlp, fp8" else None,
)
