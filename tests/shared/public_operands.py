"""Small operands, by name, for a call of every public function (public_calls.py)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from jax_deepgemm.ops import quantize as quantization
from jax_deepgemm.quantization import QuantizedArray

PER_ROW, BLOCKED, PER_COLUMN = (1, 128), (128, 128), (128, 1)
TOKENS, HIDDEN, WIDTH, EXPERTS, TOP_K = 6, 256, 128, 4, 2


@functools.cache
def mesh_of_two() -> Mesh:
    kinds = (AxisType.Auto,) * 2
    return jax.make_mesh((2, 1), ("expert", "tensor"), axis_types=kinds, devices=jax.devices()[:2])


@functools.cache
def operands() -> dict[str, Any]:
    """Numbers without NaN and infinities, on the device before any setting holds."""
    rng = np.random.default_rng(0)

    def normal(*shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)

    def quantized(block: tuple[int, int], *shape: int) -> QuantizedArray:
        scales = rng.uniform(0.5, 2, quantization.scales_shape(shape, block))
        values = normal(*shape, dtype=jnp.float8_e4m3fn)
        return QuantizedArray(values, jnp.asarray(scales, jnp.float32), block)

    def integers(*values: Any) -> jax.Array:
        return jnp.asarray(values, jnp.int32)

    scores = rng.uniform(0.2, 0.8, (TOKENS, EXPERTS))
    ids = np.argsort(-scores, axis=1)[:, :TOP_K]
    return {
        "x": normal(TOKENS, HIDDEN),
        "x_f32": normal(TOKENS, HIDDEN, dtype=jnp.float32),
        "x_t": normal(HIDDEN, TOKENS),
        "w": normal(WIDTH, HIDDEN),
        "w_t": normal(HIDDEN, WIDTH),
        "w_f32": normal(WIDTH, HIDDEN, dtype=jnp.float32),
        "c": normal(TOKENS, WIDTH),
        "heads": normal(TOKENS, 3, HIDDEN),
        "q_heads": quantized(PER_ROW, TOKENS, 3, HIDDEN),
        "c_heads": normal(TOKENS, 3, WIDTH),
        "xs": normal(3, TOKENS, HIDDEN),
        "ws": normal(3, WIDTH, HIDDEN),
        "ws_t": normal(3, HIDDEN, WIDTH),
        "ws_f32": normal(3, WIDTH, HIDDEN, dtype=jnp.float32),
        "w13": normal(EXPERTS, 2 * WIDTH, HIDDEN, dtype=jnp.float32),
        "w2": normal(EXPERTS, HIDDEN, WIDTH, dtype=jnp.float32),
        "q_w13": quantized(BLOCKED, EXPERTS, 2 * WIDTH, HIDDEN),
        "q_w2": quantized(BLOCKED, EXPERTS, HIDDEN, WIDTH),
        "q_x": quantized(PER_ROW, TOKENS, HIDDEN),
        "q_x_t": quantized(PER_COLUMN, HIDDEN, TOKENS),
        "q_w": quantized(BLOCKED, WIDTH, HIDDEN),
        "q_w_t": quantized(BLOCKED, HIDDEN, WIDTH),
        "q_w_rows": quantized(PER_ROW, WIDTH, HIDDEN),
        "q_xs": quantized(PER_ROW, 3, TOKENS, HIDDEN),
        "q_ws": quantized(BLOCKED, 3, WIDTH, HIDDEN),
        "q_ws_t": quantized(BLOCKED, 3, HIDDEN, WIDTH),
        "q_w_columns": quantized(PER_COLUMN, HIDDEN, WIDTH),
        "sizes": integers(2, 0, 3),
        "long_sizes": integers(100, 0, 130),
        "indices": integers(0, 0, 2, 2, 2, -1),
        "ends": integers(2, 4, 6),
        "rows": integers(5, 0, 0, 6, 3),
        "k_rows": integers(200, 0, -1, 7, 7, 256),
        "counts": integers(1, 0, 6),
        "ids": jnp.asarray(ids, jnp.int32),
        "weights": jnp.asarray(np.take_along_axis(scores, ids, 1), jnp.float32),
        "logits": normal(TOKENS, EXPERTS, dtype=jnp.float32),
        "bias": normal(EXPERTS, dtype=jnp.float32),
        "hidden_bias": normal(HIDDEN, dtype=jnp.float32),
        "group_bias": normal(3, WIDTH, dtype=jnp.float32),
        "column_bias": normal(WIDTH, dtype=jnp.float32),
        "expert_sizes": integers(3, 0, 2, 1),
        "row_weights": jnp.asarray(rng.uniform(0.5, 1, TOKENS), jnp.float32),
        "dact": normal(TOKENS, HIDDEN // 2),
        "scales": jnp.asarray(rng.uniform(0.5, 2, (TOKENS, 4)), jnp.float32),
        "powers": jnp.asarray(2.0 ** rng.integers(-3, 3, (TOKENS, 4)), jnp.float32),
        "ks": integers(128, 640),
        "words": jnp.asarray(rng.integers(1, 254, (TOKENS, 4)) * 0x01010101, jnp.int32),
        "w13_t": normal(EXPERTS, HIDDEN, 2 * WIDTH, dtype=jnp.float32),
        "w2_t": normal(EXPERTS, WIDTH, HIDDEN, dtype=jnp.float32),
        "w13_half": normal(EXPERTS, WIDTH, HIDDEN, dtype=jnp.float32),
        "ws_t_f32": normal(3, HIDDEN, WIDTH, dtype=jnp.float32),
        "b13": normal(EXPERTS, 2 * WIDTH, dtype=jnp.float32),
        "b2": normal(EXPERTS, HIDDEN, dtype=jnp.float32),
        "gate": normal(HIDDEN, dtype=jnp.float32),
        "queries": normal(TOKENS, 2, 32),
        "keys": normal(9, 32),
        "pages": normal(2, 16, 32, dtype=jnp.float8_e4m3fn),
        "page_scales": jnp.asarray(rng.uniform(0.5, 2, (2, 16)), jnp.float32),
        "q_keys": quantized(PER_ROW, 9, 32),
        "head_weights": normal(TOKENS, 2, dtype=jnp.float32),
        "hc_weight": normal(8, 64, dtype=jnp.float32),
        "hc_scale": jnp.asarray([0.1, 0.2, 0.3], jnp.float32),
        "hc_bias": normal(8, dtype=jnp.float32),
        "k_start": integers(*(0,) * TOKENS),
        "k_end": integers(*(9,) * TOKENS),
    }  # fmt: skip
