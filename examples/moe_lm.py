"""A small mixture-of-experts language model in the style of DeepSeek-V3, and text to train it on.

Shared by train_moe_lm.py and decode_moe.py. Tokens are bytes; the text is the source code of Python's own
standard library, so nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jax_deepgemm.flax import Linear, Load, MoE
from jax_deepgemm.moe import ExpertForm

VOCABULARY = 256
ATTENTIONS = ("xla", "cudnn")


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the model and of a training run.

    Attributes:
      hidden: width of the residual stream.
      layers: number of blocks, each attention and a mixture of experts.
      heads, head_dim: of the attention.
      experts, top_k: how many experts a layer has, and how many a token visits.
      intermediate: width of one expert; also of the shared expert, which every token visits.
      context: tokens of a sequence.
      batch: sequences of a step, over all devices.
      steps: optimizer steps.
      learning_rate: of AdamW, after `warmup` steps; it falls to a tenth along a cosine.
      attention: "xla", or "cudnn" on GPUs, which keeps no scores in memory.
      bias_rate: how fast the router's bias moves against the load of an expert, per step.
      method, capacity_factor: how tokens travel to experts of other devices, as `expert_parallel_moe` says.
    """

    hidden: int
    layers: int
    heads: int
    head_dim: int
    experts: int
    top_k: int
    intermediate: int
    context: int
    batch: int
    steps: int
    learning_rate: float
    warmup: int
    bias_rate: float = 1e-3
    attention: str = "xla"
    method: str = "all_to_all"
    capacity_factor: float | None = None


CONFIGS = {
    "tiny": Config(
        hidden=128,
        layers=2,
        heads=4,
        head_dim=32,
        experts=8,
        top_k=2,
        intermediate=128,
        context=64,
        batch=8,
        steps=60,
        learning_rate=3e-3,
        warmup=10,
        bias_rate=1e-2,
    ),
    "h200": Config(
        hidden=2048,
        layers=4,
        heads=16,
        head_dim=128,
        experts=64,
        top_k=8,
        intermediate=1024,
        context=1024,
        batch=32,
        steps=200,
        learning_rate=6e-4,
        warmup=30,
        bias_rate=1e-2,
    ),
}


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, in float32."""

    def __init__(self, features: int) -> None:
        self.scale = nnx.Param(jnp.ones(features, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)
        return (wide * inverse * self.scale[...]).astype(x.dtype)


def rotate(x: jax.Array, positions: jax.Array, base: float = 10000.0) -> jax.Array:
    """Rotary position embedding of x [batch, length, heads, head_dim] at positions [length]."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    sin, cos = jnp.sin(angles)[:, None], jnp.cos(angles)[:, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


@jax.checkpoint  # scores and probabilities [batch, heads, length, length] are made again in the backward pass
def xla_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array, implementation: str) -> jax.Array:
    if implementation == "xla":
        return xla_attention(q, k, v)
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def parts_of(recipe: str) -> tuple[str, str]:
    """What layers take as recipe= and weight_gradient=, of "bf16", "fp8", or "fp8-128x128"."""
    kind, _, weight_gradient = recipe.partition("-")
    return kind, weight_gradient or "1x128"


