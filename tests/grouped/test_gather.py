"""The producer that copies rows which an index names: its device code on the CPU, every thread of it
(tests/shared/native/gather.cc)."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.shared import native_tiles
from tests.shared.native_tiles import DEVICE_CODE

pytestmark = pytest.mark.any_version


BROKEN = {
    "any row": ("gather.cuh", "static_cast<u32>(found) < static_cast<u32>(rows)", "found != -1", "beside"),
    "the next group's rows": (
        "gather.cuh",
        "place < end ? __ldg(index + place) : -1",
        "__ldg(index + place)",
        "",
    ),
    "an arrival before the copies": (
        "producer.cuh",
        "ptx::copy_async_arrive(ring.full());",
        "ptx::mbarrier_arrive(ring.full());",
        "values of the tile",
    ),
}


def run(folder: Path, *included: Path) -> subprocess.CompletedProcess[str]:
    return native_tiles.run("gather.cc", folder, included)


def test_every_slot(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "every slot\n"


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_producer_is_found(what: str, tmp_path: Path) -> None:
    name, right, wrong, said = BROKEN[what]
    text = (DEVICE_CODE / "jax_deepgemm" / "gemm" / name).read_text()
    assert text.count(right) == 1
    changed = tmp_path / "jax_deepgemm" / "gemm" / name
    changed.parent.mkdir(parents=True)
    changed.write_text(text.replace(right, wrong))
    done = run(tmp_path, tmp_path)
    assert done.returncode == 1
    assert said in done.stderr
