"""Grouped GEMMs under jit, vmap, derivatives, remat, scan, sharding with exact collectives, donation."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_deepgemm as jdg
from jax_deepgemm.ops.grouped import op as ops
from tests.shared import grouped_oracle as oracle
from tests.shared import op_checks
from tests.shared.gemm_oracle import assert_rounded
from tests.shared.op_checks import OpCase, Shard

BF16, F32 = jnp.bfloat16, jnp.float32
M, N, K, G = 32, 320, 704, 4  # n / 4 = 80 and k / 4 = 176: shards end inside blocks of 128
BOTH = ("auto", "explicit")
BLOCK, ROW = (128, 128), (1, 128)


def some_sizes(seed: int, groups: int, rows: int) -> jax.Array:
    """Group sizes that sum to less than the rows; some are zero."""
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.integers(0, rows - 1, groups))
    return jnp.asarray(np.diff(cuts, prepend=0), jnp.int32)


# m-grouped


def m_grouped_args(block: Any, m: int, n: int, k: int, seed: int) -> list[Any]:
    sizes = some_sizes(seed, G, m)
    if block is None:
        return [*map(jnp.asarray, (oracle.random(seed, m, k), oracle.random(seed + 1, G, n, k))), sizes]
    pairs = (*oracle.fp8(seed, m, k), *oracle.fp8(seed + 1, G, n, k, block=block))
    return [*map(jnp.asarray, pairs), sizes]


def run_m_fp8(a: Any, sa: Any, b: Any, sb: Any, s: Any, **options: Any) -> jax.Array:
    return jdg.m_grouped_fp8_gemm_nt_contiguous((a, sa), (b, sb), s, **options)


def m_fp8_shards() -> tuple[Shard, ...]:
    def shard(a: P, sa: P, b: P, out: P, *sums: str, modes: Any = BOTH) -> Shard:
        return Shard((a, sa, b, P(), P()), out, sums, modes)

    return (
        shard(P("x"), P("x"), P(None, "y"), P("x", "y")),
        shard(P(None, "y"), P(), P(None, None, "y"), P(), "all-reduce"),
        shard(P("x", "y"), P("x"), P(None, None, "y"), P("x", "y"), "reduce-scatter"),
        shard(P("x"), P("x"), P("y"), P("x"), "all-reduce"),
        shard(P(), P(), P("x", "y"), P("x", "y"), "reduce-scatter"),
        shard(P(None, "y"), P(), P("x", None, "y"), P(), "all-reduce"),
    )


def bf16_m_shards() -> tuple[Shard, ...]:
    """The last one is expert parallelism: rows are gathered, and each device adds those of its groups."""
    return (
        Shard((P("x"), P(None, "y"), P()), P("x", "y"), modes=("auto",)),
        Shard((P(), P(None, "y"), P()), P(None, "y"), modes=("shard_map",)),
        Shard((P("x"), P("y"), P()), P("x"), ("all-reduce",)),
        Shard((P("y"), P("y"), P()), P("y"), ("all-gather", "reduce-scatter"), ("explicit",)),
    )


def plain_m(a: jax.Array, b: jax.Array, s: jax.Array, *, form: str, out: Any) -> jax.Array:
    index = jnp.searchsorted(jnp.cumsum(s), jnp.arange(a.shape[0]), side="right")
    hot = jax.nn.one_hot(index, b.shape[0])
    subscripts = "mg,mk,gnk->mn" if form == "nt" else "mg,mk,gkn->mn"
    return jnp.einsum(subscripts, hot, a.astype(F32), b.astype(F32)).astype(out)


def run_m_bf16(a: Any, b: Any, s: Any, *, form: str, out: Any, **options: Any) -> jax.Array:
    run = getattr(jdg, f"m_grouped_bf16_gemm_{form}_contiguous")
    return run(a, b, s, out_dtype=out, **options)


def m_bf16_args(form: str, m: int, n: int, k: int, seed: int) -> list[Any]:
    a, b, s = m_grouped_args(None, m, n, k, seed)
    return [a, b if form == "nt" else jnp.swapaxes(b, 1, 2), s]


def m_bf16_case(form: str, out: Any, **fields: Any) -> OpCase:
    params = {"form": form, "out": out}
    return OpCase(
        f"m-bf16-{form}-{jnp.dtype(out).name}",
        functools.partial(run_m_bf16, **params),
        functools.partial(m_bf16_args, form, 32, 16, 24),
        plain=functools.partial(plain_m, **params),
        wrt=(0, 1),
        tolerance=2**-7 if out == BF16 else 1e-5,
        grad_tolerance=2**-6,
        **fields,
    )


# masked


def masked_args(block: Any, m: int, n: int, k: int, seed: int) -> list[Any]:
    counts = jnp.asarray(np.random.default_rng(seed).integers(0, m + 1, G), jnp.int32)
    if block is None:
        return [*map(jnp.asarray, (oracle.random(seed, G, m, k), oracle.random(seed + 1, G, n, k))), counts]
    pairs = (*oracle.fp8(seed, G, m, k), *oracle.fp8(seed + 1, G, n, k, block=block))
    return [*map(jnp.asarray, pairs), counts]


def run_masked_fp8(a: Any, sa: Any, b: Any, sb: Any, counts: Any, **options: Any) -> jax.Array:
    return jdg.m_grouped_fp8_gemm_nt_masked((a, sa), (b, sb), counts, zero_rows=True, **options)


def run_masked_bf16(a: Any, b: Any, counts: Any, **options: Any) -> jax.Array:
    return jdg.m_grouped_bf16_gemm_nt_masked(a, b, counts, zero_rows=True, out_dtype=F32, **options)


def plain_masked(a: jax.Array, b: jax.Array, counts: jax.Array) -> jax.Array:
    d = jnp.einsum("gmk,gnk->gmn", a.astype(F32), b.astype(F32))
    return jnp.where(jnp.arange(a.shape[1])[:, None] < counts[:, None, None], d, 0)


def masked_shards(fp8: bool) -> tuple[Shard, ...]:
    def shard(g: Any, m: Any, n: Any, k: Any, out: P, *sums: str, modes: Any = BOTH) -> Shard:
        a, b = P(g, m, k), P(g, n, k)
        return Shard((a, P(g, m), b, P(g), P(g)) if fp8 else (a, b, P(g)), out, sums, modes)

    return (
        shard("x", None, None, None, P("x"), modes=("shard_map",)),
        shard("x", None, "y", None, P("x", None, "y")),
        shard(None, "x", "y", None, P(None, "x", "y"), modes=("auto",)),
        shard("x", None, None, "y", P("x"), "all-reduce"),
        shard(None, None, None, "y", P(None, None, "y"), "reduce-scatter", modes=("auto",)),
    )


# k-grouped


def k_args(fp8: bool, add: bool, m: int, n: int, k: int, seed: int) -> list[Any]:
    s = some_sizes(seed, G, k)
    c = [jnp.asarray(oracle.random(seed + 2, G, m, n, dtype=np.float32))] if add else []
    if not fp8:
        return [*map(jnp.asarray, (oracle.random(seed, k, m), oracle.random(seed + 1, k, n))), s, *c]
    return [*map(jnp.asarray, (*oracle.fp8(seed, m, k), *oracle.fp8(seed + 1, n, k))), s, *c]


def run_k_fp8(a: Any, sa: Any, b: Any, sb: Any, s: Any, *c: Any, **options: Any) -> jax.Array:
    return jdg.k_grouped_fp8_gemm_nt_contiguous((a, sa), (b, sb), s, *c, **options)


def plain_k(a: jax.Array, b: jax.Array, s: jax.Array, *c: jax.Array) -> jax.Array:
    index = jnp.searchsorted(jnp.cumsum(s), jnp.arange(a.shape[0]), side="right")
    hot = jax.nn.one_hot(index, s.shape[0])
    return sum(c, jnp.einsum("kg,km,kn->gmn", hot, a.astype(F32), b.astype(F32)))


def k_shards(fp8: bool, add: bool) -> tuple[Shard, ...]:
    def shard(m: Any, n: Any, k: Any, out: P, *sums: str, modes: Any = BOTH) -> Shard:
        pair = (P(m, k), P(m), P(n, k), P(n)) if fp8 else (P(k, m), P(k, n))
        return Shard((*pair, P(), *((out,) if add else ())), out, sums, modes)

    return (
        shard("x", "y", None, P(None, "x", "y"), modes=("auto",) if add else ("explicit", "shard_map")),
        shard(None, None, "y", P(), "all-reduce"),
        shard(None, None, "y", P("y"), "reduce-scatter"),
        shard(None, None, "y", P(None, None, "y"), "reduce-scatter", modes=("explicit",)),
        shard(None, "y", None, P("x", None, "y")),
        shard(None, None, "y", P("x"), "all-reduce"),
    )


def test_scales_that_xla_cuts_are_gathered() -> None:
    """The scales are transposed; XLA cuts them as the result, which it has to undo."""
    shard = Shard((P(None, "y"), P(), P(None, "y"), P(), P()), P(None, None, "y"))
    case = OpCase("k-fp8", run_k_fp8, functools.partial(k_args, True, False, 16, 32, K))
    compiled, _ = op_checks.compile_sharded(case, shard, "auto")
    text = compiled.as_text()
    assert set(op_checks.collectives(text)) <= {"all-gather", "reduce-scatter"}
    gathered = [line for line in text.splitlines() if "all-gather(" in line]
    assert all("f32[6,32]" in line for line in gathered)  # 1 / 32 of the values' bytes


def only(shard: Shard, *modes: str) -> Shard:
    return dataclasses.replace(shard, modes=modes)


CASES = [
    OpCase(
        "m-fp8-block",
        functools.partial(run_m_fp8, out_dtype=F32),
        functools.partial(m_grouped_args, BLOCK, M, N, K),
        nests=(((0, 0, None, None, 0),), ((None, None, 0, 0, 0), (0, 0, None, None, None))),
        shards=m_fp8_shards(),
    ),
    OpCase(
        "m-fp8-row",
        run_m_fp8,
        functools.partial(m_grouped_args, ROW, M, N, K),
        shards=(only(m_fp8_shards()[0], "explicit"), only(m_fp8_shards()[1], "auto")),
        tolerance=2**-7,
    ),
    m_bf16_case("nt", F32, shards=bf16_m_shards(), nests=(((0, None, 0),), ((None, 0, None), (0, 0, 0)))),
    m_bf16_case("nn", BF16, second=True),
    OpCase(
        "masked-fp8",
        functools.partial(run_masked_fp8, out_dtype=F32),
        functools.partial(masked_args, BLOCK, 8, N, K),
        nests=(((0, 0, None, None, 0),),),
        shards=masked_shards(True),
    ),
    OpCase(
        "masked-bf16",
        run_masked_bf16,
        functools.partial(masked_args, None, 8, 16, 24),
        nests=(((None, 0, None),),),
        shards=(only(masked_shards(False)[1], "explicit"), only(masked_shards(False)[3], "auto")),
        plain=plain_masked,
        wrt=(0, 1),
        second=True,
        grad_tolerance=2**-6,
    ),
    OpCase(
        "k-fp8",
        run_k_fp8,
        functools.partial(k_args, True, False, 16, 32, K),
        nests=(((0, 0, None, None, None),),),
        shards=k_shards(True, False),
    ),
    OpCase(
        "k-fp8-edges",
        run_k_fp8,
        functools.partial(k_args, True, False, 16, 32, 1024),
        shards=(only(k_shards(True, False)[1], "auto"),),
    ),
    OpCase(
        "k-fp8-add",
        run_k_fp8,
        functools.partial(k_args, True, True, 16, 32, K),
        nests=(((0, 0, 0, 0, None, 0),),),
        shards=(only(k_shards(True, True)[2], "explicit"), only(k_shards(True, True)[4], "auto")),
    ),
    OpCase(
        "k-bf16-add",
        jdg.k_grouped_bf16_gemm_tn_contiguous,
        functools.partial(k_args, False, True, 16, 24, 40),
        nests=(((None, 0, 0, 0),),),
        shards=(k_shards(False, True)[0], only(k_shards(False, True)[2], "explicit")),
        plain=plain_k,
        wrt=(0, 1, 3),
        second=True,
        grad_tolerance=2**-6,
    ),
]


@pytest.mark.parametrize("check", op_checks.checks(CASES))
def test_op(check):
    check()


def test_partitioned_programs_refer_to_frames_that_exist() -> None:
    """XLA merges the piece of one device into the program; frames of its own would be numbers of others.

    Compilers of jaxlib 0.11 follow such frames for ever where loops are nested (`_private.without_frames`).
    """
    case = next(case for case in CASES if case.name == "m-fp8-block")
    text = op_checks.compile_sharded(case, case.shards[1], "auto")[0].as_text()
    table = re.search(r"StackFrames\n((?:\d+ .*\n)*)", text)
    known = len(table.group(1).splitlines()) if table else 0
    used = {int(number) for number in re.findall(r"stack_frame_id=(\d+)", text)}
    assert not table or max(used, default=0) <= known
    own = re.findall(r"FileNames\n((?:\d+ .*\n)*)", text)
    assert not any("grouped/reference.py" in names for names in own)


def gradient_ops(fn: Any, *operands: Any) -> str:
    return str(jax.make_jaxpr(jax.grad(lambda *a: fn(*a).astype(F32).sum(), (0, 1)))(*operands))


def test_derivatives_are_grouped_gemms() -> None:
    """No derivative transposes a matrix, or expands rows per group."""
    a, b, s = m_bf16_args("nt", 32, 16, 24, 0)
    text = gradient_ops(lambda a, b: jdg.m_grouped_bf16_gemm_nt_contiguous(a, b, s), a, b)
    assert "m_grouped_bf16_gemm_nn[" in text
    assert "k_grouped_bf16_gemm[" in text
    a, b, counts = masked_args(None, 8, 16, 24, 0)
    masked = gradient_ops(lambda a, b: jdg.m_grouped_bf16_gemm_nt_masked(a, b, counts), a, b)
    assert "m_masked_bf16_gemm_nn[" in masked
    assert "k_masked_bf16_gemm[" in masked
    for one in (text, masked):
        assert "transpose[" not in one
        assert "dot_general" not in one


def test_gradients_of_segments() -> None:
    """An index per row whose groups descend, with gaps: both derivatives, and theirs."""
    index = np.array([3] * 4 + [-1] * 3 + [2] * 9 + [0] * 2 + [-1] * 2, np.int32)
    a, b = jnp.asarray(oracle.random(0, 20, 16)), jnp.asarray(oracle.random(1, 4, 8, 16))
    hot = jnp.asarray(index[:, None] == np.arange(4), F32)

    def run(a: Any, b: Any) -> jax.Array:
        return jdg.m_grouped_bf16_gemm_nt_contiguous(a, b, m_indices=jnp.asarray(index), out_dtype=F32)

    def plain(a: Any, b: Any) -> jax.Array:
        return jnp.einsum("mg,mk,gnk->mn", hot, a.astype(F32), b.astype(F32))

    def second(fn: Any) -> Any:
        first = jax.grad(lambda *x: jnp.sin(fn(*x)).sum(), (0, 1))
        return jax.grad(lambda *x: sum(jnp.sin(g.astype(F32)).sum() for g in first(*x)), (0, 1))(a, b)

    op_checks.assert_same(jax.jit(lambda: second(run))(), second(plain), 2**-5)


def test_gradients_of_padding_are_zero() -> None:
    """Cotangents of rows of no group are not read, and their rows get none."""
    index = oracle.rows_of((3, 0, 6), 16)
    a, b = oracle.random(0, 16, 24), jnp.asarray(oracle.random(1, 3, 8, 24))
    a[index < 0] = np.nan
    cotangent = np.where(index[:, None] < 0, np.nan, oracle.random(2, 16, 8, dtype=np.float32))
    sizes = jnp.array([3, 0, 6], jnp.int32)
    run = functools.partial(jdg.m_grouped_bf16_gemm_nt_contiguous, group_sizes=sizes, out_dtype=F32)
    _, pullback = jax.vjp(run, jnp.asarray(a), b)
    da, db = pullback(jnp.asarray(cotangent, F32))
    assert not np.any(np.asarray(da)[index < 0])
    assert np.all(np.isfinite(oracle.wide(da)))
    assert np.all(np.isfinite(oracle.wide(db)))
    assert not np.any(np.asarray(db)[1])

    counts = np.array([2, 0, 4])
    beyond = np.arange(4) >= counts[:, None]
    x = oracle.random(0, 3, 4, 24)
    x[beyond] = np.nan
    masked = lambda x, b: jdg.m_grouped_bf16_gemm_nt_masked(x, b, jnp.asarray(counts), out_dtype=F32)  # noqa: E731
    _, pullback = jax.vjp(masked, jnp.asarray(x), b)
    dd = np.where(beyond[..., None], np.nan, oracle.random(2, 3, 4, 8, dtype=np.float32))
    da, db = pullback(jnp.asarray(dd, F32))
    assert not np.any(np.asarray(da)[beyond])
    assert np.all(np.isfinite(oracle.wide(db)))


def test_integer_operands_have_no_tangent() -> None:
    a, b, s = m_bf16_args("nt", 32, 16, 24, 0)
    run = jdg.m_grouped_bf16_gemm_nt_contiguous
    _, tangent = jax.jvp(run, (a, b, s), (a, b, np.zeros(s.shape, jax.dtypes.float0)))
    assert_rounded(tangent, 2 * oracle.wide(run(a, b, s, out_dtype=F32)), 24)
    _, pullback = jax.vjp(run, a, b, s)
    assert pullback(tangent)[2].dtype == jax.dtypes.float0


def test_fp8_names_the_layer_that_has_gradients() -> None:
    a, sa, b, sb, s = m_grouped_args(BLOCK, 8, 16, 128, 0)
    with pytest.raises(
        NotImplementedError, match=r"m_grouped_fp8_gemm_block has no derivative.*grouped_linear"
    ):
        jax.grad(lambda sa: run_m_fp8(a, sa, b, sb, s).astype(F32).sum())(sa)
    for op in (ops.M_MASKED_FP8[1, 128], ops.K_GROUPED_FP8, ops.K_GROUPED_FP8_ADD):
        assert "grouped_linear" in op.grad_hint


def test_expert_parallel_inside_shard_map() -> None:
    """Each device has two groups, knows all sizes, and adds its rows' results; gradients too."""
    mesh = op_checks.make_mesh("auto")
    a, b, s = m_bf16_args("nt", 32, 16, 24, 0)

    def experts(a: jax.Array, b: jax.Array, s: jax.Array) -> jax.Array:
        first = jax.lax.axis_index("x") * b.shape[0]
        d = jdg.m_grouped_bf16_gemm_nt_contiguous(a, b, s, group_offset=first, out_dtype=F32)
        return jax.lax.psum(d, "x")

    split = jax.shard_map(experts, mesh=mesh, in_specs=(P(), P("x"), P()), out_specs=P())
    loss = lambda fn: jax.jit(jax.value_and_grad(lambda a, b: jnp.sin(fn(a, b, s)).sum(), (0, 1)))  # noqa: E731
    plain = functools.partial(plain_m, form="nt", out=F32)
    op_checks.assert_same(loss(split)(a, b), loss(plain)(a, b), 2**-6)


