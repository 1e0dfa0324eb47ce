"""What families give to compute-sanitizer: the runner finds it all, and every call is a possible one."""

from __future__ import annotations

import jax
import pytest

from jax_deepgemm.core.sanitize import Case
from jax_deepgemm.tools import registry
from tests.gpu import sanitize

CASES_OF = {"quantize": 10, "swiglu": 6, "gemm": 14, "grouped": 33}
"""At least so many; of GEMMs as many more as there are kinds of configurations."""


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return list(sanitize.cases())


def test_every_family_of_kernels_has_cases() -> None:
    found = {module.__name__.split(".")[-2] for module in registry.parts("sanitize")}
    assert found >= {family.name for family in registry.families()}
    for module in registry.parts("sanitize"):
        assert len(list(module.cases())) >= CASES_OF[module.__name__.split(".")[-2]]


def test_cases_have_names_of_their_own_and_one_result(cases: list[Case]) -> None:
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    for kind in ("swap", "fp8 m=520", "fp8 m=5 ", "bf16 m=520", "bf16 m=5 ", "ping-pong", "split", "batch"):
        assert any(kind in name for name in names), kind
    for case in cases:
        result = jax.eval_shape(case.function, *case.operands)
        assert isinstance(result, jax.ShapeDtypeStruct), case.name
