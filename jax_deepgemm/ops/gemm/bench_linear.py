"""Rows of the benchmark: a linear layer forward and backward, beside the same in BF16 by cuBLASLt."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jax_deepgemm.core.bench import BESIDE_BASELINE, CLOCK, Beside, Row, Table
from jax_deepgemm.ops.gemm.linear import fp8_linear
from jax_deepgemm.ops.quantize.api import quantize
from jax_deepgemm.ops.quantize.prepared import prepare_weight

FROZEN, TRAINING = "forward, FP8 weight", "forward and backward"
PREPARED = f"{TRAINING}, weight prepared"
SQUARE = f"{PREPARED}, dw 128x128"
SIZES = ((8192, 4096, 7168), (8192, 7168, 2048))
"""Tokens, n, k."""
GEMM_PREFIX = "jdg_sm90_"
"""How the names of all kernels of products begin."""
CUBLASLT_ONLY = {"xla_gpu_enable_triton_gemm": False}


@functools.partial(jax.jit, static_argnums=range(3))
def _draw(m: int, n: int, k: int) -> tuple[Any, ...]:
    """x, w, the gradient of the result, w in FP8, and prepared."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (m, k), (n, k), (m, n)
    x, w, dy = (jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True))
    return x, w, dy, quantize(w, (128, 128)), prepare_weight(w)


def _training(layer: Callable[..., jax.Array], x: jax.Array, w: jax.Array, dy: jax.Array) -> Any:
    y, vjp = jax.vjp(layer, x, w)
    return y, vjp(dy)


def _prepared(scales: str, x: jax.Array, w: Any, dy: jax.Array) -> Any:
    layer = functools.partial(fp8_linear, weight_gradient=scales)
    return _training(lambda x, master: layer(x, w.with_master(master)), x, w.master, dy)


def _bf16(x: jax.Array, w: jax.Array) -> jax.Array:
    return x @ w.T


WAYS: dict[str, tuple[Callable[..., Any], Callable[..., Any], int]] = {
    FROZEN: (fp8_linear, _bf16, 3),
    TRAINING: (functools.partial(_training, fp8_linear), functools.partial(_training, _bf16), 1),
    PREPARED: (functools.partial(_prepared, "1x128"), functools.partial(_training, _bf16), 4),
    SQUARE: (functools.partial(_prepared, "128x128"), functools.partial(_training, _bf16), 4),
}
"""What is measured: in FP8, in BF16, and which of the draw is the weight in FP8."""


def _operands(what: str, weight: int, drawn: tuple[Any, ...]) -> tuple[Any, ...]:
    x, dy = drawn[0], drawn[2]
    return (x, drawn[weight]) if what == FROZEN else (x, drawn[weight], dy)


def rows(small: bool) -> Iterator[Row]:
    """The table's rows."""
    for m, n, k in ((64, 256, 128),) if small else SIZES:
        draw = functools.partial(_draw, m, n, k)
        for what, (ours, theirs, weight) in WAYS.items():
            yield Row(
                name=f"linear {what}: m={m} n={n} k={k}",
                fields={"what": what, "m": m, "n": n, "k": k},
                function=ours,
                draw=draw,
                flops=2 * m * n * k * (1 if what == FROZEN else 3),
                operands=functools.partial(_operands, what, weight),
                prefix="",
                gemms=GEMM_PREFIX,
                baseline=Beside(
                    "BF16 by cuBLASLt through jnp",
                    theirs,
                    functools.partial(_operands, what, 1),
                    elsewhere="XLA dot",
                    options=CUBLASLT_ONLY,
                ),
            )


TABLE = Table(
    "fp8_linear with a bfloat16 weight, all kernels, beside BF16 through jnp",
    ("what", "m", "n", "k"),
    rows,
    columns=(
        *("us", "span us", "TFLOP/s", "GEMMs us", "launches", "temp GB"),
        *(*BESIDE_BASELINE, "{baseline} temp GB", CLOCK),
    ),
    baseline="BF16 by cuBLASLt",
    elsewhere="XLA",
    part=lambda fields: str(fields["what"]),
    order=2,
    in_bf16=lambda fields: {},
)
