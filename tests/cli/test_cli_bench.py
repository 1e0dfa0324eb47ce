"""Benchmarks: reading a trace, timing on a CPU, reports from result files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jax_deepgemm.cli import main
from jax_deepgemm.cli.bench import write
from jax_deepgemm.core.bench import Row
from jax_deepgemm.ops.gemm import bench as dense
from jax_deepgemm.tools.bench import catalog, plots, report, timing, trace
from jax_deepgemm.tools.bench.machine import ClockLog
from jax_deepgemm.tools.bench.measure import with_gemms

FLUSH_NAME = "loop_broadcast_fusion"


def profile(events: list[tuple[str, str, float]], plane: str = "/device:GPU:0") -> Any:
    """A profile whose one stream ran (kernel, module, microseconds), one after the other."""
    from jax.profiler import ProfileData

    names = {name: number for number, name in enumerate(dict.fromkeys(name for name, *_ in events), 1)}
    modules = {module: number for number, module in enumerate(dict.fromkeys(m for _, m, _ in events), 10)}
    lines, start = [], 0
    for name, module, microseconds in events:
        stat = f"stats {{ metadata_id: 1 ref_value: {modules[module]} }}" if module else ""
        picoseconds = int(microseconds * 1e6)
        lines.append(
            f"events {{ metadata_id: {names[name]} offset_ps: {start} duration_ps: {picoseconds} {stat} }}"
        )
        start += picoseconds + 1000
    kinds = [f'event_metadata {{ key: {n} value {{ id: {n} name: "{name}" }} }}' for name, n in names.items()]
    stats = ['stat_metadata { key: 1 value { id: 1 name: "hlo_module" } }']
    stats += [
        f'stat_metadata {{ key: {n} value {{ id: {n} name: "{m}" }} }}' for m, n in modules.items() if m
    ]
    body = "\n".join(lines)
    derived = (
        f'lines {{ id: 2 name: "XLA Modules" events {{ metadata_id: 1 offset_ps: 0 duration_ps: {start} }} }}'
    )
    planes = f'planes {{ name: "{plane}" lines {{ id: 1 name: "Stream #13(Compute)" {body} }} {derived} '
    planes += " ".join([*kinds, *stats]) + ' } planes { name: "/host:CPU" }'
    return ProfileData.from_serialized_xspace(ProfileData.text_proto_to_serialized_xspace(planes))


def two_jobs(named: bool) -> list[tuple[str, str, float]]:
    """Twice each: a kernel of ours behind a copy, and a baseline of two kernels; each behind a flush."""
    events = []
    for factor in (1.0, 1.2):
        events += [(FLUSH_NAME, "jit_jdg_flush", 2400.0), ("copy", "jit_ours", 3.0)]
        events += [("jdg_sm90_fp8", "jit_ours", 10.0 * factor)]
        events += [(FLUSH_NAME, "jit_jdg_flush", 2400.0)]
        events += [("nvjet_gemm", "jit_base", 20.0 * factor), ("splitk_reduce", "jit_base", 2.0)]
    return events if named else [(name, "", duration) for name, _, duration in events]


@pytest.mark.parametrize("named", [True, False])
def test_kernels_find_their_call(named: bool) -> None:
    events = trace.device_events(profile(two_jobs(named)))
    calls = trace.split_calls(events, ["ours", "base"] * 2)
    ours = trace.measured(calls["ours"], prefix="jdg_")
    base = trace.measured(calls["base"])
    assert ours.microseconds == pytest.approx((10.0, 12.0))
    assert ours.everything == pytest.approx((13.0, 15.0))
    assert ours.kernels == ("jdg_sm90_fp8",)
    assert base.microseconds == pytest.approx((22.0, 26.0))
    assert base.by_kernel == pytest.approx({"nvjet_gemm": 22.0, "splitk_reduce": 2.0})


def test_other_planes_are_ignored() -> None:
    assert trace.device_events(profile(two_jobs(True), plane="/device:GPU:1")) == []
    assert trace.device_events(profile(two_jobs(True), plane="/host:threads")) == []


def test_lost_call_is_an_error_that_counts() -> None:
    events = trace.device_events(profile(two_jobs(False)[:-3]))
    with pytest.raises(ValueError, match="shows 3 calls between flushes, but 4 were made"):
        trace.split_calls(events, ["ours", "base"] * 2)


def test_missing_kernel_is_an_error_that_lists() -> None:
    events = trace.device_events(profile(two_jobs(True)))
    calls = trace.split_calls(events, ["ours", "base"] * 2)
    with pytest.raises(ValueError, match=r"no kernel named jdg_\* among \['nvjet_gemm', 'splitk_reduce'\]"):
        trace.measured(calls["base"], prefix="jdg_")


def test_jobs_are_timed_by_the_wall_clock_without_a_gpu() -> None:
    import jax
    import jax.numpy as jnp

    x = jnp.ones((64, 64))
    square = jax.jit(timing.named(lambda a: a @ a, "square"))

    def fails() -> None:
        raise RuntimeError("out of luck\nand more")

    jobs = [timing.Job("square", lambda: square(x)), timing.Job("fails", fails)]
    results = timing.time_jobs(jobs, calls=3, flush=timing.flusher(1 << 16))
    measured = results["square"].measured
    assert measured is not None
    assert len(measured.microseconds) == 3
    assert results["square"].method.startswith("wall clock")
    assert results["fails"].measured is None
    assert results["fails"].error == "RuntimeError: out of luck"


def test_jobs_are_timed_from_the_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    kernels = {trace.FLUSH: FLUSH_NAME, "ours": "jdg_gemm", "base": "nvjet", "odd": "something_else"}

    def read(folder: str) -> list[trace.Event]:
        seen = ran[ran.index(trace.FLUSH) :]
        return [
            trace.Event(kernels[name], i, 1000.0 * (i % 7 + 1), f"jit_{name}") for i, name in enumerate(seen)
        ]

    monkeypatch.setattr(trace, "read", read)
    jobs = [timing.Job(name, lambda name=name: ran.append(name)) for name in ("ours", "base")]
    jobs.append(timing.Job("odd", lambda: ran.append("odd"), prefix="jdg_"))
    results = timing.time_jobs(jobs, calls=3, flush=lambda: ran.append(trace.FLUSH))
    for name in ("ours", "base"):
        measured = results[name].measured
        assert measured is not None
        assert measured.kernels == (kernels[name],)
        assert len(measured.microseconds) == 3
        assert results[name].method == "profiler"
    assert results["odd"].error == "no kernel named jdg_* among ['something_else']"


def test_clock_log_takes_the_samples_of_an_interval() -> None:
    log = ClockLog(
        period_ms=100, samples=[(0.0, 1980, 100), (1.0, 1500, 600), (1.1, 1400, 700), (5.0, 1980, 90)]
    )
    assert log.between(0.95, 1.15) == {
        "sm_mhz_median": 1450,
        "sm_mhz_min": 1400,
        "power_w_median": 650,
        "samples": 2,
    }
    assert log.between(3.0, 3.1) == {}


def result(failed: bool = False) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for table, m in (("fp8", 64), ("fp8", 4096), ("bf16", 4096)):
        [product] = dense.products(table, [m], 4096, 7168)
        row = {"table": table, "m": m, "n": 4096, "k": 7168, "compile_ms": 700.0, "status": "ok"}
        row |= {
            "us": 100.0,
            "tflops": product.flops / 1e8,
            "gbytes_per_s": 9.0,
            "clock": {"sm_mhz_median": 1600.0},
        }
        rows.append(row | {"baseline": {"what": "cuBLASLt", "status": "ok", "us": 110.0, "tflops": 1.0}})
    if failed:
        rows[0] = {key: rows[0][key] for key in ("table", "m", "n", "k")} | {
            "status": "failed",
            "error": "broken",
            "baseline": {"status": "failed", "error": "broken"},
        }
    return {
        "schema": 1,
        "device": "NVIDIA H200",
        "gpu": {"name": "NVIDIA H200", "driver_version": "1.2", "power.limit": "700"},
        "versions": {"jax": "0.0"},
        "method": "As invented.",
        "calls": 12,
        "started": "2026-01-01T00:00:00Z",
        "rows": rows,
    }


@pytest.mark.any_version
def test_report_compares_with_recorded_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "h200.json"
    write(path, result())
    assert json.loads(path.read_text()) == result()
    assert main(["bench", "--report", str(path)]) == 0
    shown = capsys.readouterr().out
    [row] = [line.split() for line in shown.splitlines() if line.split()[:3] == ["4096", "4096", "7168"]][:1]
    assert row[6:] == ["110.0", "167.4", "1.10x", "1.67x", "1600"]


GROUPED_TABLES = ("m_grouped", "masked", "k_grouped", "ragged_dot")


def rows_of(table: str, small: bool = False) -> list[Row]:
    return list(catalog.tables()[table].rows(small))


def fields_of(table: str, row: Row) -> dict[str, Any]:
    """What a result says of a row before it is measured."""
    return {"table": table, **row.fields}


def grouped_result() -> dict[str, Any]:
    """One row of each kind of table; the second calls twice as long as DeepGEMM's."""
    measured = {
        "status": "ok",
        "us": 200.0,
        "all_us": 210.0,
        "tflops": 1000.0,
        "gbytes_per_s": 9.0,
        "clock": {},
    }
    rows = []
    for table in GROUPED_TABLES:
        rows += [fields_of(table, row) | measured for row in rows_of(table)]
    for row in rows:
        if row["table"] == "ragged_dot":
            row["baseline"] = {"what": "jax.lax.ragged_dot", "status": "ok", "us": 1000.0}
    rows += [fields_of("moe", row) | measured | {"gemm_us": 150.0, "rest_us": 50.0} for row in rows_of("moe")]
    return result() | {"rows": rows}


