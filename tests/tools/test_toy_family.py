"""A family of one elementwise kernel, registered by one line, gets all that a family gets."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_deepgemm as jdg
from jax_deepgemm.cli import main
from jax_deepgemm.core import tuning
from jax_deepgemm.core.chip import H200, Chip
from jax_deepgemm.tools import registry, tune
from jax_deepgemm.tools.bench.rows import Compiled
from jax_deepgemm.tools.bench.timing import Job, Timing
from jax_deepgemm.tools.bench.trace import Measured
from tests.shared.toy_family.family import FAMILY, ScaleConfig, ScaleProblem
from tests.shared.toy_family.op import scale

pytest.importorskip("jax_deepgemm._ffi")
FOLDER = "tests.shared.toy_family"
X, W = jax.ShapeDtypeStruct((64, 100), jnp.float32), jax.ShapeDtypeStruct((100,), jnp.float32)
PROBLEM = ScaleProblem(64, 100)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one line that registers a family."""
    monkeypatch.setattr(registry, "FOLDERS", (*registry.FOLDERS, FOLDER))


def lowered(function: Callable[..., Any], *operands: Any) -> str:
    fresh = lambda *given: function(*given)  # noqa: E731 - jax caches what it lowered before
    return jax.jit(fresh).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()


# --- choosing --------------------------------------------------------------------------------------------


def test_a_configuration_is_chosen_and_explained() -> None:
    pytest.importorskip("cuda.core")
    [call] = jdg.explain(scale, X, W, show=False)
    assert (call.op, call.problem, call.flops) == ("toy_scale", "scale 64x100", 6400)
    assert (call.config, call.origin) == (ScaleConfig(128), "cost model")
    assert [str(config) for config, _ in call.candidates] == ["threads=128", "threads=256", "threads=1024"]
    [kernel] = call.kernels
    assert (kernel.name, kernel.grid, kernel.block) == ("jdg_toy_scale_t128", (50, 1, 1), 128)
    assert "threads=128, cost model" in str(call)
    assert "stages" not in str(call)  # it has none


def test_a_given_configuration_and_a_share_of_the_chip() -> None:
    pytest.importorskip("cuda.core")
    given = ScaleConfig(512)  # legal, though no candidate
    [call] = jdg.explain(lambda x, w: scale(x, w, config=given, num_sms=3), X, W, show=False)
    assert (call.config, call.origin, call.kernels[0].grid) == (given, "given", (3, 1, 1))
    assert "jdg_toy_scale_t512@" in lowered(lambda x, w: scale(x, w, config=given), X, W)


def test_a_configuration_that_breaks_a_rule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"config threads=100 cannot run scale 64x100: threads is 100, must"):
        lowered(lambda x, w: scale(x, w, config=ScaleConfig(100)), X, W)
    with pytest.raises(TypeError, match=r"scale: config is 'fast', need a ScaleConfig or None"):
        scale(jnp.ones((2, 3)), jnp.ones(3), config="fast")
    with pytest.raises(ValueError, match=r"scale: num_sms is 0, need a positive int"):
        scale(jnp.ones((2, 3)), jnp.ones(3), num_sms=0)


def test_the_tuning_file_goes_before_the_cost_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tuning.json"
    monkeypatch.setenv("JAX_DEEPGEMM_TUNING_FILE", str(path))
    entry = tuning.Entry(ScaleConfig(1024), 3.0, ScaleConfig(128), 4.0, 3)
    tuning.write(path, {"NVIDIA H200, 132 SMs": {"ScaleProblem rows=64 cols=100": tuning.as_fields(entry)}})
    assert FAMILY.choose(PROBLEM, H200).config == ScaleConfig(1024)
    assert FAMILY.choose(PROBLEM, H200, ScaleConfig(256)).config == ScaleConfig(256)
    broken = dataclasses.replace(entry, config=ScaleConfig(100))
    fields = {"ScaleProblem rows=64 cols=100": tuning.as_fields(broken)}
    tuning.write(path, {"NVIDIA H200, 132 SMs": fields})
    assert FAMILY.choose(PROBLEM, H200).config == ScaleConfig(128)


# --- architectures ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "arch"), [("8.0", "80"), ("8.9", "89"), ("9.0", "90a"), ("10.0", "100a")]
)
def test_portable_kernels_serve_later_chips(capability: str, arch: str) -> None:
    """There is one for 8.0; it is compiled for the chip at hand."""
    pytest.importorskip("cuda.core")
    chip = Chip("some GPU", arch, 100, 99 * 1024)
    assert (chip.capability, FAMILY.runs_on(capability)) == (capability, True)
    [kernel] = jdg.precompile([PROBLEM], chip=chip)
    assert kernel.arch == arch


