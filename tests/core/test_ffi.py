"""The native module without a GPU: import, registration, cubin lookup, and GPU programs compiled for one."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import Primitive
from jax.interpreters import mlir

from jax_deepgemm.core import launch
from jax_deepgemm.core.launch import LaunchPlan, Memset, Operand, Result, Scalar, Scratch, TensorMap
from tests.shared.launch_plans import FakeKernel, fake_launch, matrix_map

ROOT = Path(__file__).parents[2]
ffi = launch.native()

has_cuda_plugin = any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13))
needs_cuda_plugin = pytest.mark.skipif(not has_cuda_plugin, reason="the CUDA plugin of jax is not installed")


def run_python(*arguments, **environment):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), **environment}
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_opens_no_driver():
    code = "import jax_deepgemm.core.launch; print('libcuda.so' in open('/proc/self/maps').read())"
    assert run_python("-c", code).strip() == "False"


def test_driver_info_answers_with_and_without_a_driver():
    info = ffi.driver_info()
    assert info["available"] == (info["error"] == "")
    if info["available"]:
        assert info["version"] >= (12, 0)
    else:
        assert "libcuda.so.1" in info["error"]


def test_only_execute_may_be_captured_and_all_speak_the_oldest_api():
    assert list(ffi.handlers()) == ["instantiate", "prepare", "initialize", "execute"]
    stages = {stage: ffi.metadata(stage) for stage in ("prepare", "initialize", "execute")}
    assert [stages[stage]["command_buffer_compatible"] for stage in stages] == [False, False, True]
    assert {stages[stage]["api_version"][0] for stage in stages} == {0}
    with pytest.raises(ValueError, match="there is no stage record"):
        ffi.metadata("record")


def test_registration_happens_once(monkeypatch):
    calls = []
    monkeypatch.setattr(jax.ffi, "register_ffi_type", lambda *a, **k: calls.append(("type", k)))
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda *a, **k: calls.append(("target", k)))
    launch._register_once.cache_clear()
    threads = [threading.Thread(target=launch.register_target) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [("type", {"platform": "CUDA"}), ("target", {"platform": "CUDA"})]


# Cubins.


def test_a_registered_cubin_is_found_in_the_process():
    content = b"registered in this test"
    digest = hashlib.sha256(content).hexdigest()
    assert ffi.find_cubin(digest) is None
    ffi.register_cubin(digest, content)
    ffi.register_cubin(digest, content)
    assert launch.find_cubin(digest) == "process"


@pytest.mark.parametrize("size", [0, 1, 55, 56, 63, 64, 65, 119, 120, 128, 100_003])
def test_digests_are_sha256(size):
    content = bytes(i * 7 % 251 for i in range(size))
    ffi.register_cubin(hashlib.sha256(content).hexdigest(), content)


def test_a_wrong_digest_is_refused():
    with pytest.raises(ValueError, match=r"12 bytes was given with digest 0{64}, but its SHA-256 is"):
        ffi.register_cubin("0" * 64, b"not matching")


@pytest.fixture
def two_directories(tmp_path):
    before = ffi.cubin_directories()
    directories = [tmp_path / "first", tmp_path / "second"]
    for directory in directories:
        directory.mkdir()
    ffi.set_cubin_directories(list(map(str, directories)))
    yield directories
    ffi.set_cubin_directories(before)


def test_cubins_are_found_in_directories_in_order(two_directories):
    first, second = two_directories
    content = b"a cubin on disk"
    name = hashlib.sha256(content).hexdigest()
    assert ffi.find_cubin(name) is None
    (second / f"{name}.cubin").write_bytes(content)
    assert ffi.find_cubin(name) == str(second / f"{name}.cubin")
    (first / f"{name}.cubin").write_bytes(content)
    assert ffi.find_cubin(name) == str(first / f"{name}.cubin")
    (first / f"{name}.cubin").write_bytes(content[:-1])  # damaged: as if it were not there
    assert ffi.find_cubin(name) == str(second / f"{name}.cubin")


def test_another_process_finds_cubins_through_the_cache_directory(tmp_path):
    content = b"compiled by an earlier process"
    name = hashlib.sha256(content).hexdigest()
    (tmp_path / "cubins").mkdir()
    (tmp_path / "cubins" / f"{name}.cubin").write_bytes(content)
    code = f"from jax_deepgemm.core.launch import find_cubin; print(find_cubin({name!r}))"
    found = run_python("-c", code, JAX_DEEPGEMM_CACHE_DIR=str(tmp_path)).strip()
    assert found == str(tmp_path / "cubins" / f"{name}.cubin")


@pytest.mark.parametrize(
    ("arch", "capability", "runs"),
    [
        ("90a", (9, 0), True),
        ("90a", (10, 0), False),
        ("90a", (8, 0), False),
        ("90", (9, 0), True),
        ("80", (8, 6), True),
        ("86", (8, 0), False),
        ("80", (9, 0), False),
        ("100f", (10, 3), True),
        ("100a", (10, 3), False),
        ("103f", (10, 0), False),
    ],
)
def test_which_device_runs_which_code(arch, capability, runs):
    assert ffi.runs_on(arch, *capability) == runs


# What execution checks of its buffers, as (address, size).

CHECKED = LaunchPlan(
    (
        fake_launch(matrix_map(Operand(1, 32)), Result(0), Scratch(0)),
        Memset(Result(0), 256),
        Memset(Scratch(0, 4), 60, Scalar(1, "uint32")),
        fake_launch(TensorMap(Operand(2), "uint4_spaced", (256,), (), (128,))),
    ),
    (64,),
    "checked",
)
GOOD = {"operands": [(16, 0), (4096, 102_432), (96, 128)], "results": [(8, 256), (24, 64)]}


def check_buffers(**changes):
    ffi.check_buffers(launch.encode(CHECKED).tobytes(), **(GOOD | changes))


def test_fitting_buffers_pass():
    check_buffers()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"operands": [(16, 0)]},
            "plan of checked uses operand 1, and the call has 1 operands and 1 results",
        ),
        (
            {"results": [(8, 256), (26, 64)]},
            "scratch 0 of checked is at address 0x1e, .* in units of 4 bytes",
        ),
        (
            {"operands": [(16, 0), (4096, 102_432), (80, 128)]},
            "operand 2 of checked is at address 0x50, .* a multiple of 32. Slice at multiples of 32",
        ),
        ({"operands": [(16, 0), (4096, 102_432), (96, 127)]}, "operand 2 of checked has 127 bytes"),
        ({"operands": [(16, 0), (4096, 102_431)]}, "operand 1 of checked has 102431 bytes .* to byte 102432"),
        (
            {"operands": [(16, 0), (4104, 200_000)]},
            r"operand 1 .* 0x1028, and parameter 0 .* a multiple of 16",
        ),
        ({"results": [(8, 255), (24, 64)]}, "result 0 of checked has 255 bytes"),
        ({"results": [(24, 64)]}, "uses result 0, and the call has 3 operands and 0 results"),
        ({"results": []}, "has 0 results and its plan needs 1 scratch buffers"),
    ],
)
def test_other_buffers_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        check_buffers(**changes)


# Lowering.


def primitive_for(plan):
    """x -> result of x's type, by the plan."""
    primitive = Primitive("ffi_test")
    primitive.multiple_results = True
    primitive.def_abstract_eval(lambda x: [jax.core.ShapedArray(x.shape, x.dtype)])
    mlir.register_lowering(primitive, lambda ctx, x: launch.emit(ctx, plan, (x,)), platform="cuda")
    return primitive


