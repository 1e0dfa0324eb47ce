"""Every example in a docstring runs, and every public function has one."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from types import ModuleType

import pytest

import jax_deepgemm
from jax_deepgemm import config, moe
from jax_deepgemm.ops import grouped
from jax_deepgemm.ops import quantize as quantization
from jax_deepgemm.ops import swiglu as activation

MODULES = sorted(
    found.name
    for found in pkgutil.walk_packages(jax_deepgemm.__path__, "jax_deepgemm.")
    if not found.name.endswith("_ffi")
)
PUBLIC: dict[ModuleType, list[str]] = {
    jax_deepgemm: jax_deepgemm.__all__,
    quantization: quantization.__all__,
    grouped: grouped.__all__,
    activation: activation.__all__,
    moe: moe.__all__,
    config: ["get", "update", "use"],
}
SEEN_WHOLE = {"GemmConfig", "GemmProblem", "DispatchPlan"}
"""Plain data, shown in the examples of `explain`, `precompile` and `plan_dispatch`."""


def needs_a_compiler(module: str) -> bool:
    return module in {"jax_deepgemm.tools.explain", "jax_deepgemm.core.launch"} or ".jit." in module


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


@pytest.mark.parametrize("module", PUBLIC, ids=lambda module: module.__name__)
def test_every_public_function_has_an_example(module: ModuleType) -> None:
    documented = {name: getattr(module, name) for name in PUBLIC[module]}
    missing = [
        name
        for name, value in documented.items()
        if callable(value) and name not in SEEN_WHOLE and ">>>" not in (value.__doc__ or "")
    ]
    assert not missing
