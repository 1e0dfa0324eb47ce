"""Benchmarks of other shapes, skewed groups, whole ops and sustained load; floors, plots and reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jax_deepgemm.cli import main
from jax_deepgemm.cli.bench import write
from jax_deepgemm.core.bench import Row
from jax_deepgemm.ops.gemm import bench as dense
from jax_deepgemm.tools.bench import catalog, floors, plots, report, timing, trace, whole
from jax_deepgemm.tools.bench.machine import ClockLog
from jax_deepgemm.tools.bench.measure import measure_baseline

pytestmark = pytest.mark.any_version

MEASURED = {
    "status": "ok",
    "us": 100.0,
    "all_us": 100.0,
    "tflops": 500.0,
    "gbytes_per_s": 2000.0,
    "clock": {},
}
CLOCK = {"clock": {"sm_mhz_median": 1300.0, "power_w_median": 699.6}}


def result(*rows: dict[str, Any]) -> dict[str, Any]:
    about = {"schema": 1, "device": "NVIDIA H200", "gpu": {"name": "NVIDIA H200"}, "versions": {}}
    return about | {"method": "", "calls": 1, "started": "2026-01-01T00:00:00Z", "rows": list(rows)}


def dense_row(table: str, m: int, n: int = 4096, k: int = 7168, **more: Any) -> dict[str, Any]:
    row = {"table": table, "m": m, "n": n, "k": k} | MEASURED
    return row | {"baseline": {"what": "cuBLASLt", "status": "ok", "us": 80.0, "tflops": 625.0}} | more


def rows_of(table: str, small: bool = False) -> list[Row]:
    return list(catalog.tables()[table].rows(small))


def cells(found: dict[str, Any]) -> list[dict[str, str]]:
    """The rows of all tables by their titles."""
    return [
        dict(zip(catalog.header(about, True), row, strict=True))
        for about, rows in report._tables(found)
        for row in rows
    ]


def test_small_run_of_the_further_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trial.json"
    chosen = "^fp8 m=33|^m_grouped fp8|skew few bf16|^fp8 m=128 |^(fp8|bf16) m=64 "
    tables = "shapes,skew,sustained,op,bf16"
    assert main(["bench", "--out", str(path), "--calls", "2", "--tables", tables, "--rows", chosen]) == 0
    one, experts, skewed, sustained, whole, small = rows = report.load(path)["rows"]
    assert [row["table"] for row in rows] == ["shapes", "shapes", "skew", "sustained", "op", "bf16"]
    assert (one["op"], experts["op"]) == ("dense", "m_grouped")
    assert one["baseline"]["us"] > 0
    assert skewed["baseline"]["group_sizes"] != skewed["group_sizes"]
    assert len(sustained["seconds"]) == len(sustained["baseline"]["seconds"]) == 2
    assert whole["other_us"] == 0 < whole["wall_us"]
    assert small["read_flush"]["status"] == "ok"
    assert f"{len(rows)} rows, 0 failed" in capsys.readouterr().out


def test_only_few_rows_of_a_are_timed_after_reading() -> None:
    keys = {"route": "tokens", "topk": "rows", "attention_decode": "rows"}

    def rows(table: str) -> set[int]:
        read = [row.fields for row in rows_of(table) if row.read_flush]
        return {fields[keys.get(table, "m")] for fields in read}

    chosen = {name: rows(name) for name in catalog.tables()}
    assert {name: some for name, some in chosen.items() if some} == {
        "fp8": {1, 16, 64},
        "bf16": {1},
        "fine": {1, 16, 64},
        "mixed": {1, 16, 64},
        "shapes": {1, 64},
        "route": {1, 64, 4096, 16384},  # a choice reads its logits and does little else
        "topk": {1, 8, 64, 128, 1024, 4096, 8192},  # so it is meant to be
        "attention_decode": {1},
    }


def test_other_shapes_are_other_and_fit_cublaslt() -> None:
    rows = [row.fields for row in rows_of("shapes")]
    recorded = catalog.recorded("NVIDIA H200")
    for row in rows:
        assert row["n"] % 16 == row["k"] % 16 == 0, "XLA would pad FP8 operands at each call"
        if row["op"] == "dense":
            assert (row["type"], row["m"], row["n"], row["k"]) not in recorded
    assert {2880, 4096, 5120, 6144} <= {side for row in rows for side in (row["n"], row["k"])}
    assert {row["groups"] for row in rows if row["op"] == "m_grouped"} == {8, 64, 128, 512}
    assert any(row["m"] % 2 for row in rows)
    assert any(row["k"] % 512 for row in rows)


def test_even_groups_have_the_rows_of_skewed_ones() -> None:
    for row in rows_of("skew"):
        assert row.baseline is not None
        skewed, even = (side.constants[0].tolist() for side in (row, row.baseline))
        assert skewed == row.fields["group_sizes"]
        assert even == row.baseline.fields["group_sizes"]
        assert sum(skewed) == sum(even) == row.fields["k" if row.fields["case"] == "half of k" else "m"]
        assert [size > 0 for size in skewed] == [size > 0 for size in even]
        filled = [size for size in even if size]
        assert max(filled) - min(filled) <= 1
        assert (max(skewed) == sum(skewed) // 2) == (row.fields["case"] != "few")


@pytest.mark.parametrize("flush", floors.READ_US)
def test_reading_floors_grow_with_the_bytes(flush: str) -> None:
    times = [floors.read_us(mib * 2**20, flush) for mib in (0.5, 3, 4, 5, 100, 256, 300)]
    assert times == sorted(times)
    assert times[0] > 0.64, "shorter than an empty kernel"
    assert times[2] == floors.READ_US[flush][0]
    assert times[5] == floors.READ_US[flush][-1]
    assert floors.read_us(2e7, "read") < floors.read_us(2e7, "write")


def test_floors_count_bytes_of_the_operands() -> None:
    def read(row: dict[str, Any]) -> int | None:
        reads = catalog.tables()[row["table"]].reads
        assert reads is not None
        return reads(row)

    fp8, bf16 = read(dense_row("fp8", 64, 4032, 4096)), read(dense_row("bf16", 64, 4032, 4096))
    assert fp8 is not None
    assert floors.read_us(fp8, "read") == 5.3
    assert bf16 is not None
    assert floors.read_us(bf16, "write") == 12.5
    assert read(dense_row("fp8", 128)) is None


def test_clock_of_several_intervals() -> None:
    log = ClockLog(samples=[(0.1, 1900, 500), (1.1, 1300, 700), (2.1, 1500, 600), (3.1, 1200, 710)])
    assert log.during([(0, 1), (2, 3)]) == {
        "sm_mhz_median": 1700,
        "sm_mhz_min": 1500,
        "power_w_median": 550,
        "samples": 2,
    }


def test_queued_calls_share_the_time_of_their_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    events = [trace.Event(name, 0, 3000.0, "jit_op(7)") for name in ("quantize", "gemm")] * 4
    monkeypatch.setattr(trace, "read", lambda folder: [*events, trace.Event("copy", 0, 1e6, "jit_other")])
    jobs = [timing.Job("op", lambda: ran.append("op"))]
    queued = timing.time_queued(jobs, calls=4)["op"]
    assert queued.kernels == pytest.approx(6.0)
    assert queued.wall > 0
    assert len(ran) == timing.WARM_UP + 2 * 4


@pytest.mark.parametrize(("all_us", "status"), [(100.0, "ok"), (103.0, "failed")])
def test_a_kernel_beside_the_gemm_fails_the_row(all_us: float, status: str) -> None:
    row = whole.judged(MEASURED | {"all_us": all_us}, MEASURED | {"us": 120.0}, timing.Queued(130.0, 121.0))
    assert row["status"] == status
    assert (row["other_us"], row["idle_us"]) == (all_us - 100.0, 9.0)
    assert status == "ok" or row["error"] == "beside the GEMM's 100.0 us its program ran 3.0 us of others"


def test_columns_of_the_read_flush_are_shown_where_it_was_measured() -> None:
    small = dense_row("fp8", 64, 4032, 4096)
    assert "read flush us" not in cells(result(small))[0]
    first, second = cells(result(small | {"read_flush": MEASURED | {"us": 9.0}}, dense_row("fp8", 4096)))
    names = ("floor us", "read flush us", "read flush floor us")
    assert [first[name] for name in names] == ["7.3", "9.0", "5.3"]
    assert [second[name] for name in names] == ["–"] * 3


def test_summary_has_ratios_of_times() -> None:
    lines = report.summary(result(dense_row("fp8", 4096), dense_row("fp8", 1024, us=50.0)))
    by = {line[3]: line[4:] for line in lines}
    assert by["cuBLASLt"] == ["1.13x", "0.80x", "0.884", "1.250"]
    assert by["DeepGEMM"] == ["1.21x", "0.88x", "0.826", "1.142"], "of 167.4 and 43.8 us"


def test_report_of_the_further_tables() -> None:
    skewed = {"table": "skew", "type": "fp8", "case": "few", "groups": 256, "m": 5000, "n": 7168, "k": 2048}
    sustained = dense_row("sustained", 8192) | CLOCK
    sustained["baseline"] |= {"clock": {"sm_mhz_median": 1250.0, "power_w_median": 700.0}}
    whole = dense_row("op", 64) | {
        "whole": MEASURED | {"us": 104.0},
        "wall_us": 109.0,
        "idle_us": 4.0,
        "other_us": 0.0,
    }
    shape = {"table": "shapes", "op": "m_grouped", "type": "bf16", "groups": 8, "m": 33, "n": 64, "k": 192}
    found = result(shape | MEASURED, skewed | MEASURED | {"baseline": {"us": 80.0}}, sustained, whole)
    shapes_cells, skew_cells, sustained_cells, op_cells = cells(found)
    assert shapes_cells["cuBLASLt us"] == shapes_cells["vs cuBLASLt"] == "–"
    assert (skew_cells["even sizes us"], skew_cells["ratio"]) == ("80.0", "1.25")
    assert ["skew", "fp8, few", "1", "even sizes", "0.80x", "0.80x", "1.250", "1.250"] in report.summary(
        found
    )
    names = ("TFLOP/s", "cuBLASLt TFLOP/s", "SM MHz", "cuBLASLt SM MHz", "W", "cuBLASLt W")
    assert [sustained_cells[name] for name in names] == ["500", "625", "1300", "1250", "700", "700"]
    names = ("us", "all us", "other us", "op us", "wall us", "wall - kernels us")
    assert [op_cells[name] for name in names] == ["100.0", "100.0", "0.0", "104.0", "109.0", "4.0"]


def test_control_is_reported_once_beside_the_reference(tmp_path: Path) -> None:
    assert catalog.reference_us("NVIDIA H200") == 714.0
    found = result(dense_row("fp8", 4096)) | {"control": {"what": "X", "us": 785.4, "reference_us": 714.0}}
    line = "Control: X 785.4 us, 1.10 of 714.0 us in the reference state."
    assert report.text(found).count(line) == report.markdown(tmp_path, found).count(line) == 1
    assert "Control" not in report.text(result(dense_row("fp8", 4096)))
    measured = measure_baseline(dense.control(64), calls=1, flush=lambda: None, clocks=None)
    assert measured["what"] == "cuBLASLt FP8 64^3 through jnp"
    assert measured["us"] > 0


def test_each_table_has_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    rows = [dense_row("fp8", 4096), dense_row("bf16", 4096), {"table": "moe", "status": "ok", "us": 1.0}]
    for table in ("m_grouped", "masked", "k_grouped"):
        rows += [{"table": table, **row.fields, **MEASURED} for row in rows_of(table)[:4]]
    path = tmp_path / "h200.json"
    write(path, result(*rows[:2], *rows[3:]))
    assert main(["bench", "--report", str(path), "--plot", str(tmp_path / "plots")]) == 0
    drawn = {target.name for target in (tmp_path / "plots").iterdir()}
    assert drawn == {f"h200-{name}.png" for name in ("fp8", "bf16", "m_grouped", "masked", "k_grouped")}
    assert (tmp_path / "plots" / "h200-masked.png").read_bytes().startswith(b"\x89PNG")
    peers = catalog.recorded("NVIDIA H200")
    lines = plots.series([row for row in rows if row["table"] == "fp8"], peers)
    assert list(lines) == ["jax_deepgemm", "DeepGEMM", "cuBLASLt"]
    assert lines["DeepGEMM"][0] / lines["jax_deepgemm"][0] == pytest.approx(1.674)
