"""Latent attention against float64, over drawn batches; bad data; transformations; writing to its cache."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jax_deepgemm.attention import mla_append, paged_mla_attention, sparse_mla_attention
from jax_deepgemm.ops.mla.op import PAGED, SPARSE
from jax_deepgemm.ops.mla.problem import MlaProblem
from tests.shared import mla_oracle, op_checks
from tests.shared.op_checks import OpCase, Shard

PAGES = MlaProblem(
    tokens=12, heads=5, seqs=5, columns=4, pages=18, page=16, layers=2, depth=48, v_depth=32, scale=0.2
)
NAMED = dataclasses.replace(PAGES, sparse=True, columns=30, seqs=12)
LENGTHS = [(1, 40), (5, 64), (0, 9), (3, 1), (2, 33)]
FORMS = {
    "causal": PAGES,
    "full": dataclasses.replace(PAGES, causal=False),
    "float16": dataclasses.replace(PAGES, dtype="f16", page=32, columns=2),
    "rows beyond": dataclasses.replace(PAGES, max_q_len=2),
    "named": NAMED,
    "named float16": dataclasses.replace(NAMED, dtype="f16"),
}


def run(p: MlaProblem, operands: mla_oracle.Operands, **options: Any) -> Any:
    x = {name: jnp.asarray(array) for name, array in operands.items()}
    options |= {"scale": p.scale, "v_head_dim": p.v_depth, "return_lse": True, "layer": x["layer"][0]}
    if p.sparse:
        return sparse_mla_attention(x["q"], x["cache"], x["tables"], **options)
    options |= {"causal": p.causal, "max_q_len": p.max_q_len or None}
    return paged_mla_attention(x["q"], x["cache"], x["tables"], x["cu_q_lens"], x["kv_lens"], **options)


def check(p: MlaProblem, operands: mla_oracle.Operands) -> None:
    out, lse = run(p, operands)
    want, want_lse = mla_oracle.attend(p, operands)
    assert out.dtype == operands["q"].dtype
    np.testing.assert_allclose(np.asarray(out, np.float64), want, atol=1e-2, rtol=1e-2)
    np.testing.assert_allclose(np.asarray(lse), want_lse, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_against_float64(form):
    """NaN is in all of the cache that is not seen."""
    p = FORMS[form]
    check(p, mla_oracle.draw_sparse(p, 0) if p.sparse else mla_oracle.draw(p, LENGTHS, 0, missing=0.2))


def test_what_no_cache_has_leaves_no_array():
    """Lengths beyond the tables and below zero, rows beyond q, slots and a layer that are not there."""
    most, least = 2**31 - 1, -(2**31)
    operands = mla_oracle.draw(PAGES, [(0, 5), (0, 0), (3, 64), (2, 1), (7, 33)], 1)
    operands |= {"cu_q_lens": np.array([6, least, 0, 3, 5, most], np.int32)}
    operands |= {"kv_lens": np.array([5, least, most, 1, 33], np.int32)}
    check(PAGES, operands)
    for p, given in ((PAGES, operands), (NAMED, mla_oracle.draw_sparse(NAMED, 1))):
        for layer in (2, -1):
            out, lse = run(p, given | {"layer": np.array([layer], np.int32)})
            assert not np.any(out)
            assert np.all(np.isneginf(lse))


def test_number_of_sequences():
    operands = mla_oracle.draw(PAGES, LENGTHS, 2)
    two = operands | {"tables": operands["tables"][:2], "cu_q_lens": operands["cu_q_lens"][:3]}
    want, _ = mla_oracle.attend(PAGES, two | {"kv_lens": operands["kv_lens"][:2]})
    for number in (2, jnp.int32(2)):
        out, _ = run(PAGES, operands, num_seqs=number)
        np.testing.assert_allclose(np.asarray(out, np.float64), want, atol=1e-2)


def test_appended_rows_are_attended_to():
    """Decoding by pages is decoding by their slots."""
    keys = jax.random.normal(jax.random.key(0), (40, 64), jnp.bfloat16)
    tables, at = jnp.array([[5, 1, 3]]), jnp.arange(40)
    slots = tables[0, at // 16] * 16 + at % 16
    cache = mla_append(jnp.full((6, 16, 64), jnp.nan, jnp.bfloat16), keys, slots)
    q = jax.random.normal(jax.random.key(1), (1, 3, 64), jnp.bfloat16)
    form = {"scale": 0.1, "v_head_dim": 64}
    paged = paged_mla_attention(q, cache, tables, jnp.array([0, 1]), jnp.array([40]), **form)
    named = sparse_mla_attention(q, cache, slots[None], **form)
    weights = jax.nn.softmax((q[0].astype(jnp.float32) @ keys.T.astype(jnp.float32)) * 0.1)
    np.testing.assert_allclose(paged[0], weights @ keys.astype(jnp.float32), atol=2e-2)
    np.testing.assert_allclose(paged, named, atol=2e-2)


def test_append():
    """Every bit of what is not written stays; donated, the cache is not copied."""
    rng = np.random.default_rng(0)
    cache = jnp.asarray(rng.integers(0, 2**16, (3, 4, 16, 32), np.uint16)).view(jnp.bfloat16)
    keys = jnp.asarray(rng.standard_normal((6, 32)), jnp.bfloat16)
    slots = np.array([63, -1, 64, 17, -(2**31), 2**31 - 1], np.int32)
    want = np.array(cache.view(jnp.uint16)).reshape(3, 64, 32)
    for row, slot in zip(np.asarray(keys.view(jnp.uint16)), slots, strict=True):
        if 0 <= slot < 64:
            want[1, slot] = row
    append = jax.jit(mla_append, donate_argnums=0)
    text = append.lower(cache, keys, slots, layer=jnp.int32(1)).as_text()
    assert "tf.aliasing_output" in text
    for layer in (3, -1):
        same = mla_append(cache, keys, slots, layer=jnp.int32(layer))
        np.testing.assert_array_equal(same.view(jnp.uint16), cache.view(jnp.uint16))
    got = append(cache, keys, slots, layer=jnp.int32(1))
    np.testing.assert_array_equal(got.view(jnp.uint16).reshape(3, 64, 32), want)


# Transformations --------------------------------------------------------------------------------------------

FORM = {"out_dtype": jnp.bfloat16, "v_head_dim": 16, "scale": 0.2, "split": 0}


def paged(*arrays: jax.Array, out_sharding: Any = None) -> Any:
    return tuple(PAGED(*arrays, out_sharding=out_sharding, causal=True, max_q_len=0, **FORM))


def sparse(*arrays: jax.Array, out_sharding: Any = None) -> Any:
    form = {name: value for name, value in FORM.items() if name != "split"}
    return tuple(SPARSE(*arrays, out_sharding=out_sharding, **form))


def operands_of(p: MlaProblem, seed: int) -> list[jax.Array]:
    """All rows see keys: a difference of infinities is none."""
    p = dataclasses.replace(p, tokens=8 if p.sparse else 6, heads=8, depth=32, layers=1)
    drawn = mla_oracle.draw_sparse(p, seed) if p.sparse else mla_oracle.draw(p, [(2, 20), (4, 9)], seed)
    drawn["cache"] = np.asarray(jnp.nan_to_num(jnp.asarray(drawn["cache"])))
    if p.sparse:
        drawn["tables"][:, 0] = 3
    return [jnp.asarray(array) for array in drawn.values()]


HEADS = P(None, "y")
CASES = [
    OpCase(
        "paged",
        paged,
        lambda seed: operands_of(dataclasses.replace(PAGES, seqs=2, columns=2, pages=6), seed),
        nests=(((0,) * 6,), ((0, None, None, 0, 0, None),)),
        shards=(Shard((HEADS, *(P(),) * 5), (HEADS, HEADS), modes=("auto", "explicit", "shard_map")),),
        tolerance=1e-2,
    ),
    OpCase(
        "sparse",
        sparse,
        lambda seed: operands_of(dataclasses.replace(NAMED, columns=7, pages=6), seed),
        nests=(((0,) * 4,),),
        shards=(
            Shard(
                (P("x", "y"), P(), P("x"), P()),
                (P("x", "y"), P("x", "y")),
                modes=("auto", "explicit", "shard_map"),
            ),
        ),
        tolerance=1e-2,
    ),
]


@pytest.mark.parametrize("check", op_checks.checks(CASES))
def test_op(check):
    check()


def test_export():
    x = [jnp.asarray(array) for array in mla_oracle.draw_sparse(NAMED, 3).values()]
    stored = jax.export.export(jax.jit(sparse), platforms=["cpu"])(*x).serialize()
    for got, want in zip(jax.export.deserialize(stored).call(*x), sparse(*x), strict=True):
        np.testing.assert_array_equal(got, want)


# Errors -----------------------------------------------------------------------------------------------------

CACHE = jnp.zeros((2, 16, 64), jnp.bfloat16)
Q, TABLES = jnp.zeros((4, 3, 64), jnp.bfloat16), jnp.zeros((2, 1), jnp.int32)
SLOTS = jnp.zeros((4, 5), jnp.int32)


def call_paged(q: Any = Q, cache: Any = CACHE, tables: Any = TABLES, **options: Any) -> Any:
    options = {"scale": 0.1, "v_head_dim": 32, **options}
    return paged_mla_attention(q, cache, tables, jnp.arange(3), jnp.ones(2, int), **options)


def call_sparse(q: Any = Q, cache: Any = CACHE, indices: Any = SLOTS, **options: Any) -> Any:
    return sparse_mla_attention(q, cache, indices, **{"scale": 0.1, "v_head_dim": 32, **options})


def append(cache: Any = CACHE, keys: Any = Q[:, 0], slots: Any = SLOTS[:, 0], **options: Any) -> Any:
    return mla_append(cache, keys, slots, **options)


@pytest.mark.parametrize(
    ("call", "given", "error", "match"),
    [
        (call_paged, {"q": Q.astype(jnp.float32)}, TypeError, r"q is float32 .* as the cache is\. Con"),
        (call_paged, {"q": Q[0]}, ValueError, r"q is bfloat16 \[3, 64\], need \[t, heads, 64\]"),
        (call_paged, {"cache": CACHE.astype(jnp.float32)}, TypeError, "cache is float32 .* or float16"),
        (call_paged, {"cache": CACHE[0]}, ValueError, r"need \[pages, page_size, head_dim\], or \[layers"),
        (call_paged, {"cache": CACHE[:, :9]}, ValueError, "page_size is 9, need one of 16, 32"),
        (call_paged, {"tables": TABLES[0]}, ValueError, r"block_tables are int32 \[1\]"),
        (call_paged, {"scale": None}, ValueError, r"scale is None, need a number: of DeepSeek's models 192"),
        (call_paged, {"scale": -1.0}, ValueError, "scale is -1.0, need a positive number"),
        (call_paged, {"v_head_dim": 65}, ValueError, "v_head_dim is 65, need 1 to head_dim = 64"),
        (call_paged, {"split": 0}, ValueError, "split is 0"),
        (call_paged, {"max_q_len": 0}, ValueError, "max_q_len is 0"),
        (call_paged, {"layer": 0}, ValueError, "so leave layer out"),
        (call_paged, {"cache": CACHE[None]}, ValueError, "layer is None and the cache has 1 layers"),
        (call_sparse, {"indices": SLOTS[0]}, ValueError, r"indices are int32 \[5\], need integers \[4, n\]"),
        (call_sparse, {"indices": SLOTS[:2]}, ValueError, r"indices is int32 \[2, 5\], need \[4, 5\]"),
        (call_sparse, {"indices": SLOTS * 1.0}, TypeError, "indices is float32"),
        (call_sparse, {"scale": None}, ValueError, "sparse_mla_attention: scale is None"),
        (append, {"keys": Q[:, 0].astype(jnp.float32)}, TypeError, r"keys is float32 .* keys.astype\("),
        (append, {"keys": Q[:, 0, :32]}, ValueError, r"keys is bfloat16 \[4, 32\], need \[4, 64\]"),
        (append, {"slots": SLOTS}, ValueError, r"slots is int32 \[4, 5\], need \[4\]"),
    ],
)  # fmt: skip
def test_errors(call, given, error, match):
    with pytest.raises(error, match=match):
        call(**given)


@pytest.mark.parametrize("call", [call_paged, call_sparse])
def test_there_is_no_derivative(call):
    with pytest.raises(NotImplementedError, match="to train, expand latents"):
        jax.grad(lambda q: call(q=q).astype(jnp.float32).sum())(Q)
