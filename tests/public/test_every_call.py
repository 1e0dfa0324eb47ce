"""What holds for every public function of arrays: JAX's strict settings, replaced functions of JAX, 64-bit
types and a mesh that is partly manual change no program."""

from __future__ import annotations

import functools
from typing import Any

import jax
import pytest

from tests.core.test_partly_manual import on_each_half, twice
from tests.core.test_patched_jax import replace_functions
from tests.public.test_strict_settings import lower, strict, types
from tests.shared import public_calls
from tests.shared.public_calls import CALLS, Call

pytestmark = pytest.mark.each_version

each_call = pytest.mark.parametrize("call", CALLS, ids=str)


@functools.cache
def program(call: Call) -> tuple[str, list[Any]]:
    """Its text as it is, and the types of its results."""
    lowered = lower(call, call.arrays())
    return lowered.as_text(), types(lowered.out_info)


def test_every_public_function_is_called() -> None:
    known = public_calls.called_names() | public_calls.WITHOUT_ARRAYS
    assert public_calls.public_names() <= known


@each_call
def test_same_program(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """With strict settings, as libraries like qwix replace products: first, so that nothing is in caches."""
    arrays = jax.block_until_ready(call.arrays())
    with monkeypatch.context() as patch, strict():
        replace_functions(patch)
        text = lower(call, arrays).as_text()
    if not call.name.startswith("check_"):  # their programs count the checks of the process
        assert text == program(call)[0]


@each_call
def test_same_types_with_x64(call: Call) -> None:
    arrays = call.arrays()
    with jax.enable_x64(True):
        got = types(jax.eval_shape(call.fn, *arrays))
    assert got == program(call)[1]


@pytest.mark.parametrize("call", [call for call in CALLS if not call.mesh], ids=str)
def test_is_a_program_on_a_partly_manual_mesh(call: Call) -> None:
    stacked = twice(call.arrays())
    result = jax.jit(functools.partial(on_each_half, call)).lower(*stacked).out_info
    assert types(result) == [((2, *shape), dtype) for shape, dtype in program(call)[1]]
