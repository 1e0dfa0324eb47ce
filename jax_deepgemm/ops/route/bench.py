"""Rows of the benchmark: routing, and its gradient, beside the same in jnp."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jax_deepgemm.core.bench import BESIDE_BASELINE, CLOCK, Beside, Fields, Row, Table
from jax_deepgemm.ops.route import reference
from jax_deepgemm.ops.route.api import DEEPSEEK_V3, route
from jax_deepgemm.ops.route.router import Router

CHOICE, GRADIENT = "choice", "gradient"
ROUTERS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "softmax": (256, 8, {}),
    "DeepSeek-V3": (256, 8, dict(DEEPSEEK_V3)),
    "DeepSeek-V4": (256, 6, {"score": "sqrt_softplus", "scale": 1.5}),
    "Qwen3": (128, 8, {}),
    "Mixtral": (8, 2, {}),
}
"""Name -> experts, top_k, options. DeepSeek's have a bias."""
TOKENS = (1, 64, 4096, 16384)


def _router(top_k: int, options: dict[str, Any]) -> Router:
    return Router(top_k, **{"renormalize": True, **options})


def _draw(tokens: int, experts: int, top_k: int) -> tuple[jax.Array, ...]:
    """Logits, a bias, and the gradient of the weights."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((tokens, experts), (experts,), (tokens, top_k))
    return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))


def _functions(kind: str, name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The public function and jnp, of what `_draw` returns."""
    _, top_k, options = ROUTERS[name]
    router = _router(top_k, options)
    biased = name.startswith("DeepSeek")

    def ours(logits: Any, bias: Any, by: Any) -> Any:
        return route(logits, top_k, bias=bias if biased else None, **options)

    def plain(logits: Any, bias: Any, by: Any) -> Any:
        return reference.choose(logits, bias if biased else None, router)

    if kind == CHOICE:
        return ours, plain
    return tuple(  # type: ignore[return-value]
        lambda logits, bias, by, one=one: jax.vjp(lambda x: one(x, bias, by)[1], logits)[1](by)[0]
        for one in (ours, plain)
    )


def _bytes(kind: str, tokens: int, experts: int, top_k: int) -> int:
    """Logits, ids and weights, each once; the gradient is of both passes, which read and write more."""
    choice = tokens * (experts * 4 + top_k * 8)
    return choice if kind == CHOICE else choice + tokens * (2 * experts * 4 + top_k * 8)


def _rows(small: bool) -> Iterator[Row]:
    for name in ("Mixtral",) if small else ROUTERS:
        experts, top_k, _ = ROUTERS[name]
        for tokens in (16,) if small else TOKENS:
            for kind in (CHOICE, GRADIENT):
                ours, plain = _functions(kind, name)
                yield Row(
                    f"route {kind} {name} tokens={tokens} experts={experts} top_k={top_k}",
                    {"kind": kind, "router": name, "tokens": tokens, "experts": experts, "top_k": top_k},
                    ours,
                    functools.partial(_draw, tokens, experts, top_k),
                    bytes=_bytes(kind, tokens, experts, top_k),
                    baseline=Beside("jnp, XLA", plain),
                    read_flush=kind == CHOICE,
                )


def _reads(fields: Fields) -> int | None:
    return fields["tokens"] * fields["experts"] * 4 if fields["kind"] == CHOICE else None


TABLES = {
    "route": Table(
        "Routing of float32 logits, and both passes of it, beside jnp",
        ("kind", "router", "tokens", "experts", "top_k"),
        _rows,
        columns=("us", "GB/s", *BESIDE_BASELINE, CLOCK),
        baseline="jnp",
        part=lambda fields: str(fields["kind"]),
        order=2,
        reads=_reads,
    )
}
