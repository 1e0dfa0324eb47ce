"""The examples run: training on one device, on a 2x2 mesh of two processes, and decoding what was trained."""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("flax.nnx")
pytest.importorskip("optax")
pytest.importorskip("orbax.checkpoint")

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
STEPS = ["--steps", "6", "--layers", "1"]


def start(name: str, *arguments: object) -> subprocess.Popen[str]:
    """Starts an example on CPU devices of its own number."""
    flags = " ".join(f for f in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in f)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, out + err
    return out


def losses(folder: Path, recipe: str) -> np.ndarray:
    return np.array(json.loads((folder / "curves.json").read_text())["curves"][recipe]["loss"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    text = finish(start("train_moe_lm.py", *STEPS, "--save", "--out", out))
    assert "PASS" in text
    return out


@pytest.mark.slow
def test_training_learns_in_both_recipes(trained: Path) -> None:
    for recipe in ("bf16", "fp8"):
        curve = losses(trained, recipe)
        assert len(curve) == 6
        assert curve[-1] < 0.9 * curve[0]


@pytest.mark.any_version
@pytest.mark.slow
def test_two_processes_on_a_mesh_of_data_and_experts_train_the_same(trained: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    common = [*STEPS, "--recipes", "fp8", "--mesh", "2x2", "--out", tmp_path, "--distributed"]
    common += ["--coordinator", f"localhost:{port}", "--processes", 2, "--process"]
    processes = [start("train_moe_lm.py", *common, rank) for rank in (0, 1)]
    said = [finish(process) for process in processes]
    assert "mesh 2 data x 2 expert" in said[0]
    assert not said[1].replace("[Gloo]", "").strip().startswith("fp8")
    content = json.loads((tmp_path / "curves.json").read_text())
    assert content["processes"] == 2
    np.testing.assert_allclose(losses(tmp_path, "fp8"), losses(trained, "fp8"), rtol=0.02)


@pytest.mark.any_version
@pytest.mark.slow
def test_decoding_compiles_once_whatever_the_routing(trained: Path) -> None:
    common = ["--weights", trained / "weights-fp8", "--layers", 1, "--tokens", 12, "--loop"]
    said = [
        finish(process) for process in [start("decode_moe.py", *common, loop) for loop in ("step", "scan")]
    ]
    assert all("PASS" in text and "no compilation after the first" in text for text in said)
    assert said[0].splitlines()[0] == said[1].splitlines()[0]  # the same bytes from either loop


def test_a_second_compilation_while_decoding_is_an_error() -> None:
    decode_moe = importlib.import_module("decode_moe")
    with pytest.raises(RuntimeError, match="1 compilations while decoding"), decode_moe.no_compilation():
        jax.jit(lambda x: x + 1)(np.float32(1))
    with decode_moe.no_compilation():
        pass
