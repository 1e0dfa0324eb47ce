"""Sparse attention in the style of DeepSeek-V3.2, and how its indexer learns what the attention looks at.

    pip install '.[flax]'                         # in the clone, for optax; with a GPU '.[cuda13,flax]'
    python examples/sparse_attention.py           # half a minute on a CPU
    python examples/sparse_attention.py --tokens 4096 --top-k 512 --index-dim 128      # for a GPU

Every token scores all tokens before it with a small indexer, keeps the best `top_k`, and attends to those:

    x --> indexer --> q, k, weights --> mqa_logits --> topk --> indices --> attention over gathered keys

The attention's weights are random and stay as they are, as in the first stage of DeepSeek's training. The
indexer learns from it: its scores, as probabilities of the keys that it chose, are to be those that the
attention gives them. First it chooses all keys (`--warm-up` steps), then `top_k`. The program prints that
divergence, which falls; the share of the keys with most attention that are chosen (recall), which rises; and
PASS if it does.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from typing import Any, TypeAlias

try:
    import optax
except ImportError as error:
    sys.exit(f"{error}. Install it in the clone: pip install '.[flax]' (with a GPU: '.[cuda13,flax]')")

import jax
import jax.numpy as jnp

from jax_deepgemm import topk
from jax_deepgemm.cli.arguments import Parser, from_zero, whole
from jax_deepgemm.indexer import hadamard, indexer_quantize, mqa_logits

Parameters: TypeAlias = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the block.

    Attributes:
      hidden: width of the residual stream.
      heads: of the attention.
      latent: numbers of a key that all heads share, which are its value too (MLA).
      rope: numbers that are turned by the position: behind the latent, and the last ones of an index head.
      index_heads, index_dim: of the indexer.
      tokens: of a sequence.
      top_k: keys that a token attends to.
    """

    hidden: int = 128
    heads: int = 4
    latent: int = 32
    rope: int = 16
    index_heads: int = 8
    index_dim: int = 32
    tokens: int = 128
    top_k: int = 16


# The block -------------------------------------------------------------------------------------------------


def rope(x: jax.Array, numbers: int) -> jax.Array:
    """x [s, .., d], whose last numbers are turned in pairs, further at each token."""
    fixed, a, b = jnp.split(x, [x.shape[-1] - numbers, x.shape[-1] - numbers // 2], axis=-1)
    speed = 1e4 ** -jnp.linspace(0, 1, numbers // 2, endpoint=False)
    angle = jnp.expand_dims(jnp.arange(x.shape[0])[:, None] * speed, range(1, x.ndim - 1))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([fixed, a * cos - b * sin, b * cos + a * sin], axis=-1)


def layer_norm(x: jax.Array, gain: jax.Array, bias: jax.Array) -> jax.Array:
    return jax.nn.standardize(x, epsilon=1e-6) * gain + bias


def indexer(p: Parameters, x: jax.Array, config: Config) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [s, h, d], one key [s, d] of each token, and weights [s, h] of the heads, of x [s, hidden]."""
    heads, size = config.index_heads, config.index_dim
    q = rope((x @ p["q"]).reshape(-1, heads, size), config.rope)
    k = rope(layer_norm(x @ p["k"], p["gain"], p["bias"]), config.rope)
    return q, k, (x @ p["weights"]) * (heads * size) ** -0.5


def causal(tokens: int) -> tuple[jax.Array, jax.Array]:
    """The window of each token: itself and those before it."""
    return jnp.zeros(tokens, jnp.int32), jnp.arange(1, tokens + 1)


def choose(p: Parameters, x: jax.Array, config: Config) -> jax.Array:
    """The keys that each token attends to, [s, top_k], in FP8. -1: there are no more of them."""
    q, k, weights = indexer(p, x, config)
    logits = mqa_logits(indexer_quantize(q), indexer_quantize(k), weights, *causal(len(x)))
    return topk(logits, config.top_k)


def attention_inputs(p: Parameters, x: jax.Array, config: Config) -> tuple[jax.Array, jax.Array]:
    """Queries [s, heads, latent + rope], and keys [s, latent + rope], which begin with the values."""
    size = config.latent + config.rope
    q = rope((x @ p["q"]).reshape(-1, config.heads, size), config.rope)
    return q * size**-0.5, rope(x @ p["kv"], config.rope)


def sparse_attention(
    p: Parameters, x: jax.Array, indices: jax.Array, config: Config
) -> tuple[jax.Array, jax.Array]:
    """The block's result [s, hidden], and what each head gives each of the keys of indices, [s, heads, k]."""
    q, keys = attention_inputs(p, x, config)
    gathered = keys[indices]
    scores = jnp.einsum("shd,skd->shk", q, gathered)
    given = jax.nn.softmax(jnp.where(indices[:, None] >= 0, scores, -jnp.inf))
    found = jnp.einsum("shk,skl->shl", given, gathered[..., : config.latent])
    return found.reshape(len(x), -1) @ p["out"], given


def dense_attention(p: Parameters, x: jax.Array, config: Config) -> tuple[jax.Array, jax.Array]:
    """The same with all keys, [s, heads, n]: what the sparse one replaces."""
    q, keys = attention_inputs(p, x, config)
    scores = jnp.einsum("shd,nd->shn", q, keys)
    given = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((len(x),) * 2, bool))[:, None], scores, -jnp.inf))
    found = jnp.einsum("shn,nl->shl", given, keys[:, : config.latent])
    return found.reshape(len(x), -1) @ p["out"], given


