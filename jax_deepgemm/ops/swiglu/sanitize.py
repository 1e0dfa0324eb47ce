"""Calls for compute-sanitizer: SwiGLU with quantising and without; each writes all results, one of them is
compared."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.core.sanitize import Case
from jax_deepgemm.ops.quantize.activation import GPT_OSS, Activation
from jax_deepgemm.ops.quantize.blocks import row_blocks
from jax_deepgemm.ops.swiglu.api import swiglu, swiglu_grad_quantize, swiglu_quantize

M, N = 520, 272  # tails in both dimensions
ROWS = 300  # that are valid


def cases() -> Iterator[Case]:
    """Yields widths of whole blocks of 128, of vectors only, and of neither; then activations that lie other
    than gate | up."""
    rng, rows, weight = np.random.default_rng(0), jnp.int32(ROWS), jnp.ones((M,), jnp.float32)
    for width in (2 * 128, N, N + 2):
        h, dact = (
            jnp.asarray(rng.standard_normal((M, columns)), jnp.bfloat16) for columns in (width, width // 2)
        )
        yield Case(f"swiglu {width}", lambda h: swiglu_quantize(h, weight, rows)[3], (h,))
        yield Case(
            f"swiglu_grad {width}", lambda h, d: swiglu_grad_quantize(h, weight, d, rows)[4], (h, dact)
        )
        blocks = row_blocks(jnp.asarray([130, 0, 7, 260]), M)
        for block_t in ((128, 1), (128, 128)):
            act = partial(swiglu_quantize, blocks=blocks, block_t=block_t)
            grad = partial(swiglu_grad_quantize, blocks=blocks, block_t=block_t)
            name = f"groups {block_t} {width}"
            yield Case(f"swiglu {name}", lambda h, f=act: f(h, weight)[1], (h,))
            yield Case(f"swiglu_grad {name}", lambda h, d, f=grad: f(h, weight, d)[4], (h, dact))
    for name, activation in {
        "gpt-oss": GPT_OSS,
        "relu2": Activation("relu2"),
        "gelu": Activation("gelu"),
    }.items():
        for width in (N, N + 2):
            h, dact = (
                jnp.asarray(rng.standard_normal((M, columns)), jnp.bfloat16)
                for columns in (width, width // activation.halves)
            )
            forth, back = (partial(f, activation=activation) for f in (swiglu_quantize, swiglu_grad_quantize))
            yield Case(f"{name} plain {width}", lambda h, a=activation: swiglu(h, weight, activation=a), (h,))
            yield Case(f"{name} plain gradient {width}", partial(_gradient, activation), (h, dact))
            yield Case(f"{name} {width}", lambda h, f=forth: f(h, weight, rows)[3], (h,))
            yield Case(f"{name} gradient {width}", lambda h, d, f=back: f(h, weight, d, rows)[4], (h, dact))


def _gradient(activation: Activation, h: jax.Array, dact: jax.Array) -> jax.Array:
    weight = jnp.ones((M,), jnp.float32)
    dh: jax.Array = jax.vjp(lambda h, weight: swiglu(h, weight, activation=activation), h, weight)[1](dact)[0]
    return dh
