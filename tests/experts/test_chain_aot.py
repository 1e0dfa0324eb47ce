"""Chains compiled for eight H200s on a machine without any: one call a layer, captured with its like."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_deepgemm.ops.experts.api import experts_swiglu
from jax_deepgemm.quantization import QuantizedArray
from tests.gemm.test_aot import h200_mesh, pytestmark  # noqa: F401 - skips where there is no GPU compiler

F8, F32 = jnp.float8_e4m3fn, jnp.float32
T, E, K, H, I = 16, 8, 2, 512, 256


def test_tokens_are_cut_and_layers_are_one_command_buffer(tmp_path: Path) -> None:
    """The scales of w2, two in a row, are made four once, not in every layer."""
    mesh = h200_mesh("auto")
    tokens, whole = P("x"), P()
    types = [
        ((T, H), jnp.bfloat16, tokens),
        ((T, K), jnp.int32, tokens),
        ((T, K), F32, tokens),
        ((E, 2 * I, H), F8, whole),
        ((E, 2 * I // 128, H // 128), F32, whole),
        ((E, H, I), F8, whole),
        ((E, H // 128, I // 128), F32, whole),
    ]
    args = [jax.ShapeDtypeStruct(s, d, sharding=NamedSharding(mesh, spec)) for s, d, spec in types]

    def layers(x: jax.Array, ids: jax.Array, weights: jax.Array, *quantised: jax.Array) -> jax.Array:
        w13, w2 = (QuantizedArray(*quantised[i : i + 2], (128, 128)) for i in (0, 2))
        for _ in range(6):
            x = experts_swiglu(x, ids, weights, w13, w2)
        return x

    options = {"xla_dump_to": str(tmp_path)}
    cut = NamedSharding(mesh, tokens)
    hlo = jax.jit(layers, out_shardings=cut).lower(*args).compile(compiler_options=options).as_text()
    assert hlo.count('custom_call_target="jax_deepgemm_launch"') == 6
    assert not re.search(r" (?:all-gather|all-reduce|all-to-all|collective-permute)", hlo)
    assert len(re.findall(r" pad\(", hlo)) == 1
    (dump,) = tmp_path.glob("*thunk_sequence_after_thunk_passes.txt")
    lines = dump.read_text().splitlines()
    outside = [line.split()[1] for line in lines if re.match(r"\d+: ", line)]
    assert outside == ["kCommandBuffer"], lines
    assert len([line for line in lines if re.match(r" +\d+: kCustomCall", line)]) == 6
