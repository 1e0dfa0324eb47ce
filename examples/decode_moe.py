"""Generates text with the model of train_moe_lm.py, token by token: masked experts, KV cache, FP8 weights.

    pip install '.[flax]'                         # in the clone; with a GPU '.[cuda13,flax]'
    python examples/decode_moe.py                                          # tiny, random weights, a CPU
    python examples/train_moe_lm.py --save && python examples/decode_moe.py --weights out/weights-fp8
    python examples/decode_moe.py --config h200 --batch 64                 # random weights of the full size

The step is compiled once. Which experts a token visits, and how many tokens an expert gets, are data on the
device; the program counts XLA's compilations while routing changes, and prints PASS if there are none.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import time
from pathlib import Path
from typing import Any

try:
    from flax import nnx
except ImportError as error:
    sys.exit(f"{error}. Install it in the clone: pip install '.[flax]' (with a GPU: '.[cuda13,flax]')")

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
from moe_lm import CONFIGS, Config, LanguageModel

from jax_deepgemm.cli.arguments import Parser, from_zero, input_folder, whole
from jax_deepgemm.flax import quantize_module

COMPILATION = "/jax/core/compile/backend_compile_duration"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    number = whole(1, 1 << 20)
    parser.add_argument("--config", choices=CONFIGS, default="tiny")
    parser.add_argument(
        "--weights", type=input_folder, help="folder that train_moe_lm.py --save wrote (default: random)"
    )
    parser.add_argument(
        "--recipe", choices=("fp8", "bf16"), default="fp8", help="fp8: weights are quantised once"
    )
    parser.add_argument("--layers", type=number, help="as in training (default: the configuration's)")
    parser.add_argument("--batch", type=number, default=4, help="sequences at a time")
    parser.add_argument("--tokens", type=number, default=64, help="bytes to generate for each")
    parser.add_argument("--prompt", default="def main(", help="the same for all sequences")
    parser.add_argument("--temperature", type=from_zero, default=0.8, help="0 takes the likeliest byte")
    parser.add_argument(
        "--loop", choices=("step", "scan"), default="step", help="one program per token, or one for all"
    )
    parser.add_argument("--seed", type=whole(0, 2**31 - 1), default=0)
    args = parser.parse_args(arguments)
    if not args.prompt:
        parser.error("argument --prompt: is empty, need at least one byte")
    return args


def load(config: Config, recipe: str, weights: Path | None, seed: int) -> LanguageModel:
    """The model with trained or random weights: bfloat16, or FP8 for the recipe "fp8"."""

    def build() -> LanguageModel:
        return LanguageModel(config, recipe=recipe, rngs=nnx.Rngs(seed))

    graph, abstract = nnx.split(nnx.eval_shape(build))
    if weights is None:
        state = jax.jit(lambda: nnx.state(build()))()
    else:
        import orbax.checkpoint as ocp

        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), abstract
        )
        with ocp.StandardCheckpointer() as checkpointer:
            state = checkpointer.restore(weights.absolute(), target)
    model = nnx.merge(graph, state)
    if recipe == "fp8":
        return quantize_module(model)
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16) if leaf.ndim > 1 else leaf, nnx.state(model))
    return nnx.merge(graph, narrow)


def make_step(graph: Any, temperature: float) -> Any:
    """(state, carry, forced) -> (carry, (token, load)); forced [batch]: the next byte, or -1 to choose."""

    def step(state: Any, carry: Any, forced: jax.Array) -> tuple[Any, Any]:
        token, caches, position, key = carry
        logits, caches, load = nnx.merge(graph, state).step(token, caches, position)
        key, now = jax.random.split(key)
        chosen = jax.random.categorical(now, logits / temperature) if temperature > 0 else logits.argmax(-1)
        token = jnp.where(forced >= 0, forced, chosen.astype(jnp.int32))
        return (token, caches, position + 1, key), (token, load.tokens)

    return step


def generate(
    model: LanguageModel, prompt: np.ndarray, tokens: int, temperature: float, seed: int, loop: str
) -> tuple[np.ndarray, np.ndarray, float]:
    """Continues prompt [batch, p]: bytes [batch, tokens], load [steps, layers, experts], seconds per step.

    The steps of the prompt go through the same program; the first run compiles, the second is timed.
    """
    batch, length = prompt.shape
    steps = length - 1 + tokens
    graph, state = nnx.split(model)
    step = make_step(graph, temperature)
    forced = np.full((steps, batch), -1, np.int32)
    forced[: length - 1] = prompt.T[1:]
    forced = jnp.asarray(forced)

    def begin(key: int) -> Any:
        caches = model.empty_caches(batch, length + tokens)
        return jnp.asarray(prompt[:, 0], jnp.int32), caches, jnp.int32(0), jax.random.key(key)

    @functools.partial(jax.jit, donate_argnums=1)
    def whole(state: Any, carry: Any, forced: jax.Array) -> tuple[Any, Any]:
        return jax.lax.scan(lambda carry, now: step(state, carry, now), carry, forced)

    one = jax.jit(step, donate_argnums=1)

    def run(carry: Any) -> Any:
        if loop == "scan":
            return whole(state, carry, forced)[1]
        made = []
        for now in rows:
            carry, out = one(state, carry, now)
            made.append(out)
        return made

    rows = list(forced)
    jax.block_until_ready(run(begin(seed)))
    carry = jax.block_until_ready(begin(seed + 1))
    with no_compilation():
        start = time.perf_counter()
        made = jax.block_until_ready(run(carry))
        seconds = (time.perf_counter() - start) / steps
    text, load = made if loop == "scan" else (np.stack(parts) for parts in zip(*made, strict=True))
    return np.asarray(text)[length - 1 :].T, np.asarray(load), seconds


class no_compilation:
    """Raises at its end if XLA compiled anything inside."""

    def __enter__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, _: float, **__: Any) -> None:
        self.count += event == COMPILATION

    def __exit__(self, kind: Any, *_: Any) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)
        if kind is None and self.count:
            raise RuntimeError(f"{self.count} compilations while decoding")


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    config = CONFIGS[args.config]
    config = dataclasses.replace(config, layers=args.layers or config.layers)
    model = load(config, args.recipe, args.weights, args.seed)
    prompt = np.tile(np.frombuffer(args.prompt.encode(), np.uint8), (args.batch, 1))
    text, load_per_step, seconds = generate(
        model, prompt, args.tokens, args.temperature, args.seed, args.loop
    )
    print(args.prompt + bytes(text[0].astype(np.uint8)).decode(errors="replace"))
    print(
        f"\n{args.batch / seconds:,.0f} tokens/s, {1e3 * seconds:.2f} ms a step of {args.batch} sequences, "
        f"{args.recipe} on {jax.devices()[0].device_kind}"
    )
    patterns = len({load.tobytes() for load in load_per_step})
    print(
        f"{'PASS' if patterns > 1 else 'FAIL'}: {patterns} different loads of the experts in "
        f"{len(load_per_step)} steps (tokens per expert {load_per_step.min()} to {load_per_step.max()}), "
        "no compilation after the first"
    )
    return 0 if patterns > 1 else 1


if __name__ == "__main__":
    sys.exit(main())
