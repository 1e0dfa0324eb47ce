"""Rows of the benchmark: a layer of experts, from the router's logits to the combined tokens, and back.

DeepSeek-V3's sizes, with as many experts as one of eight devices holds: 4096 tokens go to 8 of 32 experts
each, 32768 rows in all, as such a device gets from all eight. "1 of 8 held": the tokens of one device alone
go to 8 of 256 experts, of which it holds 32; copies for the others are dropped. What is beside the GEMMs
(routing, moving rows, quantising, SwiGLU) is told apart from them by the names of the kernels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jax_deepgemm.core.bench import CLOCK, Row, Table
from jax_deepgemm.moe.layer import moe_mlp
from jax_deepgemm.moe.route import route
from jax_deepgemm.ops.gemm.bench import GEMM_PREFIX
from jax_deepgemm.ops.quantize.api import quantize

FORWARD, FROZEN, TRAINING = "forward", "forward, FP8 weights", "forward and backward"
HELD = "forward, FP8 weights, 1 of 8 held"
PASSES = (("fp8", FROZEN), ("fp8", FORWARD), ("fp8", TRAINING), ("bf16", FORWARD), ("bf16", TRAINING))
DEVICES = 8  # that share the experts of "held"


@dataclass(frozen=True)
class Layer:
    """What a row runs.

    Attributes:
      recipe: "fp8" or "bf16".
      what: "forward" and "forward and backward" have bfloat16 master weights, which FP8 quantises each time;
        "forward, FP8 weights" has them quantised before.
      experts: that tokens are routed to; all are held, but for "1 of 8 held".
    """

    recipe: str
    what: str
    tokens: int = 4096
    hidden: int = 7168
    inner: int = 2048
    experts: int = 32
    top_k: int = 8

    @property
    def held(self) -> int:
        """Experts whose weights are here."""
        return self.experts // DEVICES if self.what == HELD else self.experts

    @property
    def flops(self) -> int:
        """Of the GEMMs: three matrices, and in the backward pass twice as much again."""
        copies = self.tokens * self.top_k * self.held // self.experts  # on average
        forward = 6 * copies * self.hidden * self.inner
        return forward * (3 if self.what == TRAINING else 1)

    @property
    def bytes(self) -> int:
        """Of the weights, the tokens and the results, each once (and their gradients)."""
        weights = 3 * self.held * self.hidden * self.inner
        stored = weights * (1 if self.what in (FROZEN, HELD) else 2) + 4 * self.tokens * self.hidden
        return stored * (2 if self.what == TRAINING else 1)

    @property
    def row(self) -> Row:
        """What the benchmark measures."""
        sizes = f"tokens={self.tokens} hidden={self.hidden} inner={self.inner} experts={self.experts}"
        return Row(
            name=f"moe {self.recipe} {self.what}: {sizes} top_k={self.top_k}",
            fields=dataclasses.asdict(self),
            function=_function(self),
            draw=functools.partial(_draw, self),
            flops=self.flops,
            bytes=self.bytes,
            prefix="",
            gemms=GEMM_PREFIX,
        )


def _rows(small: bool) -> Iterator[Row]:
    sizes = {"tokens": 16, "hidden": 256, "inner": 128, "top_k": 2} if small else {}
    experts, all_experts = (4, 16) if small else (32, 256)
    for recipe, what in PASSES:
        yield Layer(recipe, what, experts=experts, **sizes).row
    yield Layer("fp8", HELD, experts=all_experts, **sizes).row


@functools.partial(jax.jit, static_argnums=0)
def _draw(layer: Layer) -> tuple[Any, ...]:
    """Tokens, logits of the router, both weights, and the gradient of the result."""
    keys = jax.random.split(jax.random.key(0), 5)
    draw = lambda key, *shape: jax.random.normal(key, shape, jnp.bfloat16)  # noqa: E731
    x, dy = (draw(key, layer.tokens, layer.hidden) for key in keys[:2])
    logits = jax.random.normal(keys[2], (layer.tokens, layer.experts))
    w13 = layer.hidden**-0.5 * draw(keys[3], layer.held, 2 * layer.inner, layer.hidden)
    w2 = layer.inner**-0.5 * draw(keys[4], layer.held, layer.hidden, layer.inner)
    weights = (w13.astype(jnp.bfloat16), w2.astype(jnp.bfloat16))
    if layer.what in (FROZEN, HELD):
        return (x, logits, *(quantize(w, (128, 128)) for w in weights), dy)
    return (x, logits, *weights, dy)


def _function(layer: Layer) -> Callable[..., Any]:
    """What is measured, of what `_draw` returns."""

    def forward(x: Any, logits: Any, w13: Any, w2: Any) -> jax.Array:
        ids, weights = route(logits, layer.top_k)
        expected = layer.tokens * layer.top_k // layer.experts
        return moe_mlp(x, ids, weights, w13, w2, recipe=layer.recipe, expected_m=expected)

    def training(*arguments: Any) -> Any:
        y, vjp = jax.vjp(forward, *arguments[:-1])
        return y, vjp(arguments[-1])

    return training if layer.what == TRAINING else lambda *arguments: forward(*arguments[:-1])


TABLES = {
    "moe": Table(
        "A layer of experts, from the router's logits to the combined tokens, all kernels",
        ("recipe", "what", "tokens", "hidden", "inner", "experts", "top_k"),
        _rows,
        columns=("us", "TFLOP/s", "GEMMs us", "rest us", "rest", CLOCK),
        part=lambda fields: "",
        order=2,
    )
}
