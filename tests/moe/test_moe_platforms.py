"""method="ragged": the collective in programs for GPUs, its emulation in those for CPUs, wherever traced."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import PartitionSpec as P

from jax_deepgemm import export_checks
from jax_deepgemm.moe import exchange, moe_layer
from tests.shared import moe_oracle as oracle
from tests.shared import op_checks
from tests.shared.moe_oracle import normal

F32 = jnp.float32
DEVICES, T, K, E, H = 8, 16, 2, 8, 16
IDS = oracle.random_ids(0, T, K, E, dropped=0.1)
CUT = P("expert")


def there_and_back(x: jax.Array, emulate: bool | None = None) -> jax.Array:
    """Rows to the devices of their experts and back, with sin between."""
    mesh = op_checks.make_mesh("auto", (DEVICES,), ("expert",))

    def local(x: jax.Array, ids: jax.Array) -> jax.Array:
        wire = exchange.plan_wire("expert", "ragged", T // DEVICES, K, E // DEVICES, None, emulate)
        way = exchange.plan_exchange(ids, E // DEVICES, wire)
        return exchange.return_rows(way, jnp.sin(exchange.send_tokens(way, x)))

    return jax.shard_map(local, mesh=mesh, in_specs=CUT, out_specs=CUT)(x, IDS)


def gradient(x: jax.Array) -> jax.Array:
    return jax.grad(lambda x: jnp.sum(jnp.cos(there_and_back(x))))(x)


FORMS = {"forward": there_and_back, "gradient": gradient, "vmap": jax.vmap(gradient)}


@pytest.mark.parametrize("form", ["forward", "gradient"])
def test_decided_where_a_program_is_lowered(form):
    """Not where it is traced; and nothing is decided where it runs."""
    traced = jax.jit(FORMS[form]).trace(normal(0, T, H, dtype=F32))
    cuda = traced.lower(lowering_platforms=("cuda",)).as_text()
    cpu = traced.lower(lowering_platforms=("cpu",))
    wide = [line for line in cuda.splitlines() if "all_gather" in line and f"x{H}x" in line]
    assert "ragged_all_to_all" in cuda
    assert not wide
    assert "ragged_all_to_all" not in cpu.as_text()
    assert " conditional(" not in cpu.compile().as_text()


@pytest.mark.parametrize("form", FORMS)
def test_the_emulation_is_chosen_under_transformations(form):
    x = normal(0, *([3] if form == "vmap" else []), T, H, dtype=F32)
    plain = {"forward": lambda x: jnp.sin(x) * np.sum(np.asarray(IDS) >= 0, axis=1)[:, None]}
    plain["gradient"] = jax.grad(lambda x: jnp.sum(jnp.cos(plain["forward"](x))))
    plain["vmap"] = jax.vmap(plain["gradient"])
    np.testing.assert_allclose(jax.jit(FORMS[form])(x), plain[form](x), rtol=1e-5, atol=1e-5)


def test_export_decides_by_the_platforms_it_is_for():
    """Made here for either: the collective for GPUs; for CPUs the emulation, which runs."""
    x = normal(0, T, H, dtype=F32)
    cuda, cpu = (
        export.export(jax.jit(gradient), platforms=[platform], disabled_checks=export_checks)(x)
        for platform in ("cuda", "cpu")
    )
    assert "@ragged_all_to_all" in cuda.mlir_module()
    assert "@ragged_all_to_all" not in cpu.mlir_module()
    mesh = op_checks.make_mesh("auto", (DEVICES,), ("expert",))
    placed = jax.device_put(x, jax.sharding.NamedSharding(mesh, CUT))
    np.testing.assert_allclose(jax.jit(cpu.call)(placed), jax.jit(gradient)(x), rtol=1e-5)


def test_export_of_a_layer_for_gpus():
    """The public call, made on a machine of CPUs: tokens go through the collective, 8 bits at a time."""
    mesh = op_checks.make_mesh("explicit", (DEVICES,), ("expert",))
    layer = functools.partial(moe_layer, mesh=mesh, method="ragged")
    cut = jax.sharding.NamedSharding(mesh, CUT)
    shapes: Any = [((T, 128), jnp.bfloat16), ((T, K), jnp.int32), ((T, K), F32)]
    shapes += [((E, 256, 128), F32), ((E, 128, 128), F32)]
    args = [jax.ShapeDtypeStruct(shape, dtype, sharding=cut) for shape, dtype in shapes]
    with jax.set_mesh(mesh):
        exported = export.export(jax.jit(layer), platforms=["cuda"], disabled_checks=export_checks)(*args)
    sent = [line for line in exported.mlir_module().splitlines() if "@ragged_all_to_all" in line]
    assert sum("x32xui32>" in line for line in sent) == 1
    assert sum("x128xbf16>" in line for line in sent) == 1
