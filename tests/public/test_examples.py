"""Every example in a docstring runs (test_docstrings.py: every public function has one)."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import jax_deepgemm

MODULES = sorted(
    found.name
    for found in pkgutil.walk_packages(jax_deepgemm.__path__, "jax_deepgemm.")
    if not found.name.endswith("_ffi")
)


def needs_a_compiler(module: str) -> bool:
    return module in {"jax_deepgemm.tools.explain", "jax_deepgemm.core.launch"} or ".jit." in module


@pytest.mark.any_version
@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    if needs_a_compiler(name):
        pytest.importorskip("cuda.core")
        pytest.importorskip("jax_deepgemm._ffi")
    if name.startswith("jax_deepgemm.flax"):
        pytest.importorskip("flax.nnx")
    if name == "jax_deepgemm.ops.quantize.interop":
        pytest.importorskip("qwix")
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0
