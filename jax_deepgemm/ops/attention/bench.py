"""Rows of the benchmark: decoding, prompts and parts of prompts from pages, beside cuDNN's attention to the
same keys and values where they lie without pages."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.core.bench import BESIDE_BASELINE, CLOCK, Beside, Fields, Row, Table
from jax_deepgemm.ops.attention.api import ragged_paged_attention
from jax_deepgemm.ops.paged_append.cache import PagedKVCache

DECODING = (
    (1, 8192, 64, 8, 128, "bfloat16", 16),
    (1, 1024, 32, 4, 128, "bfloat16", 16),
    (1, 32768, 32, 8, 128, "float8_e4m3fn", 16),
    (1, 262144, 32, 4, 128, "float8_e4m3fn", 16),
    (32, 4096, 32, 8, 128, "bfloat16", 16),
    (32, 4096, 32, 8, 128, "bfloat16", 256),
    (32, 4096, 32, 8, 128, "float8_e4m3fn", 16),
    (8, 32768, 32, 8, 128, "bfloat16", 16),
    (64, 2048, 64, 8, 64, "bfloat16", 64),
    (32, 4096, 16, 4, 256, "bfloat16", 64),
)
"""Sequences, keys, heads, heads of the cache, numbers of a head, type of the cache, page."""
DRAWN = ((64, 3000, 32, 4, 128, "bfloat16", 64), (256, 700, 32, 8, 128, "float8_e4m3fn", 64))
"""The same with lengths drawn around these."""
PROMPTS = (
    (1, 8192, 8192, 32, 8, 128, "bfloat16", 16),
    (1, 8192, 8192, 32, 8, 128, "bfloat16", 256),
    (1, 8192, 8192, 32, 8, 128, "float8_e4m3fn", 64),
    (8, 512, 8704, 32, 8, 128, "bfloat16", 16),
    (1, 8192, 8192, 64, 8, 64, "bfloat16", 64),
    (1, 8192, 8192, 16, 4, 256, "bfloat16", 64),
    (16, 700, 1500, 32, 8, 128, "bfloat16", 64),
)
"""Sequences, rows of each, keys of each, and as above."""
_KEYS = ("sequences", "rows", "keys", "heads", "kv_heads", "depth", "stored", "page")


def _lengths(sequences: int, keys: int, drawn: bool) -> np.ndarray:
    if not drawn:
        return np.full(sequences, keys, np.int32)
    return np.random.default_rng(0).integers(1, 2 * keys, sequences).astype(np.int32)


def _draw(form: tuple[Any, ...], drawn: bool) -> tuple[Any, ...]:
    sequences, rows, keys, heads, kv, depth, stored, page = form
    lens = _lengths(sequences, keys, drawn)
    columns = -(-int(lens.max()) // page)
    pages = sequences * columns
    random = jax.random.split(jax.random.key(0), 3)
    shape = (1, pages, kv, page, depth)
    k, v = (jax.random.normal(one, shape, jnp.bfloat16).astype(stored) for one in random[:2])
    q = jax.random.normal(random[2], (sequences * rows, heads, depth), jnp.bfloat16)
    tables = np.random.default_rng(1).permutation(pages).reshape(sequences, columns).astype(np.int32)
    starts = (np.arange(sequences + 1) * rows).astype(np.int32)
    ones = jnp.ones((1, kv), jnp.float32)
    return q, PagedKVCache(k, v, ones, ones), *map(jnp.asarray, (tables, starts, lens))


def _without_pages(drawn: tuple[Any, ...]) -> tuple[Any, ...]:
    """q [b, rows, h, d], k and v [b, keys, g, d], of other numbers, and the lengths."""
    q, cache, tables, _, lens = drawn
    sequences, columns = tables.shape
    shape = (sequences, columns * cache.page_size, cache.kv_heads, cache.head_dim)
    k, v = (x.astype(jnp.bfloat16).reshape(shape) for x in (cache.k, cache.v))
    return q.reshape(sequences, -1, *q.shape[1:]), k, v, lens


def _cudnn(causal: bool, q: Any, k: Any, v: Any, lens: Any) -> jax.Array:
    """A mask by jax.nn's `is_causal` begins with the first row and key, so that it is right for whole prompts
    alone; parts of prompts are measured without a mask, at 2 % more keys."""
    given = {} if causal else {"key_value_seq_lengths": lens}
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn", **given)


def _row(form: tuple[Any, ...], drawn: bool) -> Row:
    sequences, rows, keys, heads, kv, depth, stored, _ = form
    lens = _lengths(sequences, keys, drawn).astype(np.int64)
    seen = int((lens * rows - rows * (rows - 1) // 2).sum())  # pairs of a row and a key
    width = 1 if stored == "float8_e4m3fn" else 2
    whole = rows == keys
    names = [f"{key}={value}" for key, value in zip(_KEYS, form, strict=True)]
    attend = functools.partial(ragged_paged_attention, max_q_len=rows)
    return Row(
        name=" ".join(["attention", *names, *["drawn"] * drawn]),
        fields={**dict(zip(_KEYS, form, strict=True)), "drawn": drawn},
        function=attend,
        draw=functools.partial(_draw, form, drawn),
        flops=4 * seen * heads * depth,
        bytes=int(lens.sum()) * kv * depth * 2 * width + 4 * sequences * rows * heads * depth,
        baseline=Beside(
            "cuDNN without pages, bfloat16",
            functools.partial(_cudnn, whole),
            operands=_without_pages,
            elsewhere="jax.nn.dot_product_attention",
            skipped="" if jax.default_backend() == "gpu" else "cuDNN runs on GPUs alone",
        ),
        read_flush=rows == 1,
    )


def _decoding(small: bool) -> Iterator[Row]:
    for drawn, forms in ((False, DECODING), (True, DRAWN)):
        for sequences, *rest in ((2, 40, 4, 2, 64, "bfloat16", 16),) if small else forms:
            yield _row((sequences, 1, *rest), drawn)


def _prompts(small: bool) -> Iterator[Row]:
    for form in ((1, 30, 40, 4, 2, 64, "bfloat16", 16),) if small else PROMPTS:
        yield _row(form, False)


def _reads(fields: Fields) -> int:
    lens = _lengths(fields["sequences"], fields["keys"], fields["drawn"])
    width = 1 if fields["stored"] == "float8_e4m3fn" else 2
    return int(lens.astype(np.int64).sum()) * fields["kv_heads"] * fields["depth"] * 2 * width


TABLES = {
    "attention_decode": Table(
        "One new token of each sequence attends to its keys in pages, beside cuDNN without pages",
        (*(key for key in _KEYS if key != "rows"), "drawn"),
        _decoding,
        columns=("us", "GB/s", *BESIDE_BASELINE, CLOCK),
        baseline="cuDNN",
        part=lambda fields: "",
        order=3,
        reads=_reads,
    ),
    "attention_prefill": Table(
        "Prompts and parts of prompts attend to keys in pages, beside cuDNN without pages",
        _KEYS,
        _prompts,
        columns=("us", "TFLOP/s", *BESIDE_BASELINE, CLOCK),
        baseline="cuDNN",
        part=lambda fields: "",
        order=3,
    ),
}
