"""Rows of the benchmark: a layer of experts, from the router's logits to the combined tokens, and back.

DeepSeek-V3's sizes, with as many experts as one of eight devices holds: 4096 tokens go to 8 of 32 experts
each, 32768 rows in all, as such a device gets from all eight. "1 of 8 held": the tokens of one device alone
go to 8 of 256 experts, of which it holds 32; copies for the others are dropped. The other sizes are those of
Qwen3-30B-A3B. What is beside the GEMMs (routing, moving rows, quantising, SwiGLU) is told apart from them by
the names of the kernels. Which experts a token goes to follows from random logits, so loads are not even.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_deepgemm.core.bench import CLOCK, Fields, Row, Table
from jax_deepgemm.moe import bench_shared, bench_step
from jax_deepgemm.moe.form import ExpertForm
from jax_deepgemm.moe.layer import moe_mlp
from jax_deepgemm.moe.route import route
from jax_deepgemm.ops.gemm.bench import GEMM_PREFIX
from jax_deepgemm.ops.quantize.api import quantize
from jax_deepgemm.ops.quantize.prepared import prepare_weight

FORWARD, FROZEN, TRAINING = "forward", "forward, FP8 weights", "forward and backward"
WIDE = f"{TRAINING}, float32 masters"
PREPARED = ", weights prepared"
SQUARE = ", dw 128x128"
FP8_WEIGHTS = "FP8 weights"
HELD = "forward, FP8 weights, 1 of 8 held"
EXPERTS, EXPERTS_BF16 = "experts alone, FP8 weights", "experts alone"
DEVICES = 8  # that share the experts of "held"
READ_RATE = 4.5e12  # bytes a second that kernels which only read reach on an H200
GEMM_RATE = {"fp8": 1480e12, "bf16": 800e12}  # operations a second of the fastest products there
KINDS = (
    ("^jdg_sm90_(masked_)?k_grouped", 0, "K-grouped GEMM"),
    (f"^{GEMM_PREFIX}", 0, "GEMM"),
    ("^jdg_.*swiglu", 0, "activation"),
    ("^jdg_(take|sum)_rows", 0, "move rows"),
    ("^jdg_(dispatch|route)", 0, "dispatch"),
    ("^jdg_", 0, "quantise"),
    ("[sS]ort", 0, "dispatch"),
    ("fusion", 20, "move rows"),
    ("fusion|softmax|reduce|transpose|scan", 0, "dispatch"),
)
"""What a layer's kernels do, for its picture. The names of XLA's say little: in FP8, those that take long
gather or sum rows, and the short ones route and plan."""


@dataclass(frozen=True)
class Layer:
    """What a row runs.

    Attributes:
      recipe: "fp8" or "bf16".
      what: "forward" and "forward and backward" have bfloat16 master weights, or float32 ones if they say so,
        which FP8 quantises each time, or which come with FP8 copies ("weights prepared"); "FP8 weights" were
        quantised before. "experts alone": the choice of experts is given, the router's part is not counted.
        "dw 128x128": weight gradients with such scales of one operand.
      experts: that tokens are routed to; all are held, but for "1 of 8 held".
    """

    recipe: str
    what: str
    tokens: int = 4096
    hidden: int = 7168
    inner: int = 2048
    experts: int = 32
    top_k: int = 8

    @property
    def held(self) -> int:
        """Experts whose weights are here."""
        return self.experts // DEVICES if self.what == HELD else self.experts

    @property
    def trains(self) -> bool:
        """Whether it has a backward pass."""
        return self.what.startswith(TRAINING)

    @property
    def chosen(self) -> bool:
        """Whether the choice of experts is given."""
        return self.what.startswith(EXPERTS_BF16)

    @property
    def pictured(self) -> bool:
        """Whether documents show when its kernels run."""
        large = self.chosen and self.tokens >= 4096
        return self.recipe == "fp8" and (large or self.what in (TRAINING, f"{TRAINING}{PREPARED}"))

    @property
    def weight_dtype(self) -> str:
        """Of the weights that it is given."""
        fp8 = FP8_WEIGHTS in self.what
        return "float8_e4m3fn" if fp8 else "float32" if self.what.startswith(WIDE) else "bfloat16"

    @property
    def prepared(self) -> bool:
        """Whether its master weights come with FP8 copies."""
        return PREPARED in self.what

    @property
    def form(self) -> ExpertForm:
        """How its experts are built."""
        return ExpertForm(weight_gradient="128x128" if self.what.endswith(SQUARE) else "1x128")

    @property
    def flops(self) -> int:
        """Of the GEMMs: three matrices, and in the backward pass twice as much again."""
        copies = self.tokens * self.top_k * self.held // self.experts  # on average
        return 6 * copies * self.hidden * self.inner * (3 if self.trains else 1)

    @property
    def bytes(self) -> int:
        """Of the weights, the tokens and the results, each once (and their gradients)."""
        weights = 3 * self.held * self.hidden * self.inner
        stored = weights * jnp.dtype(self.weight_dtype).itemsize + 4 * self.tokens * self.hidden
        return stored * (2 if self.trains else 1)

    @property
    def floor_us(self) -> float:
        """What the GEMMs of a forward pass cannot beat: the weights of as many experts as there can be tokens
        for read once, or all products at the best rate."""
        met = min(self.held, self.tokens * self.top_k)
        read = 3 * met * self.hidden * self.inner * jnp.dtype(self.weight_dtype).itemsize
        return round(max(read / READ_RATE, self.flops / GEMM_RATE[self.recipe]) * 1e6, 1)

    @property
    def row(self) -> Row:
        """What the benchmark measures."""
        sizes = f"tokens={self.tokens} hidden={self.hidden} inner={self.inner} experts={self.experts}"
        floor = {"floor_us": self.floor_us} if self.chosen else {}
        return Row(
            name=f"moe {self.recipe} {self.what}: {sizes} top_k={self.top_k}",
            fields=dataclasses.asdict(self) | floor,
            function=_function(self),
            draw=_drawing(replace(self, recipe="", what=""), self.held, self.weight_dtype, self.prepared),
            operands=functools.partial(_operands, self),
            flops=self.flops,
            bytes=self.bytes,
            prefix="",
            gemms=GEMM_PREFIX,
            timeline=self.pictured,
        )


DEEPSEEK: dict[str, int] = {}
QWEN = {"tokens": 16384, "hidden": 2048, "inner": 768, "experts": 128}
SMALL = {"tokens": 16, "hidden": 256, "inner": 128, "experts": 4, "top_k": 2}
INFERENCE = (
    (1, 7168, 2048, 256),
    (16, 7168, 2048, 32),
    (128, 7168, 2048, 32),
    (64, 2048, 768, 128),
    (1024, 7168, 2048, 32),
    (4096, 7168, 2048, 32),
    (8192, 2048, 768, 128),
    (16384, 4096, 1536, 128),
)
"""Tokens, hidden, inner, experts, of which each token goes to eight."""


def _rows(small: bool) -> Iterator[Row]:
    first, *others = (SMALL,) if small else (DEEPSEEK, QWEN)
    for recipe, what in (("fp8", FROZEN), ("fp8", FORWARD), ("bf16", FORWARD)):
        yield Layer(recipe, what, **first).row
    yield Layer("fp8", HELD, **first | {"experts": 16 if small else 256}).row
    for sizes in (first, *others):
        for what in (TRAINING, WIDE):
            for recipe in ("fp8", "bf16"):
                yield Layer(recipe, what, **sizes).row
        yield Layer("fp8", f"{TRAINING}{PREPARED}", **sizes).row
        yield Layer("fp8", f"{TRAINING}{PREPARED}{SQUARE}", **sizes).row
    yield Layer("fp8", f"{WIDE}{PREPARED}", **first).row


def _inference(small: bool) -> Iterator[Row]:
    for recipe, what in (("fp8", EXPERTS), ("bf16", EXPERTS_BF16)):
        if small:
            yield Layer(recipe, what, **SMALL).row
            continue
        for tokens, hidden, inner, experts in INFERENCE:
            yield Layer(recipe, what, tokens, hidden, inner, experts).row


@functools.cache
def _drawing(sizes: Layer, held: int, dtype: str, prepared: bool) -> Callable[[], Any]:
    """One for all rows of equal operands, which are measured together."""
    return functools.partial(_draw, sizes, held, dtype, prepared)


@functools.partial(jax.jit, static_argnums=range(4))
def _draw(sizes: Layer, held: int, dtype: str, prepared: bool) -> tuple[Any, ...]:
    """Tokens, logits of the router, both weights, and the gradient of the result."""
    keys = jax.random.split(jax.random.key(0), 5)
    x, dy = (jax.random.normal(key, (sizes.tokens, sizes.hidden), jnp.bfloat16) for key in keys[:2])
    logits = jax.random.normal(keys[2], (sizes.tokens, sizes.experts))

    def weight(key: jax.Array, n: int, k: int) -> Any:
        def one(key: jax.Array) -> Any:  # an expert at a time: random bits take eight times as much memory
            w = k**-0.5 * jax.random.normal(key, (n, k))
            if dtype == "float8_e4m3fn":
                return quantize(w, (128, 128))
            return prepare_weight(w.astype(dtype)) if prepared else w.astype(dtype)

        return lax.map(one, jax.random.split(key, held))

    w13 = weight(keys[3], 2 * sizes.inner, sizes.hidden)
    return x, logits, w13, weight(keys[4], sizes.hidden, sizes.inner), dy


def _operands(layer: Layer, drawn: tuple[Any, ...]) -> tuple[Any, ...]:
    """Those of a row's function."""
    x, logits, w13, w2, dy = drawn
    if layer.chosen:
        return x, *jax.jit(route, static_argnums=1)(logits, layer.top_k), w13, w2
    return (x, logits, w13, w2, dy) if layer.trains else (x, logits, w13, w2)


