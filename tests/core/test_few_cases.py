"""What `pytest --few`, the oldest end of CI, runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from tests import conftest

pytestmark = pytest.mark.any_version


@dataclass(frozen=True)
class Item:
    nodeid: str
    marker: str = ""

    def get_closest_marker(self, name: str) -> bool:
        return name == self.marker


def left(count: int, marker: str = "") -> list[int]:
    """Which of `count` cases of one test are left."""
    items: list[Any] = [Item(f"tests/test_a.py::test_b[{i}: x[{i}]]", marker) for i in range(count)]
    found = conftest.few([Item("tests/test_a.py::test_c"), *items])  # type: ignore[list-item]
    assert len(found) == 1 + sum(item in found for item in items)
    return [i for i, item in enumerate(items) if item in found]


@pytest.mark.parametrize(
    ("count", "want"),
    [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (4, [0, 1, 3]), (13, [0, 4, 8, 12]), (16, [0, 5, 10, 15])],
)
def test_a_quarter_three_at_least(count: int, want: list[int]) -> None:
    assert left(count) == want


@pytest.mark.parametrize("marker", ["each_version", "skipif"])
def test_all_cases_of_tests_with_a_marker(marker: str) -> None:
    assert left(20, marker) == list(range(20))
