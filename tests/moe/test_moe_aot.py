"""A mixture of experts compiled for eight H200s on a machine without any: what travels, and what runs."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_deepgemm.moe import moe_layer, moe_mlp, moe_mlp_decode
from tests.gemm.test_aot import h200_mesh, pytestmark  # noqa: F401 - skips where there is no GPU compiler

F32 = jnp.float32
T, E, K, H, I = 1024, 16, 2, 256, 128
TRAVELS = re.compile(
    r"= \(*(\w+)\[([\d,]*)\].* (ragged-all-to-all|all-to-all|all-gather|all-reduce)(?:-start)?\("
)


@pytest.mark.parametrize("method", ["all_to_all", "ragged"])
def test_training_step_over_experts(method):
    """Tokens and the gradients of results travel in 8 bits, results and the tokens' in bfloat16."""
    mesh = h200_mesh("auto")
    tokens, experts = P(("x", "y")), P("y")
    types = [
        ((T, H), jnp.bfloat16, tokens),
        ((T, K), jnp.int32, tokens),
        ((T, K), F32, tokens),
        ((E, 2 * I, H), F32, experts),
        ((E, H, I), F32, experts),
    ]
    args = [jax.ShapeDtypeStruct(s, d, sharding=NamedSharding(mesh, spec)) for s, d, spec in types]

    def loss(*args: jax.Array) -> jax.Array:
        y, _ = moe_layer(*args, mesh=mesh, expert_axis="y", method=method, capacity_factor=1.5)
        return jnp.sum(jnp.sin(y.astype(F32)))

    hlo = jax.jit(jax.grad(loss, (0, 2, 3, 4))).lower(*args).compile().as_text()
    found = [TRAVELS.search(line) for line in hlo.splitlines()]
    moved = Counter(
        (match[3], match[1]) for match in found if match and re.search(r",(?:256|64)\b", match[2])
    )
    collective = method.replace("_", "-") if method == "all_to_all" else "ragged-all-to-all"
    assert moved[collective, "u32"] == 2  # x, and the gradient of y: H / 4 words
    assert moved[collective, "bf16"] == 2  # y, and the gradient of x
    assert sum(count for (name, _), count in moved.items() if name == collective) == 4
    assert not re.search(r" (?:dot|transpose|ragged-dot)\(", hlo[hlo.index("ENTRY") :])
    assert " conditional(" not in hlo
    kernels = Counter(re.findall(r"%(\w+?)_kernel[.\d]* = .*jax_deepgemm_launch", hlo))
    gemms = {name: count for name, count in kernels.items() if "gemm" in name}
    assert gemms == {"m_grouped_fp8_gemm_block": 4, "k_grouped_fp8_gemm": 2}


@pytest.mark.parametrize(
    ("recipe", "tokens", "what"),
    [("fp8", 1024, "training"), ("bf16", 32768, "training"), ("fp8", 8, "decoding")],
)
def test_a_layer_is_one_command_buffer(recipe, tokens, what, tmp_path: Path):
    """No sort, which XLA runs outside of graphs, and no other library: of one device, whole steps."""
    mesh, bf16 = h200_mesh("auto"), jnp.bfloat16
    shapes = [((tokens, H), bf16), ((tokens, K), jnp.int32), ((tokens, K), F32)]
    shapes += [((E, 2 * I, H), bf16), ((E, H, I), bf16)]
    args = [jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P())) for shape, dtype in shapes]

    def loss(*args: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(moe_mlp(*args, recipe=recipe).astype(F32)))

    step = jax.grad(loss, (0, 2, 3, 4)) if what == "training" else moe_mlp_decode
    local = jax.shard_map(step, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    options = {"xla_dump_to": str(tmp_path)}
    hlo = jax.jit(local).lower(*args).compile(compiler_options=options).as_text()
    assert set(re.findall(r'custom_call_target="([^"]*)"', hlo)) == {"jax_deepgemm_launch"}
    assert " sort(" not in hlo
    (dump,) = tmp_path.glob("*thunk_sequence_after_thunk_passes.txt")
    lines = dump.read_text().splitlines()
    outside = [line.split()[1] for line in lines if re.match(r"\d+: ", line)]
    assert outside == ["kCommandBuffer"], lines
    captured = [line for line in lines if re.match(r" +\d+: kCustomCall", line)]
    assert len(captured) == hlo.count('custom_call_target="jax_deepgemm_launch"')