class Attention(nnx.Module):
    """Causal attention with rotary positions; projections by Linear, the rest plain JAX."""

    def __init__(self, config: Config, recipe: str, rngs: nnx.Rngs) -> None:
        self.heads, self.head_dim, self.implementation = config.heads, config.head_dim, config.attention
        inner = config.heads * config.head_dim
        kind, weight_gradient = parts_of(recipe)
        options = {"use_bias": False, "recipe": kind, "weight_gradient": weight_gradient}
        self.qkv = Linear(config.hidden, 3 * inner, **options, rngs=rngs)
        self.out = Linear(inner, config.hidden, **options, rngs=rngs)

    def project(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        shape = (*x.shape[:-1], self.heads, self.head_dim)
        q, k, v = (part.reshape(shape) for part in jnp.split(self.qkv(x), 3, axis=-1))
        return rotate(q, positions), rotate(k, positions), v

    def __call__(self, x: jax.Array) -> jax.Array:
        y = causal_attention(*self.project(x, jnp.arange(x.shape[1])), self.implementation)
        return self.out(y.reshape(*x.shape[:-1], -1))

    def step(self, x: jax.Array, cache: Cache, position: jax.Array) -> tuple[jax.Array, Cache]:
        """One token: x [batch, 1, hidden] at `position`; keys and values join the cache."""
        q, *new = self.project(x, position[None])
        at = (0, position, 0, 0)
        k, v = (jax.lax.dynamic_update_slice(old, one, at) for old, one in zip(cache, new, strict=True))
        seen = (jnp.arange(k.shape[1]) <= position)[None, None, None]
        y = jax.nn.dot_product_attention(q, k, v, mask=seen)
        return self.out(y.reshape(*x.shape[:-1], -1)), (k, v)


Cache = tuple[jax.Array, jax.Array]
"""Keys and values, [batch, length, heads, head_dim] bfloat16 each."""


class Block(nnx.Module):
    """Attention and a mixture of experts, each behind a norm, each added to the residual stream."""

    def __init__(self, config: Config, recipe: str, mesh: Mesh | None, rngs: nnx.Rngs) -> None:
        kind, weight_gradient = parts_of(recipe)
        self.attention_norm = RMSNorm(config.hidden)
        self.attention = Attention(config, recipe, rngs)
        self.moe_norm = RMSNorm(config.hidden)
        self.moe = MoE(
            config.hidden,
            config.intermediate,
            config.experts,
            config.top_k,
            shared_intermediate=config.intermediate,
            recipe=kind,
            form=ExpertForm(weight_gradient=weight_gradient),
            score="sigmoid",
            expert_axis=None if mesh is None else "expert",
            mesh=mesh,
            method=config.method,
            capacity_factor=config.capacity_factor,
            rngs=rngs,
        )

    def __call__(self, x: jax.Array) -> tuple[jax.Array, Load]:
        x = x + self.attention(self.attention_norm(x))
        y, load = self.moe(self.moe_norm(x), with_load=True)
        return x + y, load

    def step(self, x: jax.Array, cache: Cache, position: jax.Array) -> tuple[jax.Array, Cache, Load]:
        y, cache = self.attention.step(self.attention_norm(x), cache, position)
        x = x + y
        y, load = self.moe.decode(self.moe_norm(x), with_load=True)
        return x + y, cache, load


class LanguageModel(nnx.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(
        self, config: Config, *, recipe: str = "fp8", mesh: Mesh | None = None, rngs: nnx.Rngs
    ) -> None:
        self.config = config
        # Embeddings as large as what a block adds: else the mean over all tokens, which attention starts
        # with, drowns them, and every token goes to the same experts.
        table, normal = (VOCABULARY, config.hidden), jax.nn.initializers.normal
        self.embedding = nnx.Param(normal(1.0)(rngs.params(), table, jnp.float32))
        self.blocks = nnx.List([Block(config, recipe, mesh, rngs) for _ in range(config.layers)])
        self.norm = RMSNorm(config.hidden)
        self.head = nnx.Param(normal(0.02)(rngs.params(), table, jnp.float32))

    def embed(self, tokens: jax.Array) -> jax.Array:
        return jnp.take(self.embedding[...].astype(jnp.bfloat16), tokens, axis=0)

    def logits(self, x: jax.Array) -> jax.Array:
        weights = self.head[...].astype(jnp.bfloat16)
        return jnp.einsum("...h,vh->...v", self.norm(x), weights, preferred_element_type=jnp.float32)

    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, Load]:
        """tokens [batch, length] int32 -> float32 logits [batch, length, 256], load of each layer."""
        x, loads = self.embed(tokens), []
        for block in self.blocks:
            x, load = block(x)
            loads.append(load)
        return self.logits(x), stacked(loads)

    def step(
        self, token: jax.Array, caches: list[Cache], position: jax.Array
    ) -> tuple[jax.Array, list[Cache], Load]:
        """One token per sequence: [batch] int32 at `position` -> logits [batch, 256], caches, load."""
        x, loads, kept = self.embed(token)[:, None], [], []
        for block, cache in zip(self.blocks, caches, strict=True):
            x, cache, load = block.step(x, cache, position)
            kept.append(cache)
            loads.append(load)
        return self.logits(x)[:, 0], kept, stacked(loads)

    def empty_caches(self, batch: int, length: int) -> list[Cache]:
        shape = (batch, length, self.config.heads, self.config.head_dim)
        return [
            (jnp.zeros(shape, jnp.bfloat16), jnp.zeros(shape, jnp.bfloat16)) for _ in range(len(self.blocks))
        ]

    def move_biases(self, load: Load) -> None:
        """Moves each router's bias towards equal load; the load is that of one step."""
        for block, tokens in zip(self.blocks, load.tokens, strict=True):
            block.moe.move_bias(tokens, self.config.bias_rate)


def stacked(loads: list[Load]) -> Load:
    """One Load, with layers as the first dimension."""
    return jax.tree.map(lambda *layers: jnp.stack(layers), *loads)


def standard_library() -> np.ndarray:
    """The source files of Python's standard library in one array of bytes; the same order everywhere."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(
        path
        for path in root.rglob("*.py")
        if not {"site-packages", "dist-packages", "test", "tests", "idle_test"} & set(path.parts)
    )
    if not files:
        raise FileNotFoundError(
            f"no *.py under {root}: this Python came without its standard library's sources"
        )
    return np.frombuffer(b"\n".join(path.read_bytes() for path in files), np.uint8)


def batches(text: np.ndarray, config: Config, seed: int) -> Iterator[np.ndarray]:
    """Random windows of the text, [batch, context + 1] int32, for ever; equal seeds give equal batches."""
    random = np.random.default_rng(seed)
    window = np.arange(config.context + 1)
    while True:
        starts = random.integers(0, len(text) - config.context - 1, config.batch)
        yield text[starts[:, None] + window].astype(np.int32)


def parameter_count(state: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(state))