@pytest.mark.any_version
def test_report_of_grouped_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "h200.json"
    write(path, grouped_result())
    assert main(["bench", "--report", str(path)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    shown = {tuple(line[:6]): line[6:] for line in lines}
    assert shown["fp8", "32", "192", "6144", "7168", "200.0"][-3:] == ["545.6", "2.73x", "–"]
    padded = ["200.0", "1000", "9", "210.0", "719.8", "3.60x", "–"]
    assert ["fp8", "padded", "32", "256", "6144", "7168", *padded] in lines
    ragged = ["200.0", "1000", "9", "1000.0", "1062.0", "5.00x", "5.31x", "–"]
    assert ["bf16", "32", "256", "7168", "3072", *ragged] in lines
    assert any(line[-7:] == ["1000", "150.0", "50.0", "25%", "–", "–", "–"] for line in lines)
    assert any(
        line[:6] == ["ragged_dot", "bf16", "5", "jax.lax.ragged_dot", "5.00x", "5.00x"] for line in lines
    )
    pages = {target.name: content for target, content in report.documents([path]).items()}
    assert "| masked | fp8 | 32 | 192 | 6144 | 7168 | 200.0 |" in pages["README.md"]


def test_failed_rows_are_shown_as_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "h200.json"
    write(path, result(failed=True))
    assert main(["bench", "--report", str(path)]) == 0
    assert "failed" in capsys.readouterr().out


@pytest.mark.any_version
def test_documents_are_made_from_results(tmp_path: Path) -> None:
    path = tmp_path / "h200.json"
    write(path, result())
    pages = {target.name: content for target, content in report.documents([path]).items()}
    assert "| fp8 | 4096 | 4096 | 7168 | 100.0 |" in pages["README.md"]
    assert "## NVIDIA H200" in pages["benchmarks.md"]
    assert "img/h200.png" in pages["benchmarks.md"]


def test_results_without_a_gpu_claim_nothing(tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    write(path, result() | {"device": "cpu", "gpu": {}})
    assert all(report.NOTHING in content for content in report.documents([path]).values())


MOST_BYTES_OF_PLOTS, MOST_BYTES_OF_PICTURES = 150_000, 60_000  # in git, each time that results change


def test_plots_that_are_kept_are_small() -> None:
    kept = list((catalog.ROOT / "docs" / "img").iterdir())
    assert {"nvidia-h200.png"} <= {path.name for path in kept}
    most = {".png": MOST_BYTES_OF_PLOTS, ".svg": MOST_BYTES_OF_PICTURES}
    assert not [path for path in kept if path.stat().st_size > most[path.suffix]]


@pytest.mark.any_version
def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    target = tmp_path / "plot.png"
    both = result() | {"rows": result()["rows"] + grouped_result()["rows"]}
    assert plots.together(both, target)
    assert target.read_bytes().startswith(b"\x89PNG")
    assert target.stat().st_size < MOST_BYTES_OF_PLOTS


@pytest.mark.parametrize("content", ["", "[]", '{"schema": 2, "rows": []}'])
def test_other_files_are_refused(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    assert main(["bench", "--report", str(path)]) == 2
    assert "is not a result file" in capsys.readouterr().err


@pytest.mark.any_version
@pytest.mark.parametrize(
    ("arguments", "tables"),
    [
        (["--rows", "m=1 ", "--tables", "fp8,fp8_wgrad,bf16"], ["fp8", "fp8_wgrad", "bf16"]),
        pytest.param(
            ["--rows", "m_grouped fp8 padded|masked bf16|k_grouped bf16|ragged_dot bf16|fp8 layer (?!128)"],
            ["m_grouped", "masked", "k_grouped", "ragged_dot", "k_drawn"],
            marks=pytest.mark.any_version,
        ),
        pytest.param(
            ["--rows", "moe bf16 forward:|swiglu_quantize|linear forward, FP8|moe_mlp, bf16"],
            ["quantize", "linear", "moe", "moe_step"],
            marks=pytest.mark.any_version,
        ),
    ],
    ids=("dense", "grouped", "layers"),
)
def test_small_run_writes_a_result(
    arguments: list[str], tables: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trial.json"
    assert main(["bench", "--out", str(path), "--calls", "2", *arguments]) == 0
    found = report.load(path)
    assert [row["table"] for row in found["rows"]] == tables
    assert all(row["status"] == "ok" and row["calls"] == 2 for row in found["rows"])
    shown = capsys.readouterr().out
    assert f"{len(tables)} rows, 0 failed" in shown
    assert f"written to {path}" in shown


def test_no_file_is_written_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "--calls", "1", "--tables", "bf16", "--rows", "m=1 "]) == 0
    assert "written to no file (--out FILE keeps them)" in capsys.readouterr().out
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


COUNTS = {
    "fp8": 58,
    "fp8_wgrad": 7,
    "bf16": 21,
    "einsum": 11,
    "m_grouped": 48,
    "masked": 32,
    "k_grouped": 12,
    "gathered": 12,
    "fine": 16,
    "mixed": 17,
    "mixed_bf16": 6,
    "nvfp4": 6,
    "per_channel": 10,
    "ragged_dot": 5,
    "quantize": 18,
    "dispatch": 21,
    "rows": 12,
    "linear": 8,
    "route": 40,
    "topk": 20,
    "mqa_logits": 26,
    "paged_mqa_logits": 14,
    "indexer_quantize": 9,
    "indexer_topk": 6,
    "paged_append": 6,
    "hc_prenorm": 8,
    "moe": 17,
    "moe_inference": 16,
    "moe_step": 4,
    "moe_shared": 12,
    "norms": 72,
    "shapes": 24,
    "epilogue": 60,
    "attention_decode": 12,
    "attention_prefill": 7,
    "mla": 8,
    "k_drawn": 17,
    "skew": 14,
    "sustained": 1,
    "op": 6,
}


def test_every_table_is_measured_and_shown() -> None:
    counts = {name: len(rows_of(name)) for name in catalog.tables()}
    assert counts == COUNTS
    assert list(counts) == list(COUNTS)
    for name, table in catalog.tables().items():
        assert rows_of(name, small=True), name
        for small in (False, True):
            rows = rows_of(name, small)
            assert len(set(map(str, rows))) == len({catalog.key(fields_of(name, row)) for row in rows})
            assert len(set(map(str, rows))) == len(rows)
            assert all(set(table.keys) <= set(row.fields) for row in rows)
        assert set(table.columns) <= set(catalog.CELLS)


def test_tables_are_those_of_the_recorded_figures() -> None:
    tables = ("fp8", "fp8_wgrad", "bf16", *GROUPED_TABLES)
    ours = {catalog.key(fields_of(table, row)) for table in tables for row in rows_of(table)}
    others = {
        catalog.key(fields_of(table, row))
        for table in ("mqa_logits", "paged_mqa_logits", "hc_prenorm", "einsum")
        for row in rows_of(table)
    }
    recorded = set(catalog.recorded("NVIDIA H200"))
    assert recorded - others == ours
    assert len(recorded & others) == 14
    assert catalog.recorded("NVIDIA A100") == {}


def test_group_sizes_have_the_sum_of_the_recorded_ones() -> None:
    """rows = us * TFLOP/s / (2 n k), within the rounding of a rate to a whole number."""
    peers = catalog.recorded("NVIDIA H200")
    for table in ("m_grouped", "masked", "k_grouped"):
        for row in rows_of(table):
            if row.fields["sizes"] == "padded" or table != "m_grouped":
                peer = peers[catalog.key(fields_of(table, row))]
                assert row.flops / peer["us"] / 1e6 == pytest.approx(peer["tflops"], abs=1), str(row)
            expected = row.fields["k" if table == "k_grouped" else "m"]
            assert all(0.69 * expected <= size <= 1.3 * expected + 128 for size in row.fields["group_sizes"])
            assert row.fields["group_sizes"] == row.constants[0].tolist()


def test_gemms_of_a_layer_are_told_from_the_rest() -> None:
    kernels = {"jdg_sm90_rows_e4m3_nt": 60.0, "jdg_quantize_1x128_bf16_e4m3": 10.0, "loop_gather_fusion": 5.0}
    [prefix] = {row.gemms for row in rows_of("moe")}
    found = with_gemms({"status": "ok", "us": 80.0, "kernels": kernels}, prefix)
    assert (found["gemm_us"], found["rest_us"]) == (60.0, 20.0)
