"""Benchmarks of layers: spans and launches from a trace, the picture of a call, rows and their floors."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jax_deepgemm.cli import main
from jax_deepgemm.cli.bench import write
from jax_deepgemm.core.bench import Row
from jax_deepgemm.moe import bench as moe
from jax_deepgemm.tools.bench import catalog, report, rows, timeline, trace
from jax_deepgemm.tools.bench.timing import Timing
from jax_deepgemm.tools.bench.trace import Event, Measured

pytestmark = pytest.mark.any_version

US = 1e3  # nanoseconds
GATHER, PLAN = "loop_select_fusion", "loop_select_fusion_1"
CALL = (
    Event(PLAN, 0, 2 * US),
    Event("jdg_quantize_1x128_bf16_e4m3_t_rows", 5 * US, 40 * US),
    Event("jdg_sm90_m_grouped_e4m3_nt_128x256_s4", 40 * US, 300 * US),  # begins before the other ends
    Event("void cub::detail::DeviceRadixSortOnesweepKernel<int, (cub::SortOrder)0>(int*)", 350 * US, 20 * US),
    Event(GATHER, 380 * US, 120 * US),
    Event("jdg_sm90_k_grouped_e4m3_nt_256x128_s4", 500 * US, 400 * US),
    Event("jdg_swiglu_grad_sum", 900 * US, 3 * US),
    Event("Memset 3", 910 * US, 1 * US),
)
KINDS = [
    *("dispatch", "quantise", "GEMM", "dispatch", "move rows", "K-grouped GEMM", "activation", "other"),
]


def longer(call: tuple[Event, ...], factor: float) -> tuple[Event, ...]:
    return tuple(Event(event.name, event.start * factor, event.duration) for event in call)


def measured() -> Measured:
    """Three calls, of which the last but one takes longest."""
    return trace.measured([longer(CALL, factor) for factor in (1.0, 3.0, 2.0)])


def rows_of(table: str, small: bool = False) -> list[Row]:
    return list(catalog.tables()[table].rows(small))


def result(*found: dict[str, Any]) -> dict[str, Any]:
    about = {"schema": 1, "device": "NVIDIA H200", "gpu": {"name": "NVIDIA H200"}, "versions": {}}
    return about | {"method": "", "calls": 3, "started": "2026-01-01T00:00:00Z", "rows": list(found)}


def layer_row(**more: Any) -> dict[str, Any]:
    """What a run on a GPU leaves of the layer's first training row."""
    row, *_ = [row for row in rows_of("moe") if (row.fields["recipe"], row.fields["what"]) == TRAINED]
    timing = Timing(measured(), {}, "profiler")
    found = {"table": "moe"} | dict(row.fields) | rows.figures(row, timing, "") | timeline.kept(timing)
    return found | {"temp_bytes": 1_650_000_000, "gemm_us": 700.0, "rest_us": 186.0} | more


TRAINED = ("fp8", moe.TRAINING)


def test_a_span_counts_what_lies_between_and_overlaps_once() -> None:
    found = measured()
    assert found.median == 886.0
    assert found.span == 1821.0
    assert found.launches == 8
    assert found.typical() == longer(CALL, 2.0)
    assert (Measured((5.0,), (), {}).span, Measured((5.0,), (), {}).typical()) == (None, ())


def test_only_rows_of_several_kernels_say_so() -> None:
    layer, product = rows_of("moe")[0], rows_of("fp8")[0]
    timing = Timing(measured(), {}, "profiler")
    assert {"span_us": 1821.0, "launches": 8}.items() <= rows.figures(layer, timing, "").items()
    assert "span_us" not in rows.figures(product, timing, "")


def test_columns_of_layers() -> None:
    [[about, [shown]]] = report._tables(result(layer_row()))
    by = dict(zip(catalog.header(about, True), shown, strict=True))
    assert [by[name] for name in ("us", "span us", "launches", "temp GB")] == ["886.0", "1821.0", "8", "1.65"]
    new = ("span_us", "launches", "temp_bytes")
    before = {key: value for key, value in layer_row().items() if key not in new}
    [[about, [shown]]] = report._tables(result(before))
    by = dict(zip(catalog.header(about, True), shown, strict=True))
    assert [by[name] for name in ("us", "span us", "launches", "temp GB")] == ["886.0", "–", "–", "–"]


