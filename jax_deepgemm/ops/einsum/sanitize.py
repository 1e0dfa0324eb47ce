"""Calls of einsums for compute-sanitizer: a batch between rows and columns, and runs of k, with tails."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.core.sanitize import Case, on_few
from jax_deepgemm.ops.einsum.api import bf16_einsum, fp8_einsum
from jax_deepgemm.ops.gemm.config import GemmConfig
from jax_deepgemm.ops.quantize.api import quantize

HEADS = 3
SPLIT = GemmConfig(64, 64, 8, split_k=4)
UP = "bhr,hdr->bhd"


def cases() -> Iterator[Case]:
    """Yields each place of the batch, with every kind of store, and runs in both kernels."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)

    x, few, w, dy = (
        normal(200, HEADS, 264),
        normal(5, HEADS, 264),
        normal(HEADS, 136, 264),
        normal(200, 3, 136),
    )
    up = on_few(functools.partial(bf16_einsum, UP))
    yield Case("einsum bf16 inside", up, (x, w))
    yield Case("einsum bf16 inside, few rows", functools.partial(bf16_einsum, UP), (few, w))
    yield Case("einsum bf16 inside, odd columns", up, (x, w[:, :133]))
    yield Case("einsum bf16 down", on_few(functools.partial(bf16_einsum, "bhd,hdr->bhr")), (dy, w))
    yield Case("einsum bf16 gradient", on_few(functools.partial(bf16_einsum, "bhd,bhr->hdr")), (dy, x))
    for out_dtype in (jnp.float32, jnp.bfloat16):
        for columns in (136, 133):
            c = jnp.ones((200, HEADS, columns), out_dtype)
            added = on_few(functools.partial(bf16_einsum, UP), out_dtype=out_dtype)
            yield Case(f"einsum bf16 inside + C {c.dtype} {columns}", added, (x, w[:, :columns], c))
    q_w = quantize(w, (128, 128))
    yield Case("einsum fp8 inside", on_few(functools.partial(fp8_einsum, UP)), (quantize(x), q_w))
    yield Case("einsum fp8 few rows", functools.partial(fp8_einsum, UP), (quantize(few), q_w))
    yield Case("einsum fp8 rows", on_few(functools.partial(fp8_einsum, UP)), (quantize(x), quantize(w)))
    a, b = normal(7, 72, 72), normal(7, 136, 72)
    runs = functools.partial(bf16_einsum, "bmk,bnk->mn")
    yield Case("einsum bf16 runs", on_few(runs), (a, b))
    yield Case("einsum bf16 runs, split", functools.partial(runs, config=SPLIT), (a, b))
    turned = functools.partial(bf16_einsum, "bkm,nbk->mn", config=SPLIT)
    yield Case("einsum bf16 runs of columns", turned, (normal(7, 72, 72), normal(136, 7, 72)))
