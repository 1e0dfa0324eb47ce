"""The command line, as a user calls it."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest

from jax_deepgemm.cli import COMMANDS, main
from jax_deepgemm.tools import text


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["--help"])
    assert leaving.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)


def test_no_command_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main([])
    assert leaving.value.code == 2
    assert capsys.readouterr().err.startswith("usage: python -m jax_deepgemm [-h] [--version]")


@pytest.mark.parametrize("command", [["info"], ["explain", "--m", "1", "--n", "1", "--k", "1"]])
def test_wrong_variables_exit_with_2(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JAX_DEEPGEMM_COMPILER", "clang")
    assert main(command) == 2
    assert "JAX_DEEPGEMM_COMPILER is 'clang', need one of nvrtc, nvcc" in capsys.readouterr().err


@pytest.mark.any_version
def test_demo_passes_in_a_process_of_its_own() -> None:
    """Optimised, as a user's: its matrices are large, and what is compiled for the other tests is slow."""
    command = [sys.executable, "-m", "jax_deepgemm", "demo", "--tokens", "16", "--seconds", "0.01"]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\nPASS" in done.stdout
    for word in ("fp8_gemm_nt (up)", "MLP fwd + bwd, fp8", "TFLOP/s", "rel. error", "chosen kernel"):
        assert word in done.stdout


def test_demo_fails_when_a_result_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import jax.numpy as jnp

    from jax_deepgemm.cli import demo

    operands = (jnp.ones((2, 3), jnp.bfloat16), jnp.ones((4, 3), jnp.bfloat16))

    def wrong(x, w):  # type: ignore[no-untyped-def]
        return demo.float32_linear(x, w) * 1.5

    def broken(x, w):  # type: ignore[no-untyped-def]
        raise ValueError("no kernel for this")

    def rows(tokens: int) -> list[demo.Row]:
        exact = demo.float32_linear
        return [
            demo.Row(f.__name__, "2x4x3", f, exact, operands, operands, 48.0, 0.01) for f in (wrong, broken)
        ]

    monkeypatch.setattr(demo, "problems", rows)
    assert main(["demo", "--seconds", "0.001"]) == 1
    shown = capsys.readouterr()
    assert "0.5000 FAIL" in shown.out
    assert "\nFAIL" in shown.out
    assert "no kernel for this" in shown.err


def test_info_says_what_is_supported(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    sections = "versions toolchain cache tuning configuration environment driver extension devices"
    for section in sections.split():
        assert f"{section}\n  " in shown
    assert "num sms: all" in shown
    assert "reference only. Ops run in their float32 reference form" in shown


@pytest.mark.parametrize(
    ("platform", "capability", "supported", "words"),
    [
        ("cpu", None, False, "float32 reference"),
        ("gpu", "9.0", True, "capability 9.0: quantize, "),
        ("gpu", "8.0", True, "capability 8.0: paged_append, norm."),
        ("gpu", "7.5", False, "Compute capability 7.5 has no kernels"),
        ("gpu", None, False, "need an NVIDIA GPU"),
    ],
)
def test_support_and_its_reason(platform: str, capability: str | None, supported: bool, words: str) -> None:
    from types import SimpleNamespace

    from jax_deepgemm.cli.info import support

    device = SimpleNamespace(platform=platform, compute_capability=capability, client=None)
    found, reason = support(device)
    assert found == supported
    assert words in reason


def test_explain_prints_the_choice(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("cuda.core")
    arguments = ["explain", "--op", "fp8_gemm_nt", "--m", "256", "--n", "576", "--k", "512"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    for word in (
        "m=256 n=576 k=512",
        "config",
        "candidates, the cheapest",
        "registers",
        "0 bytes spilled",
        "cubin",
    ):
        assert word in shown


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_draws_in_place_and_cleans_up() -> None:
    screen = Terminal()
    with text.Progress(2, "work", quiet=0, stream=screen) as progress:
        progress.step("first")
    assert "work [############............] 1/2 0s first" in screen.getvalue()
    assert screen.getvalue().endswith("\r")


def test_progress_is_silent_for_short_work() -> None:
    screen = Terminal()
    with text.Progress(1, "work", stream=screen) as progress:
        progress.step()
    assert screen.getvalue() == ""
