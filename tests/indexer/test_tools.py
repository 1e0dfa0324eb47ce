"""What tools know of the indexer: shapes that people name, configurations, operands to measure with."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jax_deepgemm as jdg
from jax_deepgemm.indexer import IndexerConfig, paged_mqa_logits
from jax_deepgemm.tools import shape_files
from jax_deepgemm.tools.bench import catalog, products

pytestmark = pytest.mark.any_version

SHAPES: list[tuple[dict[str, Any], str]] = [
    ({"op": "mqa_logits", "tokens": 2048, "keys": 8192, "heads": 32}, "mqa_logits e4m3 2048x8192"),
    ({"op": "mqa_logits", "tokens": 100, "keys": 900, "recipe": "bf16", "compressed": True}, "bf16 100x900"),
    ({"op": "paged_mqa_logits", "requests": 64, "pages": 128, "next_n": 2}, "8192 joined pages of 64"),
    ({"op": "paged_mqa_logits", "requests": 3, "pages": 5, "page": "16", "joined": False, "out": "bfloat16"},
     "15 pages of 16 batches=3"),
    ({"op": "mqa_logits", "tokens": 2, "keys": 8192, "recipe": "fp4"}, "2x8192 of 8192 FP4 keys"),
    ({"op": "paged_mqa_logits", "requests": 64, "pages": 128, "keys": "fp4"}, "8192 FP4 keys"),
    ({"op": "topk", "rows": 64, "columns": 65536, "k": 2048}, "top 2048 of 64x65536 float32"),
    ({"op": "indexer_quantize", "tokens": 64, "heads": 32}, "rows 2048x128 bfloat16 rotated"),
    ({"op": "indexer_quantize", "tokens": 64, "page": 64, "scales": "ue8m0"}, "joined to 1 pages of 64"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "problem"), SHAPES, ids=lambda x: x["op"] if isinstance(x, dict) else "")
def test_shapes_are_explained(row, problem):
    pytest.importorskip("cuda.core")
    pytest.importorskip("jax_deepgemm._ffi")
    [call] = shape_files.shape_of(row).calls()
    [found] = jdg.explain(call.function, *call.operands, show=False)
    assert problem in str(found.problem)
    assert found.kernels
    assert not any(kernel.spill_bytes for kernel in found.kernels)


def test_a_configuration_can_be_chosen():
    pytest.importorskip("cuda.core")
    pytest.importorskip("jax_deepgemm._ffi")
    [call] = shape_files.shape_of({"op": "paged_mqa_logits", "requests": 4, "pages": 8}).calls()
    few = IndexerConfig(tokens=1, stages=3)
    given = functools.partial(paged_mqa_logits, config=few)
    [free], [fixed] = (jdg.explain(f, *call.operands, show=False) for f in (call.function, given))
    assert free.config == free.candidates[0][0] != few
    assert (fixed.config, fixed.origin) == (few, "given")


@pytest.mark.parametrize("table", ["mqa_logits", "paged_mqa_logits"])
def test_what_tune_measures_has_keys_to_score(table):
    """Windows, contexts and tables have their own values, also where operands are drawn."""
    row = next(iter(catalog.tables()[table].rows(True)))
    [operands] = products.drawn([products.of_row(row).operands])
    logits = row.function(*operands)
    assert np.mean(np.isfinite(logits)) > 0.3
    assert np.unique(logits[np.isfinite(logits)]).size > 20


@pytest.mark.parametrize("row", [row for row, _ in SHAPES[:4]], ids=lambda row: row["op"])
def test_what_tune_measures_of_shapes_has_all_keys(row):
    sizes = {name: 9 for name in ("tokens", "keys", "requests", "pages") if name in row}
    apart = {"joined": False} if "pages" in row else {}  # bytes that are drawn are no scales
    work = products.of_shape(shape_files.shape_of(row | sizes | apart))
    [operands] = products.drawn([work.operands])
    logits = work.function(*operands)
    assert logits.size
    assert np.isfinite(logits.astype(jnp.float32)).all()


def test_models_are_measured():
    """Heads of V3.2, V4 and GLM-5, and of 16; a chunk of a prompt, causal; decoding with a token or more."""
    logits = [row.fields for row in catalog.tables()["mqa_logits"].rows(False)]
    assert {row["h"] for row in logits if row["d"] == 128 and row["type"] == "fp8"} == {16, 32, 64}
    assert {row["window"] for row in logits if row["n"] > row["s"]} == {"all", "causal"}
    pages = [row.fields for row in catalog.tables()["paged_mqa_logits"].rows(False)]
    assert {row["h"] for row in pages} == {16, 32, 64}
    assert {1, 2, 4, 8} <= {row["next_n"] for row in pages}
