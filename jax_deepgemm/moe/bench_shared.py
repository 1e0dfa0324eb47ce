"""Rows of the benchmark: a layer with a shared expert, which is the last of w13 and w2, in the same launches,
or has weights and launches of its own; and the layer without it.

DeepSeek-V3's sizes, the choice of experts given, as in `moe_inference`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_deepgemm.core.bench import CLOCK, Row, Table
from jax_deepgemm.moe.layer import moe_mlp
from jax_deepgemm.moe.route import route
from jax_deepgemm.moe.shared import SharedExperts
from jax_deepgemm.ops.gemm.bench import GEMM_PREFIX
from jax_deepgemm.ops.quantize.api import quantize

KEYS = ("tokens", "hidden", "inner", "experts", "top_k")
FORWARD, TRAINING = "forward, FP8 weights", "forward and backward"
ALONE, LAST, OWN = "none", "last of w13", "weights of its own"
Sizes = tuple[int, int, int, int, int]
SMALL: Sizes = (16, 256, 128, 4, 2)
DECODING: tuple[Sizes, ...] = ((1, 7168, 2048, 256, 8), (128, 7168, 2048, 32, 8))
MANY: Sizes = (4096, 7168, 2048, 32, 8)


@dataclass(frozen=True)
class _Case:
    what: str
    shared: str
    sizes: Sizes

    @property
    def row(self) -> Row:
        tokens, hidden, inner, _, top_k = self.sizes
        copies = tokens * (top_k + (self.shared != ALONE))
        named = dict(zip(KEYS, self.sizes, strict=True))
        words = " ".join(f"{name}={size}" for name, size in named.items())
        return Row(
            name=f"moe_shared {self.what}, shared: {self.shared}: {words}",
            fields={"what": self.what, "shared": self.shared, **named},
            function=functools.partial(_training if self.what == TRAINING else _forward, self.shared),
            draw=_drawing(self.sizes, self.what == FORWARD),
            operands=functools.partial(_operands, self.shared),
            flops=6 * copies * hidden * inner * (3 if self.what == TRAINING else 1),
            prefix="",
            gemms=GEMM_PREFIX,
        )


@functools.cache
def _drawing(sizes: Sizes, frozen: bool) -> Callable[[], Any]:
    """One for all rows of equal operands."""
    return functools.partial(_draw, sizes, frozen)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _draw(sizes: Sizes, frozen: bool) -> tuple[Any, ...]:
    """Tokens, ids, weights, the gradient of the result, and w13 and w2 with one expert more."""
    tokens, hidden, inner, experts, top_k = sizes
    keys = jax.random.split(jax.random.key(0), 5)
    x, dy = (jax.random.normal(key, (tokens, hidden), jnp.bfloat16) for key in keys[:2])
    ids, weights = route(jax.random.normal(keys[2], (tokens, experts)), top_k)

    def weight(key: jax.Array, n: int, k: int) -> Any:
        def one(key: jax.Array) -> Any:
            w = k**-0.5 * jax.random.normal(key, (n, k))
            return quantize(w, (128, 128)) if frozen else w.astype(jnp.bfloat16)

        return lax.map(one, jax.random.split(key, experts + 1))

    return x, ids, weights, dy, weight(keys[3], 2 * inner, hidden), weight(keys[4], hidden, inner)


def _operands(shared: str, drawn: tuple[Any, ...]) -> tuple[Any, ...]:
    *routed, w13, w2 = drawn
    if shared == LAST:
        return *routed, (w13, w2), ()
    experts = jax.tree.leaves(w13)[0].shape[0] - 1
    first, last = (
        jax.tree.map(lambda part, index=index: part[index], (w13, w2))
        for index in (slice(experts), slice(experts, None))
    )
    return *routed, first, last if shared == OWN else ()


def _layer(shared: str, x: Any, ids: Any, weights: Any, w: Any, own: Any) -> jax.Array:
    given = {ALONE: None, LAST: 1, OWN: SharedExperts(*own) if own else None}[shared]
    return moe_mlp(x, ids, weights, *w, shared=given)


def _forward(shared: str, x: Any, ids: Any, weights: Any, dy: Any, w: Any, own: Any) -> jax.Array:
    return _layer(shared, x, ids, weights, w, own)


def _training(shared: str, x: Any, ids: Any, weights: Any, dy: Any, w: Any, own: Any) -> Any:
    y, vjp = jax.vjp(lambda x, weights, w, own: _layer(shared, x, ids, weights, w, own), x, weights, w, own)
    return y, vjp(dy)


def _rows(small: bool) -> Iterator[Row]:
    for sizes in (SMALL,) if small else (*DECODING, MANY):
        for shared in (ALONE, LAST, OWN):
            yield _Case(FORWARD, shared, sizes).row
    for shared in (ALONE, LAST, OWN):
        yield _Case(TRAINING, shared, SMALL if small else MANY).row


TABLE = Table(
    "A layer of experts with a shared expert, FP8: as the last of w13 and w2, or with weights of its own",
    ("what", "shared", *KEYS),
    _rows,
    columns=("us", "span us", "GEMMs us", "launches", "temp GB", CLOCK),
    part=lambda fields: "",
    order=2,
)