def test_sharded_index_per_row() -> None:
    """On Explicit axes too, where rows and their index are cut."""
    mesh = op_checks.make_mesh("explicit")
    index = np.repeat(np.array([1, -1, 3, 0], np.int32), 8)
    a, b = oracle.random(0, 32, 24), oracle.random(1, 4, 16, 24)
    with jax.set_mesh(mesh):
        put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))  # noqa: E731
        run = jax.jit(functools.partial(jdg.m_grouped_bf16_gemm_nt_contiguous, out_dtype=F32))
        got = run(put(a, "x"), put(b, None, "y"), m_indices=put(index, "x"))
    assert got.sharding.spec == P("x", "y")
    assert_rounded(got, oracle.m_grouped(a, b, index), 24)


@pytest.mark.parametrize("mode", ["plain", "auto"])
def test_c_is_donated(mode: str) -> None:
    operands = k_args(False, True, 16, 24, 40, 0)
    run = jdg.k_grouped_bf16_gemm_tn_contiguous
    if mode == "plain":
        placed, program = operands, jax.jit(run, donate_argnums=3).lower(*operands).compile()
    else:
        shard = Shard((P(None, "x"), P(None, "y"), P(), P(None, "x", "y")), P(None, "x", "y"))
        case = OpCase("donated", run, lambda seed: operands)
        program, placed = op_checks.compile_sharded(case, shard, mode, donate_argnums=3)
    assert program.memory_analysis().alias_size_in_bytes > 0
    program(*placed)
    assert placed[3].is_deleted()