def test_kernels_of_a_layer_have_their_kinds() -> None:
    kinds = catalog.tables()["moe"].kinds
    names = [re.split("[<(]", event.name)[0] for event in CALL]
    found = [
        timeline.kind_of(name, event.duration / US, kinds) for name, event in zip(names, CALL, strict=True)
    ]
    assert found == KINDS
    own = ("jdg_sum_rows_bf16_16x4_slots8", "jdg_take_rows_16x4", "jdg_dispatch_one_w4", "jdg_route_f32")
    assert [timeline.kind_of(name, 1.0, kinds) for name in own] == ["move rows"] * 2 + ["dispatch"] * 2
    assert {kind for *_, kind in kinds} | {timeline.OTHER} == set(timeline.KINDS)


def test_the_picture_of_two_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / "before.json", tmp_path / "after.json"]
    faster = Measured((1.0,), (), {}, (), (CALL[:3],))
    for path, row in zip(
        paths, (layer_row(), layer_row(**timeline.kept(Timing(faster, {}, "profiler")))), strict=True
    ):
        write(path, result(row, layer_row(timeline=None, what=moe.FROZEN)))
    target = tmp_path / "layer.svg"
    command = ["bench", "--report", *map(str, paths), "--timeline", str(target)]
    assert main([*command, "--rows", "what=forward and backward tokens=4096 "]) == 0
    assert f"wrote {target.name}" in capsys.readouterr().out
    drawn = ElementTree.parse(target).getroot()
    texts = [text.text or "" for text in drawn.iter("{http://www.w3.org/2000/svg}text")]
    heads = [text for text in texts if "from first start to last end" in text]
    assert [head.split(":")[0] for head in heads] == ["before", "after"]
    assert "1,821 us from first start to last end, 8 launches" in heads[0]
    assert "340 us from first start to last end, 3 launches" in heads[1]
    bars = [bar for bar in drawn.iter("{http://www.w3.org/2000/svg}rect") if len(bar)]
    assert [bar.get("fill") for bar in bars[:8]] == [timeline.KINDS[kind] for kind in KINDS]
    assert len(bars) == 8 + 3
    ends = [float(bar.get("x", 0)) + float(bar.get("width", 0)) for bar in bars]
    assert max(ends) <= timeline.WIDTH
    assert main([*command, "--rows", "no such row"]) == 2
    assert "no row keeps when its kernels ran" in capsys.readouterr().err


def test_a_layer_of_many_kernels_makes_a_small_picture() -> None:
    call = tuple(Event(f"jdg_kernel_of_some_layer_{i % 40}", i * 1e4, 9e3) for i in range(120))
    kept = timeline.kept(Timing(Measured((1.0,), (), {}, (), (call,)), {}, "profiler"))
    row = {"table": "moe", **rows_of("moe")[0].fields, **kept}
    assert len(timeline.draw([("a", row)] * 2)) < 60_000


def test_timeline_needs_results(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["bench", "--timeline", str(tmp_path / "a.svg")]) == 2
    assert "--timeline needs --report" in capsys.readouterr().err


def test_fp8_is_compared_with_bf16() -> None:
    """By spans, where they were measured; also with the baseline of a table that has one recipe."""
    slower = layer_row(recipe="bf16", span_us=3642.0, temp_bytes=2_000_000_000)
    dense = {"table": "linear", **rows_of("linear")[0].fields, "status": "ok", "us": 50.0}
    dense |= {"baseline": {"what": "BF16", "status": "ok", "us": 80.0}}
    alone = layer_row(what=moe.WIDE)
    prepared = layer_row(what=moe.TRAINING + moe.PREPARED, span_us=910.5)
    layer = "recipe=fp8 forward and backward{} tokens=4096 hidden=7168 inner=2048 experts=32 top_k=8"
    linear = "forward, FP8 weight m=8192 n=4096 k=7168"
    assert report.recipes(result(slower, layer_row(), dense, alone, prepared)) == [
        ["linear", linear, "50", "80", "0.62", "–", "–"],
        ["moe", layer.format(""), "1821", "3642", "0.50", "1.65", "2.00"],
        ["moe", layer.format(moe.PREPARED), "910", "3642", "0.25", "1.65", "2.00"],
    ]


