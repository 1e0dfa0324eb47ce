"""The command that lists DeepSpeed's names."""

from __future__ import annotations

import json

import pytest

from jax_deepgemm.cli import main
from jax_deepgemm.inference import deepspeed_names, fastgen_names, listing

pytestmark = pytest.mark.any_version


def test_every_name_and_how_it_is_called(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["names"]) == 0
    shown = capsys.readouterr().out
    assert "deepspeed_names, 76 names" in shown
    assert "fastgen_names, 24 names" in shown
    assert "  bias_gelu_fp16(input, bias)\n" in shown
    for name in (*deepspeed_names, *fastgen_names):
        assert f"\n  {name}(" in shown


def test_numbers_of_arguments_are_those_that_are_taken(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["names", "--table", "deepspeed_names", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["deepspeed_names"]
    for name, orders in found["deepspeed_names"].items():
        with pytest.raises(TypeError) as refused:
            deepspeed_names[name](*range(99))
        for order in orders:
            assert f"{len(order)} ({', '.join(order)})" in str(refused.value)


@pytest.mark.parametrize("table", listing.TABLES)
def test_names_of_one_release_and_of_another(table: str) -> None:
    for name, orders in listing.arguments(table).items():
        assert len({len(order) for order in orders}) == len(orders), name
