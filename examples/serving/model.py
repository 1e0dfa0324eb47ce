"""The models that serve.py serves: decoders with FP8 experts, as plain functions over plain trees of arrays.

`forward` is written once and given how to attend, so that serving (a paged cache) and its check (whole
sequences, no cache) differ in that alone.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm import QuantizedArray, fp8_linear
from jax_deepgemm.checkpoint import Weight, hugging_face_names, load_quantized
from jax_deepgemm.moe import DEEPSEEK_V3, SharedExperts, moe_mlp, moe_mlp_decode, route

Tree: TypeAlias = dict[str, Any]
Attend: TypeAlias = Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array]
"""(layer, q [t, heads, head_dim], k and v [t, kv_heads, ..]) -> [t, heads, v_head_dim]"""
E4M3, SPREAD = jnp.float8_e4m3fn, 64
"""Random FP8 weights are normal numbers times SPREAD, so that few of them are below what e4m3 resolves."""


@dataclass(frozen=True)
class Config:
    """Sizes of a model.

    Attributes:
      rotary: numbers at the front of a head that its position turns.
      inner: of an expert, of which each token passes top_k.
      shared: inner size of the expert that every token passes; 0 for none.
      qk_norm: whether heads of queries and keys are normed, as Qwen3's are.
      router: further arguments of `moe.route`, as items.
      eos: the token that ends a text.
    """

    vocabulary: int = 256
    hidden: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    v_head_dim: int = 32
    rotary: int = 32
    theta: float = 1e4
    qk_norm: bool = True
    experts: int = 8
    top_k: int = 2
    inner: int = 128
    shared: int = 0
    router: tuple[tuple[str, Any], ...] = field(default=(("renormalize", True),))
    epsilon: float = 1e-6
    eos: int = 0

    @property
    def inv_freq(self) -> np.ndarray:
        return np.float32(self.theta) ** -np.linspace(
            0, 1, self.rotary // 2, endpoint=False, dtype=np.float32
        )

    @staticmethod
    def of_checkpoint(config: Mapping[str, Any]) -> Config:
        """Of a config.json of Qwen3-MoE."""
        size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        eos = config.get("eos_token_id", -1)
        return Config(
            vocabulary=config["vocab_size"],
            hidden=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            kv_heads=config["num_key_value_heads"],
            head_dim=size,
            v_head_dim=size,
            rotary=size,
            theta=config["rope_theta"],
            experts=config["num_experts"],
            top_k=config["num_experts_per_tok"],
            inner=config["moe_intermediate_size"],
            router=(("renormalize", config["norm_topk_prob"]),),
            epsilon=config["rms_norm_eps"],
            eos=eos[0] if isinstance(eos, list) else eos,
        )


QWEN3_MOE = Config(
    vocabulary=151936,
    hidden=2048,
    layers=4,
    heads=32,
    kv_heads=4,
    head_dim=128,
    v_head_dim=128,
    rotary=128,
    theta=1e6,
    experts=128,
    top_k=8,
    inner=768,
)
"""Layers of Qwen3-30B-A3B, which has 48."""
DEEPSEEK = Config(
    vocabulary=129280,
    hidden=7168,
    layers=2,
    heads=128,
    kv_heads=8,
    head_dim=192,
    v_head_dim=128,
    rotary=64,
    qk_norm=False,
    experts=256,
    top_k=8,
    inner=2048,
    shared=2048,
    router=tuple(DEEPSEEK_V3.items()),
)
"""Experts, router and head sizes of DeepSeek-V3, which has 58 such layers. Heads that share keys and values
are in the place of its latent attention."""
CONFIGS = {
    "tiny": Config(),
    "tiny-deepseek": Config(
        kv_heads=1,
        head_dim=48,
        v_head_dim=32,
        rotary=16,
        qk_norm=False,
        shared=128,
        router=tuple((DEEPSEEK_V3 | {"num_groups": 4, "top_groups": 2}).items()),
    ),
    "qwen3-moe": QWEN3_MOE,
    "deepseek": DEEPSEEK,
}


# Weights ---------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="shape")
def draw_fp8(key: jax.Array, shape: tuple[int, ...]) -> QuantizedArray:
    """[.., n, k] that keeps the size of what it multiplies; made matrix by matrix, so in little memory."""
    *lead, n, k = shape

    def one(key: jax.Array) -> jax.Array:
        return (jax.random.normal(key, (n, k), jnp.bfloat16) * SPREAD).astype(E4M3)

    values = jax.lax.map(one, jax.random.split(key, lead[0])) if lead else one(key)
    scales = jnp.full((*lead, -(-n // 128), -(-k // 128)), k**-0.5 / SPREAD, jnp.float32)
    return QuantizedArray(values, scales, (128, 128))


def draw_weights(config: Config, seed: int) -> Tree:
    """Random weights in the form that `load_weights` gives."""
    keys = (jax.random.key(seed + i) for i in range(1 << 30))
    c = config

    def plain(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape, jnp.bfloat16) * jnp.bfloat16(shape[-1] ** -0.5)

    def layer() -> Tree:
        rows = c.heads * c.head_dim + c.kv_heads * (c.head_dim + c.v_head_dim)
        attention = {
            "qkv": draw_fp8(next(keys), (rows, c.hidden)),
            "o": draw_fp8(next(keys), (c.hidden, c.heads * c.v_head_dim)),
        }
        if c.qk_norm:  # above 1: heads look at few keys, as those of trained models do
            attention |= {name: jnp.full(c.head_dim, 1.5, jnp.bfloat16) for name in ("q_norm", "k_norm")}
        mlp = {
            "router": plain(c.experts, c.hidden),
            "w13": draw_fp8(next(keys), (c.experts, 2 * c.inner, c.hidden)),
            "w2": draw_fp8(next(keys), (c.experts, c.hidden, c.inner)),
        }
        if c.shared:
            mlp["router_bias"] = 0.1 * jax.random.normal(next(keys), (c.experts,))
            mlp["shared"] = {
                "w13": draw_fp8(next(keys), (2 * c.shared, c.hidden)),
                "w2": draw_fp8(next(keys), (c.hidden, c.shared)),
            }
        ones = jnp.ones(c.hidden, jnp.bfloat16)
        return {"attention_norm": ones, "attention": attention, "mlp_norm": ones, "mlp": mlp}

    return {
        "embed": jax.random.normal(next(keys), (c.vocabulary, c.hidden), jnp.bfloat16),
        "layers": [layer() for _ in range(c.layers)],
        "norm": jnp.ones(c.hidden, jnp.bfloat16),
        "head": plain(c.vocabulary, c.hidden),
    }


def load_weights(folder: Path, layers: Iterable[int] | None = None) -> tuple[Config, Tree]:
    """Of a Qwen3-MoE checkpoint, in FP8 as Qwen3-30B-A3B-FP8 is."""
    content = json.loads((folder / "config.json").read_text())
    if content.get("model_type") != "qwen3_moe":
        raise ValueError(f"{folder}: model_type is {content.get('model_type')!r}, need 'qwen3_moe'.")
    names = hugging_face_names(content, layers)
    for layer in names["layers"]:
        attention = layer["attention"]
        attention["qkv"] = Weight(*(attention.pop(name) for name in "qkv"))
    params = load_quantized(folder, names)
    return Config.of_checkpoint(content | {"num_hidden_layers": len(names["layers"])}), params


def weight_bytes(config: Config, params: Tree, tokens: int) -> float:
    """Bytes of weights that a step of so many tokens reads: of experts those that balanced routing takes."""

    def size(tree: Any) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    chosen = 1 - (1 - config.top_k / config.experts) ** tokens
    experts = size([(layer["mlp"]["w13"], layer["mlp"]["w2"]) for layer in params["layers"]])
    rest = size(params) - experts - (size(params["embed"]) if "head" in params else 0)
    return rest + chosen * experts


# The forward pass ------------------------------------------------------------------------------------------


def rms_norm(x: jax.Array, gain: jax.Array, epsilon: float) -> jax.Array:
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return (wide * scale * gain.astype(jnp.float32)).astype(x.dtype)


def linear(x: jax.Array, w: Any) -> jax.Array:
    return fp8_linear(x, w) if isinstance(w, QuantizedArray) else x @ w.T


def mlp(w: Tree, x: jax.Array, valid: jax.Array, config: Config, few: bool) -> jax.Array:
    """The layer's experts; rows that are not valid go to none of them."""
    logits = jnp.matmul(x, w["router"].T, preferred_element_type=jnp.float32)
    ids, weights = route(logits, config.top_k, bias=w.get("router_bias"), **dict(config.router))
    shared = SharedExperts(**w["shared"]) if "shared" in w else None
    experts = moe_mlp_decode if few else moe_mlp
    return experts(x, jnp.where(valid[:, None], ids, -1), weights, w["w13"], w["w2"], shared=shared)


