"""Configurations that were measured: the tuning file, what it decides, and the command that writes it."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_deepgemm as jdg
from jax_deepgemm import config
from jax_deepgemm.cli import bench as cli_bench
from jax_deepgemm.cli import main
from jax_deepgemm.core import _private, tuning
from jax_deepgemm.core.chip import H200, with_sms
from jax_deepgemm.ops.gemm.family import GemmConfig, Sm90Config
from jax_deepgemm.ops.gemm.problem import GemmProblem
from jax_deepgemm.ops.grouped.bench_rows import contiguous
from jax_deepgemm.ops.grouped.problem import GroupedProblem
from jax_deepgemm.tools import explain as introspect
from jax_deepgemm.tools import tune
from jax_deepgemm.tools.bench import products
from jax_deepgemm.tools.bench.rows import Accumulator, Compiled, compile_job
from jax_deepgemm.tools.bench.timing import Job, Timing
from jax_deepgemm.tools.bench.trace import Measured
from jax_deepgemm.tools.shape_files import shape_of
from tests.shared.choosing import choose, ranked
from tests.shared.jit_kernels import python

DENSE = GemmProblem(256, 384, 512, a="bf16", b="bf16", b_scales="none")
GROUPED = GroupedProblem(
    "rows", 6, 256, 384, 512, expected=42, segments=6, a="bf16", b="bf16", b_scales="none"
)


def shape(*dims: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype)


CALLS: dict[str, tuple[Any, Callable[..., Any], tuple[Any, ...]]] = {
    "dense": (DENSE, jdg.bf16_gemm_nt, (shape(256, 512), shape(384, 512))),
    "grouped": (
        GROUPED,
        jdg.m_grouped_bf16_gemm_nt_contiguous,
        (shape(256, 512), shape(6, 384, 512), shape(6, dtype=jnp.int32)),
    ),
}
each_call = pytest.mark.parametrize(("problem", "function", "operands"), CALLS.values(), ids=CALLS)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tuning file in force, not there yet."""
    path = tmp_path / "tuning.json"
    monkeypatch.setenv(config.TUNING_FILE, str(path))
    _private.log_once.cache_clear()
    return path


def second(problem: Any, chip: Any = H200) -> GemmConfig:
    """A candidate that the model does not choose, whose kernel has another name."""
    configs = [c for c, _ in ranked(problem, chip)]
    return next(c for c in configs if (c.block_m, c.block_n) != (configs[0].block_m, configs[0].block_n))


def entry(problem: Any, best: GemmConfig, us: float = 8.0) -> tuning.Entry:
    model = ranked(problem, H200)[0][0]
    return tuning.Entry(best, us, model, 1.25 * us, 12)


def put(path: Path, problem: Any, *, chip: Any = H200, **changes: Any) -> GemmConfig:
    """Writes a file with `second` of one problem, fields changed."""
    best = second(problem)
    fields = tuning.as_fields(entry(problem, best)) | changes
    tuning.write(path, {tuning.device_key(chip): {tuning.problem_key(problem): fields}})
    return best


# --- the file ----------------------------------------------------------------------------------------


def test_file_holds_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "tuning.json"
    wanted = {
        device: {tuning.problem_key(p): tuning.as_fields(entry(p, second(p), us)) for p in (DENSE, GROUPED)}
        for device, us in (("NVIDIA H200, 132 SMs", 8.0), ("NVIDIA H100, 114 SMs", 9.0))
    }
    tuning.write(path, wanted)
    found = tuning.read(path)
    assert found == wanted
    got = tuning.parsed(found["NVIDIA H200, 132 SMs"][tuning.problem_key(GROUPED)], Sm90Config)
    assert got == entry(GROUPED, second(GROUPED))
    assert got.regret == 0.25
    assert got.version == jdg.__version__


def test_keys_tell_all_problems_apart() -> None:
    changes: list[dict[str, Any]] = [
        {"m": 8},
        {"layout": "nn"},
        {"out": "float32"},
        {"add_c": True},
        {"batches": 2, "batched": (True, True)},
        {"batches": 2, "batched": (True, False)},
    ]
    keys = {tuning.problem_key(dataclasses.replace(DENSE, **change)) for change in changes}
    keys |= {tuning.problem_key(p) for p in (DENSE, GROUPED, dataclasses.replace(GROUPED, expected=64))}
    assert len(keys) == len(changes) + 3
    assert tuning.device_key(H200) != tuning.device_key(with_sms(H200, 100))


