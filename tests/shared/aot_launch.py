"""Compiles a chain of launches for an H200 that is not there; tests/test_ffi.py runs this in its own process.

Usage: aot_launch.py CALLS [embed]. Prints JSON: the HLO text and the memory XLA reserves for temporaries.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.extend.core import Primitive
from jax.interpreters import mlir

from jax_deepgemm.core.launch import LaunchPlan, Memset, Result, Scratch, embed_kernels, emit
from tests.shared.launch_plans import fake_launch, matrix_map

SCRATCH_BYTES = 1 << 20
PLAN = LaunchPlan(
    (
        Memset(Scratch(0), 4096),
        fake_launch(matrix_map(dims=(256, 128), strides=(512,)), Scratch(0), Result(0)),
    ),
    (SCRATCH_BYTES,),
    "aot test",
)

step_p = Primitive("aot_test_step")
step_p.multiple_results = True
step_p.def_abstract_eval(lambda x: [jax.core.ShapedArray(x.shape, x.dtype)])
mlir.register_lowering(step_p, lambda ctx, x: emit(ctx, PLAN, (x,), aliases={0: 0}), platform="cuda")


def chain(x: jax.Array, calls: int) -> jax.Array:
    for _ in range(calls):
        (x,) = step_p.bind(x)
    return x


def main(calls: int, embed: bool) -> None:
    jax.devices()
    config = (Path(__file__).parent / "data" / "h200_target_config.txtpb").read_text()
    topology = topologies.get_topology_desc(platform="cuda", target_config=config, topology="1x1x1")
    mesh = jax.sharding.Mesh(topology.devices, ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    x = jax.ShapeDtypeStruct((128, 256), jnp.bfloat16, sharding=sharding)
    lowered = jax.jit(chain, static_argnums=1, donate_argnums=0).lower(x, calls)
    if embed:
        with embed_kernels():
            lowered = jax.jit(chain, static_argnums=1, donate_argnums=0).lower(x, calls)
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    print(json.dumps({"hlo": compiled.as_text(), "temp_bytes": memory.temp_size_in_bytes}))


if __name__ == "__main__":
    main(int(sys.argv[1]), embed="embed" in sys.argv)
