"""Tests dealt out to several processes: each test to one of them, and all processes busy for about as long.

    pytest -m gpu tests/gpu --shard 1/8          the first of eight parts
    python -m tests.shared.shards RESULT.xml ... [--record SECONDS.json]
        sums up what processes left with --junitxml; records how long a test of each function took

Tests that stay together share what is costly: those of a file that takes less than a process's share of the
time, else those of a function.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

RECORDED = Path(__file__).parent.parent / "gpu" / "seconds.json"
UNKNOWN = 1.0
"""Seconds of a test that no record knows."""
TOGETHER = ("test_grouped_gpu.py", "test_gemm_gpu.py::test_table")
"""Tests whose names start so are in one process: in several they would need more memory than a GPU has."""


def recorded() -> dict[str, float]:
    """Seconds of one test: of a function ("test_a.py::test_b"), or of any other of a file ("test_a.py")."""
    found: dict[str, float] = json.loads(RECORDED.read_text())
    return found


def deal(tests: Sequence[str], seconds: Mapping[str, float], count: int) -> list[list[str]]:
    """Node ids for each of `count` processes, in their order: the same ones in every process that asks.

    >>> deal(["t.py::a[1]", "t.py::a[2]", "t.py::b", "u.py::c"], {"t.py::a": 3, "t.py::b": 5}, 2)
    [['t.py::a[1]', 't.py::a[2]'], ['t.py::b', 'u.py::c']]
    """
    cost = {test: seconds_of(test, seconds) for test in tests}
    units = _units(cost, sum(cost.values()) / count)
    parts: list[set[str]] = [set() for _ in range(count)]
    loads = [0.0] * count
    for _, unit in sorted(units.items(), key=lambda named: (-_total(named[1], cost), named[0])):
        least = loads.index(min(loads))
        parts[least].update(unit)
        loads[least] += _total(unit, cost)
    return [[test for test in tests if test in part] for part in parts]


def _units(cost: Mapping[str, float], share: float) -> dict[str, list[str]]:
    """Tests that stay together, by the name of what they have in common."""
    of_file: dict[str, list[str]] = collections.defaultdict(list)
    for test in cost:
        of_file[file_of(test)].append(test)
    units: dict[str, list[str]] = collections.defaultdict(list)
    for file, tests in of_file.items():
        whole = _total(tests, cost) <= share
        for test in tests:
            function = function_of(test)
            unit = next((start for start in TOGETHER if function.startswith(start)), function)
            units[file if whole else unit].append(test)
    return units


def _total(tests: Iterable[str], cost: Mapping[str, float]) -> float:
    return sum(cost[test] for test in tests)


def function_of(test: str) -> str:
    """Of a node id: "file.py::function".

    >>> function_of("tests/gpu/test_a.py::test_b[1/2]")
    'test_a.py::test_b'
    """
    return test.split("[")[0].rsplit("/", 1)[-1]


def file_of(test: str) -> str:
    """Of a node id: "file.py"."""
    return function_of(test).split("::")[0]


def seconds_of(test: str, seconds: Mapping[str, float]) -> float:
    """What a test is taken to need."""
    return seconds.get(function_of(test), seconds.get(file_of(test), UNKNOWN))


# What they left -------------------------------------------------------------------------------------------


class Ran(NamedTuple):
    """A test that ended: "file.py::function[parameters]", its seconds, "passed", "skipped" or "failed"."""

    test: str
    seconds: float
    verdict: str


def results(path: Path) -> list[Ran]:
    """What a file of --junitxml says."""
    found = []
    for case in ElementTree.parse(path).iter("testcase"):
        children = {child.tag for child in case}
        verdict = "skipped" if "skipped" in children else "passed"
        verdict = "failed" if children & {"failure", "error"} else verdict
        file = case.get("classname", "").rsplit(".", 1)[-1]
        found.append(Ran(f"{file}.py::{case.get('name')}", float(case.get("time", 0)), verdict))
    return found


def means(every: Iterable[Ran]) -> dict[str, float]:
    """Seconds that one test of each function took; those that were skipped count too."""
    times: dict[str, list[float]] = collections.defaultdict(list)
    for one in every:
        times[function_of(one.test)].append(one.seconds)
    return {name: round(sum(all_of) / len(all_of), 2) for name, all_of in sorted(times.items())}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.shared.shards")
    parser.add_argument("results", nargs="+", type=Path, help="files of --junitxml, one for each process")
    parser.add_argument("--record", type=Path, help="a file for the seconds of each function's tests")
    options = parser.parse_args(arguments)
    parts = [results(path) for path in options.results]
    every = [one for part in parts for one in part]
    for one in sorted(every, key=_time)[-10:]:
        print(f"{one.seconds:6.1f} s  {one.test}")
    print("seconds of the processes:", *(round(sum(one.seconds for one in part)) for part in parts))
    counts = collections.Counter(one.verdict for one in every)
    print(", ".join(f"{counts[verdict]} {verdict}" for verdict in ("passed", "skipped", "failed")))
    if options.record:
        options.record.write_text(json.dumps(means(every), indent=1) + "\n")
    return 0 if counts["passed"] and not counts["failed"] else 1


def _time(one: Ran) -> float:
    return one.seconds


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