def test_older_chips_are_refused() -> None:
    assert not FAMILY.runs_on("7.5")
    with pytest.raises(
        ValueError, match=r"toy: old has no kernels; the kernels are for .* 8\.0 \(Ampere\) and later"
    ):
        FAMILY.kernels_for(Chip("old", "75", 40, 64 * 1024))


# --- tools -----------------------------------------------------------------------------------------------


def test_precompile_takes_problems_and_shapes() -> None:
    pytest.importorskip("cuda.core")
    [kernel] = jdg.precompile([PROBLEM])
    assert kernel.name == "jdg_toy_scale_t128"
    for _ in range(2):  # what was lowered before is found again
        assert jdg.precompile([(scale, X, W)]) == [kernel]
        assert jdg.precompile([{"op": "toy_scale", "m": 64, "k": 100}]) == [kernel]


def test_commands_know_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("cuda.core")
    assert main(["explain", "--op", "toy_scale", "--m", "64", "--k", "100", "--json"]) == 0
    [shape] = json.loads(capsys.readouterr().out)["shapes"]
    [call] = shape["functions"][0]["calls"]
    assert call["config"] == {"threads": 128}
    assert len(call["candidates"]) == 3
    path = tmp_path / "shapes.csv"
    path.write_text("op,m,k\ntoy_scale,64,100\n")
    assert main(["compile", "--shapes", str(path)]) == 0
    assert "jdg_toy_scale_t128" in capsys.readouterr().out


def test_tune_keeps_the_best_of_all_candidates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a GPU that is quickest with 256 threads."""

    def compile_job(function: Any, name: str, operands: Any, **place: Any) -> Compiled:
        tried = tuning.tried(PROBLEM)
        return Compiled(lambda: {256: 2.0}.get(tried.threads, 3.0), 1.0)

    def time_jobs(jobs: list[Job], *, calls: int, flush: Any) -> dict[str, Timing]:
        return {job.name: Timing(Measured((job.run(),) * calls, (), {}), {}, "fake") for job in jobs}

    for name, fake in (("chip_here", lambda: H200), ("compile_job", compile_job), ("time_jobs", time_jobs)):
        monkeypatch.setattr(tune, name, fake)
    monkeypatch.setattr(tune, "flusher", lambda: lambda: None)
    shapes, out = tmp_path / "shapes.csv", tmp_path / "tuning.json"
    shapes.write_text("op,m,k\ntoy_scale,64,100\n")
    assert main(["tune", "--shapes", str(shapes), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "threads=256" in shown
    assert "50.0%" in shown  # by so much the model's choice, 3 us, is slower
    assert main(["tune", "--report", str(out), "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert (row["problem"], row["config"]) == ("ScaleProblem rows=64 cols=100", {"threads": 256})


def test_bench_measures_its_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--tables", "toy_scale", "--small", "--calls", "2"]) == 0
    shown = capsys.readouterr().out
    assert "Columns scaled" in shown
    assert "1 rows, 0 failed" in shown


def test_its_case_for_the_sanitizer_is_found() -> None:
    *_, module = registry.parts("sanitize")
    assert module.__name__ == f"{FOLDER}.sanitize"
    [(name, function, (x, w))] = module.cases()
    assert name == "toy scale"
    np.testing.assert_array_equal(function(x, w), np.asarray(x) * np.asarray(w))


# --- vmap, for a kernel that knows no batch --------------------------------------------------------------


def kernels_in(text: str) -> int:
    return text.count("@jax_deepgemm_launch(")


def test_a_batch_of_rows_is_one_launch() -> None:
    batch = jax.ShapeDtypeStruct((5, 64, 100), jnp.float32)
    text = lowered(jax.vmap(scale, (0, None)), batch, W)
    assert kernels_in(text) == 1
    assert "tensor<320x100xf32>" in text
    assert "stablehlo.while" not in text
    [call] = jdg.explain(jax.vmap(scale, (0, None)), batch, W, show=False)
    assert call.problem == "scale 320x100"


@pytest.mark.parametrize("axes", [(0, 0), (None, 0)])
def test_other_batches_are_a_loop(axes: tuple[int | None, int | None]) -> None:
    x = jax.ShapeDtypeStruct((5, 64, 100) if axes[0] == 0 else X.shape, jnp.float32)
    w = jax.ShapeDtypeStruct((5, 100), jnp.float32)
    text = lowered(jax.vmap(scale, axes), x, w)
    assert kernels_in(text) == 1
    assert "stablehlo.while" in text
    [call] = jdg.explain(jax.vmap(scale, axes), x, w, show=False)
    assert call.problem == "scale 64x100"
