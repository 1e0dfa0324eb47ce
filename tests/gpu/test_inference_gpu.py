"""jax_deepgemm.inference on a GPU: cuDNN's attention, weights in bytes, every DeepSpeed name against float64.

Run: pytest -m gpu tests/gpu/test_inference_gpu.py        (about 30 s)
"""

from __future__ import annotations

from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from jax_deepgemm import inference
from tests.inference import test_deepspeed_names as deepspeed
from tests.inference import test_fastgen_names as fastgen
from tests.inference import test_functions as functions
from tests.shared import inference_oracle as oracle
from tests.shared.inference_oracle import close, drawn, visible, wide

BF16 = ml_dtypes.bfloat16
LENS = np.array([70, 7, 0], np.int32)
ATTENTION: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "causal": ((3, 70, 8, 2, 70, 64), {"causal": True}),
    "window": ((2, 130, 2, 2, 130, 128), {"causal": True, "window": 33}),
    "lens": ((3, 33, 8, 8, 70, 80), {"kv_lens": LENS}),
    "causal lens": ((3, 70, 4, 1, 70, 128), {"causal": True, "kv_lens": LENS}),
    "wide": ((1, 20, 2, 1, 20, 256), {"scale": 0.1}),
}
"""[batch, queries, heads, kv heads, keys, d]."""


@pytest.mark.parametrize("impl", ["cudnn", "xla", "auto"])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name: str, impl: str) -> None:
    (b, s, h, kv, length, d), options = ATTENTION[name]
    q, k, v = drawn(0, b, s, h, d, dtype=BF16), *(drawn(i, b, length, kv, d, dtype=BF16) for i in (1, 2))
    run = jax.jit(lambda q, k, v: inference.attention(q, k, v, impl=impl, **options)).lower(q, k, v).compile()
    assert ("__cudnn$fmha" in run.as_text()) == (impl != "xla")
    form = {name: value for name, value in options.items() if name in ("causal", "window")}
    ends = options.get("kv_lens", [None] * b)
    seen = np.stack([visible(s, length, end=end, **form) for end in ends])[:, None]
    want = oracle.attention(wide(q), wide(k), wide(v), seen, scale=options.get("scale"))
    close(run(q, k, v), want, 2)


@pytest.mark.parametrize("m", [pytest.param(1, marks=pytest.mark.smoke), 17, 64, 300])
def test_int8_is_read_as_it_is_stored(m: int) -> None:
    x, w = drawn(3, m, 512, dtype=BF16), inference.quantize(drawn(4, 512, 272))
    run = jax.jit(inference.linear).lower(x, w).compile()
    assert "jax_deepgemm" in run.as_text()
    close(run(x, w), wide(x) @ wide(inference.dequantize(w)), 1)


@pytest.mark.parametrize("name", deepspeed.CASES)
def test_deepspeed_name(name: str) -> None:
    deepspeed.test_values(name)


@pytest.mark.parametrize("name", fastgen.CASES)
def test_fastgen_name(name: str) -> None:
    fastgen.test_values(name)


def test_fastgen_chains() -> None:
    fastgen.test_experts()
    fastgen.test_pages_and_attention()


@pytest.mark.parametrize("name", functions.CASES)
def test_function(name: str) -> None:
    functions.test_values(name)


@pytest.mark.parametrize(
    ("end", "d", "alibi"), [("bf16", 64, False), ("fp16", 128, False), ("fp32", 8, True)]
)
def test_a_prompt_and_steps_are_one_pass(end: str, d: int, alibi: bool) -> None:
    deepspeed.test_a_prompt_and_steps_are_one_pass(end, d, alibi)
