"""What scales cost a weight gradient, dw = dyT x in FP8: by what shares one, and by how numbers are spread.

    python benchmarks/weight_gradient_error.py            # measures, and prints the table of docs/fp8.md
    python benchmarks/weight_gradient_error.py --write    # also writes the data file and the table

Errors are those of the operands alone: products and sums are float32. "1x128" is the recipe of DeepSeek-V3,
a scale for each feature and 128 tokens in both operands; the others have one for 128 tokens and 128 features
in x (weight_gradient="128x128"), in dy, or in both (no kernel does that).
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

from jax_deepgemm import dequantize, quantize
from jax_deepgemm.tools.bench import report

ROOT = Path(__file__).parent.parent
DATA = ROOT / "benchmarks" / "data" / "weight_gradient_error.json"
PAGE = ROOT / "docs" / "fp8.md"
SECTION = "weight gradient error"

TOKENS, FEATURES = 1024, 512
COLUMN, SQUARE = (128, 1), (128, 128)
WAYS = {
    "1x128": (COLUMN, COLUMN),
    "x 128x128": (COLUMN, SQUARE),
    "dy 128x128": (SQUARE, COLUMN),
    "both 128x128": (SQUARE, SQUARE),
}
"""Blocks of dy and of x."""

Spread = Callable[[jax.Array], jax.Array]
"""A key -> factors of [tokens, features]."""


def ones(key: jax.Array) -> jax.Array:
    return jnp.ones((1, 1))


def few_features(size: float, key: jax.Array) -> jax.Array:
    """One feature of 64 is so many times larger, for all tokens: outlier channels."""
    return jnp.where(jax.random.uniform(key, (1, FEATURES)) < 1 / 64, size, 1.0)


def few_tokens(size: float, key: jax.Array) -> jax.Array:
    """One token of 64 is so many times larger, in all features."""
    return jnp.where(jax.random.uniform(key, (TOKENS, 1)) < 1 / 64, size, 1.0)


def few_numbers(size: float, key: jax.Array) -> jax.Array:
    """One number of 4096 is so many times larger: massive activations."""
    return jnp.where(jax.random.uniform(key, (TOKENS, FEATURES)) < 1 / 4096, size, 1.0)


def lognormal(key: jax.Array) -> jax.Array:
    """Every feature and every token has a magnitude of its own."""
    one, other = jax.random.split(key)
    return jnp.exp(1.5 * (jax.random.normal(one, (1, FEATURES)) + jax.random.normal(other, (TOKENS, 1))))


def cauchy(key: jax.Array) -> jax.Array:
    """Tails so heavy that there is no variance."""
    return 1 / jnp.maximum(jnp.abs(jax.random.normal(key, (TOKENS, FEATURES))), 1e-4)


SPREADS: dict[str, Spread] = {
    "normal": ones,
    "1 feature of 64 is 100 times larger": functools.partial(few_features, 1e2),
    "1 feature of 64 is 10,000 times larger": functools.partial(few_features, 1e4),
    "1 feature of 64 is 1,000,000 times larger": functools.partial(few_features, 1e6),
    "1 token of 64 is 10,000 times larger": functools.partial(few_tokens, 1e4),
    "1 number of 4096 is 10,000 times larger": functools.partial(few_numbers, 1e4),
    "lognormal features and tokens": lognormal,
    "Cauchy": cauchy,
}


@functools.partial(jax.jit, static_argnums=(0, 1))
def errors(of_dy: Spread, of_x: Spread, key: jax.Array) -> dict[str, jax.Array]:
    """Relative errors of dw of each way: of its columns, or rows, each beside its own norm, so that small
    features count as much as large ones; the larger of both medians."""
    keys = jax.random.split(key, 4)
    dy, x = (
        (jax.random.normal(k, (TOKENS, FEATURES)) * spread(s)).astype(jnp.bfloat16)
        for k, spread, s in ((keys[0], of_dy, keys[1]), (keys[2], of_x, keys[3]))
    )
    product = functools.partial(jnp.einsum, "tn,tk->nk", precision="highest")
    want = product(dy.astype(jnp.float32), x.astype(jnp.float32))
    found = {}
    for way, blocks in WAYS.items():
        dw = product(*(dequantize(quantize(one, block)) for one, block in zip((dy, x), blocks)))
        of = (jnp.linalg.norm(dw - want, axis=i) / jnp.linalg.norm(want, axis=i) for i in (0, 1))
        found[way] = functools.reduce(jnp.maximum, map(jnp.median, of))
    return found


def measure() -> list[dict[str, Any]]:
    """A row for each spread, of x and of dy."""
    rows = []
    for name, spread in SPREADS.items():
        for where, pair in (("x", (ones, spread)), ("dy", (spread, ones))):
            if spread is ones and where == "dy":
                continue
            found = {way: round(float(e), 4) for way, e in errors(*pair, jax.random.key(0)).items()}
            rows.append({"spread": name, "of": where if spread is not ones else "both", "errors": found})
            print(name, where, found, file=sys.stderr, flush=True)
    return rows


def table(content: dict[str, Any]) -> str:
    """Markdown of a measurement."""
    lines = ["| numbers | of | " + " | ".join(WAYS) + " |", "|:--|:--|" + "--:|" * len(WAYS)]
    for row in content["rows"]:
        cells = (f"{100 * row['errors'][way]:.1f} %" for way in WAYS)
        lines.append(f"| {row['spread']} | {row['of']} | " + " | ".join(cells) + " |")
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
        "method": "Relative error of a column or a row of dw against float32: the larger of their medians. "
        f"{TOKENS} tokens, {FEATURES} features of x and of dy.",
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
