"""How rows are measured, whatever they compute: what shares a draw, a session, which kernels count."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jax_deepgemm.cli import main
from jax_deepgemm.core.bench import Beside, Row, Table, every_row
from jax_deepgemm.ops.gemm import bench as dense
from jax_deepgemm.tools import registry
from jax_deepgemm.tools.bench import catalog, machine, measure, products, report, sides, timing, whole
from jax_deepgemm.tools.bench.timing import Job, Timing
from jax_deepgemm.tools.bench.trace import Measured


def halves(n: int, draw: Callable[[], Any] | None = None, **more: Any) -> Row:
    row = Row(f"halves n={n}", {"n": n}, lambda x: x / 2, draw or (lambda: (jnp.ones(n),)), bytes=8 * n)
    return replace(row, **more)


def measured(*rows: Row) -> list[dict[str, Any]]:
    return list(measure.measure(rows, calls=2, flush=lambda: None, clocks=None))


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[str, str, int]]]:
    """Names, prefixes and calls of what is timed in each profiler session, as on a GPU."""
    seen: list[list[tuple[str, str, int]]] = []

    def time_jobs(jobs: list[Job], *, calls: int, flush: Any, clocks: Any) -> dict[str, Timing]:
        seen.append([(job.name, job.prefix, calls) for job in jobs])
        for job in jobs:
            jax.block_until_ready(job.run())
        return {job.name: Timing(Measured((8.0,) * calls, ("k",), {"k": 8.0}), {}, "fake") for job in jobs}

    monkeypatch.setattr(machine, "on_gpu", lambda: True)
    monkeypatch.setattr(sides, "time_jobs", time_jobs)
    return seen


def test_rows_of_one_draw_share_it_and_a_session(sessions: list[Any]) -> None:
    drawn: list[jax.Array] = []

    def draw() -> jax.Array:
        drawn.append(jnp.ones(9))
        return drawn[-1]

    first = [halves(n, draw, operands=lambda all_of_it, n=n: (all_of_it[:n],)) for n in (3, 9)]
    results = measured(first[0], halves(5), first[1])
    assert [row["n"] for row in results] == [3, 9, 5]
    assert len(drawn) == 1
    assert [[name for name, *_ in session] for session in sessions] == [
        ["jdg_row_0", "jdg_row_1"],
        ["jdg_row_0"],
    ]
    assert results[1]["gbytes_per_s"] == round(72 / 8.0 / 1e3, 1)


def test_rows_of_one_session_have_draws_of_their_own(sessions: list[Any]) -> None:
    results = measured(halves(3, session="all"), halves(5), halves(7, session="all"))
    assert [row["n"] for row in results] == [3, 7, 5]
    assert list(map(len, sessions)) == [2, 1]


def test_only_own_kernels_count_and_baselines_are_measured_as_they_ask(sessions: list[Any]) -> None:
    beside = Beside("theirs", lambda x: x * 0.5, elsewhere="without a GPU")
    ours = Beside("ours, too", lambda x, y: x / y, constants=(jnp.float32(2),), fields={"n": 4}, ours=True)
    apart = Beside("apart", lambda x: x * 0.5, calls=5)
    skipped = replace(apart, skipped="too large")
    rows = [halves(4, session=0, baseline=one) for one in (beside, ours, apart, skipped, None)]
    results = measured(*rows, halves(4, prefix="", gemms="k", session=0))
    together, alone = sessions
    assert [prefix for _, prefix, _ in together] == ["jdg_", "", "jdg_", "jdg_", "jdg_", "jdg_", "jdg_", ""]
    assert {calls for *_, calls in together} == {2}
    assert [(prefix, calls) for _, prefix, calls in alone] == [("", 5)]
    baselines = [row["baseline"] for row in results if "baseline" in row]
    assert [one["what"] for one in baselines] == ["theirs", "ours, too", "apart", "apart"]
    assert [one["status"] for one in baselines] == ["ok", "ok", "ok", "skipped"]
    assert baselines[1]["n"] == 4
    assert baselines[3]["error"] == "too large"
    assert (results[-1]["gemm_us"], results[-1]["rest_us"]) == (8.0, 0.0)
    assert "baseline" not in results[4]


def test_a_row_that_fails_does_not_end_the_others() -> None:
    def no_memory() -> Any:
        raise RuntimeError("out of memory")

    wrong = halves(4, function=lambda x: x @ jnp.ones(5))
    first, second, third, fourth = measured(halves(3, no_memory), wrong, halves(4, in_turns=True), halves(4))
    assert first == {"n": 3, "status": "failed", "error": "operands: RuntimeError: out of memory"}
    assert (second["status"], third["status"], fourth["status"]) == ("failed", "failed", "ok")
    assert "TypeError" in second["error"]


def test_a_result_that_is_carried_takes_the_place_of_its_operand() -> None:
    [row] = measured(halves(4, lambda: (jnp.ones(4), jnp.zeros(4)), function=lambda x, c: c + x, carry=1))
    assert row["status"] == "ok"


def test_a_run_on_a_gpu_begins_with_the_control(
    sessions: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    control = catalog.control_row()
    assert control is not None
    monkeypatch.setattr(catalog, "control_row", lambda: replace(control, row=dense.control(64)))
    monkeypatch.setattr(timing, "flusher", lambda size: lambda: None)
    monkeypatch.setattr(measure, "_read_flusher", lambda: lambda: None)
    monkeypatch.setattr(whole, "time_queued", lambda jobs, calls: {jobs[0].name: timing.Queued(9.0, 8.5)})
    path = tmp_path / "gpu.json"
    tables = ["--tables", "bf16,quantize,op", "--rows", "m=64 |quantize_both"]
    assert main(["bench", "--small", "--calls", "3", "--out", str(path), *tables]) == 0
    found = report.load(path)
    assert found["control"]["what"] == "cuBLASLt FP8 64^3 through jnp"
    assert found["control"]["status"] == "ok"
    product, quantising, op = found["rows"]
    assert product["baseline"]["what"] == "cuBLASLt through jnp"
    assert product["read_flush"]["us"] == 8.0
    assert quantising["baseline"]["what"] == "copy of as many bytes, XLA"
    assert (op["whole"]["us"], op["idle_us"], op["other_us"]) == (8.0, 0.5, 0.0)
    prefixes = [[prefix for _, prefix, _ in session] for session in sessions]
    assert prefixes == [[""], ["jdg_", ""], ["jdg_"], ["jdg_", ""], ["jdg_sm90_", ""]]


TITLE = "Halves of float32 numbers"


def modules_of_toys() -> Iterator[tuple[str, ModuleType]]:
    """Two packages whose bench.py fill one table."""

    def rows(*of: int) -> Callable[[bool], list[Row]]:
        return lambda small: [halves(n) for n in (of[:1] if small else of)]

    table = Table(TITLE, ("n",), rows(8, 9), tuned=True, plotted=every_row)
    for name, declared in (("a", table), ("b", replace(table, rows=rows(10, 11)))):
        package, module = ModuleType(f"toys_{name}"), ModuleType(f"toys_{name}.bench")
        package.__path__ = []  # type: ignore[attr-defined]
        module.__spec__ = type(sys.__spec__)(module.__name__, None)  # type: ignore[misc]
        module.TABLES = {"halves": declared}  # type: ignore[attr-defined]
        yield package.__name__, package
        yield module.__name__, module


def test_a_package_that_is_registered_has_its_tables_measured_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, module in modules_of_toys():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(registry, "FOLDERS", (*registry.FOLDERS, "toys_a", "toys_b"))
    assert [row.name for row in products.tables()["halves"]] == [f"halves n={n}" for n in (8, 9, 10, 11)]
    assert products.of_row(halves(8)).operands[0].shape == (8,)
    path = tmp_path / "toys.json"
    assert main(["bench", "--tables", "halves", "--calls", "1", "--out", str(path)]) == 0
    assert TITLE in capsys.readouterr().out
    found = report.load(path)
    assert [(row["table"], row["n"]) for row in found["rows"]] == [("halves", 8), ("halves", 10)]
    assert main(["bench", "--report", str(path)]) == 0
    assert TITLE in capsys.readouterr().out


def test_without_them_there_is_no_such_table() -> None:
    assert "halves" not in catalog.tables()
