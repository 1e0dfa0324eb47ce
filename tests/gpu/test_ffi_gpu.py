"""The launcher on a GPU: small kernels that need each thing it can do, and each of its errors.

Run: pytest -m gpu tests/gpu/test_ffi_gpu.py -s        (-s shows the measured host cost of a launch)
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Primitive
from jax.interpreters import mlir

from jax_deepgemm.core import launch
from jax_deepgemm.core.launch import (
    TARGET,
    Launch,
    LaunchPlan,
    Memset,
    Operand,
    Result,
    Scalar,
    Scratch,
    TensorMap,
)
from jax_deepgemm.jit import KernelSource, compile_kernel
from tests.shared.launch_plans import FakeKernel

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parent.parent.parent
ffi = launch.native()

KERNELS = {
    "axpy": """
extern "C" __global__ void axpy(const float* x, float* y, int n, float a, long long b) {
  asm volatile("griddepcontrol.wait;" ::: "memory");
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = a * x[i] + (float)b;
}""",
    "tma_copy": """
struct alignas(64) TensorMap { char bytes[128]; };
#define MAP const __grid_constant__ TensorMap
extern "C" __global__ void tma_copy(MAP in, MAP out) {
  __shared__ alignas(1024) float tile[64 * 32];
  __shared__ alignas(8) unsigned long long barrier;
  if (threadIdx.x != 0) return;
  unsigned data = (unsigned)__cvta_generic_to_shared(tile);
  unsigned bar = (unsigned)__cvta_generic_to_shared(&barrier);
  int x = blockIdx.x * 32, y = blockIdx.y * 64;
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(bar) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  int bytes = 64 * 32 * 4;
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
               " [%0], [%1, {%3, %4}], [%2];" ::"r"(data), "l"(&in), "r"(bar), "r"(x), "r"(y) : "memory");
  unsigned done = 0;
  while (!done)
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0;"
                 " selp.u32 %0, 1, 0, p; }"
                 : "=r"(done) : "r"(bar) : "memory");
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];"
               ::"l"(&out), "r"(data), "r"(x), "r"(y) : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}""",
    "reverse": """
extern "C" __global__ void reverse(const float* x, float* y, int n) {
  extern __shared__ float tile[];
  for (int i = threadIdx.x; i < n; i += blockDim.x) tile[n - 1 - i] = x[i];
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = tile[i];
}""",
    "cluster_rank": """
extern "C" __global__ void cluster_rank(float* y) {
  unsigned rank, size;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  if (threadIdx.x == 0) y[blockIdx.x] = rank + 100.0f * size;
}""",
    "add_to": """
extern "C" __global__ void add_to(const float* x, float* sum, int n) {
  asm volatile("griddepcontrol.wait;" ::: "memory");
  int step = gridDim.x * blockDim.x;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step) atomicAdd(sum, x[i]);
}""",
    "spread": """
extern "C" __global__ void spread(const float* sum, float* y, int n) {
  asm volatile("griddepcontrol.wait;" ::: "memory");
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = *sum;
}""",
    "meet": """
extern "C" __global__ void meet(unsigned* arrived, float* y) {
  if (threadIdx.x != 0) return;
  atomicAdd(arrived, 1);
  while (atomicAdd(arrived, 0) < gridDim.x) __nanosleep(100);  // until every block has come
  y[blockIdx.x] = gridDim.x;
}""",
    "bounded": """
extern "C" __global__ void __launch_bounds__(128) bounded(float* y) {
  __shared__ float fixed[4096];
  fixed[threadIdx.x] = threadIdx.x;
  __syncthreads();
  y[threadIdx.x] = fixed[127 - threadIdx.x];
}""",
}


@functools.cache
def kernel(name):
    return compile_kernel(KernelSource(name, KERNELS[name]))


def caller(plan, name="gpu_test"):
    """x -> an array of x's type, computed by the plan."""
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_abstract_eval(lambda x: [jax.core.ShapedArray(x.shape, x.dtype)])
    mlir.register_lowering(primitive, lambda ctx, x: launch.emit(ctx, plan, (x,)), platform="cuda")
    return jax.jit(lambda x: primitive.bind(x)[0])


def raw_caller(plan, **attributes):
    """The custom call itself: no emit, so no cubin is registered. `plan` may be encoded already."""
    attributes = {"plan": launch.encode(plan) if isinstance(plan, LaunchPlan) else plan, **attributes}
    launch.register_target()
    return lambda x: jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct(x.shape, x.dtype))(x, **attributes)


