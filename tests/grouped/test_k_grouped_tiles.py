"""Tiles of K-grouped products with scales of 1x128 and 128x128: the producer and the main loop.

Their device code runs on the CPU, a thread for each warp (tests/shared/native/k_grouped_tiles.cc), over tiles
of every length behind each other, and its sums are compared with those of the numbers.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.shared import native_tiles
from tests.shared.native_tiles import DEVICE_CODE

pytestmark = pytest.mark.any_version


BROKEN = {
    "scales in ascending order": (
        "fp8_loop.cuh",
        "load_shared(at + 3 * apart), ptx::load_shared(at + 2 * apart)",
        "load_shared(at), ptx::load_shared(at + 2 * apart)",
    ),
    "a group's last block whole": (
        "fp8_loop.cuh",
        "ceil_div(min(tile.k_stop, C::BLOCK_K), 32)",
        "kStepsPerBlock",
    ),
}


def run(folder: Path, *included: Path) -> subprocess.CompletedProcess[str]:
    return native_tiles.run("k_grouped_tiles.cc", folder, included)


def test_every_tile(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "every tile\n"


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_loop_is_found(what: str, tmp_path: Path) -> None:
    name, right, wrong = BROKEN[what]
    text = (DEVICE_CODE / "jax_deepgemm" / "gemm" / name).read_text()
    assert text.count(right) == 1
    changed = tmp_path / "jax_deepgemm" / "gemm" / name
    changed.parent.mkdir(parents=True)
    changed.write_text(text.replace(right, wrong))
    done = run(tmp_path, tmp_path)
    assert done.returncode == 1
    assert "tile at" in done.stderr
