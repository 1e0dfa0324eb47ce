"""How far layers in FP8 and BF16 are from float32: results and gradients, on any platform.

    python benchmarks/fp8_error.py            # measures, and prints the table of docs/fp8.md
    python benchmarks/fp8_error.py --write    # also writes benchmarks/data/fp8_error.json and the table

The numbers are those of a GPU but for the order of sums: FP8 operands are equal bit for bit.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jax_deepgemm import bf16_gemm_nt, fp8_linear
from jax_deepgemm.moe import ExpertForm, moe_mlp, route
from jax_deepgemm.tools.bench import report

ROOT = Path(__file__).parent.parent
DATA = ROOT / "benchmarks" / "data" / "fp8_error.json"
PAGE = ROOT / "docs" / "fp8.md"
SECTION = "fp8 error"

TOKENS, HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 256, 256, 256, 8, 2
SEEDS = 2
PARTS = ("y", "dx", "drouter", "dw13", "dw2")

Layer = tuple[jax.Array, jax.Array, jax.Array]
"""Router [experts, hidden], w13 [experts, 2 * intermediate, hidden], w2 [experts, hidden, intermediate]."""


def float32_moe(x: jax.Array, ids: jax.Array, weights: jax.Array, w13: jax.Array, w2: jax.Array) -> jax.Array:
    """All experts for all tokens, in float32."""
    gate, up = jnp.split(jnp.einsum("th,eih->tei", x, w13, precision="highest"), 2, axis=-1)
    y = jnp.einsum("tei,ehi->teh", jax.nn.silu(gate) * up, w2, precision="highest")
    share = jnp.einsum("tke,tk->te", jax.nn.one_hot(ids, EXPERTS), weights)
    return jnp.einsum("teh,te->th", y, share, precision="highest")


MOE = {
    "float32": float32_moe,
    "bf16": functools.partial(moe_mlp, recipe="bf16"),
    "fp8": functools.partial(moe_mlp, recipe="fp8"),
    "fp8, dw 128x128": functools.partial(moe_mlp, form=ExpertForm(weight_gradient="128x128")),
}
LINEAR = {
    "float32": lambda x, w: jnp.matmul(x, w.T, precision="highest"),
    "bf16": lambda x, w: bf16_gemm_nt(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)),
    "fp8": lambda x, w: fp8_linear(x.astype(jnp.bfloat16), w),
    "fp8, dw 128x128": lambda x, w: fp8_linear(x.astype(jnp.bfloat16), w, weight_gradient="128x128"),
}


def choose(logits: jax.Array, ids: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """The router's choice, or the weights of the experts given."""
    if ids is None:
        return route(logits, TOP_K, score="softmax")
    scores = jnp.take_along_axis(jax.nn.softmax(logits), ids, axis=-1)
    return ids, scores / scores.sum(axis=-1, keepdims=True)


def stack(
    recipe: str, layers: list[Layer], x: jax.Array, chosen: list[jax.Array] | None = None
) -> tuple[jax.Array, list[jax.Array]]:
    """Residual layers, a norm before each: the result, and the experts of each layer.

    The residual stream is float32, what enters a layer bfloat16. With `chosen`, tokens visit those experts.
    """
    visited = []
    for number, (router, w13, w2) in enumerate(layers):
        normed = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
        logits = jnp.matmul(normed, router.T, precision="highest")
        ids, weights = choose(logits, chosen[number] if chosen else None)
        entering = normed if recipe == "float32" else normed.astype(jnp.bfloat16)
        x = x + MOE[recipe](entering, ids, weights, w13, w2).astype(jnp.float32)
        visited.append(ids)
    return x, visited


def normal(key: jax.Array, *shape: int) -> jax.Array:
    """Of variance one over the last dimension."""
    return jax.random.normal(key, shape) / shape[-1] ** 0.5


def layer(key: jax.Array) -> Layer:
    router, w13, w2 = jax.random.split(key, 3)
    return (
        normal(router, EXPERTS, HIDDEN),
        normal(w13, EXPERTS, 2 * INTERMEDIATE, HIDDEN),
        normal(w2, EXPERTS, HIDDEN, INTERMEDIATE),
    )


def error(found: jax.Array, expected: jax.Array) -> float:
    """Norm of the difference over the norm."""
    return float(jnp.linalg.norm(found.astype(jnp.float32) - expected) / jnp.linalg.norm(expected))


