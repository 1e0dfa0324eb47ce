"""Experts with MXFP4 weights, as gpt-oss and DeepSeek-V4 have them: how far BF16, FP8 and FP4 are from
float32.

    python examples/fp4_experts.py                  # small shapes, on any platform
    python examples/fp4_experts.py --size full      # the models' shapes, for a GPU, with times of a call

Weights are random. "of the masters" is the error beside float32 weights that each recipe rounds for itself;
"of the checkpoint" is beside the numbers of the FP4 weights, in float32: what a model that was trained in FP4
means. There BF16 and FP8 take these numbers too.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_deepgemm import quantize
from jax_deepgemm.activation import GPT_OSS, Activation
from jax_deepgemm.moe import ExpertForm, moe_mlp, moe_mlp_decode, prepare_weights, route
from jax_deepgemm.quantization import Fp4Array, dequantize_fp4, expand_fp4

V4 = ExpertForm(Activation(limit=10.0), scale_format="ue8m0")
MODELS = {
    "gpt-oss": (ExpertForm(GPT_OSS), True, {"small": (8, 2, 192, 192), "full": (128, 4, 2880, 2880)}),
    "DeepSeek-V4": (V4, False, {"small": (8, 2, 256, 128), "full": (64, 6, 4096, 2048)}),
}
"""Form, whether there are biases, and sizes: experts, of these for a token, hidden, intermediate."""
TOKENS = {"small": 48, "full": 64}
REPEATS = 20

Weights = tuple[Any, Any]


def masters(experts: int, hidden: int, intermediate: int) -> Weights:
    """Random float32 weights w13 [e, 2 * i, h] and w2 [e, h, i]."""
    keys = jax.random.split(jax.random.key(0))
    w13 = jax.random.normal(keys[0], (experts, 2 * intermediate, hidden)) / hidden**0.5
    return w13, jax.random.normal(keys[1], (experts, hidden, intermediate)) / intermediate**0.5


def in_fp4(w: jax.Array) -> Fp4Array:
    """MXFP4, as a checkpoint has it."""
    small: Any = quantize(w, (1, 32), jnp.float4_e2m1fn)
    return small


def float32_experts(
    form: ExpertForm, x: jax.Array, ids: Any, weights: Any, w13: Any, w2: Any, **bias: Any
) -> Any:
    """Each token's experts in float32, one slot after the other."""
    limit, act = form.act.limit, form.act
    y = jnp.zeros(x.shape, jnp.float32)
    product = functools.partial(jnp.einsum, precision="highest")
    for slot in range(ids.shape[1]):
        chosen = ids[:, slot]
        h = jax.lax.map(lambda one: product("h,nh->n", one[0], w13[one[1]]), (x.astype(jnp.float32), chosen))
        h = h + bias["b13"][chosen] if bias else h
        gate, up = (h[:, ::2], h[:, 1::2]) if act.interleaved else jnp.split(h, 2, axis=1)
        if limit is not None:
            gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        a = gate * jax.nn.sigmoid(act.alpha * gate) * (up + act.shift)
        out = jax.lax.map(lambda one: product("i,hi->h", one[0], w2[one[1]]), (a, chosen))
        y = y + weights[:, slot, None] * (out + bias["b2"][chosen] if bias else out)
    return y


def error(y: jax.Array, exact: jax.Array) -> float:
    """The distance from float32, relative to its length."""
    return float(jnp.linalg.norm(y.astype(jnp.float32) - exact) / jnp.linalg.norm(exact))


def microseconds(layer: Callable[..., jax.Array], *operands: Any) -> float:
    """Wall time of a call, the others queued behind it."""
    layer(*operands).block_until_ready()
    start = time.perf_counter()
    for _ in range(REPEATS):
        y = layer(*operands)
    y.block_until_ready()
    return (time.perf_counter() - start) / REPEATS * 1e6


def measure(name: str, size: str) -> list[str]:
    """Lines of the table of one model."""
    form, biased, sizes = MODELS[name]
    experts, top_k, hidden, intermediate = sizes[size]
    keys = jax.random.split(jax.random.key(1), 4)
    x = jax.random.normal(keys[0], (TOKENS[size], hidden), jnp.bfloat16)
    ids, weights = route(jax.random.normal(keys[1], (TOKENS[size], experts)), top_k)
    shapes = {"b13": (experts, 2 * intermediate), "b2": (experts, hidden)}
    bias = {what: jax.random.normal(keys[2], shapes[what]) for what in shapes if biased}
    w = masters(experts, hidden, intermediate)
    small = tuple(map(in_fp4, w))
    prepared = jax.block_until_ready(prepare_weights(*small))
    numbers = tuple(dequantize_fp4(one) for one in small)
    reference = functools.partial(float32_experts, form, x, ids, weights, **bias)
    of_masters, of_checkpoint = jax.jit(reference)(*w), jax.jit(reference)(*numbers)
    ways: dict[str, tuple[str, Weights, Weights]] = {
        "BF16": ("bf16", _rounded(w), _rounded(numbers)),
        "FP8": ("fp8", tuple(quantize(one, (128, 128)) for one in w), tuple(map(expand_fp4, small))),
        "FP4": ("fp8", prepared, prepared),
    }
    lines = []
    for way, (recipe, own, given) in ways.items():
        run = jax.jit(functools.partial(moe_mlp, form=form, recipe=recipe, **bias))
        errors = [error(run(x, ids, weights, *own), of_masters)]
        errors += [error(run(x, ids, weights, *given), of_checkpoint)]
        times = []
        if size == "full":
            decode = jax.jit(functools.partial(moe_mlp_decode, form=form, recipe=recipe, **bias))
            times = [microseconds(one, x, ids, weights, *given) for one in (run, decode)]
        shown = " | ".join(f"{100 * one:.2f} %" for one in errors) + "".join(f" | {one:.0f}" for one in times)
        lines.append(f"| {name} | {way} | {shown} |")
    return lines


def _rounded(w: Weights) -> Weights:
    return w[0].astype(jnp.bfloat16), w[1].astype(jnp.bfloat16)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=tuple(TOKENS), default="small", help="of the models' shapes")
    size = parser.parse_args().size
    timed = " | moe_mlp us | moe_mlp_decode us" if size == "full" else ""
    print(f"| model | recipe | of the masters | of the checkpoint{timed} |")
    print("|:--|:--|--:|--:|" + "--:|--:|" * bool(timed))
    for name in MODELS:
        print("\n".join(measure(name, size)), flush=True)


if __name__ == "__main__":
    main()
