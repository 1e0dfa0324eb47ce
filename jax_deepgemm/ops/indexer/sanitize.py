"""Calls for compute-sanitizer: logits of every form of the kernel, with tails of tokens and of keys."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_deepgemm.core.sanitize import Case, on_few
from jax_deepgemm.ops.indexer.api import bf16_mqa_logits, mqa_logits
from jax_deepgemm.ops.indexer.paged import paged_mqa_logits
from jax_deepgemm.ops.indexer.paged_op import bytes_of
from jax_deepgemm.ops.quantize import quantize
from jax_deepgemm.ops.quantize.fp4 import quantize_fp4

FORMS = (
    (9, 389, 64, 128, False),
    (21, 301, 32, 64, True),
    (37, 130, 3, 32, False),
    (5, 700, 120, 128, True),
    (8, 256, 128, 128, False),
)
"""Tokens, keys, heads, d, compressed; what lies beyond the tokens and keys is nobody's."""


def cases() -> Iterator[Case]:
    """Yields each form with FP8 and BF16 operands; minus infinity is 0, so that differences are numbers."""
    for tokens, keys, heads, depth, compressed in FORMS:
        rng = np.random.default_rng(tokens)
        q = jnp.asarray(rng.normal(size=(tokens, heads, depth)), jnp.bfloat16)
        kv = jnp.asarray(rng.normal(size=(keys, depth)), jnp.bfloat16)
        weights = jnp.asarray(rng.normal(size=(tokens, heads)), jnp.float32)
        bounds = [jnp.asarray(x, jnp.int32) for x in np.sort(rng.integers(0, keys + 1, (2, tokens)), axis=0)]
        name = f"logits {tokens}x{keys} h={heads} d={depth}"
        for kind, function, operands in (
            ("fp8", mqa_logits, (quantize(q), quantize(kv))),
            ("bf16", bf16_mqa_logits, (q, kv)),
        ):
            run = on_few(function, compressed=compressed)
            yield Case(f"{name} {kind}", functools.partial(_finite, run), (*operands, weights, *bounds))

    yield from _pages()
    yield from _tokens()


def _pages() -> Iterator[Case]:
    """A context of nothing, and of all; in both formats."""
    for page, heads, tokens, joined in ((16, 64, 1, True), (64, 32, 3, False), (128, 24, 2, True)):
        rng = np.random.default_rng(page)
        q = jnp.asarray(rng.normal(size=(5, tokens, heads, 128)), jnp.float8_e4m3fn)
        values = jnp.asarray(rng.normal(size=(9, page, 128)), jnp.float8_e4m3fn)
        scales = jnp.asarray(rng.uniform(0.5, 2, (9, page)), jnp.float32)
        cache = bytes_of(values, scales).reshape(9, page, 132) if joined else (values, scales)
        weights = jnp.asarray(rng.normal(size=(5, tokens, heads)), jnp.float32)
        lens = jnp.asarray([0, 3 * page, 1, 2 * page, page + 1], jnp.int32)
        tables = jnp.asarray(rng.integers(0, 9, (5, 3)), jnp.int32)
        run = functools.partial(_finite, on_few(paged_mqa_logits))
        yield Case(f"logits of pages of {page}", run, (q, cache, weights, lens, tables))
        small = quantize_fp4(values.astype(jnp.float32) * scales[..., None])
        words = small.scales.view(jnp.int32)[..., 0]
        cache = bytes_of(small.values, words).reshape(9, page, 68) if joined else (small.values, words)
        yield Case(f"logits of FP4 pages of {page}", run, (q, cache, weights, lens, tables))


def _tokens() -> Iterator[Case]:
    """Requests of no token, of one, and of more than a block of threads takes."""
    for heads, lengths in ((64, (0, 1, 6, 2)), (16, (9, 3, 0, 20))):
        rng = np.random.default_rng(heads)
        whose = np.repeat(np.arange(4, dtype=np.int32), lengths)
        tokens = len(whose)
        q = jnp.asarray(rng.normal(size=(tokens, 1, heads, 64)), jnp.float8_e4m3fn)
        values = jnp.asarray(rng.normal(size=(9, 32, 64)), jnp.float8_e4m3fn)
        scales = jnp.asarray(rng.uniform(0.5, 2, (9, 32)), jnp.float32)
        weights = jnp.asarray(rng.normal(size=(tokens, 1, heads)), jnp.float32)
        lens = jnp.asarray(rng.integers(0, 161, tokens), jnp.int32)
        tables, indices = jnp.asarray(rng.integers(0, 9, (4, 5)), jnp.int32), jnp.asarray(whose)
        operands = q, (values, scales), weights, lens, tables, indices
        yield Case(
            f"logits of tokens of requests h={heads}", functools.partial(_finite, _with_indices), operands
        )


def _with_indices(*operands: Any) -> Any:
    *others, indices = operands
    return on_few(paged_mqa_logits, indices=indices)(*others)


def _finite(function: object, *operands: object) -> object:
    logits = function(*operands)  # type: ignore[operator]
    return jnp.where(jnp.isinf(logits), 0, logits)
