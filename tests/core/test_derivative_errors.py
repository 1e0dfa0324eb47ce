"""Derivatives that FP8 layers lack: the error says what there is, and that works."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jax_deepgemm
from jax_deepgemm import moe
from tests.shared.public_calls import CALLS

OPERANDS = {
    name: x for call in CALLS if not call.mesh for name, x in zip(call.operands, call.arrays(), strict=True)
}
X, ROWS = OPERANDS["x_f32"], OPERANDS["row_weights"]
Function = Callable[[jax.Array], jax.Array]


def layers(**options: Any) -> dict[str, Function]:
    """Layers as functions of activations."""
    w, ws, w13, w2 = (OPERANDS[name] for name in ("w_f32", "ws_f32", "w13", "w2"))
    sizes, expert_sizes, ids = (OPERANDS[name] for name in ("sizes", "expert_sizes", "ids"))
    return {
        "fp8_linear": lambda x: jax_deepgemm.fp8_linear(x, w),
        "fp8_linear frozen": lambda x: jax_deepgemm.fp8_linear(x, OPERANDS["q_w"]),
        "grouped_linear": lambda x: jax_deepgemm.grouped_linear(x, ws, sizes, **options),
        "grouped_linear frozen": lambda x: jax_deepgemm.grouped_linear(x, OPERANDS["q_ws"], sizes, **options),
        "expert_mlp": lambda x: moe.expert_mlp(x, w13, w2, expert_sizes, ROWS, **options),
        "moe_mlp": lambda x: moe.moe_mlp(x, ids, OPERANDS["weights"], w13, w2, **options),
    }


def loss(layer: Function) -> Function:
    return lambda x: jnp.sum(jnp.sin(layer(x).astype(jnp.float32)))


FORWARD: dict[str, Callable[[Function], Any]] = {
    "jvp": lambda layer: jax.jvp(layer, (X,), (X,)),
    "jvp in jit": lambda layer: jax.jit(lambda x: jax.jvp(layer, (x,), (x,))[1])(X),
    "jacfwd": lambda layer: jax.jacfwd(layer)(X),
    "linearize": lambda layer: jax.linearize(layer, X)[1](X),
}
SECOND: dict[str, Callable[[Function], Any]] = {
    "hessian": lambda layer: jax.hessian(loss(layer))(X),
    "jvp of grad": lambda layer: jax.jvp(jax.grad(loss(layer)), (X,), (X,)),
    "grad of grad": lambda layer: jax.grad(lambda x: jnp.sum(jax.grad(loss(layer))(x)))(X),
    "grad of vjp": lambda layer: jax.grad(lambda dy: jnp.sum(jax.vjp(layer, X)[1](dy)[0]))(layer(X)),
}


@pytest.mark.parametrize("way", FORWARD | SECOND)
@pytest.mark.parametrize("name", layers())
def test_what_is_not_there_says_what_is(name: str, way: str) -> None:
    """While it is traced, where values are not computed first; for one layer also with values."""
    where = name.split()[0]
    run = functools.partial((FORWARD | SECOND)[way], layers()[name])
    with pytest.raises(TypeError, match=f"^{where}: FP8 gradients are of first order") as raised:
        run() if name == "fp8_linear" else jax.eval_shape(run)
    advice = str(raised.value).split("derivatives use ")[1]
    assert where not in advice
    assert ("bf16_gemm_nt" if where == "fp8_linear" else "recipe='bf16'") in advice


@pytest.mark.parametrize("way", ["jvp", "hessian", "grad of grad"])
@pytest.mark.parametrize("name", ["bf16_gemm_nt", "grouped_linear", "expert_mlp", "moe_mlp"])
def test_the_advice_works(name: str, way: str) -> None:
    if (name, way) == ("moe_mlp", "jvp"):
        way = "jvp of grad"
    w = OPERANDS["w"]
    there = layers(recipe="bf16") | {
        "bf16_gemm_nt": lambda x: jax_deepgemm.bf16_gemm_nt(x.astype(w.dtype), w)
    }
    shapes = jax.jit(lambda: (FORWARD | SECOND)[way](there[name])).lower().out_info
    assert all(jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(shapes))


def test_first_order_under_transformations() -> None:
    """Marks of what may be differentiated change no number, in programs of any shape."""
    layer = loss(layers()["fp8_linear"])
    expected = jax.jit(jax.grad(layer))(X)
    for same in (
        lambda x: jax.grad(jax.checkpoint(layer))(x),
        lambda x: jax.vmap(jax.grad(layer))(x[None])[0],
        lambda x: jax.grad(lambda x: jnp.sum(jax.lax.map(layer, x[None])))(x),
        lambda x: jax.linear_transpose(jax.linearize(layer, X)[1], x)(jnp.float32(1))[0],
    ):
        assert bool(jnp.all(jax.jit(same)(X) == expected))
