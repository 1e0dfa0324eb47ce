"""examples/serve.py: its scheduler over a device of numpy, its models' names and sizes, and a tiny run."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_deepgemm import dequantize, quantize
from jax_deepgemm.checkpoint import save_safetensors

serve, engines, models = (
    importlib.import_module(name) for name in ("serve", "serving.engine", "serving.model")
)
VOCABULARY = 50


def successor(tokens: Any) -> int:
    """What follows a text: depends on every token and on its place."""
    weights = np.arange(1, len(tokens) + 1) ** 2
    return int(np.dot(weights, np.asarray(tokens, np.int64) + 1) % VOCABULARY)


class Device:
    """A step in numpy: the cache holds tokens themselves. It reads nothing that the batch does not name."""

    def __init__(self, sizes: Any) -> None:
        self.sizes, self.widths = sizes, []

    def __call__(self, cache: np.ndarray, made: np.ndarray, batch: Any) -> tuple[Any, Any, Any]:
        cache, out = cache.copy(), np.full(self.sizes.slots, -99)
        rows = int(batch.starts[-1])
        self.widths.append(rows)
        assert (batch.tokens[rows:] == -1).all()
        read: list[int] = []
        for slot, length in enumerate(batch.lens):
            start, end = batch.starts[slot : slot + 2]
            if start == end:
                continue
            new = np.where(batch.tokens[start:end] < 0, made[slot], batch.tokens[start:end])
            at = np.arange(length - len(new), length)
            size = self.sizes.page_size
            pages = batch.tables[slot, : -(-length // size)]
            assert (pages >= 0).all()
            read += pages.tolist()
            cache[batch.tables[slot, at // size], at % size] = new
            out[slot] = successor(cache[pages].reshape(-1)[:length])
        assert len(read) == len(set(read)), "two requests share a page"
        return cache, out, -out.astype(np.float64)


def requests_of(rng: np.random.Generator, sizes: Any, count: int) -> list[Any]:
    arrivals = np.sort(rng.integers(0, 40, count))
    prompts = rng.integers(1, sizes.longest - 1, count)
    return [
        engines.Request(
            int(arrival),
            rng.integers(0, VOCABULARY, prompt),
            int(rng.integers(1, sizes.longest - prompt + 1)),
        )
        for arrival, prompt in zip(arrivals, prompts, strict=True)
    ]


@pytest.mark.any_version
@pytest.mark.parametrize("seed", range(40))
def test_each_request_is_served_as_if_alone(seed: int) -> None:
    rng = np.random.default_rng(seed)
    page = int(rng.integers(1, 9))
    longest = int(rng.integers(10, 40))
    least = -(-longest // page)
    sizes = engines.Sizes(
        slots=int(rng.integers(1, 6)),
        chunk=int(rng.integers(1, 30)),
        longest=longest,
        pages=int(rng.integers(least, 2 * least + 1)),
        page_size=page,
    )
    requests, eos = requests_of(rng, sizes, 12), int(rng.integers(0, VOCABULARY))
    devices = {decode: Device(sizes) for decode in (True, False)}
    cache = np.full((sizes.pages, page), -7)
    engine = engines.Engine(devices, cache, np.zeros(sizes.slots, np.int32), sizes, eos)
    engine.run(requests)
    for request in requests:
        alone = request.prompt.tolist()
        while len(alone) < len(request.prompt) + request.limit and (
            len(alone) == len(request.prompt) or alone[-1] != eos
        ):
            alone.append(successor(alone))
        assert request.tokens == alone
        assert request.logits == [-float(token) for token in alone[len(request.prompt) :]]
    assert sorted(engine.free) == list(range(sizes.pages))
    assert sorted(engine.idle) == list(range(sizes.slots))
    assert engine.turns == len(requests) + engine.preempted
    assert max(devices[True].widths, default=0) <= sizes.slots
    assert max(devices[False].widths, default=0) <= sizes.slots + sizes.chunk


@pytest.mark.any_version
def test_the_youngest_gives_up_its_pages_and_the_oldest_never() -> None:
    sizes = engines.Sizes(slots=3, chunk=12, longest=16, pages=8, page_size=2)
    requests = [engines.Request(0, np.full(3, i), 12) for i in range(3)]
    devices = dict.fromkeys((True, False), Device(sizes))
    engine = engines.Engine(devices, np.zeros((8, 2), int), np.zeros(3, np.int32), sizes, eos=-1)
    lost: list[int] = []
    give_up = engine.preempt
    engine.preempt = lambda request: (lost.append(requests.index(request)), give_up(request))
    engine.run(requests)
    assert lost[0] == 2
    assert 0 not in lost
    assert engine.preempted == len(lost) > 1
    assert all(len(request.logits) == 12 for request in requests)


@pytest.mark.any_version
@pytest.mark.parametrize(("prompt", "limit"), [(0, 4), (4, 0), (10, 7)])
def test_a_request_without_room_is_refused(prompt: int, limit: int) -> None:
    sizes = engines.Sizes(slots=1, chunk=4, longest=16, pages=8, page_size=2)
    engine = engines.Engine({}, None, None, sizes, eos=0)
    with pytest.raises(
        ValueError, match=f"a request of {prompt} to {prompt + limit} tokens, need 1, then more"
    ):
        engine.run([engines.Request(0, np.ones(prompt, int), limit)])


def test_a_checkpoint_of_qwen3_moe(tmp_path: Path) -> None:
    """Gate and up, and queries, keys and values, are one; the tree is that of random weights."""
    want = models.Config(heads=4, kv_heads=4, head_dim=32, layers=1, experts=3, theta=1e6, eos=7)
    fields = {"vocab_size": 256, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    fields |= {"num_key_value_heads": 4, "head_dim": 32, "rope_theta": 1e6, "num_experts": 3}
    fields |= {"num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True}
    fields |= {"rms_norm_eps": 1e-6, "eos_token_id": [7, 8]}
    (tmp_path / "config.json").write_text(json.dumps(fields | {"model_type": "qwen3_moe"}))
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)

    at = "model.layers.0"
    plain = {"model.embed_tokens": (256, 128), "lm_head": (256, 128), "model.norm": (128,)}
    plain |= {f"{at}.input_layernorm": (128,), f"{at}.post_attention_layernorm": (128,)}
    plain |= {f"{at}.self_attn.{name}_norm": (32,) for name in "qk"} | {f"{at}.mlp.gate": (3, 128)}
    products = [f"{at}.self_attn.{name}_proj" for name in "qkvo"]
    products += [f"{at}.mlp.experts.{e}.{name}_proj" for e in range(3) for name in ("gate", "up", "down")]
    tensors: dict[str, Any] = {f"{name}.weight": draw(*shape) for name, shape in plain.items()}
    tensors |= {f"{name}.weight": quantize(draw(128, 128), (128, 128)) for name in products}
    save_safetensors(tmp_path / "model.safetensors", tensors)

    config, params = models.load_weights(tmp_path, range(1))
    assert dataclasses.replace(config, router=want.router) == want
    assert dict(config.router) == {"renormalize": True}
    drawn = jax.eval_shape(lambda: models.draw_weights(want, 0))
    assert jax.tree.structure(params) == jax.tree.structure(drawn)
    found, want_all = ([(x.shape, x.dtype) for x in jax.tree.leaves(tree)] for tree in (params, drawn))
    assert found == want_all

    def joined(*names: str) -> np.ndarray:
        return np.concatenate([np.asarray(dequantize(tensors[f"{at}.{name}.weight"])) for name in names])

    layer = params["layers"][0]
    got = np.asarray(dequantize(layer["attention"]["qkv"]))
    np.testing.assert_array_equal(got, joined(*(f"self_attn.{name}_proj" for name in "qkv")))
    got = np.asarray(dequantize(layer["mlp"]["w13"]))[2]
    np.testing.assert_array_equal(got, joined("mlp.experts.2.gate_proj", "mlp.experts.2.up_proj"))
    np.testing.assert_array_equal(params["head"], tensors["lm_head.weight"])


def test_other_checkpoints_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="model_type is 'llama', need 'qwen3_moe'"):
        models.load_weights(tmp_path)


@pytest.mark.any_version
def test_bytes_of_a_step_are_those_of_the_layers_weights() -> None:
    """Qwen3-30B-A3B, from its card: of 128 experts of 3 x 768 x 2048 numbers a token has 8."""
    config = models.QWEN3_MOE
    params = jax.eval_shape(lambda: models.draw_weights(config, 0))
    expert, scales = 3 * 768 * 2048, 3 * 6 * 16 * 4
    attention = 2048 * 128 * (2 * 32 + 2 * 4)
    router, norms = 2 * 128 * 2048, 2 * (2 * 2048 + 2 * 128)
    attention += 4 * attention // 128**2
    head = 2 * (151936 * 2048 + 2048)
    rest = config.layers * (attention + router + norms) + head
    one = models.weight_bytes(config, params, 1) - rest
    assert math.isclose(one, config.layers * 8 * (expert + scales))
    many = models.weight_bytes(config, params, 10_000) - rest
    assert math.isclose(many, config.layers * 128 * (expert + scales))


@pytest.mark.any_version
@pytest.mark.slow
def test_a_tiny_model_is_served_and_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert serve.main(["--config", "tiny-deepseek", "--layers", "1", "--requests", "6", "--pages", "8"]) == 0
    said = capsys.readouterr().out
    assert "PASS: the decode step makes 0 copies of the cache" in said
    same, total = map(int, re.findall(r"(\d+) of (\d+) logits of 6 requests have the same bits", said)[0])
    assert same == total > 50
    assert "tokens equal full recomputation's" in said
    assert ", 0 preempted" not in said
    assert "floor 0." in said
