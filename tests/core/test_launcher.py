"""The launcher's driver calls, seen by a libcuda that only writes them down."""

from __future__ import annotations

import importlib.util
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from jax_deepgemm.core import launch
from jax_deepgemm.core.launch import Copy, LaunchPlan, Memset, Operand, Result, Scalar, Scratch
from tests.shared.launch_plans import FakeKernel, fake_launch, matrix_map

ROOT = Path(__file__).parents[2]


def cuda_include() -> Path | None:
    spec = importlib.util.find_spec("nvidia")
    places = [Path(place) for place in (spec.submodule_search_locations if spec else [])]
    candidates = [place / part / "include" for place in places for part in ("cu13", "cuda_runtime")]
    candidates.append(Path("/usr/local/cuda/include"))
    return next((path for path in candidates if (path / "cuda.h").exists()), None)


@pytest.fixture(scope="module")
def fake_driver(tmp_path_factory):
    compiler, include = shutil.which("c++"), cuda_include()
    if not compiler or not include or sys.platform != "linux":
        pytest.skip("needs a C++ compiler and cuda.h")
    folder = tmp_path_factory.mktemp("fake_driver")
    source = ROOT / "tests" / "shared" / "native" / "fake_libcuda.cc"
    command = [
        compiler,
        "-std=c++17",
        "-shared",
        "-fPIC",
        "-I",
        include,
        source,
        "-o",
        folder / "libcuda.so.1",
    ]
    subprocess.run([str(part) for part in command], check=True)
    return folder


# As much of a cubin as is looked at before the driver gets it: a 64-bit ELF header for CUDA, with no tables.
CUBIN = struct.pack(
    "<4sBBBB8xHHIQQQIHHHHHH", b"\x7fELF", 2, 1, 1, 0, 2, 190, 1, 0, 64, 64, 0, 64, 56, 0, 64, 0, 0
)
KERNEL = FakeKernel("fake_kernel", CUBIN)

# Loads the module by its file: the package around it would import jax.
LOAD_MODULE = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_ffi", {launch.native().__file__!r})
_ffi = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_ffi)
"""
RUN = """
plan, cubins, operands, results, repeat = eval(sys.stdin.read())
for digest, cubin in cubins:
    _ffi.register_cubin(digest, cubin)
try:
    _ffi.run(plan, operands, results, repeat)
except Exception as error:
    print(f"{type(error).__name__}: {error}")