def _function(layer: Layer) -> Callable[..., Any]:
    """What is measured, of its operands."""
    expected = max(layer.tokens * layer.top_k // layer.experts, 1)
    mlp = functools.partial(moe_mlp, recipe=layer.recipe, expected_m=expected, form=layer.form)

    def forward(x: Any, logits: Any, w13: Any, w2: Any) -> jax.Array:
        return mlp(x, *route(logits, layer.top_k), w13, w2)

    def training(*arguments: Any) -> Any:
        y, vjp = jax.vjp(forward, *arguments[:-1])
        return y, vjp(arguments[-1])

    def of_prepared(x: Any, logits: Any, w13: Any, w2: Any, dy: Any) -> Any:
        def of_masters(x: Any, logits: Any, *masters: Any) -> jax.Array:
            both = (w.with_master(master) for w, master in zip((w13, w2), masters, strict=True))
            return forward(x, logits, *both)

        y, vjp = jax.vjp(of_masters, x, logits, w13.master, w2.master)
        return y, vjp(dy)

    if layer.prepared:
        return of_prepared
    return mlp if layer.chosen else training if layer.trains else forward


KEYS = ("tokens", "hidden", "inner", "experts", "top_k")


def _in_bf16(fields: Fields) -> Fields | None:
    """The same with bfloat16 weights, or masters of the same type, where it is measured."""
    if fields["recipe"] == "bf16":
        return None
    what = fields["what"].removesuffix(SQUARE).removesuffix(PREPARED).removesuffix(f", {FP8_WEIGHTS}")
    return {"recipe": "bf16", "what": what}


TABLES = {
    "moe": Table(
        "A layer of experts, from the router's logits to the combined tokens, all kernels: their sum (us),"
        " the time from the first start to the last end (span), and temporary memory",
        ("recipe", "what", *KEYS),
        _rows,
        columns=("us", "span us", "TFLOP/s", "GEMMs us", "rest us", "rest", "launches", "temp GB", CLOCK),
        part=lambda fields: "",
        order=2,
        in_bf16=_in_bf16,
        kinds=KINDS,
    ),
    "moe_inference": Table(
        "Inference: a layer of experts, the choice of experts given; weights in FP8 or bfloat16. With one"
        " token kernels in FP8 overlap, so that their sum (us) says less than the span",
        ("recipe", *KEYS),
        _inference,
        columns=("us", "span us", "GEMMs us", "floor us", "span / GEMMs", "launches", CLOCK),
        part=lambda fields: "",
        order=2,
        in_bf16=_in_bf16,
        kinds=KINDS,
    ),
    "moe_step": bench_step.TABLE,
    "moe_shared": bench_shared.TABLE,
}
