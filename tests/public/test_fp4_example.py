"""The example of experts in FP4: a line for each recipe, and errors that are what they should be."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "fp4_experts.py"


def example() -> Any:
    spec = importlib.util.spec_from_file_location("fp4_experts", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.any_version
def test_errors_of_gpt_oss() -> None:
    """Beside the checkpoint FP4 is as far as FP8, whose bits it has; beside the masters it is coarser."""
    lines = example().measure("gpt-oss", "small")
    found = [[float(one) for one in re.findall(r"([\d.]+) %", line)] for line in lines]
    (bf16, of_bf16), (fp8, of_fp8), (fp4, of_fp4) = found
    assert max(bf16, of_bf16) < 0.8
    assert fp8 < 6 < 10 < fp4 < 20
    assert of_fp8 == of_fp4 < 4