"""


@pytest.fixture
def run(fake_driver, tmp_path):
    """Runs a plan in a process with the fake driver: (calls, error)."""

    def run(plan, operands, results, repeat=1, **environment):
        log = tmp_path / "log"
        log.write_text("")
        path = f"{fake_driver}:{os.environ.get('LD_LIBRARY_PATH', '')}"
        env = {**os.environ, "LD_LIBRARY_PATH": path, "FAKE_LOG": str(log)}
        cubins = [(kernel.digest, kernel.cubin) for kernel in plan.kernels]
        job = repr((launch.encode(plan).tobytes(), cubins, operands, results, repeat))
        command = [sys.executable, "-c", LOAD_MODULE + RUN]
        done = subprocess.run(
            command, input=job, env=env | environment, capture_output=True, text=True, check=True
        )
        return log.read_text().splitlines(), done.stdout.strip()

    return run


PLAN = LaunchPlan(
    (
        Memset(Scratch(0), 64, 255),
        fake_launch(
            matrix_map(Operand(0, 16)),
            Result(0, 4),
            Scalar(-1, "int32"),
            Scalar(1.0, "float32"),
            kernel=KERNEL,
            grid=(32, 2, 1),
            cluster=16,
            shared_memory=100_000,
            pdl=True,
        ),
    ),
    (64,),
    "toy",
)
OPERANDS, RESULTS = [(0x10000, 200_000)], [(0x20000, 4), (0x30000, 64)]
PARAMS = {"FAKE_PARAMS": "128,8,4,4"}

LOAD = [
    "cuLibraryLoadData",
    "cuLibraryGetKernel fake_kernel",
    "cuKernelGetFunction",
    "cuFuncSetAttribute 8 100000",  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    "cuFuncSetAttribute 14 1",  # CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
]
MEMSET = "cuMemsetD8Async 0x30000 255 64"
ENCODE = "cuTensorMapEncodeTiled 0x10010 type 9 512//64 100/1024/128 swizzle 3 promotion 3 fill 0"
LAUNCH = (
    "cuLaunchKernelEx 32x2x1 block 128 shared 100000 cluster 16 pdl 0x10010 0x20004 0xffffffff 0x3f800000"
)


def test_each_thing_is_done_once_and_launches_every_time(run):
    calls, error = run(PLAN, OPERANDS, RESULTS, repeat=3, **PARAMS)
    assert error == ""
    assert calls == [*LOAD, MEMSET, ENCODE, LAUNCH, MEMSET, LAUNCH, MEMSET, LAUNCH]


def test_copy_happens_between_different_buffers_only(run):
    step = Copy(Operand(0, 16), Result(0), 4)
    plan = LaunchPlan((step, fake_launch(kernel=KERNEL)))
    apart, error = run(plan, [(0x10000, 64)], [(0x20000, 64)])
    assert error == ""
    assert [call for call in apart if "cpy" in call] == ["cuMemcpyDtoDAsync 0x20000 0x10010 4"]
    together, error = run(plan, [(0x10000, 64)], [(0x10010, 64)])
    assert error == ""
    assert together == [call for call in apart if "cpy" not in call]
    [*_, launched], error = run(plan, [(0x10000, 64)], [(0x20000, 64)], FAKE_FAIL="cuMemcpyDtoDAsync")
    assert "copying 4 bytes" in error
    assert "Launch" not in launched


def test_two_kernels_of_one_cubin_load_it_once(run):
    other = FakeKernel("other_kernel", CUBIN)
    plan = LaunchPlan((fake_launch(kernel=KERNEL), fake_launch(kernel=other), fake_launch(kernel=KERNEL)))
    calls, error = run(plan, [], [])
    assert error == ""
    assert [call.split()[0] for call in calls] == [
        "cuLibraryLoadData",
        *["cuLibraryGetKernel", "cuKernelGetFunction"] * 2,
        *["cuLaunchKernelEx"] * 3,
    ]


@pytest.mark.parametrize(
    ("environment", "error"),
    [
        (
            {"FAKE_CAPABILITY": "100"},
            "ValueError: jax_deepgemm: kernel fake_kernel was compiled for sm_90a and device 3 (Fake GPU) is "
            "sm_100. Lower and compile the function for the device it runs on.",
        ),
        ({"FAKE_PARAMS": "128,8,4"}, "kernel fake_kernel has 3 parameters and the plan gives 4."),
        ({"FAKE_PARAMS": "128,8,4,4,4"}, "kernel fake_kernel has more than the 4 parameters of the plan."),
        ({"FAKE_PARAMS": "128,8,8,4"}, "parameter 2 of kernel fake_kernel has 8 bytes and the plan gives 4."),
        ({"FAKE_FAIL": "no context"}, "no CUDA context is current at execution of toy."),
        (
            {"FAKE_FAIL": "cuLibraryLoadData"},
            "loading the code of kernel fake_kernel (sm_90a, 64 bytes, from process)",
        ),
        (
            {"FAKE_FAIL": "cuLibraryGetKernel"},
            "finding kernel fake_kernel in its cubin: CUDA_ERROR_FAKE (719)",
        ),
        ({"FAKE_FAIL": "cuKernelGetFunction"}, "loading kernel fake_kernel: CUDA_ERROR_FAKE"),
        (
            {"FAKE_FAIL": "cuFuncSetAttribute"},
            "allowing 100000 bytes of shared memory to kernel fake_kernel: CUDA",
        ),
        (
            {"FAKE_FAIL": "cuTensorMapEncodeTiled"},
            "the driver refuses the tensor map of operand 0, type 9, dims [512, 100], strides [1024] bytes, "
            "box [64, 128], swizzle code 3: CUDA_ERROR_FAKE (719), asked to fail.",
        ),
        ({"FAKE_FAIL": "cuMemsetD8Async"}, "setting 64 bytes of toy: CUDA_ERROR_FAKE"),
        (
            {"FAKE_FAIL": "cuLaunchKernelEx"},
            "RuntimeError: jax_deepgemm: launching kernel fake_kernel of toy (grid 32x2x1, block 128, "
            "cluster 16, 100000 bytes of shared memory): CUDA_ERROR_FAKE (719), asked to fail.",
        ),
    ],
)
def test_errors_say_what_failed(run, environment, error):
    _, message = run(PLAN, OPERANDS, RESULTS, **(PARAMS | environment))
    assert error in message


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (
            {"shared_memory": 232_000},
            "needs 232000 + 1024 bytes of shared memory per block (dynamic + static)",
        ),
        (
            {"kernel": FakeKernel("no_code", b"text")},
            "the code of kernel no_code (4 bytes, from process) is not a cubin",
        ),
        (
            {"kernel": FakeKernel("cut", CUBIN[:-1])},
            "the code of kernel cut (63 bytes, from process) is not a cubin",
        ),
    ],
)
def test_what_the_device_cannot_run(run, options, error):
    plan = LaunchPlan((fake_launch(**({"kernel": KERNEL} | options)),))
    calls, message = run(plan, [], [])
    assert error in message
    assert not any(call.startswith("cuLaunchKernelEx") for call in calls)


def test_too_many_threads(run):
    step = launch.Launch(KERNEL, (1, 1, 1), 1024, ())
    _, message = run(LaunchPlan((step,)), [], [])
    assert "can run 512 threads per block (128 registers each) and the plan asks for 1024" in message


def test_the_driver_is_seen_without_being_initialised(fake_driver):
    command = [sys.executable, "-c", LOAD_MODULE + "print(_ffi.driver_info())"]
    env = {**os.environ, "LD_LIBRARY_PATH": str(fake_driver)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str({"available": True, "version": (12, 8), "error": ""})