def test_new_fields_of_a_configuration_are_at_their_default() -> None:
    fields = tuning.as_fields(entry(DENSE, second(DENSE)))
    del fields["config"]["split_k"]
    assert tuning.parsed(fields, Sm90Config).config == second(DENSE)


# --- what it decides -----------------------------------------------------------------------------------


@each_call
def test_an_entry_goes_before_the_model(problem: Any, function: Any, operands: Any, file: Path) -> None:
    pytest.importorskip("cuda.core")
    [before] = jdg.explain(function, *operands, show=False)
    best = put(file, problem)
    [after] = jdg.explain(function, *operands, show=False)
    assert (before.config, before.origin) == (before.candidates[0][0], "cost model")
    assert after.config == best
    assert after.origin == f"measured 8.0 us, the fastest of 12 ({file})"
    assert after.origin in str(after)
    assert f"_{best.block_m}x{best.block_n}_" in after.kernels[0].name
    assert after.kernels[0].name != before.kernels[0].name
    [given] = jdg.explain(lambda *x: function(*x, config=before.config), *operands, show=False)
    assert (given.kernels[0].name, given.origin) == (before.kernels[0].name, "given")
    [kernel] = jdg.precompile([problem], progress=False)
    assert kernel.name == after.kernels[0].name


@each_call
def test_it_is_in_the_lowered_program(problem: Any, function: Any, operands: Any, file: Path) -> None:
    pytest.importorskip("jax_deepgemm._ffi")
    best = put(file, problem)
    lowered = jax.jit(lambda *x: function(*x)).trace(*operands).lower(lowering_platforms=("cuda",))
    assert f"_{best.block_m}x{best.block_n}_" in lowered.as_text()


def test_only_the_same_problem_and_device_count(file: Path) -> None:
    best = put(file, DENSE)
    others = dataclasses.replace(DENSE, m=264), dataclasses.replace(DENSE, add_c=True)
    assert choose(DENSE, H200) == best
    assert [choose(p, H200) for p in others] == [ranked(p, H200)[0][0] for p in others]
    for chip in (with_sms(H200, 100), dataclasses.replace(H200, name="NVIDIA H100")):
        assert choose(DENSE, chip) == ranked(DENSE, chip)[0][0]


def test_a_changed_file_holds_from_the_next_lowering_on(file: Path) -> None:
    model = choose(DENSE, H200)
    best = put(file, DENSE)
    assert choose(DENSE, H200) == best != model
    tuning.write(file, {tuning.device_key(H200): {}})
    assert choose(DENSE, H200) == model


