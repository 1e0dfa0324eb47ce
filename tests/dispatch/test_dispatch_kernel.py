"""The kernel that plans a dispatch, without a GPU.

The device code itself runs on the CPU, one thread for each thread of each block (tests/shared/native), with
the thread sanitizer on, which finds a barrier that is missing, and is compared with a loop.
"""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import jax_deepgemm
from jax_deepgemm.core.chip import H200
from jax_deepgemm.ops.dispatch import sm90
from jax_deepgemm.ops.dispatch.family import FAMILY
from jax_deepgemm.ops.dispatch.problem import MOST_EXPERTS, MOST_ROWS, DispatchProblem
from tests.shared import dispatch_oracle
from tests.shared.device_code import fields_of_concept, fields_of_struct

pytestmark = pytest.mark.any_version

NATIVE = Path(__file__).parents[1] / "shared" / "native"
DEVICE_CODE = Path(jax_deepgemm.__file__).parent / "include"
HEADER = Path("jax_deepgemm/dispatch/dispatch.cuh")
ALONE, CLUSTER, GRID, OF_ROWS = range(4)
CASES = 8
BROKEN = {
    "counts are summed while they grow": (
        "  count_run(d, at, mine);\n  __syncthreads();\n",
        "  count_run(d, at, mine);\n",
    ),
    "counts are read before they are raised": (
        "    __syncwarp();\n    if (known && below",
        "    if (known && below",
    ),
    "blocks do not wait": ("  meet<C>(d);\n", ""),
    "first rows are read while they are added to": ("sums);\n    __syncthreads();\n", "sums);\n"),
}

Case = tuple[int, int, int, int, list[int]]
"""Meeting, blocks, capacity (0: none), experts, ids."""


def draw(rng: random.Random) -> Case:
    meeting = rng.choice([ALONE, CLUSTER, GRID])
    meeting = OF_ROWS if meeting == ALONE and rng.random() < 0.5 else meeting
    blocks = 1 if meeting in (ALONE, OF_ROWS) else rng.choice([2, 3, 4])
    experts, copies = rng.choice([1, 2, 7, 33, 200]), rng.choice([1, 5, 31, 32, 33, 100, 500])
    skewed = rng.random() < 0.3
    ids = [0 if skewed and rng.random() < 0.9 else rng.randrange(experts) for _ in range(copies)]
    if rng.random() < 0.5:
        ids = [rng.choice([-1, experts, 2**31 - 1, -(2**31)]) if rng.random() < 0.2 else e for e in ids]
    return meeting, blocks, rng.choice([0, 0, 1, 3, 40]), experts, ids


def build(folder: Path, *included: Path) -> Path:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    target = folder / "dispatch"
    include = [f"-I{path}" for path in (*included, NATIVE / "blocks", DEVICE_CODE)]
    flags = ["-std=c++20", "-Og", "-pthread", "-fsanitize=thread", "-Wno-unknown-pragmas"]
    subprocess.run([compiler, *flags, *include, NATIVE / "dispatch.cc", "-o", target], check=True)
    return target


def problems(cases: list[Case], program: Path) -> list[str]:
    """What is wrong with the program's plans: races, and plans that are not the loop's."""
    lines = [" ".join(map(str, (*numbers, len(ids), *ids))) for *numbers, ids in cases]
    done = subprocess.run(
        [program], input="\n".join(lines), capture_output=True, text=True, check=False, timeout=100
    )
    if done.returncode:
        return [done.stderr]
    found = []
    for (*_, capacity, experts, ids), line in zip(cases, done.stdout.splitlines(), strict=True):
        plan = dispatch_oracle.plan(np.array(ids)[:, None], experts, capacity or None)
        want = np.concatenate([one.reshape(-1) for one in plan])
        found += [] if np.array_equal(np.array(line.split(), int), want) else [line]
    return found


def test_any_routing(tmp_path: Path) -> None:
    rng = random.Random(0)
    wide = (GRID, 34, 0, 5, [rng.randrange(-1, 5) for _ in range(400)])  # a lane has counts of two blocks
    rows = (OF_ROWS, 1, 0, 7, [rng.randrange(-1, 8) for _ in range(100)])
    assert problems([wide, rows, *(draw(rng) for _ in range(CASES))], build(tmp_path)) == []


@pytest.mark.parametrize("what", BROKEN)
def test_a_missing_barrier_is_found(what: str, tmp_path: Path) -> None:
    right, wrong = BROKEN[what]
    text = (DEVICE_CODE / HEADER).read_text()
    assert text.count(right) == 1
    changed = tmp_path / HEADER
    changed.parent.mkdir(parents=True)
    changed.write_text(text.replace(right, wrong))
    rng = random.Random(1)
    cases = [(GRID, 3, 0, 40, [rng.randrange(40) for _ in range(600)]) for _ in range(2)]
    assert problems(cases, build(tmp_path, tmp_path))


SIZES = (
    (1, 1, 0),
    (8, 256, 0),
    (2048, 2048, 3),
    (2049, 32, 0),
    (1 << 15, 256, 0),
    (40_000, 128, 0),
    (1 << 24, 2048, 0),
    (MOST_ROWS, MOST_EXPERTS, 7),
)
PROBLEMS = [*(DispatchProblem(*sizes) for sizes in SIZES), DispatchProblem(8, 256, slots=8)]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_plans_fit_the_chip(problem: DispatchProblem) -> None:
    pytest.importorskip("cuda.core")
    plan = FAMILY.plan(problem, H200, {})
    launch = plan.steps[-1]
    assert launch.shared_memory <= H200.smem_per_block
    assert launch.grid[0] <= H200.num_sms
    assert launch.cooperative == (problem.copies > sm90.TOGETHER) == (len(plan.steps) == 2)
    assert launch.cluster == (launch.grid[0] if not launch.cooperative else 1)
    cut = sm90.cut_of(problem, H200.num_sms)
    assert 32 * cut.width >= launch.grid[0]
    assert cut.warps & (cut.warps - 1) == 0
    assert not launch.kernel.report.problems()


def test_the_text_gives_what_device_code_asks_for() -> None:
    [source] = FAMILY.sources(PROBLEMS[0], H200)
    wanted = fields_of_concept("dispatch/dispatch.cuh", "DispatchConfig")
    assert fields_of_struct(source.text, "Config") == sorted(wanted)
