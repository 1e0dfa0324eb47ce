"""Latent attention on a GPU, over pages and named keys, against float64.

Run: pytest -m gpu tests/gpu/test_mla_gpu.py        (about a minute)
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_deepgemm.core import launch
from jax_deepgemm.core.chip import H200
from jax_deepgemm.jit import compile_kernel
from jax_deepgemm.ops.mla import sm90
from jax_deepgemm.ops.mla.family import MlaConfig
from jax_deepgemm.ops.mla.op import PAGED, SPARSE
from jax_deepgemm.ops.mla.problem import MlaProblem
from tests.shared import mla_oracle

SCALE = 192**-0.5
# Sequences (tokens, keys), and what problem and configuration are beside the usual ones.
PAGED_FORMS: dict[str, tuple[list[tuple[int, int]], dict[str, Any], MlaConfig | None]] = {
    "16 heads": ([(1, 300), (1, 1), (1, 0), (1, 64), (1, 4000), (2, 65)], {}, None),
    "16 steps held": ([(1, 300), (1, 1), (1, 0), (1, 64), (1, 4000), (2, 65)], {}, MlaConfig(1, 16)),
    "128 heads": ([(1, 900), (1, 63), (2, 2000), (1, 129)], {"heads": 128}, MlaConfig(2)),
    "128 heads alone": ([(1, 900), (1, 63), (2, 2000), (1, 129)], {"heads": 128}, MlaConfig(1)),
    "teams of 4": ([(2, 900), (2, 63), (2, 1)], {"heads": 128, "max_q_len": 2}, MlaConfig(4, 16)),
    "prompts": ([(30, 33), (1, 500), (17, 400)], {"heads": 20, "page": 16}, None),
    "full": ([(2, 900), (5, 63), (0, 20), (9, 5)], {"heads": 64, "causal": False}, None),
    "float16": ([(1, 500), (3, 900)], {"heads": 7, "dtype": "f16"}, None),
    "split": ([(1, 3000), (3, 900), (1, 10)], {"split": 512}, None),
    "small heads": ([(1, 300), (3, 90)], {"depth": 192, "v_depth": 128, "page": 256}, None),
    "many": ([(1, n) for n in range(1, 700, 4)], {"page": 32, "max_q_len": 1}, None),
}
SPARSE_FORMS: dict[str, tuple[int, int, dict[str, Any], MlaConfig | None]] = {
    "16 heads": (33, 300, {}, None),
    "teams": (20, 513, {"heads": 128}, MlaConfig(2)),
    "16 steps held": (20, 513, {"heads": 128}, MlaConfig(2, 16)),
    "float16": (3, 2048, {"heads": 64, "dtype": "f16"}, None),
}


def paged_problem(form: str) -> MlaProblem:
    lengths, other, _ = PAGED_FORMS[form]
    page = other.get("page", 64)
    needed = [-(-keys // page) for _, keys in lengths]
    usual = {"heads": 16, "page": page, "layers": 2, "scale": SCALE}
    sizes = {"tokens": sum(n for n, _ in lengths) + 2, "seqs": len(lengths)}
    sizes |= {"columns": max(needed) + 1, "pages": sum(needed) + 3}
    return MlaProblem(**{**usual, **sizes, **other})


def sparse_problem(form: str) -> MlaProblem:
    tokens, keys, other, _ = SPARSE_FORMS[form]
    sizes = {"tokens": tokens, "seqs": tokens, "columns": keys, "pages": 64, "page": 64, "layers": 2}
    return MlaProblem(**{"heads": 16, "scale": SCALE, "sparse": True, "causal": False, **sizes, **other})


def kernels() -> Iterator[Any]:
    for problem, forms in ((paged_problem, PAGED_FORMS), (sparse_problem, SPARSE_FORMS)):
        for form, (*_, config) in forms.items():
            p = problem(form)
            if config is None:
                yield p
            else:
                yield from (sm90.main_source(p, config), sm90.merge_source(p, config))


@functools.cache
def program(p: MlaProblem, config: MlaConfig | None) -> Any:
    form = {"v_head_dim": p.v_depth, "scale": p.scale, **({"config": config} if config else {})}
    if not p.sparse:
        form |= {"causal": p.causal, "max_q_len": p.max_q_len, "split": p.split}
    op = SPARSE if p.sparse else PAGED
    return jax.jit(lambda *x: op(*x, out_dtype=x[0].dtype, **form))


def check(p: MlaProblem, config: MlaConfig | None, operands: mla_oracle.Operands) -> None:
    run, given = program(p, config), [jnp.asarray(x) for x in operands.values()]
    out, lse = (np.asarray(x) for x in run(*given))
    want, want_lse = mla_oracle.attend(p, operands)
    error = np.abs(out.astype(np.float64) - want).max()
    assert error <= 0.02 * np.abs(want).max()
    np.testing.assert_allclose(lse, want_lse, atol=5e-3)
    for again in run(*given), run(*given):
        np.testing.assert_array_equal(again[0], out)


@pytest.mark.smoke
@pytest.mark.parametrize("form", PAGED_FORMS)
def test_pages(form):
    lengths, _, config = PAGED_FORMS[form]
    p = paged_problem(form)
    check(p, config, mla_oracle.draw(p, lengths, 7, missing=0.05))


@pytest.mark.smoke
@pytest.mark.parametrize("form", SPARSE_FORMS)
def test_named_keys(form):
    p = sparse_problem(form)
    check(p, SPARSE_FORMS[form][-1], mla_oracle.draw_sparse(p, 5))


@pytest.mark.smoke
def test_lengths_beyond_limits():
    p = paged_problem("16 heads")
    most, least = 2**31 - 1, -(2**31)
    whole = p.columns * p.page
    operands = mla_oracle.draw(p, [(0, 5), (0, 0), (3, whole), (1, 1), (2, 90), (3, 9)], 3)
    operands["cu_q_lens"] = np.array([6, least, 0, 3, 4, 6, most], np.int32)
    operands["kv_lens"] = np.array([5, least, most, 1, 90, 9], np.int32)
    check(p, None, operands)
    gone = operands | {"layer": np.array([most], np.int32)}
    check(p, None, gone)


def test_split_does_not_depend_on_the_batch():
    p = paged_problem("split")
    operands = mla_oracle.draw(p, PAGED_FORMS["split"][0], 0)
    run = program(p, None)
    out, _ = run(*map(jnp.asarray, operands.values()))
    turned = {name: operands[name][::-1].copy() for name in ("tables", "kv_lens")}
    starts = np.array([0, 1, 4, 5], np.int32)
    order = [4, 1, 2, 3, 0, *range(5, p.tokens)]
    turned |= {"cu_q_lens": starts, "q": operands["q"][order]}
    again, _ = run(*map(jnp.asarray, {**operands, **turned}.values()))
    np.testing.assert_array_equal(again, out[np.array(order)])


@pytest.mark.smoke
def test_batches():
    p = sparse_problem("16 heads")
    given = [[jnp.asarray(x) for x in mla_oracle.draw_sparse(p, seed).values()] for seed in range(3)]
    run = program(p, None)
    got = jax.jit(jax.vmap(run))(*[jnp.stack(one) for one in zip(*given, strict=True)])
    for i, one in enumerate(given):
        for x, want in zip(got, run(*one), strict=True):
            np.testing.assert_array_equal(x[i], want)


@pytest.mark.smoke
def test_calls_are_captured():
    """All launches of a call are in the program's command buffer: the handler does not run for each call."""
    calls, runs, p = 10, 20, paged_problem("16 heads")
    operands = [
        jnp.nan_to_num(jnp.asarray(x)) for x in mla_oracle.draw(p, PAGED_FORMS["16 heads"][0], 1).values()
    ]
    step = program(p, None)

    @jax.jit
    def chain(q: Any, *rest: Any) -> jax.Array:
        for _ in range(calls):
            q = q.at[..., : p.v_depth].add(step(q, *rest)[0] * 0.1)
        return q

    want = chain(*operands).block_until_ready()
    chain(*operands).block_until_ready()
    ffi = launch.native()
    ffi.reset_execute_counters()
    for _ in range(runs):
        got = chain(*operands).block_until_ready()
    assert ffi.execute_count() <= calls * runs // 4, "the calls run outside command buffers"
    np.testing.assert_array_equal(got, want)


def test_no_kernel_spills():
    for p in (paged_problem("16 heads"), sparse_problem("teams")):
        for config in sm90.candidates(p, H200):
            report = compile_kernel(sm90.main_source(p, config)).report
            assert report.spill_store_bytes == report.spill_load_bytes == 0, config