def test_pictures_show_what_was_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tmp_path / "before.json"
    monkeypatch.setattr(report, "BEFORE", before)
    found = result(layer_row())
    [(target, now)] = report._timelines(tmp_path / "h200.json", found).items()
    assert target.name == "h200-moe.svg"
    assert f"img/{target.name}" in report._page_section(tmp_path / "h200.json", found)
    write(before, found)
    [both] = report._timelines(tmp_path / "h200.json", found).values()
    lanes = [[line for line in drawn.splitlines() if "from first start" in line] for drawn in (now, both)]
    assert list(map(len, lanes)) == [1, 2]
    assert lanes[1][0].count(">before: ") == lanes[1][1].count(">now: ") == 1
    assert report._timelines(tmp_path / "h200.json", result()) == {}


def test_a_result_of_layers_alone_has_no_plot_and_no_line_in_the_readme(tmp_path: Path) -> None:
    path = tmp_path / "layers.json"
    write(path, result(layer_row()))
    pages = {target.name: content for target, content in report.documents([path]).items()}
    assert "img/layers.png" not in pages["benchmarks.md"]
    assert report.NOTHING in pages["README.md"]
    assert report.NOTHING in pages["performance.md"], "nothing to compare"


def test_floors_of_inference() -> None:
    """Bytes of the experts that tokens can meet at 4.5 TB/s, or products at 1480 TFLOP/s."""
    by = {recipe: [] for recipe in ("fp8", "bf16")}
    for row in rows_of("moe_inference"):
        by[row.fields["recipe"]].append(row.fields["floor_us"])
    assert by["fp8"] == pytest.approx([78, 313, 313, 134, 488, 1950, 418, 3343], abs=1)
    assert by["bf16"][:4] == pytest.approx([2 * floor for floor in by["fp8"][:4]], abs=1)


def test_loads_of_experts_are_drawn_and_the_same_for_both_recipes() -> None:
    first, second = (row for row in rows_of("moe", True) if row.fields["what"] == moe.TRAINING)
    assert first.draw is second.draw
    assert all(a is b for a, b in zip(*(row.operands(d) for row, d in two(first, second)), strict=True))
    given, _ = rows_of("moe_inference", True)
    drawn = given.draw()
    _, ids, weights, *_ = given.operands(drawn)
    loads = np.bincount(np.asarray(ids).ravel(), minlength=4)
    assert loads.sum() == ids.size
    assert len(set(loads.tolist())) > 1
    assert weights.shape == ids.shape
    assert jax.tree.leaves(drawn[2])[0].dtype.itemsize == 1


def two(first: Row, second: Row) -> list[tuple[Row, Any]]:
    drawn = first.draw()
    return [(first, drawn), (second, drawn)]


def test_sizes_of_k_grouped_rows_are_as_a_router_draws_them() -> None:
    kinds = []
    for row in rows_of("k_drawn"):
        assert row.baseline is not None
        sizes, even = row.fields["group_sizes"], row.baseline.fields["group_sizes"]
        assert [row.constants[0].tolist(), row.baseline.constants[0].tolist()] == [sizes, even]
        assert even == [row.fields["k"]] * row.fields["groups"], "multiples of 128"
        assert sum(sizes) == sum(even)
        assert np.mean([size % 128 == 0 for size in sizes]) < 0.05
        assert 0 < np.std(sizes) < 0.1 * row.fields["k"]
        kinds.append(row.fields["type"])
    assert set(kinds) == {"fp8", "bf16", "fp8 layer", "fp8 layer 128x128", "bf16 ragged"}
    assert [kinds.count(kind) for kind in ("fp8", "bf16", "fp8 layer")] == [4, 4, 4]


def test_k_grouped_rows_multiply_what_they_say() -> None:
    """All ways on the same rows: equal up to the rounding of FP8."""
    found = {}
    for row in rows_of("k_drawn", small=True):
        assert row.baseline is not None
        drawn = row.draw()
        mine = row.function(*row.operands(drawn), *row.constants)
        even = row.baseline.function(*row.baseline.operands(drawn), *row.baseline.constants)
        found[row.fields["type"]] = np.stack([mine, even]).astype(np.float64)
    exact = found["bf16"]
    assert np.abs(exact[0] - exact[1]).max() > 1, "other rows of a group"
    np.testing.assert_array_equal(found["bf16 ragged"], exact)
    for kind in ("fp8", "fp8 layer", "fp8 layer 128x128"):
        assert np.linalg.norm(found[kind] - exact) < 0.06 * np.linalg.norm(exact)
