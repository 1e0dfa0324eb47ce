"""The launcher's driver calls, seen by a libcuda that only writes them down."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jax_deepgemm.core import launch
from jax_deepgemm.core.launch import Copy, LaunchPlan, Memset, Operand, Result, Scalar, Scratch, TensorMap
from jax_deepgemm.core.parameters import FILLS, L2_PROMOTIONS, SWIZZLES, TENSOR_TYPES
from tests.shared.launch_plans import (
    CUBIN,
    KERNEL,
    OLD_PLANS,
    FakeKernel,
    fake_launch,
    launcher_plan,
    old_bytes,
)

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
    """Runs a plan in a process with the fake driver: (calls, error). `encoded` stands in for its bytes."""

    def run(plan, operands, results, repeat=1, encoded=None, **environment):
        log = tmp_path / "log"
        log.write_text("")
        path = f"{fake_driver}:{os.environ.get('LD_LIBRARY_PATH', '')}"
        env = {**os.environ, "LD_LIBRARY_PATH": path, "FAKE_LOG": str(log)}
        cubins = [(kernel.digest, kernel.cubin) for kernel in plan.kernels]
        job = repr((encoded or launch.encode(plan).tobytes(), cubins, operands, results, repeat))
        command = [sys.executable, "-c", LOAD_MODULE + RUN]
        done = subprocess.run(
            command, input=job, env=env | environment, capture_output=True, text=True, check=True
        )
        return log.read_text().splitlines(), done.stdout.strip()

    return run


PLAN = launcher_plan()
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


@pytest.mark.parametrize("version", [1, 2])
def test_a_plan_of_an_older_version_runs_as_it_did(run, version):
    encoded = old_bytes("launcher", version)
    calls, error = run(PLAN, OPERANDS, RESULTS, repeat=2, encoded=encoded, **PARAMS)
    assert error == ""
    assert calls == [*LOAD, MEMSET, ENCODE, LAUNCH, MEMSET, LAUNCH]


def encode_call(param, bases):
    """What the driver is asked for a tensor map."""
    sizes = zip(param.dims, ("", *param.strides), param.box, strict=True)
    return (
        f"cuTensorMapEncodeTiled {bases[type(param.buffer)] + param.buffer.byte_offset:#x} "
        f"type {param.type.code} {' '.join(f'{d}/{s}/{b}' for d, s, b in sizes)} "
        f"swizzle {SWIZZLES[param.swizzle]} promotion {L2_PROMOTIONS[param.l2_promotion]} "
        f"fill {FILLS[param.fill]}"
    )


def encoded_maps(run, plan, **options):
    bases = {Operand: 0x100000, Result: 0x300000, Scratch: 0x500000}
    operands, *results = [(base, 1 << 21) for base in bases.values()]
    params = plan.steps[-1].params
    calls, error = run(plan, [operands], results, FAKE_PARAMS=",".join(["128"] * len(params)), **options)
    assert error == ""
    asked = [call for call in calls if call.startswith("cuTensorMap")]
    assert asked == [encode_call(param, bases) for param in params]
    return asked


def test_tensor_maps_of_version_2_are_encoded_as_they_were(run):
    asked = encoded_maps(run, OLD_PLANS["tensor maps"](), encoded=old_bytes("tensor maps"))
    assert {line.split()[3] for line in asked} == {str(code) for code in range(10)}


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
def test_tensor_maps_of_all_types_and_ranks(run, rank):
    def tensor_map(name):
        rules = TENSOR_TYPES[name]
        row = 128 if rules.bits < 8 else 128 // rules.bits
        return TensorMap(Operand(0, 32), name, (256,) * rank, (2048,) * (rank - 1), (row,) * rank)

    maps = [tensor_map(name) for name in TENSOR_TYPES]
    asked = encoded_maps(run, LaunchPlan((fake_launch(*maps, kernel=KERNEL),), (64,)))
    assert {line.split()[3] for line in asked} == {str(code) for code in range(15)}


def four_bit_plan():
    rows = TensorMap(Operand(0), "float4_e2m1fn", (512, 8), (256,), (128, 8))
    return LaunchPlan((fake_launch(rows, kernel=KERNEL),))


def test_a_driver_without_4_bit_elements_is_named(run):
    refuses = {"FAKE_FAIL": "cuTensorMapEncodeTiled", "FAKE_PARAMS": "128"}
    _, error = run(four_bit_plan(), [(0x10000, 2048)], [], FAKE_DRIVER="12040", **refuses)
    assert error.endswith(
        "the tensor map of operand 0 has elements of 4 bits, which drivers know since CUDA 12.8; this one is "
        "of CUDA 12.4. Update it."
    )
    _, error = run(four_bit_plan(), [(0x10000, 2048)], [], **refuses)
    assert "the driver refuses the tensor map of operand 0, type 13, dims [512, 8]" in error


FILL = LaunchPlan((Memset(Result(0, 4), 64, Scalar(float("-inf"), "float32")),), label="scores")


def test_memset_of_32_bits(run):
    calls, error = run(FILL, [], [(0x20000, 68)], repeat=2)
    assert error == ""
    assert calls == ["cuMemsetD32Async 0x20004 0xff800000 16"] * 2
    _, error = run(FILL, [], [(0x20000, 68)], FAKE_FAIL="cuMemsetD32Async")
    assert "setting 64 bytes of scores: CUDA_ERROR_FAKE" in error
    calls, error = run(FILL, [], [(0x20002, 68)])
    assert calls == []
    assert error == (
        "ValueError: jax_deepgemm: result 0 of scores is at address 0x20006, and the plan sets it in units "
        "of 4 bytes, which needs a multiple of that."
    )


def grid_of(run, sms, **options):
    plan = LaunchPlan((fake_launch(kernel=KERNEL, **options),))
    [*_, call], error = run(plan, [], [], FAKE_SMS=str(sms))
    assert error == ""
    return call.split()[1]


@pytest.mark.parametrize(
    ("sms", "options", "grid"),
    [
        (132, {"grid": (4096, 1, 1), "blocks_per_sm": 1}, "132x1x1"),
        (78, {"grid": (4096, 1, 1), "blocks_per_sm": 1}, "78x1x1"),
        (78, {"grid": (4096, 3, 1), "blocks_per_sm": 2}, "156x3x1"),
        (132, {"grid": (100, 1, 1), "blocks_per_sm": 1}, "100x1x1"),
        (132, {"grid": (4096, 1, 1)}, "4096x1x1"),
        (78, {"grid": (4096, 1, 1), "blocks_per_sm": 1, "cluster": 4}, "76x1x1"),  # whole clusters
        (3, {"grid": (4096, 1, 1), "blocks_per_sm": 1, "cluster": 4}, "4x1x1"),  # at least one
        (1 << 30, {"grid": (4096, 1, 1), "blocks_per_sm": 1024}, "4096x1x1"),  # beyond 32 bits
    ],
)
def test_a_grid_depends_on_the_device_that_runs_it(run, sms, options, grid):
    assert grid_of(run, sms, **options) == grid


@pytest.mark.parametrize(
    ("options", "device", "most"),
    [
        ({"grid": (265, 1, 1)}, {}, 264),
        ({"grid": (11, 3, 2)}, {"FAKE_SMS": "65", "FAKE_BLOCKS": "1"}, 65),
        ({"grid": (62, 1, 1), "cluster": 2}, {"FAKE_CLUSTERS": "30"}, 60),
        ({"grid": (1024, 1, 1), "blocks_per_sm": 3}, {}, 264),
    ],
)
def test_a_cooperative_launch_that_does_not_fit_is_refused(run, options, device, most):
    plan = LaunchPlan((fake_launch(kernel=KERNEL, cooperative=True, **options),))
    calls, error = run(plan, [], [], **device)
    assert f"device 3 (Fake GPU) runs at most {most}. Plan fewer blocks" in error
    assert error.startswith("ValueError: jax_deepgemm: the ")
    assert not any(call.startswith("cuLaunchKernelEx") for call in calls)


@pytest.mark.parametrize(
    ("options", "device", "call"),
    [
        ({"grid": (264, 1, 1)}, {}, "264x1x1 block 128 shared 0 cooperative"),
        (
            {"grid": (60, 1, 1), "cluster": 2},
            {"FAKE_CLUSTERS": "30"},
            "60x1x1 block 128 shared 0 cluster 2 cooperative",
        ),
        (
            {"grid": (1024, 1, 1), "blocks_per_sm": 2},
            {"FAKE_SMS": "7"},
            "14x1x1 block 128 shared 0 cooperative",
        ),
        ({"pdl": True}, {}, "4x1x1 block 128 shared 0 pdl cooperative"),
    ],
)
def test_a_cooperative_launch_that_fits_says_so_to_the_driver(run, options, device, call):
    plan = LaunchPlan((fake_launch(kernel=KERNEL, cooperative=True, **options),), label="sum")
    [*_, launched], error = run(plan, [], [], **device)
    assert error == ""
    assert launched == f"cuLaunchKernelEx {call}"
    _, error = run(plan, [], [], FAKE_FAIL="cuLaunchKernelEx", **device)
    assert ", cooperative, 0 bytes of shared memory): CUDA_ERROR_FAKE" in error


@pytest.mark.parametrize(
    ("function", "cluster"),
    [("cuOccupancyMaxActiveBlocksPerMultiprocessor", 1), ("cuOccupancyMaxActiveClusters", 2)],
)
def test_a_device_that_does_not_say_what_fits(run, function, cluster):
    plan = LaunchPlan((fake_launch(kernel=KERNEL, cooperative=True, cluster=cluster),))
    _, error = run(plan, [], [], FAKE_FAIL=function)
    assert error.startswith(f"RuntimeError: jax_deepgemm: {function}: CUDA_ERROR_FAKE")


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
