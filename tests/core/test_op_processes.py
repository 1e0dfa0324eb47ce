"""What an op leaves for other processes: exported programs, the compilation cache, programs over hosts."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
import textwrap
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_deepgemm
from tests.core.test_op import quantized
from tests.shared import op_checks, toy_ops

REPOSITORY = Path(__file__).parents[2]


def run_python(code: str, *args: str, **environment: str) -> str:
    path = str(REPOSITORY)
    env = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", **environment}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *args],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("mode", ["single", "explicit", "shard_map"])
def test_export_and_reload_in_another_process(mode: str, tmp_path: Path) -> None:
    fn: Any = toy_ops.block_gemm
    arrays = quantized(0)
    specs = (P("x", "y"), P("x"), P(None, "y"), P())
    if mode == "explicit":
        mesh = op_checks.make_mesh("explicit")
        fn = functools.partial(fn, out_sharding=P("x"))
    elif mode == "shard_map":
        mesh, specs = op_checks.make_mesh("auto"), (P("x"), P("x"), P(), P())
        fn = jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=P("x"))
    if mode != "single":
        arrays = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(arrays, specs, strict=True)]
    exported = jax.export.export(jax.jit(fn))(*arrays)
    (tmp_path / "program").write_bytes(exported.serialize())
    np.savez(
        tmp_path / "arrays.npz",
        expected=fn(*arrays),
        **{f"x{i}": np.asarray(x).view(np.uint8) for i, x in enumerate(arrays)},
    )
    out = run_python(
        """
        import sys, pathlib, numpy as np, jax, jax.numpy as jnp
        from jax.sharding import NamedSharding, PartitionSpec as P
        folder, mode = pathlib.Path(sys.argv[1]), sys.argv[2]
        exported = jax.export.deserialize((folder / "program").read_bytes())
        data = np.load(folder / "arrays.npz")
        arrays = [jnp.asarray(data[f"x{i}"].view(a.dtype)) for i, a in enumerate(exported.in_avals)]
        if mode != "single":
            mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
            arrays = [jax.device_put(x, NamedSharding(mesh, P())) for x in arrays]
        got = np.asarray(jax.jit(exported.call)(*arrays))
        assert "jax_deepgemm" not in sys.modules
        print(np.abs(got - data["expected"]).max())
        """,
        str(tmp_path),
        mode,
    )
    assert float(out) < 1e-4


def test_export_for_cuda_needs_the_check_disabled_and_gets_it() -> None:
    pytest.importorskip("jax_deepgemm._ffi")
    export = functools.partial(jax.export.export, jax.jit(toy_ops.block_gemm), platforms=["cuda"])
    with pytest.raises(ValueError, match="jax_deepgemm_launch"):
        export()(*quantized(0))
    exported = export(disabled_checks=jax_deepgemm.export_checks)(*quantized(0))
    again = jax.export.deserialize(exported.serialize())
    assert again.platforms == ("cuda",)
    assert b"jax_deepgemm_launch" in again.mlir_module_serialized


_CACHED_PROGRAM = """
    import json, sys, jax, jax.numpy as jnp
    flag, version = sys.argv[1:3]
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", flag == "flag")
    events = []
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
    from jax.sharding import NamedSharding, PartitionSpec as P
    from tests.shared import toy_ops
    if version != "this":
        import jax_deepgemm.core.op as op
        op.fingerprint = lambda modules: version
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    a = jax.ShapeDtypeStruct((16, 24), jnp.float32, sharding=NamedSharding(mesh, P("x", "y")))
    b = jax.ShapeDtypeStruct((8, 24), jnp.float32, sharding=NamedSharding(mesh, P(None, "y")))
    f = jax.jit(toy_ops.matmul)
    text = f.lower(a, b).compile().as_text()
    assert "all-reduce" in text
    print(json.dumps([sum("cache_hits" in e for e in events), sum("cache_misses" in e for e in events)]))
"""


@pytest.mark.parametrize("flag", ["no flag", "flag"])
def test_second_process_hits_the_persistent_cache(flag: str, tmp_path: Path) -> None:
    def run(version: str) -> list[int]:
        out = run_python(
            _CACHED_PROGRAM, flag, version, JAX_COMPILATION_CACHE_DIR=str(tmp_path), PYTHONHASHSEED="random"
        )
        return json.loads(out)

    assert run("this")[0] == 0
    hits, misses = run("this")
    assert (hits > 0, misses) == (True, 0)
    assert run("another version")[0] == 0


_TWO_HOSTS = """
    import sys, jax, numpy as np
    port, rank = sys.argv[1], int(sys.argv[2])
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=rank)
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from tests.shared import toy_ops
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((8, 24), np.float32), rng.standard_normal((16, 24), np.float32)
    for axis_type in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(axis_type,) * 2)
        def place(x, spec):
            return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda i: x[i])
        options = {"out_sharding": P()} if axis_type == AxisType.Explicit else {}
        with jax.set_mesh(mesh):
            f = jax.jit(lambda a, b: toy_ops.matmul(a, b, **options), out_shardings=NamedSharding(mesh, P()))
            got = f(place(a, P(None, ("x", "y"))), place(b, P(None, ("x", "y"))))
        print(float(np.abs(np.asarray(got.addressable_data(0)) - a @ b.T).max()))
"""


def test_one_program_over_two_processes() -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    with futures.ThreadPoolExecutor() as pool:
        outs = list(pool.map(lambda rank: run_python(_TWO_HOSTS, port, rank, **flags), ("0", "1")))
    for out in outs:
        assert max(map(float, out.splitlines()[-2:])) < 1e-4
