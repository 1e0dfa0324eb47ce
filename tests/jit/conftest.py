"""An empty cache for each test of the compiler, and a count of what was compiled."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from jax_deepgemm.jit import compiler, toolchain
from tests.shared.jit_kernels import forget


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache and an empty environment for each test."""
    for name in [name for name in os.environ if name.startswith(toolchain.PREFIX)]:
        monkeypatch.delenv(name)
    directory = tmp_path / "cache"
    monkeypatch.setenv("JAX_DEEPGEMM_CACHE_DIR", str(directory))
    forget()
    return directory


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that went through a compiler."""
    names: list[str] = []
    build = compiler.build

    def counted(job: Any, target: str) -> tuple[bytes, str]:
        names.append(job.source.name)
        return build(job, target)

    monkeypatch.setattr(compiler, "build", counted)
    return names
