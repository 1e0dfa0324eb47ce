"""Layers of experts as one chain of launches on a GPU: bit for bit the ops in a row.

A kernel that read too early would read what the call before left in the same memory, so inputs change from
call to call.

Run: pytest -m gpu tests/gpu/test_experts_gpu.py        (about a minute, kernels compiled anew)
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_deepgemm.core import launch
from jax_deepgemm.moe import layer, moe_mlp
from jax_deepgemm.ops.experts.api import experts_swiglu, fits
from jax_deepgemm.ops.experts.family import ExpertsProblem
from jax_deepgemm.quantization import QuantizedArray
from tests.shared.gpu_programs import program
from tests.shared.moe_oracle import normal, random_ids

BF16, F32 = jnp.bfloat16, jnp.float32
# tokens, top_k, hidden, inner, experts: one token; k of whole quads and not; more tiles than SMs; the most
# copies; one expert; more experts than rows; rows of several tiles.
SHAPES = (
    (1, 8, 2048, 768, 64),
    (1, 1, 512, 128, 1),
    (3, 5, 512, 384, 300),
    (16, 8, 2048, 768, 32),
    (33, 3, 1536, 640, 7),
    (64, 8, 1024, 768, 64),
    (256, 8, 1024, 256, 64),
    (60, 2, 512, 128, 2),
)


def kernels() -> Iterator[ExpertsProblem]:
    for tokens, slots, hidden, inner, experts in SHAPES:
        expected = max(1, -(-tokens * slots // experts))
        yield ExpertsProblem(tokens, slots, hidden, inner, experts, min(expected, tokens * slots))


@functools.cache
def frozen(hidden: int, inner: int, experts: int) -> tuple[Any, Any]:
    """Any finite numbers of FP8, drawn where they are used."""

    def drawn(key: jax.Array, *shape: int) -> QuantizedArray:
        bits = jax.random.bits(key, shape, jnp.uint8) & 0xB7
        scales = jax.random.uniform(key, (shape[0], shape[1] // 128, shape[2] // 128), F32, 0.01, 0.03)
        return QuantizedArray(jax.lax.bitcast_convert_type(bits, jnp.float8_e4m3fn), scales, (128, 128))

    first, second = jax.random.split(jax.random.key(0))
    both = lambda: (drawn(first, experts, 2 * inner, hidden), drawn(second, experts, hidden, inner))  # noqa: E731
    return program(both)()


@pytest.fixture(autouse=True)
def _ops_in_a_row(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The layer is not a chain unless a test says so."""
    monkeypatch.setattr(layer, "MOST_CHAINED", 0)
    yield
    jax.clear_caches()


def tokens_of(seed: int, tokens: int, top_k: int, hidden: int, experts: int, **ids: Any) -> tuple[Any, ...]:
    """NaN as the weights of dropped copies."""
    chosen = random_ids(seed, tokens, top_k, experts, **ids)
    weights = jax.nn.softmax(normal(seed + 1, tokens, top_k, dtype=F32))
    return normal(seed + 2, tokens, hidden), chosen, jnp.where(chosen >= 0, weights, jnp.nan)


def expected_m(tokens: int, top_k: int, experts: int) -> int:
    return max(-(-tokens * top_k // experts), 1)


def assert_same(got: Any, want: Any) -> None:
    got, want = (np.asarray(z.astype(F32)).view(np.uint32) for z in (got, want))
    wrong = np.argwhere(got != want)
    assert not len(wrong), f"{len(wrong)} of {got.size} differ, first at {wrong[:5].tolist()}"


@pytest.mark.smoke
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_of_the_ops_in_a_row(shape):
    tokens, top_k, hidden, inner, experts = shape
    weights = frozen(hidden, inner, experts)
    hint = expected_m(tokens, top_k, experts)
    one = program(lambda x, ids, w: experts_swiglu(x, ids, w, *weights, expected_m=hint))
    other = program(lambda x, ids, w: moe_mlp(x, ids, w, *weights))
    for seed in range(20):
        given = tokens_of(10 * seed, tokens, top_k, hidden, experts, dropped=(0.0, 0.3, 1.0, 0.05)[seed % 4])
        assert fits(*given[:2], *weights)
        assert_same(one(*given), other(*given))


@pytest.mark.parametrize("sms", [1, 3, 131])
def test_few_sms(sms):
    """Kernels of the chain run side by side on SMs that the one before does not use."""
    tokens, top_k, hidden, inner, experts = 33, 3, 1536, 640, 7
    weights = frozen(hidden, inner, experts)
    options = {"num_sms": sms, "expected_m": expected_m(tokens, top_k, experts)}
    one = program(lambda x, ids, w: experts_swiglu(x, ids, w, *weights, **options))
    other = program(lambda x, ids, w: moe_mlp(x, ids, w, *weights, **options))
    for seed in range(10):
        given = tokens_of(seed, tokens, top_k, hidden, experts, dropped=0.1)
        assert_same(one(*given), other(*given))


def test_one_expert_has_all_rows_and_float32():
    tokens, top_k, hidden, inner, experts = 60, 2, 512, 128, 2
    weights = frozen(hidden, inner, experts)
    x, _, w = tokens_of(0, tokens, top_k, hidden, experts)
    hint = expected_m(tokens, top_k, experts)
    one = program(lambda x, ids, w: experts_swiglu(x, ids, w, *weights, expected_m=hint))
    other = program(lambda x, ids, w: moe_mlp(x, ids, w, *weights))
    for expert in range(experts):
        ids = jnp.full((tokens, top_k), expert, jnp.int32)
        for y in (x, x.astype(F32)):
            assert_same(one(y, ids, w), other(y, ids, w))


@pytest.mark.smoke
def test_a_program_of_layers_in_command_buffers(monkeypatch):
    """Six layers, each reading what the one before gave, captured; the same program with other buffers, 30
    times."""
    tokens, top_k, hidden, inner, experts = 16, 8, 2048, 768, 32
    weights = frozen(hidden, inner, experts)

    def six(x: Any, ids: Any, w: Any) -> Any:
        for _ in range(6):
            x = moe_mlp(x, ids, w, *weights) * jnp.asarray(0.5, BF16)
        return x

    plain = program(lambda *given: six(*given))
    keep = [tokens_of(3 * seed, tokens, top_k, hidden, experts, dropped=0.1) for seed in range(15)]
    want = [plain(*given) for given in keep]
    monkeypatch.setattr(layer, "MOST_CHAINED", 2048)
    jax.clear_caches()
    step = program(lambda *given: six(*given))
    assert step.lower(*keep[0]).as_text().count("_swiglu_chained@") == 6
    step(*keep[0]).block_until_ready()
    launch.native().reset_execute_counters()
    for _ in range(2):
        for given, right in zip(keep, want, strict=True):
            assert_same(step(*given), right)
    count = launch.native().execute_count()
    print(f"\n180 layers: the handler ran {count} times")


def test_a_loop_of_layers(monkeypatch):
    """A body of a loop, captured or not: launches on a stream follow each other too."""
    tokens, top_k, hidden, inner, experts = 3, 5, 512, 384, 300
    weights = frozen(hidden, inner, experts)
    x, ids, w = tokens_of(0, tokens, top_k, hidden, experts)

    def run(x: Any) -> Any:
        return jax.lax.scan(lambda x, _: (moe_mlp(x, ids, w, *weights), None), x, length=50)[0]

    want = program(lambda x: run(x))(x)
    monkeypatch.setattr(layer, "MOST_CHAINED", 2048)
    jax.clear_caches()
    step = program(lambda x: run(x))
    for _ in range(5):
        assert_same(step(x), want)
