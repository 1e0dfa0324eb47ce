"""What `import jax_deepgemm` costs and touches."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import jax_deepgemm

PROBE = """
import json, sys, time
def maps():
    return open("/proc/self/maps").read() if sys.platform == "linux" else ""

import jax
driver_before = "libcuda.so" in maps()  # a plugin of jax may open it
begin = time.process_time()
import jax_deepgemm
seconds = time.process_time() - begin
from jax_deepgemm import deep_gemm
print(json.dumps({
    "seconds": seconds,
    "cuda_core": any(name == "cuda.core" or name.startswith("cuda.core.") for name in sys.modules),
    "driver": "libcuda.so" in maps() and not driver_before,
    "backends": bool(jax._src.xla_bridge._backends),
}))
"""

FORK = """
import os, warnings
import jax, jax_deepgemm
from jax_deepgemm import deep_gemm
jax_deepgemm.quantize, jax_deepgemm.fp8_gemm_nt, jax_deepgemm.fp8_linear, deep_gemm.fp8_gemm_nt
warnings.simplefilter("ignore")
children = []
for index in range(8):
    child = os.fork()
    if child == 0:
        import jax.numpy as jnp
        value = jax_deepgemm.bf16_gemm_nt(jnp.ones((2, 8), jnp.bfloat16), jnp.ones((3, 8), jnp.bfloat16))
        os._exit(0 if float(value[0, 0]) == 8.0 else 1)
    children.append(child)
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_cheap_and_touches_no_gpu() -> None:
    probes = [json.loads(run(PROBE)) for _ in range(3)]
    assert min(probe["seconds"] for probe in probes) <= 0.15
    for probe in probes:
        assert not probe["cuda_core"]
        assert not probe["driver"]
        assert not probe["backends"]


@pytest.mark.skipif(not hasattr(sys, "getswitchinterval") or sys.platform != "linux", reason="needs fork")
def test_eight_children_compute_after_a_fork() -> None:
    assert json.loads(run(FORK)) == [0] * 8


def test_import_registers_the_custom_call_for_programs_from_a_file() -> None:
    pytest.importorskip("jax_deepgemm._ffi")
    run("import jax_deepgemm, sys; sys.exit('jax_deepgemm.core.launch' not in sys.modules)")


def test_every_public_name_exists_and_is_documented() -> None:
    for name in jax_deepgemm.__all__:
        value = getattr(jax_deepgemm, name)
        if callable(value):
            assert value.__doc__, name
    assert set(jax_deepgemm.__all__) <= set(dir(jax_deepgemm))


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        jax_deepgemm.no_such_name  # noqa: B018