def test_print_configs_names_the_measurement(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("cuda.core")
    monkeypatch.setenv("JAX_DEEPGEMM_PRINT_CONFIGS", "1")
    for problem, function, operands in CALLS.values():
        best = put(file, problem)
        jdg.explain(function, *operands, show=False)
        assert f"{problem}: {best}, measured 8.0 us, the fastest of 12\n" in capsys.readouterr().err


def test_state_is_that_of_the_contents(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What caches of programs are keyed by: equal files anywhere are equal."""
    assert config.tuning_state() == ""
    put(file, DENSE)
    one = config.tuning_state()
    put(file, GROUPED)
    assert len({"", one, config.tuning_state()}) == 3
    monkeypatch.setenv("JAX_DEEPGEMM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv(config.TUNING_FILE, "")
    assert config.tuning_state() == ""
    put(tmp_path / "cache" / "tuning" / "nvidia-h200.json", DENSE)
    assert config.tuning_state() == one
    monkeypatch.setenv(config.TUNING_FILE, "off")
    assert config.tuning_state() == ""


def test_results_of_the_benchmark_say_that_a_file_is_in_force(file: Path) -> None:
    assert cli_bench.method("NVIDIA H200") == cli_bench.METHOD
    put(file, DENSE)
    assert cli_bench.method("NVIDIA H200") == f"{cli_bench.METHOD} A tuning file was in force."


# --- what is wrong with it is said once, and the model chooses ----------------------------------------------

WRONG_ENTRIES: dict[str, tuple[dict[str, Any], str]] = {
    "rule": ({"config": {"block_m": 256, "block_n": 128, "stages": 4}}, "the 64-row side is 256"),
    "memory": (
        {"config": {"block_m": 128, "block_n": 128, "stages": 16, "slabs": 2}},
        "bytes of shared memory",
    ),
    "zero": ({"config": {"block_m": 0, "block_n": 0, "stages": 0}}, "must be"),
    "unknown": ({"config": {"block_m": 64, "block_n": 64, "stages": 4, "warp": 1}}, "warp"),
    "type": ({"config": {"block_m": 64, "block_n": "64", "stages": 4}}, "block_n is '64', need int"),
    "none": ({"config": None}, "TypeError"),
    "time": ({"us": -1}, "need positive numbers"),
    "text for a time": ({"us": "8.0"}, "need positive numbers"),
    "text for a number": ({"candidates": "many"}, "candidates is 'many', need int"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG_ENTRIES.values(), ids=WRONG_ENTRIES)
@pytest.mark.parametrize(("problem", "chosen"), [(DENSE, choose), (GROUPED, choose)], ids=CALLS)
def test_wrong_entries(
    problem: Any, chosen: Any, changes: Any, message: str, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(file, problem, **changes)
    with caplog.at_level(logging.WARNING, "jax_deepgemm"):
        assert [chosen(problem, H200) for _ in range(3)] == [ranked(problem, H200)[0][0]] * 3
    [record] = caplog.records
    assert message in record.getMessage()
    assert f"{file}: entry of {tuning.problem_key(problem)} is ignored" in record.getMessage()


WRONG_FILES = {
    "empty": b"",
    "cut": b'{"schema": 1, "devices": {"NVIDIA H200, 132 SMs": {',
    "bytes": b"\xff\xfe\x00",
    "list": b"[]",
    "schema": b'{"schema": 2, "devices": {}}',
    "devices": b'{"schema": 1, "devices": {"NVIDIA H200, 132 SMs": 3}}',
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("content", WRONG_FILES.values(), ids=WRONG_FILES)
def test_wrong_files(
    content: bytes, file: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING, "jax_deepgemm"):
        assert [choose(DENSE, H200) for _ in range(3)] == [ranked(DENSE, H200)[0][0]] * 3
    [record] = caplog.records
    assert f"tuning file {file} is ignored" in record.getMessage()
    assert main(["tune", "--report", str(file)]) == 2
    assert f"tune: {file}: " in capsys.readouterr().err


def test_missing_file_is_said_if_it_was_named(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    choose(DENSE, H200)
    choose(DENSE, H200)
    [record] = caplog.records
    assert f"{config.TUNING_FILE}: {file} cannot be read" in record.getMessage()
    caplog.clear()
    monkeypatch.setenv("JAX_DEEPGEMM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv(config.TUNING_FILE)
    choose(DENSE, H200)
    assert not caplog.records


def test_variable_names_the_file_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("JAX_DEEPGEMM_CACHE_DIR", str(tmp_path))
    best = put(tmp_path / "tuning" / "nvidia-h200.json", DENSE)
    model = ranked(DENSE, H200)[0][0]
    for value, wanted in (("", best), ("off", model), (" OFF ", model), ("~/no such file", model)):
        monkeypatch.setenv(config.TUNING_FILE, value)
        assert choose(DENSE, H200) == wanted, value
    monkeypatch.delenv(config.TUNING_FILE)
    assert choose(DENSE, H200) == best
    assert config.tuning_file("x", "~/f") == Path("~/f").expanduser()
    assert len(caplog.records) <= 1


# --- measuring -------------------------------------------------------------------------------------------


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, GemmConfig]]:
    """An H200 on which a candidate's place in the ranking of the model decides its time: 10 us for the
    first, 8 us for the second, 9 us for others, none for the last. Gives what was timed."""
    timed: list[tuple[str, GemmConfig]] = []

    def compile_job(function: Any, name: str, operands: Any, **place: Any) -> Compiled:
        [(problem, chip)] = introspect.problems(function, *operands)
        assert place["carry"] == (2 if problem.add_c else None)
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(operands))
        tried = tuning.tried(problem)
        assert tried is not None
        place = [c for c, _ in ranked(problem, chip)].index(tried)
        timed.append((tuning.problem_key(problem), tried))
        if place == len(ranked(problem, chip)) - 1:
            return Compiled(None, 1.0, "CompileError: too good")
        return Compiled(lambda: {0: 10.0, 1: 8.0}.get(place, 9.0), 1.0)

    def time_jobs(jobs: list[Job], *, calls: int, flush: Any) -> dict[str, Timing]:
        assert calls == 3
        return {job.name: Timing(Measured((job.run(),) * calls, (), {}), {}, "fake") for job in jobs}

    monkeypatch.setattr(tune, "chip_here", lambda: H200)
    monkeypatch.setattr(tune, "flusher", lambda: lambda: None)
    monkeypatch.setattr(tune, "compile_job", compile_job)
    monkeypatch.setattr(tune, "time_jobs", time_jobs)
    return timed


SMALL_TABLES = {"m_grouped": [contiguous("bf16", "drawn", 42, 384, 512, (42, 43, 42, 43, 43, 43))]}


@pytest.mark.any_version
def test_command_measures_all_and_keeps_the_best(
    file: Path,
    tmp_path: Path,
    fake_gpu: list[tuple[str, GemmConfig]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(products, "tables", lambda: SMALL_TABLES)
    shapes = tmp_path / "shapes.csv"
    shapes.write_text(
        "bf16_gemm_nt,256,384,512\nfp8_gemm_nt,24,136,264,float32,1\nbf16_gemm_nt,256,384,512\n"
        "op,groups,m,n,k\nm_grouped_bf16_gemm_nt_masked,3,20,64,256\n"
    )
    wanted = ["--shapes", str(shapes), "--tables", "m_grouped", "--calls", "3"]
    assert main(["tune", *wanted]) == 1  # the last candidate of each failed
    shown = capsys.readouterr()
    found = tuning.read(file)["NVIDIA H200, 132 SMs"]
    assert len(found) == 4
    for problem in (DENSE, GROUPED):
        key, configs = tuning.problem_key(problem), [c for c, _ in ranked(problem, H200)]
        got = tuning.parsed(found[key], Sm90Config)
        assert (got.config, got.us, got.model, got.model_us) == (configs[1], 8.0, configs[0], 10.0)
        assert got.candidates == len(configs) - 1
        assert sorted(map(str, configs)) == sorted(str(c) for tried, c in fake_gpu if tried == key)
        assert f"FAILED {key}: {configs[-1]}: CompileError: too good" in shown.err
    assert choose(DENSE, H200) == ranked(DENSE, H200)[1][0]
    assert "25.0% slower than the best measured on average, 25.0% at worst" in shown.out
    assert f"4 problems, 4 candidates failed, written to {file}" in shown.err

    assert main(["tune", "--report", str(file)]) == 0
    assert capsys.readouterr().out == shown.out
    assert main(["tune", "--report", str(file), "--json"]) == 0
    assert [row["regret"] for row in json.loads(capsys.readouterr().out)] == [0.25] * 4


@pytest.mark.any_version
def test_tuning_again_keeps_the_other_problems(
    file: Path, tmp_path: Path, fake_gpu: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    put(file, GROUPED)
    shapes = tmp_path / "shapes.json"
    shapes.write_text('{"op": "bf16_gemm_nt", "m": 256, "n": 384, "k": 512}')
    main(["tune", "--shapes", str(shapes), "--calls", "3", "--json"])
    [row] = json.loads(capsys.readouterr().out)
    times = [candidate.pop("us") for candidate in row["measured"]]
    assert times == sorted(times)
    assert row["measured"][0] == row["config"] == dataclasses.asdict(ranked(DENSE, H200)[1][0])
    assert [what for what, _ in row["failed"]] == [str(ranked(DENSE, H200)[-1][0])]
    assert set(tuning.read(file)["NVIDIA H200, 132 SMs"]) == {
        tuning.problem_key(DENSE),
        tuning.problem_key(GROUPED),
    }


@pytest.mark.any_version
def test_two_processes_keep_what_the_other_writes(tmp_path: Path) -> None:
    path = tmp_path / "tuning.json"
    script = f"""
import time
from pathlib import Path
from jax_deepgemm.tools.tune import keep
from jax_deepgemm.ops.gemm.family import GemmConfig, Sm90Config
from jax_deepgemm.core.tuning import Entry
config, folder = GemmConfig(64, 128, 6), Path({str(tmp_path)!r})
(folder / "ready NAME").touch()
while not (folder / "go").exists():
    time.sleep(0.001)
for i in range(60):
    keep(folder / "tuning.json", "device", f"NAME {{i}}", Entry(config, 8.0, config, None, 1))
"""
    running = [python(script.replace("NAME", name)) for name in ("one", "other")]
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("ready *"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    (tmp_path / "go").touch()
    assert [process.wait() for process in running] == [0, 0]
    assert set(tuning.read(path)["device"]) == {f"{name} {i}" for name in ("one", "other") for i in range(60)}
    assert not list(tmp_path.glob(".*"))


def test_time_limit_stops_between_sessions(
    file: Path, fake_gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(products, "tables", lambda: SMALL_TABLES)
    assert main(["tune", "--tables", "m_grouped", "--calls", "3", "--time-limit", "1e-9"]) == 1
    assert "time limit: 0 of up to 1 problems measured" in capsys.readouterr().err
    assert not os.path.exists(file)


def test_operands_that_do_not_fit_fail_alone(fake_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = tune.drawn

    def once(calls: Any) -> Any:
        monkeypatch.setattr(tune, "drawn", drawn)
        raise RuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(tune, "drawn", once)
    monkeypatch.setattr(tune, "SESSION_JOBS", 1)
    works = [products.of_shape(shape_of({"op": "bf16_gemm_nt", "m": m, "n": 64, "k": 64})) for m in (8, 16)]
    first, last = tune.sweep(works, H200, calls=3, flush=lambda: None)
    assert first.failed == [("operands", "RuntimeError: RESOURCE_EXHAUSTED")]
    assert first.entry is None
    assert last.entry is not None


def test_one_product_at_a_time() -> None:
    a = shape(64, 64)
    twice = products.Work("twice", lambda a: jdg.bf16_gemm_nt(jdg.bf16_gemm_nt(a, a), a), (a,))
    with pytest.raises(ValueError, match="twice: calls 2 GEMMs of this package, need one to tune"):
        list(tune.sweep([twice], H200, calls=3, flush=lambda: None))


def test_candidates_are_compiled_as_told() -> None:
    """What `sweep` relies on: a thread's choice is in what it lowers."""
    pytest.importorskip("jax_deepgemm._ffi")
    problem, function, operands = CALLS["grouped"]
    for wanted, _ in ranked(problem, H200):
        with tuning.trying(problem, wanted):
            lowered = jax.jit(lambda *x: function(*x)).trace(*operands).lower(lowering_platforms=("cuda",))
        assert f"_{wanted.block_m}x{wanted.block_n}_" in lowered.as_text()


def test_drawn_operands_have_the_spread_of_quantised_ones() -> None:
    given = [(shape(40, 96), shape(300, 128, dtype=jnp.float8_e4m3fn)), (shape(40, 96), np.arange(3))]
    (a, b), (shared, sizes) = products.drawn(given)
    assert shared is a
    assert sizes.tolist() == [0, 1, 2]
    assert 0.9 < float(jnp.std(a.astype(jnp.float32))) < 1.1
    values = b.astype(jnp.float32)
    assert 130 < float(jnp.std(values)) < 180
    assert float(jnp.max(jnp.abs(values))) == 448
    assert len(jnp.unique(values[:, 0])) > 50


@pytest.mark.any_version
def test_tables_of_the_benchmark_are_problems_of_one_kernel() -> None:
    for name, rows in products.tables().items():
        work = products.of_row(rows[-1])
        [(problem, chip)] = introspect.problems(work.function, *work.operands)
        assert chip == H200
        assert len(ranked(problem, H200)) > 1, name


# --- C, which D takes the place of ------------------------------------------------------------------------


def k_grouped_with_c() -> products.Work:
    """A product whose C is the caller's."""
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.standard_normal((96, n)), jnp.bfloat16) for n in (64, 72))
    c = jnp.asarray(rng.standard_normal((3, 64, 72)), jnp.float32)
    add = lambda a, b, c, sizes: jdg.k_grouped_bf16_gemm_tn_contiguous(a, b, sizes, c)  # noqa: E731
    return products.Work("k", add, (a, b, c, jnp.array([50, 0, 46], jnp.int32)), carry=2)


