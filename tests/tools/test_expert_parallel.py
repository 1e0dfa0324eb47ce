"""benchmarks/expert_parallel.py: how a trace is read, and that docs/moe.md shows what was measured."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from jax_deepgemm.tools.bench.trace import FLUSH, Event

pytestmark = pytest.mark.any_version
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("expert_parallel", ROOT / "benchmarks/expert_parallel.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["expert_parallel"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_calls_are_counted_from_the_end_of_the_flush(script):
    flush, case = f"jit_{FLUSH}", "jit_jdg_case"
    events = [
        Event("fill", 0, 1000, flush),
        Event("early", 900, 50, case),  # of another stream, while the flush still runs
        Event("ncclDevKernel_SendRecv", 1100, 500, case),
        Event("jdg_sm90_m_grouped_e4m3_nt", 1600, 400, case),
        Event("jdg_sum_rows", 2100, 100, case),
        Event("fill", 3000, 1000, flush),
        Event("jdg_sum_rows", 4500, 100, case),
    ]
    first, second = script.calls(events)
    assert script.split(first) == {
        "span_us": pytest.approx(1.2),
        "exchange_us": pytest.approx(0.5),
        "gemm_us": pytest.approx(0.4),
        "rest_us": pytest.approx(0.3),
    }
    assert script.split(second)["span_us"] == pytest.approx(0.6)


def test_the_documented_table_is_that_of_the_data(script):
    data = json.loads((ROOT / "benchmarks/data/expert_parallel_2xh200.json").read_text())
    assert script.table(data) in (ROOT / "docs/moe.md").read_text()
