"""The arguments of the examples: wrong ones are one line and exit code 2, before a model is made."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flax.nnx")
pytest.importorskip("optax")

EXAMPLES = Path(__file__).parents[2] / "examples"
REFUSED: list[tuple[str, list[str], str]] = [
    ("train_moe_lm", ["--steps", "0"], "--steps: got '0', need a whole number from 1 to"),
    ("train_moe_lm", ["--layers", "-1"], "--layers: got '-1', need a whole number from 1 to"),
    ("train_moe_lm", ["--batch", "many"], "--batch: got 'many', need a whole number from 1 to"),
    ("train_moe_lm", ["--seed", "-1"], "--seed: got '-1', need a whole number from 0 to"),
    ("train_moe_lm", ["--capacity-factor", "nan"], "--capacity-factor: got 'nan', need a number above 0"),
    ("train_moe_lm", ["--mesh", "2"], "--mesh: got '2', need two numbers of devices, as 2x2"),
    ("train_moe_lm", ["--mesh", "0x2"], "--mesh: got '0x2', need two numbers of devices, as 2x2"),
    ("train_moe_lm", ["--mesh", "64x64"], "--mesh: needs 4096 devices, there are "),
    (
        "train_moe_lm",
        ["--mesh", "1x1", "--recipes", ""],
        "--recipes: got '', need names, separated by commas",
    ),
    ("train_moe_lm", ["--recipes", "int8"], "--recipes: no recipe int8; there are bf16, fp8"),
    ("train_moe_lm", ["--mesh", "1x2", "--batch", "3"], "--batch: 3 sequences cannot be cut over 2 devices"),
    ("train_moe_lm", ["--distributed"], "--distributed: needs --coordinator, --processes and --process"),
    ("train_moe_lm", ["--out", __file__], "test_cli_examples.py is a file"),
    ("decode_moe", ["--weights", "nowhere"], "--weights: nowhere: no such folder"),
    ("decode_moe", ["--weights", __file__], "test_cli_examples.py: a file"),
    ("decode_moe", ["--tokens", "0"], "--tokens: got '0', need a whole number from 1 to"),
    ("decode_moe", ["--batch", "0"], "--batch: got '0', need a whole number from 1 to"),
    ("decode_moe", ["--temperature", "-1"], "--temperature: got '-1', need a number, at least 0"),
    ("decode_moe", ["--prompt", ""], "--prompt: is empty, need at least one byte"),
]


@pytest.mark.parametrize(
    ("name", "given", "message"),
    REFUSED,
    ids=[f"{name} {' '.join(given)[:30]}" for name, given, _ in REFUSED],
)
def test_wrong_arguments_are_one_line(
    name: str,
    given: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = importlib.import_module(name)

    def started(*_: Any, **__: Any) -> Any:
        raise AssertionError("something was started")

    for step in ("LanguageModel", "train", "load", "standard_library"):
        monkeypatch.setattr(example, step, started, raising=False)
    with pytest.raises(SystemExit) as leaving:
        example.main(given)
    assert leaving.value.code == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1


def test_recipes_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    parse = importlib.import_module("train_moe_lm").parse
    assert parse([]).recipes == ["bf16", "fp8"]
    assert parse(["--recipes", "fp8"]).recipes == ["fp8"]
    assert parse(["--mesh", "2x3"]).mesh == (2, 3)