def gradients(function: Any, weights: Any, x: jax.Array, dy: jax.Array) -> tuple[jax.Array, Any, jax.Array]:
    """y, and the gradients of weights and x of the sum of y * dy."""

    def loss(weights: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = function(weights, x).astype(jnp.float32)
        return jnp.sum(y * dy), y

    (_, y), (dweights, dx) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(weights, x)
    return y, dweights, dx


def compare_stacks(depth: int, recipe: str, seed: int, *, same_experts: bool) -> dict[str, float]:
    """Errors of the result, and of the gradients of the first layer, which pass through all others."""
    keys = jax.random.split(jax.random.key(seed), depth + 2)
    layers = [layer(key) for key in keys[2:]]
    x, dy = (jax.random.normal(key, (TOKENS, HIDDEN)) for key in keys[:2])
    chosen = stack("float32", layers, x)[1] if same_experts else None
    found, expected = (
        gradients(lambda w, x, name=name: stack(name, w, x, chosen)[0], layers, x, dy)
        for name in (recipe, "float32")
    )
    return {part: error(*pair) for part, pair in zip(PARTS, zip(_parts(found), _parts(expected)))}


def _parts(result: tuple[jax.Array, list[Layer], jax.Array]) -> tuple[jax.Array, ...]:
    y, layers, dx = result
    return y, dx, *layers[0]


def compare_linear(recipe: str, seed: int) -> dict[str, float]:
    keys = jax.random.split(jax.random.key(seed), 3)
    w = normal(keys[0], HIDDEN, HIDDEN)
    x, dy = (jax.random.normal(key, (TOKENS, HIDDEN)) for key in keys[1:])
    found, expected = (
        gradients(lambda w, x, f=LINEAR[name]: f(x, w), w, x, dy) for name in (recipe, "float32")
    )
    return {part: error(a, b) for part, a, b in zip(("y", "dw", "dx"), found, expected)}


CASES: dict[str, Callable[[str, int], dict[str, float]]] = {
    "linear": compare_linear,
    "MoE, 1 layer": functools.partial(compare_stacks, 1, same_experts=True),
    "MoE, 3 layers": functools.partial(compare_stacks, 3, same_experts=True),
    "MoE, 3 layers, each routed by itself": functools.partial(compare_stacks, 3, same_experts=False),
}


def measure() -> list[dict[str, Any]]:
    """A row for each case and recipe: the largest error of some seeds."""
    rows = []
    for name, compare in CASES.items():
        for recipe in (name for name in MOE if name != "float32"):
            seeds = [compare(recipe, seed) for seed in range(SEEDS)]
            worst = {part: round(max(found[part] for found in seeds), 4) for part in seeds[0]}
            rows.append({"what": name, "recipe": recipe, "errors": worst})
            print(name, recipe, worst, file=sys.stderr, flush=True)
    return rows


def table(content: dict[str, Any]) -> str:
    """Markdown of a measurement."""
    columns = ("y", "dx", "dw", "drouter", "dw13", "dw2")
    lines = [
        "| layer | recipe | " + " | ".join(columns) + " |",
        "|:--|:--|" + "--:|" * len(columns),
    ]
    for row in content["rows"]:
        cells = (f"{100 * row['errors'][c]:.2f} %" if c in row["errors"] else "" for c in columns)
        lines.append(f"| {row['what']} | {row['recipe']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def with_table(page: str, content: dict[str, Any]) -> str:
    """The page with its table made anew."""
    return report.replaced(page, SECTION, table(content))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--write", action="store_true", help=f"write {DATA.name} and the table of {PAGE.name}"
    )
    args = parser.parse_args()
    content = {
        "method": "Relative error (norm of the difference over the norm) against float32; the largest of "
        f"{SEEDS} seeds. {TOKENS} tokens, hidden {HIDDEN}, {EXPERTS} experts of intermediate {INTERMEDIATE}, "
        f"{TOP_K} for each token; gradients of the first layer, of a random sum of the results.",
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "rows": measure(),
    }
    print(table(content), end="")
    if args.write:
        DATA.write_text(json.dumps(content, indent=1) + "\n")
        PAGE.write_text(with_table(PAGE.read_text(), content))
    return 0


if __name__ == "__main__":
    sys.exit(main())
