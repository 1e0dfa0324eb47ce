"""The table of groups that grouped kernels make from what the device holds, whatever it holds.

The device code runs on the CPU, one thread per lane of its warp (tests/shared/native), with the sanitizers
on, and is compared with loops over rows.
"""

from __future__ import annotations

import itertools
import random
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

import jax_deepgemm

pytestmark = pytest.mark.any_version

NATIVE = Path(__file__).parents[1] / "shared" / "native"
DEVICE_CODE = Path(jax_deepgemm.__file__).parent / "include"
TILE = 64  # rows and columns of a tile
LARGEST, SMALLEST = 2**31 - 1, -(2**31)
CASES = 120


@dataclass(frozen=True)
class Case:
    """`kind` is "rows", "masked", "inner" or "blocks" (inner, of whole blocks); `extent` the rows (inner: k)
    of the operand."""

    kind: str
    segmented: bool
    offset: int
    groups: int
    shared: int
    extent: int
    m: int
    n: int
    sizes: tuple[int, ...]

    @property
    def total(self) -> int:
        return len(self.sizes) // (3 if self.segmented else 1)

    def text(self) -> str:
        kind = ("rows", "masked", "inner", "blocks").index(self.kind)
        numbers = (kind, int(self.segmented), self.offset, self.total, self.groups, self.shared)
        return " ".join(map(str, (*numbers, self.extent, self.m, self.n, *self.sizes)))

    def ranges(self) -> list[tuple[int, int, int]]:
        """(start, end, group of this device) of every group there is, clamped."""
        if self.segmented:
            starts, ends, groups = (self.sizes[i * self.total : (i + 1) * self.total] for i in range(3))
            if self.kind == "inner":
                groups = tuple(range(self.total))
            starts = tuple(clamp(start, 0, self.extent) for start in starts)
            ends = tuple(clamp(end, start, self.extent) for start, end in zip(starts, ends, strict=True))
            return [(s, e, g - self.offset) for s, e, g in zip(starts, ends, groups, strict=True)]
        found, end = [], 0
        for group, size in enumerate(self.sizes):
            size = clamp(size, 0, self.extent)
            room = -(-size // 128) * 128 if self.kind == "blocks" else size
            start, end = end, clamp(end + room, 0, self.extent)
            found.append((start, min(start + size, end), group - self.offset))
        return found


def clamp(value: int, low: int, high: int) -> int:
    return max(low, min(value, high))


def draw(rng: random.Random) -> Case:
    kind = rng.choice(["rows", "rows", "rows", "masked", "inner", "inner", "blocks"])
    segmented = kind not in ("masked", "blocks") and rng.random() < 0.5
    total, extent = rng.choice([1, 2, 5, 31, 32, 33, 70, 256, 300]), rng.choice([1, 63, 64, 700, 5000])
    groups = total if kind == "masked" else rng.choice([total, max(1, total // 2), total + 3, 1])
    offset = rng.choice([0, 0, 0, rng.randint(0, total), -1, -3, total + 5, SMALLEST, LARGEST])
    kinds_of_size = [0, 1, extent, rng.randint(0, max(1, extent // 3))]
    if rng.random() < 0.5:
        kinds_of_size += [-5, SMALLEST, LARGEST, extent + 7]
    sizes = [rng.choice(kinds_of_size) for _ in range(total)]
    if segmented:
        edges = sorted(rng.randint(0, extent) for _ in range(2 * total))
        named = rng.sample(range(total), total)
        if rng.random() < 0.3:
            named = [rng.choice([SMALLEST, LARGEST, -1, group]) for group in named]
        sizes = [*edges[::2], *edges[1::2], *named]
    m = extent if kind in ("rows", "masked") else 100
    shared = rng.choice([groups, max(1, groups // 2)])
    return Case(kind, segmented, offset, groups, shared, extent, m, rng.choice([8, 64, 136]), tuple(sizes))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    target = tmp_path_factory.mktemp("native") / "group_table"
    include = [f"-I{NATIVE / 'one_warp'}", f"-I{DEVICE_CODE}"]
    flags = ["-std=c++20", "-Og", "-pthread", "-fsanitize=address,undefined", "-fno-sanitize-recover"]
    subprocess.run([compiler, *flags, *include, NATIVE / "group_table.cc", "-o", target], check=True)
    return target


def test_tables_of_any_sizes(program: Path) -> None:
    rng = random.Random(0)
    cases = [draw(rng) for _ in range(CASES)]
    given = "\n".join(case.text() for case in cases)
    done = subprocess.run([program], input=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(cases)
    for case, line in zip(cases, lines, strict=True):
        segments, tiles, *words = map(int, line.split())
        table = [tuple(words[i : i + 4]) for i in range(0, len(words), 4)]
        assert len(table) == segments + 1
        {"rows": check_rows, "masked": check_masked, "inner": check_inner, "blocks": check_inner}[case.kind](
            case, table, tiles
        )


def column_tiles(case: Case) -> int:
    return -(-case.n // TILE)


def check_rows(case: Case, table: list[tuple[int, ...]], tiles: int) -> None:
    """Every row is covered once, by its group, or by zeros."""
    want = [-1] * case.extent
    for start, end, group in case.ranges():
        if 0 <= group < case.groups:
            want[start:end] = [group] * (end - start)
    got: list[int | None] = [None] * case.extent
    before = 0
    for (start, end, first_tile, group), (stop, *_) in itertools.pairwise(table):
        assert first_tile == before, case
        before += -(-max(stop - start, 0) // TILE) * column_tiles(case)
        for row in range(start, stop):
            assert got[row] is None, case
            got[row] = group if row < end else -1
    assert got == want, case
    assert tiles == before, case


def check_masked(case: Case, table: list[tuple[int, ...]], tiles: int) -> None:
    rows = [clamp(size, 0, case.extent) for size in case.sizes]
    assert [(s, e, g) for s, e, _, g in table[:-1]] == [(0, r, i % case.shared) for i, r in enumerate(rows)]
    assert tiles == sum(-(-r // TILE) for r in rows) * column_tiles(case)


def check_inner(case: Case, table: list[tuple[int, ...]], tiles: int) -> None:
    """Segment i is group i of this device; groups that are not there are empty, and have their tiles too."""
    ranges = {group: (start, end) for start, end, group in case.ranges() if end > start}
    got = {i: (start, end) for i, (start, end, *_) in enumerate(table[:-1]) if end > start}
    assert got == {group: ends for group, ends in ranges.items() if 0 <= group < case.groups}, case
    assert tiles == case.groups * -(-case.m // TILE) * column_tiles(case)
