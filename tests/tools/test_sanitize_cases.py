"""What families give to compute-sanitizer: the runner finds it all, and every call is a possible one."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import pytest

from jax_deepgemm.core.sanitize import Case
from jax_deepgemm.tools import registry
from tests.gpu import sanitize

pytestmark = pytest.mark.any_version

LEAST = {
    "quantize": 10,
    "swiglu": 6,
    "dispatch": 6,
    "rows": 12,
    "gemm": 40,
    "einsum": 14,
    "grouped": 32,
    "topk": 10,
}
"""So many cases a family has, or more."""


@pytest.fixture(scope="module")
def cases() -> dict[str, list[tuple[str, Any]]]:
    """Names and results' shapes, by the folder of the family. Traced, which draws and computes no operand."""
    found = {}

    def walk() -> None:
        for module in registry.parts("sanitize"):
            shapes = [(case.name, jax.eval_shape(case.function, *case.operands)) for case in module.cases()]
            found[module.__name__.split(".")[-2]] = shapes

    jax.eval_shape(walk)
    return found


def test_every_family_of_kernels_has_cases(cases: dict[str, list[tuple[str, Any]]]) -> None:
    assert set(cases) >= {family.name for family in registry.families()}
    assert all(len(cases[name]) >= count for name, count in LEAST.items())
    kinds = ("swap", "fp8 m=520", "fp8 m=5 ", "bf16 m=520", "bf16 m=5 ", "ping-pong", "split", "batch")
    assert all(any(kind in name for name, _ in cases["gemm"]) for kind in kinds)


def test_cases_have_names_of_their_own_and_one_result(cases: dict[str, list[tuple[str, Any]]]) -> None:
    every = list(itertools.chain(*cases.values()))
    assert len({name for name, _ in every}) == len(every)
    for name, result in every:
        assert isinstance(result, jax.ShapeDtypeStruct), name


def test_the_runner_walks_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class Part:
        def __init__(self, *names: str) -> None:
            self.cases = lambda: [Case(name, abs, ()) for name in names]

    monkeypatch.setattr(
        sanitize, "parts", lambda name: [Part("a", "b"), Part("c")] if name == "sanitize" else []
    )
    assert [case.name for case in sanitize.cases()] == ["a", "b", "c"]