def test_scan_over_stacked_experts() -> None:
    x, _, s = m_bf16_args("nt", 32, 16, 16, 0)
    layers = jnp.asarray(oracle.random(1, 3, G, 16, 16))
    step = lambda x, w: jdg.m_grouped_bf16_gemm_nt_contiguous(x, w, s) * jnp.bfloat16(0.2)  # noqa: E731
    scanned = jax.jit(lambda x: jax.lax.scan(lambda x, w: (step(x, w), None), x, layers)[0])(x)
    for layer in layers:
        x = step(x, layer)
    op_checks.assert_same(scanned, x, 2**-7)


SHARDED_SIZES = {"negative": (10, -7, 9, 4), "too many": (20, 2**31 - 1, 5, 2**31 - 1), "empty": (0, 0, 0, 0)}


@pytest.mark.parametrize("name", SHARDED_SIZES)
def test_pieces_of_strange_sizes(name: str) -> None:
    """Devices that cut rows agree on whose rows are whose, whatever the sizes are."""
    mesh = op_checks.make_mesh("auto")
    sizes = jnp.array(SHARDED_SIZES[name], jnp.int32)
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))  # noqa: E731
    a, b = oracle.random(0, 32, 24), oracle.random(1, G, 16, 24)
    index = oracle.rows_of(SHARDED_SIZES[name], 32)
    rows, experts = put(a, "y"), put(b, "x")
    run = jax.jit(functools.partial(jdg.m_grouped_bf16_gemm_nt_contiguous, out_dtype=F32))
    want = oracle.m_grouped(a, b, index)
    assert_rounded(run(rows, experts, sizes), want, 24)
    assert_rounded(run(rows, experts, m_indices=jnp.asarray(index)), want, 24)

    index = oracle.rows_of(SHARDED_SIZES[name], K)  # k / 4 ends inside a block
    x, y = oracle.fp8(0, 16, K), oracle.fp8(1, 8, K)
    pieces = [(put(values, None, "y"), scales) for values, scales in (x, y)]
    got = jax.jit(jdg.k_grouped_fp8_gemm_nt_contiguous)(*pieces, sizes)
    assert_rounded(got, oracle.k_grouped(oracle.dequantized(x).T, oracle.dequantized(y).T, index, G), K)