def forward(
    params: Tree, tokens: jax.Array, valid: jax.Array, attend: Attend, config: Config, few: bool = False
) -> jax.Array:
    """Tokens [t] through all layers: [t, hidden], normed for the head.

    Args:
      valid: bool [t], which rows are tokens.
      attend: turns queries and keys by their positions, and attends.
      few: whether experts run in the form for few tokens.
    """
    c = config
    x = params["embed"][tokens]
    for number, layer in enumerate(params["layers"]):
        w = layer["attention"]
        qkv = linear(rms_norm(x, layer["attention_norm"], c.epsilon), w["qkv"])
        cuts = np.cumsum([c.heads * c.head_dim, c.kv_heads * c.head_dim])
        sizes = c.head_dim, c.head_dim, c.v_head_dim
        parts = jnp.split(qkv, cuts, axis=-1)
        q, k, v = (part.reshape(len(x), -1, size) for part, size in zip(parts, sizes, strict=True))
        if c.qk_norm:
            q, k = rms_norm(q, w["q_norm"], c.epsilon), rms_norm(k, w["k_norm"], c.epsilon)
        x += linear(attend(number, q, k, v).reshape(len(x), -1), w["o"])
        x += mlp(layer["mlp"], rms_norm(x, layer["mlp_norm"], c.epsilon), valid, c, few)
    return rms_norm(x, params["norm"], c.epsilon)


def logits_of(params: Tree, x: jax.Array) -> jax.Array:
    """float32 [t, vocabulary]."""
    head = params.get("head", params["embed"])
    return jnp.matmul(x, head.T, preferred_element_type=jnp.float32)
