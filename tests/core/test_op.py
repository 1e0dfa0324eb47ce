"""The op machinery under every transformation, on toy ops that mimic the real ones."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from tests.shared import op_checks, toy_ops
from tests.shared.arrays import normals
from tests.shared.op_checks import OpCase, Shard
from tests.shared.toy_ops import BF16, BLOCK, F32

M, N, K = 16, 72, 88  # shards of n and k end inside blocks of 16, as 576 and 704 do inside blocks of 128
ALL = ("auto", "explicit", "shard_map")


def quantized(seed: int, m: int = M, n: int = N, k: int = K, add: Any = None) -> list[jax.Array]:
    x, w, c = normals(seed, (m, k), (n, k), (m, n))
    operands = [*toy_ops.quantize(x, (1, BLOCK)), *toy_ops.quantize(w, (BLOCK, BLOCK))]
    return operands if add is None else [*operands, c.astype(add)]


def normal(*shapes: tuple[int, ...], dtype: Any = F32) -> Any:
    return lambda seed: normals(seed, *shapes, dtype=dtype)


def gemm_shards(add: bool) -> tuple[Shard, ...]:
    """Operand specs: A, scales of A, B, scales of B (and C, as the result)."""

    def shard(a: P, b: P, out: P, *sums: str) -> Shard:
        rows_of_a = P(a[0]) if len(a) else P()
        return Shard((a, rows_of_a, b, P(), *((out,) if add else ())), out, sums)

    return (
        shard(P(), P(), P()),
        shard(P("x"), P(), P("x")),
        shard(P(), P("y"), P(None, "y")),
        shard(P(), P(("x", "y")), P(None, ("x", "y"))),
        shard(P("x"), P("y"), P("x", "y")),
        shard(P(None, "y"), P(None, "y"), P(), "all-reduce"),
        shard(P(None, ("x", "y")), P(None, ("x", "y")), P(), "all-reduce"),
        shard(P("x", "y"), P(None, "y"), P("x"), "all-reduce"),
        shard(P(None, "y"), P(None, "y"), P("y"), "reduce-scatter"),
        shard(P(None, "y"), P(None, "y"), P(None, "y"), "reduce-scatter"),
        shard(P("x", "y"), P(None, "y"), P("x", "y"), "reduce-scatter"),
    )


def batched_gemm(in_axes: Any) -> Any:
    def fn(*operands: jax.Array, out_sharding: Any = None) -> jax.Array:
        return jax.vmap(functools.partial(toy_ops.block_gemm, out_sharding=out_sharding), in_axes)(*operands)

    return fn


def batched_args(seed: int) -> list[jax.Array]:
    activations = [quantized(seed + 10 * i)[:2] for i in range(4)]
    return [*(jnp.stack(x) for x in zip(*activations, strict=True)), *quantized(seed)[2:]]


def layer(x: jax.Array, w: jax.Array, out_sharding: Any = None) -> jax.Array:
    return toy_ops.linear(x, w, out_sharding=out_sharding)


MATMUL_SHARDS = (
    Shard((P("x"), P("y")), P("x", "y"), modes=ALL),
    Shard((P(None, "y"), P(None, "y")), P(), ("all-reduce",)),
    Shard((P(None, "y"), P(None, "y")), P(None, "y"), ("reduce-scatter",)),
)

CASES = [
    OpCase(
        "gemm",
        toy_ops.block_gemm,
        quantized,
        nests=(
            ((0, 0, 0, 0),),
            ((0, 0, None, None),),
            ((1, 1, None, None), (0, 0, 0, 0)),
            ((0, 0, None, None), (None, None, 0, 0)),
        ),
        shards=gemm_shards(add=False),
    ),
    OpCase(
        "gemm-bf16",
        functools.partial(toy_ops.block_gemm, out_dtype=BF16),
        quantized,
        shards=gemm_shards(add=False)[:6],
        tolerance=2**-7,
    ),
    OpCase(
        "gemm-add",
        toy_ops.block_gemm,
        functools.partial(quantized, add=F32),
        nests=(
            ((0, 0, 0, 0, 0),),
            ((0, 0, None, None, None),),
            ((None, None, None, None, 0), (0, 0, None, None, None)),
        ),
        shards=gemm_shards(add=True),
    ),
    OpCase(
        "gemm-add-bf16",
        functools.partial(toy_ops.block_gemm, out_dtype=BF16),
        functools.partial(quantized, add=BF16),
        shards=gemm_shards(add=True),
        tolerance=2**-7,
    ),
    OpCase(
        "gemm-vmapped",
        batched_gemm((0, 0, None, None)),
        batched_args,
        shards=(
            Shard((P("x"), P("x"), P("y"), P()), P("x", None, "y"), out_sharding=P(None, "y")),
            Shard((P("x", "y"), P("x", "y"), P(), P()), P("x", "y"), out_sharding=P("y")),
            Shard((P("x", None, "y"), P("x"), P(None, "y"), P()), P("x"), ("all-reduce",), out_sharding=P()),
            Shard(
                (P("x", None, "y"), P("x"), P(None, "y"), P()),
                P("x", "y"),
                ("reduce-scatter",),
                out_sharding=P("y"),
            ),
        ),
    ),
    OpCase(
        "quantize",
        lambda x, out_sharding=None: toy_ops.quantize(x, (BLOCK, BLOCK)),
        normal((N, K)),
        nests=(((0,),), ((1,), (0,))),
        shards=(
            Shard((P(),), (P(), P())),
            Shard((P("y"),), (P("y"), P()), ("all-reduce",)),
            Shard((P("x", "y"),), (P("x", "y"), P()), ("all-reduce",)),
        ),
    ),
    OpCase(
        "quantize-at-edges",
        lambda x, out_sharding=None: toy_ops.quantize(x, (BLOCK, BLOCK)),
        normal((64, 32)),
        shards=(Shard((P("y", "x"),), (P("y", "x"), P("y", "x")), modes=ALL),),
    ),
    OpCase(
        "linear",
        layer,
        normal((M, K), (N, K)),
        nests=(((0, None),), ((0, 0), (0, None))),
        shards=(Shard((P("x"), P("y")), P("x", "y"), ("all-reduce",)),),
        tolerance=1e-4,
    ),
    *(
        OpCase(
            f"matmul-{layout}",
            functools.partial(toy_ops.matmul, layout=layout),
            normal(*shapes),
            nests=(((0, None),), ((None, 0), (0, 0))),
            shards=MATMUL_SHARDS if layout == "nt" else (),
            plain=functools.partial(
                lambda layout, a, b: toy_ops._matmul_reference(layout, a, b, out_dtype=F32)[0], layout
            ),
            wrt=(0, 1),
            second=True,
        )
        for layout, shapes in (("nt", ((8, 24), (16, 24))), ("nn", ((8, 24), (24, 16))))
    ),
    OpCase(
        "matmul-add",
        toy_ops.matmul,
        normal((8, 24), (16, 24), (8, 16)),
        nests=(((0, None, None),), ((0, 0, 0),)),
        shards=(
            Shard((P("x"), P("y"), P("x", "y")), P("x", "y"), modes=ALL),
            Shard((P(None, "y"), P(None, "y"), P("x")), P("x"), ("all-reduce",)),
            Shard((P(None, "y"), P(None, "y"), P("x", "y")), P("x", "y"), ("reduce-scatter",)),
        ),
        plain=lambda a, b, c: a @ b.T + c,
        wrt=(0, 1, 2),
        second=True,
    ),
    OpCase(
        "matmul-vmapped",
        lambda a, b, out_sharding=None: jax.vmap(
            functools.partial(toy_ops.matmul, out_sharding=out_sharding), (0, None)
        )(a, b),
        normal((4, 8, 24), (16, 24)),
        shards=(
            Shard((P("x"), P("y")), P("x", None, "y"), out_sharding=P(None, "y")),
            Shard((P("x", None, "y"), P(None, "y")), P("x"), ("all-reduce",), out_sharding=P()),
        ),
        plain=lambda a, b: jnp.einsum("zmk,nk->zmn", a, b),
        wrt=(0, 1),
    ),
]


@pytest.mark.parametrize("check", op_checks.checks(CASES))
def test_op(check: Any) -> None:
    check()