# Training --------------------------------------------------------------------------------------------------


def divergence(p: Parameters, attention: Parameters, x: jax.Array, config: Config) -> jax.Array:
    """Of the indexer's probabilities of the keys that it chose from the attention's: their mean KL."""
    q, k, weights = indexer(p, x, config)
    rotated = [hadamard(one).astype(jnp.bfloat16) for one in (q, k)]
    logits = mqa_logits(*rotated, weights, *causal(len(x)))  # FP8 inside; gradients go straight through
    indices = topk(logits, config.top_k)
    given = sparse_attention(attention, x, indices, config)[1]
    target = jax.lax.stop_gradient(jnp.mean(given, axis=1))
    there = indices >= 0
    scores = jnp.where(there, jnp.take_along_axis(logits, indices, axis=1), -jnp.inf)
    differences = jnp.log(jnp.maximum(target, 1e-9)) - jax.nn.log_softmax(scores)
    return jnp.sum(jnp.where(there, target * differences, 0)) / len(x)


@functools.partial(jax.jit, static_argnames=("config", "optimizer"))
def train_step(
    p: Parameters, state: Any, attention: Parameters, batch: jax.Array, *, config: Config, optimizer: Any
) -> tuple[Parameters, Any, jax.Array]:
    def loss(p: Parameters) -> jax.Array:
        return jnp.mean(jax.vmap(lambda x: divergence(p, attention, x, config))(batch))

    kl, gradients = jax.value_and_grad(loss)(p)
    updates, state = optimizer.update(gradients, state)
    return optax.apply_updates(p, updates), state, kl


@functools.partial(jax.jit, static_argnames="config")
def evaluate(
    p: Parameters, attention: Parameters, batch: jax.Array, *, config: Config
) -> dict[str, jax.Array]:
    """Of sequences that were not trained on, as they would be served.

    Returns:
      recall: of the top_k keys with most attention, the share that is chosen, where there are more than that.
      attention: what the chosen keys have of all attention, there.
      error: of the block's result against dense attention's, relative.
    """

    def of_sequence(x: jax.Array) -> dict[str, jax.Array]:
        indices = choose(p, x, config)
        sparse, _ = sparse_attention(attention, x, indices, config)
        dense, given = dense_attention(attention, x, config)
        given = jnp.mean(given, axis=1)
        chosen = jnp.any(indices[:, :, None] == jnp.arange(len(x)), axis=1)
        best = topk(given, config.top_k, end=causal(len(x))[1])
        some = jnp.arange(len(x)) >= config.top_k
        return {
            "recall": jnp.mean(jnp.take_along_axis(chosen, best, axis=1), where=some[:, None]),
            "attention": jnp.mean(jnp.sum(given, axis=1, where=chosen), where=some),
            "error": jnp.linalg.norm(sparse - dense) / jnp.linalg.norm(dense),
        }

    return jax.tree.map(jnp.mean, jax.vmap(of_sequence)(batch))