def cuda_text(primitive, x):
    return jax.jit(lambda x: primitive.bind(x)[0]).trace(x).lower(lowering_platforms=("cuda",)).as_text()


X = jax.ShapeDtypeStruct((128, 256), jnp.bfloat16)


def test_scratch_is_a_dropped_result_of_the_call():
    text = cuda_text(primitive_for(LaunchPlan((fake_launch(Operand(0), Result(0)),), (512,), "scratchy")), X)
    assert "@jax_deepgemm_launch" in text
    assert "(tensor<128x256xbf16>, tensor<512xui8>)" in text
    assert 'label = "scratchy"' in text
    assert 'kernels = "fake_kernel@' in text


def test_lowering_registers_the_cubin_of_the_kernel():
    kernel = FakeKernel(cubin=b"known after lowering")
    assert launch.find_cubin(kernel.digest) is None
    cuda_text(primitive_for(LaunchPlan((fake_launch(Operand(0), kernel=kernel),))), X)
    assert launch.find_cubin(kernel.digest) == "process"


def test_lowering_refuses_a_plan_for_other_shapes():
    plan = LaunchPlan((fake_launch(Operand(1)),), label="toy")
    with pytest.raises(
        ValueError, match=r"toy: step 0 \(fake_kernel\), parameter 0: got operand 1; there are 1"
    ):
        cuda_text(primitive_for(plan), X)


def test_embedding_lowers_again():
    primitive = primitive_for(LaunchPlan((fake_launch(Operand(0)),)))
    function = jax.jit(lambda x: primitive.bind(x)[0])

    def text():
        return function.trace(X).lower(lowering_platforms=("cuda",)).as_text()

    plain = text()
    with launch.embed_kernels():
        embedded = text()
    assert ("cubin0" in plain, "cubin0" in embedded, "cubin0" in text()) == (False, True, False)


# Compiled for a GPU that is not there.


def compile_chain(tmp_path, *arguments):
    flags = f"--xla_dump_to={tmp_path}"
    output = run_python(
        ROOT / "tests" / "shared" / "aot_launch.py", *arguments, XLA_FLAGS=flags, JAX_PLATFORMS="cpu"
    )
    thunks = "".join(path.read_text() for path in tmp_path.glob("*thunk_sequence_after_thunk_passes.txt"))
    return json.loads(output.splitlines()[-1]), thunks


@needs_cuda_plugin
def test_compiled_calls_sit_in_one_command_buffer(tmp_path):
    program, thunks = compile_chain(tmp_path, 8)
    assert program["hlo"].count('custom_call_target="jax_deepgemm_launch"') == 8
    assert " copy(" not in program["hlo"]  # donated and aliased
    assert 1 << 20 <= program["temp_bytes"] < 2 << 20  # one scratch buffer, used again by each call
    lines = thunks.splitlines()
    (start,) = [i for i, line in enumerate(lines) if "kCommandBuffer" in line]
    calls = [i for i, line in enumerate(lines) if "kCustomCall" in line]
    assert len(calls) == 8
    assert all(i > start for i in calls)


@needs_cuda_plugin
def test_compiled_calls_may_carry_their_kernels(tmp_path):
    program, _ = compile_chain(tmp_path, 1, "embed")
    assert "cubin0" in program["hlo"]
