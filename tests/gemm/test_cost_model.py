"""The cost models against a sweep on an H200: every candidate of the problems of all tables, timed.

The sweep is the output of `python -m jax_deepgemm tune --tables ... --json` (its `method` says of which), an
entry a line. A problem is written as the tuning file writes it: the fields that are not at their default.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from jax_deepgemm.core.chip import H200
from jax_deepgemm.core.tuning import problem_key
from jax_deepgemm.ops.gemm.family import GemmConfig
from jax_deepgemm.ops.gemm.problem import GemmProblem
from jax_deepgemm.ops.grouped.problem import GroupedProblem
from tests.shared.choosing import cheapest

pytestmark = pytest.mark.any_version

SWEEP = Path(__file__).parents[2] / "benchmarks/data/h200_sweep.json"
FAMILIES = {"dense": 90, "grouped": 100}  # at least so many problems


def problem_of(key: str) -> GemmProblem | GroupedProblem:
    """The inverse of `problem_key`."""
    name, *given = key.split()
    cls: Any = {"GemmProblem": GemmProblem, "GroupedProblem": GroupedProblem}[name]
    types = {field.name: field.type for field in dataclasses.fields(cls)}
    read = {"int": int, "bool": "True".__eq__, "str": str}
    problem = cls(**{field: read[types[field]](value) for field, value in (x.split("=") for x in given)})
    assert problem_key(problem) == key
    return problem


def regrets() -> dict[str, dict[str, float]]:
    """Family -> problem -> how much slower than the best the model's choice was, in this sweep."""
    sweep, found = json.loads(SWEEP.read_text()), defaultdict(dict)
    for row in sweep["problems"]:
        times = {}
        for measured in row["rows"]:
            fields = dict(zip(sweep["columns"], measured, strict=True))
            us = fields.pop("us")
            times[GemmConfig(**fields)] = us
        problem = problem_of(row["problem"])
        dense = isinstance(problem, GemmProblem)
        chosen = cheapest(problem, H200)
        assert chosen in times, f"{row['problem']}: {chosen} was not measured"
        found["dense" if dense else "grouped"][row["problem"]] = times[chosen] / min(times.values()) - 1
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_choices_are_near_the_best_measured(family: str) -> None:
    lost = regrets()[family]
    assert len(lost) >= FAMILIES[family]
    assert statistics.mean(lost.values()) <= 0.03
    worst = max(lost, key=lambda key: lost[key])
    assert lost[worst] <= 0.10, worst