# Data and weights ------------------------------------------------------------------------------------------


def draw(key: jax.Array, *shape: int, scale: float = 1.0) -> jax.Array:
    """Of a matrix [m, n]: it keeps the size of what it multiplies."""
    return jax.random.normal(key, shape) * scale * shape[0] ** -0.5


def draw_weights(key: jax.Array, config: Config) -> tuple[Parameters, Parameters]:
    """Of the indexer and of the attention, which looks sharply: at few keys of many."""
    keys = jax.random.split(key, 6)
    c, size = config, config.latent + config.rope
    of_indexer = {
        "q": draw(keys[0], c.hidden, c.index_heads * c.index_dim),
        "k": draw(keys[1], c.hidden, c.index_dim),
        "gain": jnp.ones(c.index_dim),
        "bias": jnp.zeros(c.index_dim),
        "weights": draw(keys[2], c.hidden, c.index_heads),
    }
    of_attention = {
        "q": draw(keys[3], c.hidden, c.heads * size, scale=3.0),
        "kv": draw(keys[4], c.hidden, size),
        "out": draw(keys[5], c.heads * c.latent, c.hidden),
    }
    return of_indexer, of_attention


def draw_batch(key: jax.Array, sequences: int, config: Config) -> jax.Array:
    """[sequences, tokens, hidden]: tokens are of 32 kinds, and no two of them are the same."""
    kinds = jax.random.normal(jax.random.key(0), (32, config.hidden))
    of_tokens, noise = jax.random.split(key)
    kind = jax.random.randint(of_tokens, (sequences, config.tokens), 0, len(kinds))
    return kinds[kind] + 0.5 * jax.random.normal(noise, (*kind.shape, config.hidden))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    number = whole(1, 1 << 20)
    parser.add_argument("--tokens", type=number, default=Config.tokens, help="of a sequence")
    parser.add_argument("--top-k", type=number, default=Config.top_k, help="keys that a token attends to")
    parser.add_argument("--index-heads", type=number, default=Config.index_heads)
    parser.add_argument("--index-dim", type=number, default=Config.index_dim, help="32, 64 or 128")
    parser.add_argument("--batch", type=number, default=4, help="sequences of a step")
    parser.add_argument("--warm-up", type=whole(0, 1 << 20), default=100, help="steps with all keys")
    parser.add_argument("--steps", type=number, default=100, help="steps with top-k keys")
    parser.add_argument("--learning-rate", type=from_zero, default=1e-2)
    parser.add_argument("--seed", type=whole(0, 2**31 - 1), default=0)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    config = Config(
        tokens=args.tokens, top_k=args.top_k, index_heads=args.index_heads, index_dim=args.index_dim
    )
    weights, held_out, *keys = jax.random.split(jax.random.key(args.seed), 2 + args.warm_up + args.steps)
    p, attention = draw_weights(weights, config)
    test = draw_batch(held_out, args.batch, config)
    optimizer = optax.adam(args.learning_rate)
    state = optimizer.init(p)
    seen = [evaluate(p, attention, test, config=config)]
    print(f"untrained: {say(seen[0])}", flush=True)
    for step, key in enumerate(keys, 1):
        warm = step <= args.warm_up
        chosen = dataclasses.replace(config, top_k=config.tokens) if warm else config
        batch = draw_batch(key, args.batch, config)
        p, state, kl = train_step(p, state, attention, batch, config=chosen, optimizer=optimizer)
        if step % 25 == 0 or step in (1, args.warm_up + 1, len(keys)):
            seen.append(evaluate(p, attention, test, config=config))
            over = "all" if warm else f"{config.top_k} chosen"
            print(f"step {step:4}: KL over {over} keys {kl:.3f}; {say(seen[-1])}", flush=True)
    first, last = seen[0], seen[-1]
    learned = bool(last["recall"] > first["recall"] and last["error"] < first["error"])
    print(
        f"{'PASS' if learned else 'FAIL'}: of the {config.top_k} keys with most attention "
        f"{first['recall']:.0%} were chosen before training, {last['recall']:.0%} after it"
    )
    return 0 if learned else 1


def say(found: dict[str, jax.Array]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in found.items())


if __name__ == "__main__":
    sys.exit(main())