def test_candidates_update_one_copy_of_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each result takes the buffer that the call is given, and the next candidate is given the result."""
    work = k_grouped_with_c()
    c = work.operands[2]
    before, results, held, places = np.asarray(c), [], [], set()

    def time_jobs(jobs: list[Job], **_: Any) -> dict[str, Timing]:
        for job in jobs * 2:
            results.append(job.run().block_until_ready())
            places.add(results[-1].unsafe_buffer_pointer())
            held.append(sum(x.shape == c.shape for x in jax.live_arrays() if not x.is_deleted()))
        assert len(jobs) > 4
        return {}

    monkeypatch.setattr(tune, "time_jobs", time_jobs)
    [outcome] = tune.sweep([work], H200, calls=1, flush=lambda: None)
    assert {error for _, error in outcome.failed} == {"not measured"}
    assert set(held) == {2}  # the caller's, and the copy
    assert len(places) == 1
    assert [x.is_deleted() for x in results] == [True] * (len(results) - 1) + [False]
    np.testing.assert_array_equal(c, before)
    product = work.function(*work.operands) - c
    np.testing.assert_allclose(results[-1], before + len(results) * product, rtol=1e-4, atol=1e-2)


def test_operands_of_a_session_count_the_copy_of_c() -> None:
    work = k_grouped_with_c()
    [task] = tune._tasks([work], H200)
    assert task.bytes == sum(x.nbytes for x in work.operands) + work.operands[2].nbytes


class LateFailure:
    """The result of a call that failed on the device, as JAX shows it."""

    def is_ready(self) -> bool:
        return True

    def block_until_ready(self) -> None:
        raise RuntimeError("late")


def test_c_is_copied_again_after_a_failed_call() -> None:
    c = Accumulator(jnp.ones(4))
    divide = lambda x: jax.pure_callback(lambda _: 1 // 0, x, x)  # noqa: E731
    at_once = compile_job(divide, "divide", (jnp.ones(4),), carry=0, held=c)
    assert at_once.run is not None
    assert c.update(lambda x: x + 1).tolist() == [2] * 4
    with pytest.raises(jax.errors.JaxRuntimeError, match="ZeroDivisionError"):
        jax.block_until_ready(at_once.run())
    assert c.update(lambda x: x + 2).tolist() == [3] * 4
    c.update(lambda x: LateFailure())  # type: ignore
    assert c.update(lambda x: x + 3).tolist() == [4] * 4
    assert c.update(lambda x: x + 3).tolist() == [7] * 4


def test_the_argument_that_is_carried_has_the_type_of_the_result() -> None:
    works = [products.of_row(rows[-1]) for rows in products.tables().values()]
    works += [
        products.of_shape(shape_of({"op": op, "out_dtype": out, "accumulate": add} | sizes))
        for op, sizes in (
            ("bf16_gemm_nn", {"m": 8, "n": 16, "k": 24}),
            ("k_grouped_bf16_gemm_tn_contiguous", {"groups": 3, "m": 8, "n": 16, "k": 24}),
        )
        for out in ("bfloat16", "float32")
        for add in (False, True)
    ]
    for work in works:
        [(problem, _)] = introspect.problems(work.function, *work.operands)
        assert (work.carry is not None) == getattr(problem, "add_c", False), work.name
        if work.carry is not None:
            c, d = work.operands[work.carry], jax.eval_shape(work.function, *work.operands)
            assert (c.shape, c.dtype) == (d.shape, d.dtype), work.name
    assert sum(work.carry is not None for work in works) == 6


def test_no_gpu_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--tables", "bf16"]) == 2
    assert capsys.readouterr().err == (
        "tune: cpu has no kernels to measure, need a GPU of compute capability 9.0 (Hopper) or 8.0 (Ampere) "
        "and later.\n"
    )


def test_wrong_shapes_and_places_are_refused(
    file: Path,
    tmp_path: Path,
    fake_gpu: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shapes = tmp_path / "shapes.csv"
    shapes.write_text("fp8_gemm_xx,1,2,3")
    assert main(["tune", "--shapes", str(shapes)]) == 2
    assert "op is 'fp8_gemm_xx', need one of fp8_gemm_nt, " in capsys.readouterr().err
    shapes.write_text("bf16_gemm_nt,8,8,8")
    file.write_text("mine")
    assert main(["tune", "--shapes", str(shapes)]) == 2
    assert file.read_text() == "mine"
    monkeypatch.setenv(config.TUNING_FILE, "off")
    assert main(["tune", "--shapes", str(shapes)]) == 2
    assert f"{config.TUNING_FILE} is off: name a file to write, or unset it." in capsys.readouterr().err
    assert fake_gpu == []
