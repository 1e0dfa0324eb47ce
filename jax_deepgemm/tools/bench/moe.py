"""A layer of experts end to end: from the router's logits to the combined tokens, and back.

DeepSeek-V3's sizes, with as many experts as one of eight devices holds: 4096 tokens go to 8 of 32 experts
each, 32768 rows in all, as such a device gets from all eight. "1 of 8 held": the tokens of one device alone
go to 8 of 256 experts, of which it holds 32; copies for the others are dropped. What is beside the GEMMs
(routing, moving rows, quantising, SwiGLU) is told apart from them by the names of the kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jax_deepgemm.tools.bench.machine import ClockLog
from jax_deepgemm.tools.bench.rows import GEMM_PREFIX, compile_job, figures
from jax_deepgemm.tools.bench.timing import Job, time_jobs

FORWARD, FROZEN, TRAINING = "forward", "forward, FP8 weights", "forward and backward"
HELD = "forward, FP8 weights, 1 of 8 held"
PASSES = (("fp8", FROZEN), ("fp8", FORWARD), ("fp8", TRAINING), ("bf16", FORWARD), ("bf16", TRAINING))
DEVICES = 8  # that share the experts of "held"


@dataclass(frozen=True)
class Problem:
    """One row.

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

    def __str__(self) -> str:
        sizes = f"tokens={self.tokens} hidden={self.hidden} inner={self.inner} experts={self.experts}"
        return f"moe {self.recipe} {self.what}: {sizes} top_k={self.top_k}"

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
    def row(self) -> dict[str, Any]:
        keys = ("recipe", "what", "tokens", "hidden", "inner", "experts", "top_k")
        return {"table": "moe"} | {key: getattr(self, key) for key in keys}


def tables() -> dict[str, list[Problem]]:
    """Returns the problems of the one table.

    >>> [str(row).split(":")[0] for row in tables()["moe"]][:2]
    ['moe fp8 forward, FP8 weights', 'moe fp8 forward']
    """
    return {"moe": [*(Problem(recipe, what) for recipe, what in PASSES), Problem("fp8", HELD, experts=256)]}


def small_tables() -> dict[str, list[Problem]]:
    """Returns small problems, to try the machinery where there is no GPU."""
    every = [Problem(recipe, what, 16, 256, 128, 4, 2) for recipe, what in PASSES]
    return {"moe": [*every, Problem("fp8", HELD, 16, 256, 128, 16, 2)]}


@functools.partial(jax.jit, static_argnums=0)
def operands(problem: Problem) -> tuple[Any, ...]:
    """Draws tokens, logits of the router, both weights, and the gradient of the result."""
    import jax_deepgemm

    keys = jax.random.split(jax.random.key(0), 5)
    draw = lambda key, *shape: jax.random.normal(key, shape, jnp.bfloat16)  # noqa: E731
    x, dy = (draw(key, problem.tokens, problem.hidden) for key in keys[:2])
    logits = jax.random.normal(keys[2], (problem.tokens, problem.experts))
    w13 = problem.hidden**-0.5 * draw(keys[3], problem.held, 2 * problem.inner, problem.hidden)
    w2 = problem.inner**-0.5 * draw(keys[4], problem.held, problem.hidden, problem.inner)
    weights = (w13.astype(jnp.bfloat16), w2.astype(jnp.bfloat16))
    if problem.what in (FROZEN, HELD):
        return (x, logits, *(jax_deepgemm.quantize(w, (128, 128)) for w in weights), dy)
    return (x, logits, *weights, dy)


def layer(problem: Problem) -> Callable[..., Any]:
    """Returns the function that is measured, of what `operands` draws."""
    from jax_deepgemm import moe

    def forward(x: Any, logits: Any, w13: Any, w2: Any) -> jax.Array:
        ids, weights = moe.route(logits, problem.top_k)
        expected = problem.tokens * problem.top_k // problem.experts
        return moe.moe_mlp(x, ids, weights, w13, w2, recipe=problem.recipe, expected_m=expected)

    def training(*arguments: Any) -> Any:
        y, vjp = jax.vjp(forward, *arguments[:-1])
        return y, vjp(arguments[-1])

    if problem.what == TRAINING:
        return training
    return lambda *arguments: forward(*arguments[:-1])


def measure(
    problems: Sequence[Problem], *, calls: int, flush: Callable[[], None], clocks: ClockLog | None
) -> Iterator[dict[str, Any]]:
    """Measures every problem; yields a row for each."""
    for problem in problems:
        try:
            drawn = operands(problem)
        except Exception as error:
            text = f"operands: {type(error).__name__}: {error}"[:400]
            yield problem.row | {"status": "failed", "error": text}
            continue
        compiled = compile_job(layer(problem), "jdg_moe", drawn)
        timing = None
        if compiled.run is not None:
            jobs = [Job("jdg_moe", compiled.run)]
            timing = time_jobs(jobs, calls=calls, flush=flush, clocks=clocks)["jdg_moe"]
        row = problem.row | {"compile_ms": round(compiled.milliseconds, 1)}
        yield row | _with_parts(figures(problem, timing, compiled.error))


def _with_parts(found: dict[str, Any]) -> dict[str, Any]:
    """Adds the time of the GEMM kernels, and of everything else, where there is a trace to tell."""
    if found.get("kernels"):
        gemms = sum(us for name, us in found["kernels"].items() if name.startswith(GEMM_PREFIX))
        found |= {"gemm_us": round(gemms, 3), "rest_us": round(found["us"] - gemms, 3)}
    return found
