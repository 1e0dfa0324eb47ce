"""The sharding plan as a table: no devices, no tracing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from jax_deepgemm.core.sharding import ShardingPlan, ShardingRule, as_spec, entries, plan_sharding

BLOCKS = {"kb": ("k", 128), "nb": ("n", 128)}
GEMM = ShardingRule.parse("m k, m kb, n k, nb kb -> m n", reduces=("k",), blocks=BLOCKS)
GEMM_ADD = ShardingRule.parse("m k, m kb, n k, nb kb, m n -> m n", reduces=("k",), blocks=BLOCKS, addend=4)
QUANTIZE = ShardingRule.parse("r c -> r c, rb cb", blocks={"rb": ("r", 128), "cb": ("c", 128)})
MESH = {"x": 2, "y": 4}


def plan_gemm(a: P, b: P, out: P, m: int = 64, n: int = 576, k: int = 1024, rule: Any = GEMM) -> ShardingPlan:
    kb, nb = -(-k // 128), -(-n // 128)
    shapes, specs = [(m, k), (m, kb), (n, k), (nb, kb)], [entries(a, 2), [(), ()], entries(b, 2), [(), ()]]
    if rule.addend is not None:
        shapes, specs = [*shapes, (m, n)], [*specs, [(), ()]]
    return plan_sharding(rule, shapes, specs, [(m, n)], [entries(out, 2)], MESH)


@dataclass(frozen=True)
class Row:
    """What is asked (specs of A, B and the result) and what is planned."""

    a: P
    b: P
    out: P
    in_specs: tuple[P, ...]
    out_spec: P
    reduce_axes: tuple[str, ...] = ()
    scatter_dim: int | None = None
    sizes: tuple[tuple[str, int], ...] = ()
    why: str = ""


NONE = P(None, None)
ROWS = [
    Row(P(), P(), P(), (NONE,) * 4, NONE, why="nothing cut"),
    Row(P("x"), P(), P("x"), (P("x", None), P("x", None), NONE, NONE), P("x", None), why="m"),
    Row(P(), P("y"), P(None, "y"), (NONE, NONE, P("y", None), NONE), P(None, "y"), why="n inside blocks"),
    Row(
        P(),
        P("y"),
        P(None, "y"),
        (NONE, NONE, P("y", None), P("y", None)),
        P(None, "y"),
        sizes=(("n", 512),),
        why="n at the edges of blocks cuts the scales too",
    ),
    Row(
        P(None, "y"),
        P(None, "y"),
        P(),
        (P(None, "y"), P(None, "y"), P(None, "y"), P(None, "y")),
        NONE,
        ("y",),
        why="k at the edges of blocks",
    ),
    Row(
        P(None, "y"),
        P(),
        P(),
        (P(None, "y"), NONE, P(None, "y"), NONE),
        NONE,
        ("y",),
        sizes=(("k", 704),),
        why="k inside blocks; one operand is enough to cut it",
    ),
    Row(
        P(None, "y"),
        P(None, "y"),
        P("y"),
        (P(None, "y"), P(None, "y"), P(None, "y"), P(None, "y")),
        P("y", None),
        ("y",),
        0,
        why="the result wants the axes of the sum: scattered rows",
    ),
    Row(
        P("x", "y"),
        P(None, "y"),
        P("x", "y"),
        (P("x", "y"), P("x", "y"), P(None, "y"), P(None, "y")),
        P("x", "y"),
        ("y",),
        1,
        why="scattered columns",
    ),
    Row(
        P("y"),
        P("y"),
        P("y"),
        (P("y", None), P("y", None), NONE, NONE),
        P("y", None),
        why="an axis is used once; the result decides",
    ),
    Row(
        P(None, ("x", "y")),
        P(None, ("x", "y")),
        P(),
        (P(None, ("x", "y")), P(None, ("x", "y")), P(None, ("x", "y")), P(None, ("x", "y"))),
        NONE,
        ("x", "y"),
        why="k over two axes",
    ),
    Row(
        P(None, ("x", "y")),
        P(None, ("x", "y")),
        P(),
        (P(None, "x"), NONE, P(None, "x"), NONE),
        NONE,
        ("x",),
        sizes=(("k", 706),),
        why="706 divides by 2, not by 8: the trailing axis is dropped",
    ),
    Row(P(None, "y"), P(None, "y"), P(), (NONE,) * 4, NONE, sizes=(("k", 705),), why="705 cannot be cut"),
    Row(
        P(None, "y"),
        P(None, "y"),
        P(None, "y"),
        (NONE, NONE, P("y", None), NONE),
        P(None, "y"),
        sizes=(("k", 705),),
        why="k cannot be cut, so n is",
    ),
    Row(
        P(None, "y"),
        P(None, "y"),
        P(None, "y"),
        (P(None, "y"), P(None, "y"), P(None, "y"), P(None, "y")),
        NONE,
        ("y",),
        sizes=(("n", 577),),
        why="n cannot be cut, so the sum is not scattered",
    ),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.why)
def test_gemm_plan(row: Row) -> None:
    plan = plan_gemm(row.a, row.b, row.out, **dict(row.sizes))
    assert plan.in_specs == row.in_specs
    assert plan.out_specs == (row.out_spec,)
    assert plan.reduce_axes == row.reduce_axes
    assert plan.scatter_dim == row.scatter_dim


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.why)
def test_addend_is_cut_as_the_result(row: Row) -> None:
    plan = plan_gemm(row.a, row.b, row.out, **dict(row.sizes), rule=GEMM_ADD)
    assert plan.in_specs == (*row.in_specs, row.out_spec)
    assert plan.out_specs == (row.out_spec,)


@pytest.mark.parametrize(
    ("spec", "shape", "grid_spec"),
    [
        (P("y"), (512, 256), P("y", None)),
        (P("y"), (576, 256), NONE),
        (P("x", "y"), (256, 512), P("x", "y")),
        (P("x", "y"), (256, 704), P("x", None)),
    ],
)
def test_quantize_plan(spec: P, shape: tuple[int, int], grid_spec: P) -> None:
    grid = tuple(-(-n // 128) for n in shape)
    plan = plan_sharding(
        QUANTIZE, [shape], [entries(spec, 2)], [shape, grid], [entries(spec, 2), [(), ()]], MESH
    )
    assert plan.out_specs == (as_spec(entries(spec, 2)), grid_spec)
    assert plan.in_specs == plan.out_specs[:1]


def test_vmap_levels_are_factors() -> None:
    rule = GEMM.batched(((True, True, False, False), (True, True, True, True)))
    assert rule.text() == (
        "batch0 batch1 m k, batch0 batch1 m kb, batch1 n k, batch1 nb kb -> batch0 batch1 m n"
    )
    specs = [[("x",), (), (), ()], [(), (), (), ()], [("y",), (), ()], [(), (), ()]]
    shapes = [(2, 4, 64, 256), (2, 4, 64, 2), (4, 128, 256), (4, 1, 2)]
    plan = plan_sharding(rule, shapes, specs, [(2, 4, 64, 128)], [[("x",), ("y",), (), ()]], MESH)
    assert plan.in_specs[2] == P("y", None, None)
    assert plan.out_specs == (P("x", "y", None, None),)


def test_sizes_and_cuts() -> None:
    plan = plan_gemm(P("x", "y"), P(None, "y"), P("x"), k=704)
    assert [plan.cut(f) for f in ("m", "n", "k", "kb")] == [True, False, True, False]
    assert [plan.shards(f) for f in ("m", "n", "k")] == [2, 1, 4]
    assert [plan.local_size(f) for f in ("m", "n", "k")] == [32, 576, 176]


def test_reductions_stand_in_order_of_appearance() -> None:
    rule = ShardingRule.parse("m k, g n k -> m n", reduces=("g", "k"))
    assert rule.reduces_in_order() == ("k", "g")


def test_entries_of_no_spec_are_replicated() -> None:
    assert entries(None, 2) == [(), ()]
    assert entries(P("x"), 3) == [("x",), (), ()]
    assert as_spec([("x", "y"), (), ("z",)]) == P(("x", "y"), None, "z")


AXES = st.sampled_from([(), ("x",), ("y",), ("x", "y")])


@given(
    m=st.integers(1, 300),
    n=st.integers(1, 300),
    k=st.integers(1, 300),
    axes=st.tuples(*[AXES] * 6),
)
def test_every_plan_is_valid(m: int, n: int, k: int, axes: tuple[tuple[str, ...], ...]) -> None:
    """Cuts divide their dimension, no spec uses an axis twice, blocks are cut only with whole blocks."""

    def once(*dims: tuple[str, ...]) -> P:
        seen: set[str] = set()
        kept = []
        for dim in dims:
            kept.append(tuple(a for a in dim if a not in seen))
            seen.update(dim)
        return as_spec(kept)

    plan = plan_gemm(once(*axes[:2]), once(*axes[2:4]), once(*axes[4:]), m, n, k)
    for factor in ("m", "n", "k"):
        assert plan.size[factor] % plan.shards(factor) == 0
    for block, (data, step) in BLOCKS.items():
        assert not plan.cut(block) or (
            plan.shards(block) == plan.shards(data) and plan.local_size(data) % step == 0
        )
    for spec in (*plan.in_specs, *plan.out_specs):
        used = [axis for axes in entries(spec, 2) for axis in axes]
        assert len(used) == len(set(used))
    if plan.scatter_dim is not None:
        pieces = math.prod(MESH[axis] for axis in plan.reduce_axes)
        assert (m, n)[plan.scatter_dim] % pieces == 0


def test_a_grid_may_lead_its_data():
    """Where a result asks for no cut; at the edges of blocks alone."""
    rule = ShardingRule.parse("m h, g -> m h", blocks={"g": ("h", 2)}, edges=("g",), leads=("g",))

    def plan(result: Any, mesh: dict[str, int]) -> Any:
        cuts = {"specs": [[(), ()], [("x",)]], "result_specs": [[(), result]]}
        return plan_sharding(rule, shapes=[(4, 8), (4,)], result_shapes=[(4, 8)], mesh=mesh, **cuts)

    led = plan((), {"x": 2})
    assert led.in_specs == (P(None, "x"), P("x"))
    assert led.out_specs == (P(None, "x"),)
    asked = plan(("y",), {"x": 2, "y": 4})
    assert asked.in_specs == (P(None, "y"), P("y"))
    whole = plan((), {"x": 8})
    assert whole.in_specs == (P(None, None), P(None))
    under_vmap = plan_sharding(
        rule.batched(((True, False),)),
        shapes=[(3, 4, 8), (4,)],
        specs=[[(), (), ()], [("x",)]],
        result_shapes=[(3, 4, 8)],
        result_specs=[[(), (), ()]],
        mesh={"x": 2},
    )
    assert under_vmap.out_specs == (P(None, None, "x"),)
