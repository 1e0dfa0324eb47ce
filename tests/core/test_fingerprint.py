"""What invalidates a compiled program: its own op's sources, and nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import jax_deepgemm
from jax_deepgemm.core import version
from jax_deepgemm.ops.gemm.op import BF16_GEMM
from jax_deepgemm.ops.quantize.op import quantize_op

PACKAGE = Path(jax_deepgemm.__file__).parent
GEMM = BF16_GEMM["nt"].modules
After = Callable[[str, tuple[str, ...]], str]


@pytest.fixture
def fingerprint_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, tuple[str, ...]], str]:
    """The fingerprint after a line was added to a file of a copy of the package."""
    copy = tmp_path / "jax_deepgemm"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    monkeypatch.setattr(version, "__file__", str(copy / "core" / "version.py"))

    def after(edited: str, modules: tuple[str, ...]) -> str:
        if edited:
            path = copy / edited
            path.write_text(f"{path.read_text()}\n")
        version.fingerprint.cache_clear()
        return version.fingerprint(modules)

    return after


@pytest.mark.parametrize(
    ("edited", "counts"),
    [
        ("ops/gemm/op.py", True),
        ("ops/gemm/reference.py", True),
        ("ops/gemm/sm90/cost.py", True),
        ("ops/quantize/array.py", True),  # what the products' operands are
        ("core/op.py", True),
        ("jit/compiler.py", True),
        ("include/jax_deepgemm/gemm/mainloop.cuh", True),
        ("include/jax_deepgemm/ptx/wgmma.cuh", True),
        ("include/jax_deepgemm/pipeline.cuh", True),
        ("include/jax_deepgemm/grouped/group_table.cuh", False),
        ("ops/grouped/op.py", False),
        ("ops/gemm/shapes.py", False),
        ("moe/layer.py", False),
        ("tools/explain.py", False),
        ("cli/info.py", False),
    ],
)
def test_what_a_dense_product_depends_on(edited: str, counts: bool, fingerprint_after: After) -> None:
    before = fingerprint_after("", GEMM)
    assert before.startswith(jax_deepgemm.__version__)
    assert (fingerprint_after(edited, GEMM) != before) == counts


def test_another_family_is_not_touched(fingerprint_after: After) -> None:
    modules = quantize_op((1, 128), np.dtype("float8_e4m3fn"), "float32").modules
    before = fingerprint_after("", modules)
    assert fingerprint_after("ops/gemm/sm90/cost.py", modules) == before
    assert fingerprint_after("ops/quantize/sm90.py", modules) != before