def axpy_plan(n, a=2.0, b=1, *, kernel_=None, **options):
    params = (Operand(0), Result(0), Scalar(n, "int32"), Scalar(a, "float32"), Scalar(b, "int64"))
    step = Launch(kernel_ or kernel("axpy"), (-(-n // 256), 1, 1), 256, params, **options)
    return LaunchPlan((step,), label=f"axpy [{n}]")


def numbers(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))


def tma_copy_plan(rows, cols, dtype="float32"):
    def tensor(buffer):
        return TensorMap(buffer, dtype, (cols, rows), (cols * 4,), (32, 64), swizzle=128)

    grid = (-(-cols // 32), -(-rows // 64), 1)
    return LaunchPlan(
        (Launch(kernel("tma_copy"), grid, 32, (tensor(Operand(0)), tensor(Result(0)))),), (), "copy"
    )


@pytest.mark.smoke
def test_pointers_and_scalars():
    x = numbers(1000)
    np.testing.assert_array_equal(jax.jit(caller(axpy_plan(1000, 2.0, -3)))(x), 2 * x - 3)


@pytest.mark.smoke
@pytest.mark.parametrize("shape", [(64, 32), (100, 68), (1, 4), (1000, 2052)])
def test_tensor_maps_with_tails(shape):
    x = numbers(*shape)
    np.testing.assert_array_equal(jax.jit(caller(tma_copy_plan(*shape)))(x), x)


@pytest.mark.parametrize("dtype", ["float32_ftz", "tfloat32", "tfloat32_ftz"])
def test_tensor_maps_of_special_float32(dtype):
    x = jnp.arange(100 * 68, dtype=jnp.float32).reshape(100, 68) % 1024  # 10 bits: TF32 has them all
    np.testing.assert_array_equal(jax.jit(caller(tma_copy_plan(100, 68, dtype)))(x), x)


def test_tensor_maps_follow_their_buffers():
    """More addresses than the cache of descriptors holds, twice."""
    copy = jax.jit(caller(tma_copy_plan(128, 64)))
    inputs = [numbers(128, 64) + i for i in range(40)]
    for _ in range(2):
        outputs = [copy(x) for x in inputs]
        for x, y in zip(inputs, outputs, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("kilobytes", [32, 100, 200, 227])
def test_dynamic_shared_memory(kilobytes):
    n = kilobytes * 256
    params = (Operand(0), Result(0), Scalar(n, "int32"))
    step = Launch(kernel("reverse"), (1, 1, 1), 256, params, shared_memory=n * 4)
    x = numbers(n)
    np.testing.assert_array_equal(jax.jit(caller(LaunchPlan((step,))))(x), x[::-1])


@pytest.mark.smoke
@pytest.mark.parametrize("cluster", [1, 2, 8, 16])
def test_clusters(cluster):
    step = Launch(kernel("cluster_rank"), (32, 1, 1), 32, (Result(0),), cluster=cluster)
    ranks = jax.jit(caller(LaunchPlan((step,))))(jnp.zeros(32))
    np.testing.assert_array_equal(ranks, np.arange(32) % cluster + 100.0 * cluster)


def sum_plan(n, pdl=False):
    """Scratch is zeroed, summed into, and spread: three steps that depend on each other."""
    add = Launch(kernel("add_to"), (8, 1, 1), 128, (Operand(0), Scratch(0), Scalar(n, "int32")), pdl=pdl)
    spread = Launch(
        kernel("spread"), (-(-n // 128), 1, 1), 128, (Scratch(0), Result(0), Scalar(n, "int32")), pdl=pdl
    )
    return LaunchPlan((Memset(Scratch(0), 4), add, spread), (256,), "sum")


@pytest.mark.smoke
@pytest.mark.parametrize("pdl", [False, True])
def test_memset_scratch_and_dependent_launches(pdl):
    x = jnp.arange(1000, dtype=jnp.float32) % 7
    function = jax.jit(caller(sum_plan(1000, pdl)))
    for _ in range(20):
        np.testing.assert_array_equal(function(x), jnp.full(1000, x.sum()))


def test_memset_of_a_result():
    step = Memset(Result(0, 8), 16, 0x3F)
    y = np.asarray(caller(LaunchPlan((step, *axpy_plan(6, 0.0, 5).steps, step)))(numbers(6)))
    np.testing.assert_array_equal(y.view(np.uint8)[8:], np.full(16, 0x3F))
    np.testing.assert_array_equal(y[:2], [5, 5])


def chain_of_200(call):
    @jax.jit
    def chain(x):
        for _ in range(200):
            x = call(x)
        return x

    return chain


def test_memset_of_32_bits():
    """Inside a command buffer too: minus infinity around what an axpy has written."""
    n, infinity = 1000, Scalar(float("-inf"), "float32")
    ends = (Memset(Result(0), 8, infinity), Memset(Result(0, 4 * (n - 300)), 1200, infinity))
    call = caller(LaunchPlan((*axpy_plan(n, 1.0, 1).steps, *ends), label="fill"))
    expected = np.full(n, -np.inf, np.float32)
    expected[2 : n - 300] = 200
    chain = chain_of_200(call)
    for _ in range(3):
        np.testing.assert_array_equal(chain(jnp.zeros(n)), expected)


# Grids that depend on the device, and those whose blocks wait for each other.


def meeting_plan(**options):
    """Blocks that go on when all have come; y holds their number, at most 4096."""
    step = Launch(kernel("meet"), (4096, 1, 1), 128, (Scratch(0), Result(0)), cooperative=True, **options)
    return LaunchPlan((Memset(Scratch(0), 4), Memset(Result(0), 4 * 4096), step), (256,), "meeting")


@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("blocks_per_sm", [1, 3])
def test_a_grid_of_blocks_per_sm_meets(blocks_per_sm, cluster):
    device = jax.devices("cuda")[0]
    if cluster == 2 and device.core_count % 2:
        pytest.skip("an odd number of SMs")
    blocks = blocks_per_sm * device.core_count
    y = jax.jit(caller(meeting_plan(blocks_per_sm=blocks_per_sm, cluster=cluster)))(jnp.zeros(4096))
    np.testing.assert_array_equal(y, np.where(np.arange(4096) < blocks, blocks, 0))


def test_meetings_are_captured():
    chain = chain_of_200(caller(meeting_plan(blocks_per_sm=1)))
    blocks, x = jax.devices("cuda")[0].core_count, jnp.zeros(4096)
    for _ in range(2):
        chain(x).block_until_ready()
    ffi.reset_execute_counters()
    for _ in range(20):
        y = chain(x).block_until_ready()  # of one buffer: a graph is captured again when buffers have moved
    assert ffi.execute_count() <= 400, "the calls run outside command buffers"
    np.testing.assert_array_equal(y, np.where(np.arange(4096) < blocks, blocks, 0))


# Command buffers.


@pytest.mark.parametrize("pdl", [False, True])
def test_a_chain_is_captured_with_default_flags(pdl):
    chain = chain_of_200(caller(axpy_plan(4096, 1.0, 1, pdl=pdl)))
    x = jnp.zeros(4096)
    chain(x).block_until_ready()
    chain(x).block_until_ready()
    ffi.reset_execute_counters()
    for _ in range(20):
        y = chain(x).block_until_ready()
    count = ffi.execute_count()
    print(f"\n200 chained calls, 20 runs: the handler ran {count} times (pdl={pdl})")
    np.testing.assert_array_equal(y, np.full(4096, 200))
    # A graph is captured again when its buffers have moved; 20 runs outside command buffers would be 4,000.
    assert count <= 400, "the calls run outside command buffers"


@pytest.mark.alone  # a clock decides
@pytest.mark.parametrize(("name", "limit_ns"), [("axpy", 6000), ("copy", 6000)])
def test_host_cost_of_an_uncaptured_launch(name, limit_ns):
    """A loop whose length is data is not captured; 400 launches do not fill the stream's queue. They took 4.1
    to 5.1 microseconds on one machine within a minute."""
    call = caller(axpy_plan(4096) if name == "axpy" else tma_copy_plan(64, 64))
    x = jnp.zeros(4096) if name == "axpy" else jnp.zeros((64, 64))
    loop = jax.jit(lambda x, n: jax.lax.fori_loop(0, n, lambda _, x: call(x), x))
    loop(x, 3).block_until_ready()
    means = []
    for _ in range(5):
        ffi.reset_execute_counters()
        loop(x, 400).block_until_ready()
        assert ffi.execute_count() == 400
        means.append(ffi.execute_nanoseconds() / 400)
    print(
        f"\nhost cost of one uncaptured {name} launch: {min(means):.0f} ns (of {[round(m) for m in means]})"
    )
    assert min(means) <= limit_ns


# Several GPUs.


def test_two_gpus_interleaved():
    devices = jax.devices("cuda")
    if len(devices) < 2:
        pytest.skip("one GPU")
    n = 200 * 256
    params = (Operand(0), Result(0), Scalar(n, "int32"))
    reverse = jax.jit(
        caller(LaunchPlan((Launch(kernel("reverse"), (1, 1, 1), 256, params, shared_memory=n * 4),)))
    )
    copy = jax.jit(caller(tma_copy_plan(100, 68)))
    for i in range(10):
        device = devices[i % 2]
        x, z = jax.device_put(numbers(n) + i, device), jax.device_put(numbers(100, 68) + i, device)
        y = reverse(x)
        assert y.devices() == {device}
        np.testing.assert_array_equal(y, x[::-1])
        np.testing.assert_array_equal(copy(z), z)


def test_threads_share_one_program():
    devices = jax.devices("cuda")
    copy = jax.jit(caller(tma_copy_plan(100, 68)))
    failures = []

    def work(k):
        x = jax.device_put(numbers(100, 68) + k, devices[k % len(devices)])
        failures.extend(i for i in range(100) if not np.array_equal(copy(x), x))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_one_program_on_all_gpus():
    devices = jax.devices("cuda")
    mesh = jax.make_mesh((len(devices),), ("x",), devices=devices)
    spec = jax.sharding.PartitionSpec("x")
    x = jax.device_put(numbers(len(devices) * 1024), jax.sharding.NamedSharding(mesh, spec))
    call = caller(axpy_plan(1024))
    function = jax.jit(jax.shard_map(call, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    np.testing.assert_array_equal(function(x), 2 * np.asarray(x) + 1)


# Errors, and that the process goes on after them.


def fails_with(message, function, x):
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(jax.jit(function)(x))
    np.testing.assert_array_equal(caller(axpy_plan(8))(jnp.ones(8)), np.full(8, 3))


@pytest.mark.smoke
def test_code_for_another_architecture():
    plan = axpy_plan(8, kernel_=FakeKernel("axpy", b"for another chip", "100a"))
    fails_with(
        r"kernel axpy was compiled for sm_100a and device \d+ \(.*\) is sm_90", caller(plan), jnp.ones(8)
    )


def test_bytes_that_are_no_cubin():
    plan = axpy_plan(8, kernel_=FakeKernel("axpy", b"\x7fELF, but not a cubin" * 10))
    fails_with(
        r"the code of kernel axpy \(210 bytes, from process\) is not a cubin", caller(plan), jnp.ones(8)
    )


@pytest.mark.smoke
def test_missing_code_names_the_way_out():
    plan = axpy_plan(8, kernel_=FakeKernel("axpy", b"never registered"))
    message = r"kernel axpy \(sm_90a, SHA-256 [0-9a-f]{64}\) of axpy \[8\] was not found.*embed_kernels"
    fails_with(message, raw_caller(plan), jnp.ones(8))


def test_code_in_an_attribute():
    cubin = kernel("axpy").cubin + b"\0"  # other bytes, so that no cache has them; ELF ignores what follows
    plan = axpy_plan(8, kernel_=FakeKernel("axpy", cubin))
    call = raw_caller(plan, cubin0=np.frombuffer(cubin, np.uint8))
    np.testing.assert_array_equal(jax.jit(call)(jnp.ones(8)), np.full(8, 3))


def test_a_name_that_is_not_in_the_cubin():
    plan = axpy_plan(8, kernel_=FakeKernel("other", kernel("axpy").cubin))
    fails_with(r"finding kernel other in its cubin: CUDA_ERROR_NOT_FOUND", caller(plan), jnp.ones(8))


def test_damaged_plan():
    damaged = launch.encode(axpy_plan(8))[:-1]
    fails_with("malformed launch plan .* at byte", raw_caller(damaged), jnp.ones(8))


def test_an_operand_that_tma_cannot_address():
    cupy = pytest.importorskip("cupy")  # XLA's own buffers are aligned; those of others need not be
    x = jax.dlpack.from_dlpack(cupy.zeros(64 * 32 + 1, cupy.float32)[1:].reshape(64, 32))
    if x.unsafe_buffer_pointer() % 16 == 0:
        pytest.skip("the import made an aligned copy")
    message = (  # newer XLA looks for itself, and counts in hexadecimal
        r"operand 0 of copy is at address 0x\w+4, and parameter 0 of kernel tma_copy .* multiple of 16"
        r"|Address of buffer \d+ must be a multiple of 10, but was 0x\w+4"
    )
    fails_with(message, caller(tma_copy_plan(64, 32)), x)


def bounded_plan(*params, block=128, shared_memory=0):
    step = Launch(kernel("bounded"), (1, 1, 1), block, params, shared_memory=shared_memory)
    return LaunchPlan((step,), label="bounded")


def test_buffers_of_other_sizes():
    ffi.register_cubin(kernel("bounded").digest, kernel("bounded").cubin)
    fails_with(r"the call has 1 operands and 1 results", raw_caller(bounded_plan(Result(5))), jnp.ones(8))


def test_too_many_threads():
    fails_with(
        r"kernel bounded can run 128 threads .* asks for 256",
        caller(bounded_plan(Result(0), block=256)),
        jnp.ones(128),
    )


@pytest.mark.smoke
def test_too_much_shared_memory():
    plan = bounded_plan(Result(0), shared_memory=220_000)
    fails_with(r"kernel bounded needs 220000 \+ 16384 bytes of shared memory", caller(plan), jnp.ones(128))


def test_too_many_blocks_that_wait_for_each_other():
    fails_with(
        r"the 4096 blocks of kernel meet wait for each other .* runs at most \d+\. Plan fewer blocks",
        caller(meeting_plan()),
        jnp.ones(4096),
    )


def test_parameters_that_do_not_fit():
    version = ffi.driver_info()["version"]
    if version < (12, 4):
        pytest.skip(f"driver {version} cannot be asked for a kernel's parameters")
    fails_with("has more than the 0 parameters of the plan", caller(bounded_plan()), jnp.ones(128))
    fails_with(
        "has 1 parameters and the plan gives 2", caller(bounded_plan(Result(0), Operand(0))), jnp.ones(128)
    )
    fails_with(
        "parameter 0 of kernel bounded has 8 bytes and the plan gives 4",
        caller(bounded_plan(Scalar(1, "int32"))),
        jnp.ones(128),
    )


# Programs that were made in another process.

EXPORT = """
import sys
sys.path[:0] = [{root!r}]
import jax, jax.numpy as jnp
from jax import export
from pathlib import Path
from tests.gpu.test_ffi_gpu import axpy_plan, caller
import jax_deepgemm
checks = jax_deepgemm.export_checks
exported = export.export(caller(axpy_plan(8)), platforms=["cuda"], disabled_checks=checks)
x = jax.ShapeDtypeStruct((8,), jnp.float32)
Path(sys.argv[1]).write_bytes(exported(x).serialize())
with jax_deepgemm.embed_kernels():
    Path(sys.argv[2]).write_bytes(exported(x).serialize())
"""
RUN = """
import sys
sys.path.insert(0, {root!r})
import jax, jax.numpy as jnp
from jax import export
from pathlib import Path
import jax_deepgemm
print(jax.jit(export.deserialize(bytearray(Path(sys.argv[1]).read_bytes())).call)(jnp.ones(8)).tolist())
"""


def test_exported_programs_in_another_process(tmp_path):
    plain, embedded = tmp_path / "plain", tmp_path / "embedded"

    def python(code, *arguments, cache):
        env = {
            **os.environ,
            "JAX_DEEPGEMM_CACHE_DIR": str(tmp_path / cache),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }
        command = [sys.executable, "-c", code.format(root=str(ROOT)), *map(str, arguments)]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False)

    made = python(EXPORT, plain, embedded, cache="full")
    assert made.returncode == 0, made.stderr
    answer = str([3.0] * 8)
    for program, cache in ((plain, "full"), (embedded, "empty")):
        run = python(RUN, program, cache=cache)
        assert run.stdout.strip() == answer, run.stderr
    lost = python(RUN, plain, cache="empty")
    assert lost.returncode != 0
    assert "embed_kernels" in lost.stderr
    assert str(tmp_path / "empty" / "cubins") in lost.stderr
